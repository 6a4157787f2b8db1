"""Normalization with the statistics of a window (Eq. 12 and 4) and its backward pass, on BatchNorm's own kernels."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compensation.patches import weighted_patches
from ..old_torch import IS_BEFORE_2_6, is_autocast_enabled, outside_graphs
from ..window.calls import Call
from . import compilation

_backward = torch.ops.aten.native_batch_norm_backward


class WindowNorm(torch.autograd.Function):
    """y = gamma (x - M) / sqrt(V + eps) + beta, where M and V depend on the current iteration in part.

    With r = 1 / sqrt(V + eps), xhat = (x - M) r, and sums over the batch, the gradients of the loss in M and V are::

        gM = - gamma r sum(dy)
        gV = - gamma r^2 sum(dy xhat) / 2

    :class:`StatisticsGradient` says how M and V depend on x and theta. For a fraction f this gives::

        dx     = gamma r (dy - f (mean(dy) + xhat mean(dy xhat)))
        dtheta = gM dM/dtheta + gV dV/dtheta

    dx is the sum of two of BatchNorm's backward passes: the one of training with gamma f, and the one of evaluation
    with gamma (1 - f). With the projection of the batch, of mean mu and deviation sigma, it is BatchNorm's backward
    pass of training with gamma r sigma::

        xb = (x - mu) / sigma
        dx = gamma r (dy - mean(dy) - xb mean(dy xb))

    The bias b of the convolution is a part of x and of all of M, so it cancels. Therefore the gradient that dx sends to
    b is taken back here.

    Double backward is not supported.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        conv_weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        call: Call | int,
        *gradient: Tensor | None,
    ) -> Tensor:
        """Normalize.

        Args:
            ctx: Autograd context.
            x: Output of the convolution, [N, C, H, W].
            weight: gamma, [C], or None for 1.
            bias: beta, [C], or None for 0.
            conv_bias: Bias of the convolution, [C], or None. It is already in ``x`` and ``mean``: only its gradient is
                made here.
            conv_weight: theta, or None. Only a part of its gradient is made here.
            mean: M, [C], in the precision of the statistics.
            var: V, [C].
            eps: Added to V.
            call: Learns of the backward pass. Under ``torch.compile`` it is the number of the layer.
            *gradient: The members of :class:`StatisticsGradient`.
        """
        gamma, beta = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        ctx.save_for_backward(x, gamma, mean, var, *gradient)
        ctx.eps, ctx.call = eps, call
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)

    @staticmethod
    @outside_graphs
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not dy.requires_grad:
            # torch's error for a double backward depends on this, but x and the weights make the result differentiable.
            dy = dy.detach().requires_grad_()
        return WindowNorm._once(ctx, dy)

    @staticmethod
    @once_differentiable
    def _once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Under torch.compile it may be on as in the forward.
        device = dy.device.type
        with torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext():
            return WindowNorm._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, var, *members = ctx.saved_tensors
        fraction, var_slope, patches, factors, batch_mean, batch_var = members
        if isinstance(ctx.call, int):
            var = compilation.note_backward(var, dy, ctx.call)
        else:
            ctx.call.note_backward()
        need_x, need_weight, need_bias, need_conv_bias, need_conv_weight = ctx.needs_input_grad[:5]
        dtype = x.dtype
        if IS_BEFORE_2_6 and x.is_cpu:  # torch 2.1 has no kernel for a bfloat16 x with a float32 gamma on the CPU
            x, dy = x.to(mean.dtype), dy.to(mean.dtype)
        invstd = (var + ctx.eps).rsqrt()
        gamma = torch.ones_like(var) if gamma is None else gamma
        scale_of_dy = gamma * invstd
        if batch_var is None:
            own = gamma if fraction is None else gamma * fraction
            center, scale = mean, invstd
        else:
            center, scale = batch_mean, (batch_var + ctx.eps).rsqrt()
            own = gamma * (invstd / scale)
        # Autograd casts the gradients of gamma, beta, b and theta to their own precision.
        dx, dweight, dbias = _backward(dy, x, own, None, None, center, scale, True, ctx.eps, [need_x, True, True])
        if batch_var is not None:  # (x - M) r = (xb / sigma^-1 + mu - M) r
            dweight = invstd * (dweight / scale + (batch_mean - mean) * dbias)
        if need_x and fraction is not None:
            dx.addcmul_(dy, torch.addcmul(scale_of_dy, own, invstd, value=-1).view(-1, 1, 1))
        # x depends on b, so dx is there where the gradient of b is asked for.
        dconv_bias = -dx.sum(dim=(0, 2, 3), dtype=mean.dtype) if need_conv_bias else None
        if need_x:
            dx = dx.to(dtype)
        dconv_weight = None
        if need_conv_weight and var_slope is not None:
            minus = -scale_of_dy
            of_mean, of_var = minus * dbias, minus * invstd * dweight  # gM and 2 gV
            of_patches = torch.addcmul(factors[0] * of_mean, factors[1], of_var)
            dconv_weight = weighted_patches(of_patches, patches, var_slope.shape)
            dconv_weight.addcmul_(var_slope, of_var.view(-1, 1, 1, 1), value=0.5)
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dconv_bias,
            dconv_weight,
            *[None] * (4 + len(members)),  # mean, var, eps and call
        )
