"""Normalization with the statistics of a window (Eq. 12 and 4) and its backward pass, on BatchNorm's own kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..old_torch import IS_BEFORE_2_6, outside_graphs
from ..window.calls import Call
from . import compilation

_backward = torch.ops.aten.native_batch_norm_backward


class WindowNorm(torch.autograd.Function):
    """y = gamma (x - M) / sqrt(V + eps) + beta, where only a part of M and V depends on the current batch.

    The current iteration is a fraction f of M and V, and this fraction is a function of x. The rest is constant to
    autograd: "those of the previous iterations are fixed and do not receive gradients" (section 3.3). With
    r = 1 / sqrt(V + eps) and xhat = (x - M) r this gives::

        dx = gamma r (dy - f (mean(dy) + xhat mean(dy xhat)))

    This is the sum of two of BatchNorm's backward passes: the one of training with gamma f, and the one of evaluation
    with gamma (1 - f). The bias b of the convolution is a part of x and of all of M, so it cancels. Therefore the
    gradient that dx sends to b is taken back here.

    Double backward is not supported.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        fraction: Tensor,
        eps: float,
        call: Call | int,
    ) -> Tensor:
        """Normalize.

        Args:
            ctx: Autograd context.
            x: Output of the convolution, [N, C, H, W].
            weight: gamma, [C], or None for 1.
            bias: beta, [C], or None for 0.
            conv_bias: Bias of the convolution, [C], or None. It is already in ``x`` and ``mean``: only its gradient is
                made here.
            mean: M, [C]. It has the precision of the statistics, as ``var`` and ``fraction`` have.
            var: V, [C].
            fraction: f, [C].
            eps: Added to V.
            call: Learns of the backward pass. Under ``torch.compile`` it is the number of the layer.
        """
        gamma, beta = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        ctx.save_for_backward(x, gamma, mean, var, fraction)
        ctx.eps, ctx.call = eps, call
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)

    @staticmethod
    @outside_graphs
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, var, fraction = ctx.saved_tensors
        if isinstance(ctx.call, int):
            fraction = compilation.note_backward(fraction, dy, ctx.call)
        else:
            ctx.call.note_backward()
        need_x, need_weight, need_bias, need_conv_bias = ctx.needs_input_grad[:4]
        dtype = x.dtype
        if IS_BEFORE_2_6 and x.is_cpu:  # torch 2.1 has no kernel for a bfloat16 x with a float32 gamma on the CPU
            x, dy = x.to(mean.dtype), dy.to(mean.dtype)
        if gamma is None:
            gamma = torch.ones_like(fraction)
        invstd = (var + ctx.eps).rsqrt()
        own = gamma * fraction
        # Autograd casts the gradients of gamma, beta and b to their own precision.
        dx, dweight, dbias = _backward(dy, x, own, None, None, mean, invstd, True, ctx.eps, [need_x, True, True])
        if need_x:
            dx.addcmul_(dy, ((gamma - own) * invstd).view(-1, 1, 1))
        # x depends on b, so dx is there where the gradient of b is asked for.
        dconv_bias = -dx.sum(dim=(0, 2, 3), dtype=mean.dtype) if need_conv_bias else None
        if need_x:
            dx = dx.to(dtype)
        return dx, dweight if need_weight else None, dbias if need_bias else None, dconv_bias, *[None] * 5
