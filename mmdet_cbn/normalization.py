"""Normalization with the statistics of a window (Eq. 12 and 4) and its backward pass, on BatchNorm's own kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import compiled
from .calls import Call
from .old_torch import IS_BEFORE_2_6, outside_graphs

_backward = torch.ops.aten.native_batch_norm_backward


class WindowNorm(torch.autograd.Function):
    """y = gamma (x - M) / sqrt(V + eps) + beta, where M and V belong to the current batch only in part.

    Of M and V, the current iteration's share s is a function of x; the rest is constant to autograd ("those of the
    previous iterations are fixed and do not receive gradients", section 3.3). With r = 1 / sqrt(V + eps) and
    xhat = (x - M) r this gives::

        dx = gamma r (dy - s (mean(dy) + xhat mean(dy xhat)))

    which is BatchNorm's backward in training with gamma s, plus its backward in evaluation with gamma (1 - s). The bias
    b of the convolution stands in x and in all of M, so it cancels: what dx sends to it is taken back here.

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
        share: Tensor,
        eps: float,
        call: Call | int,
    ) -> Tensor:
        """Normalize.

        Args:
            ctx: Autograd context.
            x: Output of the convolution, [N, C, H, W].
            weight: gamma, [C], or None for 1.
            bias: beta, [C], or None for 0.
            conv_bias: Bias of the convolution, [C], or None. Only its gradient is made here: it is already in ``x`` and
                ``mean``.
            mean: M, [C]; together with ``var`` and ``share`` in the precision of the statistics.
            var: V, [C].
            share: s, [C].
            eps: Added to V.
            call: Learns when the backward pass goes through; under ``torch.compile`` the number of the layer.
        """
        gamma, beta = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        ctx.save_for_backward(x, gamma, mean, var, share)
        ctx.eps, ctx.call = eps, call
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)

    @staticmethod
    @outside_graphs
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, var, share = ctx.saved_tensors
        if isinstance(ctx.call, int):
            share = compiled.go_back(share, dy, ctx.call)
        else:
            ctx.call.go_back()
        need_x, need_weight, need_bias, need_conv_bias = ctx.needs_input_grad[:4]
        dtype = x.dtype
        if IS_BEFORE_2_6 and x.is_cpu:  # torch 2.1 has no kernel for a bfloat16 x with a float32 gamma on the CPU
            x, dy = x.to(mean.dtype), dy.to(mean.dtype)
        if gamma is None:
            gamma = torch.ones_like(share)
        invstd = (var + ctx.eps).rsqrt()
        own = gamma * share
        # Autograd casts the gradients of gamma, beta and b to their own precision.
        dx, dweight, dbias = _backward(dy, x, own, None, None, mean, invstd, True, ctx.eps, [need_x, True, True])
        if need_x:
            dx.addcmul_(dy, ((gamma - own) * invstd).view(-1, 1, 1))
        # x depends on b, so dx is there where the gradient of b is asked for.
        dconv_bias = -dx.sum(dim=(0, 2, 3), dtype=mean.dtype) if need_conv_bias else None
        if need_x:
            dx = dx.to(dtype)
        return dx, dweight if need_weight else None, dbias if need_bias else None, dconv_bias, *[None] * 5


def runs_again() -> bool:
    """Whether a checkpointed block runs for a second time, inside the backward pass: that is still the same step."""
    return torch._C._current_graph_task_id() != -1
