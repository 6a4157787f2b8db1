"""Batch Renormalization, the row BRN of the paper's Table 5.

S. Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017.
"""

from numbers import Real
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_int, shown
from ..errors import refuse_data_parallel
from ..old_torch import is_compiling, outside_graphs_in_training
from ..window.calls import Call, Iteration, is_recomputing
from .conversion import as_leaf
from .statistics import batch_statistics


@MODELS.register_module()
class BRN(nn.BatchNorm2d):
    """Batch normalization, corrected in training by how far the batch is from the running statistics.

    mu_B and sigma_B are mean and deviation of the batch, mu and sigma the running ones (Algorithm 1 of Ioffe's paper)::

        r = sigma_B / sigma, clipped to [1 / r_max, r_max]
        d = (mu_B - mu) / sigma, clipped to [-d_max, d_max]
        y = gamma ((x - mu_B) / sigma_B r + d) + beta

    No gradient goes through r and d. The limits start at r_max = 1 and d_max = 0, which is BatchNorm, and grow
    linearly. ``num_batches_tracked`` counts the steps, so a resumed run goes on where it was. A counter from a
    checkpoint of BatchNorm counts in the same way. A step is a training forward of the layer: in a head that levels of
    an FPN share, there are several in an iteration.

    A channel with inf or NaN in a batch keeps its running statistics. For activation checkpointing, the layer keeps r
    and d of each call in an iteration.

    Evaluation, parameters and checkpoints are as in ``nn.BatchNorm2d``. As in Ioffe's paper, the running average is
    taken of the biased deviation, not of the variance: ``running_var`` holds sigma^2 - eps.

    Args:
        num_features: C of an input of [N, C, H, W].
        eps: Added to the variance.
        momentum: Weight of the current batch in the running statistics; Ioffe's 0.01, not BatchNorm's 0.1. None
            for their cumulative average.
        affine: Whether to learn gamma and beta.
        track_running_stats: As in BatchNorm; must be True.
        r_max: Last limit of r, at least 1.
        d_max: Last limit of d, at least 0.
        r_steps: The training steps from and to which the limit of r grows from 1 to ``r_max``.
        d_steps: The training steps from and to which the limit of d grows from 0 to ``d_max``.
        device: Of parameters and buffers, as in torch.
        dtype: Of parameters and buffers, as in torch.

    Shape:
        [N, C, H, W] to [N, C, H, W].

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument of a value that is not allowed; in training, one value a channel, as in torch.
        RuntimeError: In training, an input of another number of channels; in ``torch.nn.DataParallel``; in a
            checkpointed block, if it cannot be known which of several calls runs again.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_steps: tuple[int, int] = (5000, 40000),
        d_steps: tuple[int, int] = (5000, 25000),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        num_features = check_int('BRN', 'num_features', num_features, at_least=1)
        if not track_running_stats:
            raise ValueError(
                'BRN: track_running_stats must be True, because the layer corrects the batch towards the running '
                f'statistics, got {shown(track_running_stats)}'
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.r_max = _limit('r_max', r_max, at_least=1)
        self.d_max = _limit('d_max', d_max, at_least=0)
        self.r_steps, self.d_steps = _steps('r_steps', r_steps), _steps('d_steps', d_steps)
        self.iteration = Iteration()

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, '
            f'r_steps={self.r_steps}, d_steps={self.d_steps}'
        )

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        if self.training and input.numel() > 0 and input.size(1) != self.num_features:
            raise RuntimeError(
                f'{self} expected an input of {self.num_features} channels, got input size {input.size()}'
            )

    @outside_graphs_in_training
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, [N, C, H, W]."""
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input)
        if not self.training or input.numel() == 0:
            return super().forward(input)
        self._check_input_dim(input)
        second_run = is_recomputing()
        # A compiled graph computes a checkpointed block again by itself.
        calls = None if second_run or is_compiling() else self.iteration
        if calls is not None and calls.is_over():
            calls.begin()
        call = Call() if second_run else None if calls is None else calls.begin_call()
        with torch.no_grad():
            mean, var = batch_statistics(input)
            deviation = (var + self.eps).sqrt()
            r, d = self.iteration.recall(self, input.shape) if second_run else self._corrections(mean, deviation)
            if calls is not None:
                calls.note(input.shape, None, (r, d))
        # gamma (xhat r + d) + beta is BatchNorm with other coefficients, and r and d are constant to autograd.
        gamma, beta = (r, d) if self.weight is None else (self.weight * r, self.weight * d)
        if self.bias is not None:
            beta = beta + self.bias
        y = F.batch_norm(input, None, None, gamma, beta, training=True, eps=self.eps)
        if call is not None and y.grad_fn is not None:
            y.grad_fn.register_prehook(call.note_backward)
        if not second_run:
            self._update_running_statistics(mean, deviation)
        return y

    def _replicate_for_data_parallel(self) -> 'BRN':
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()

    def _corrections(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, [C] each."""
        running_mean, running_var, steps = self._running()
        running_deviation = (running_var + self.eps).sqrt()
        # On the device: the host must not wait for the count.
        r_progress, d_progress = (
            (steps - first).to(mean.dtype).div(last - first).clamp(0, 1) for first, last in (self.r_steps, self.d_steps)
        )
        r_max = 1 + (self.r_max - 1) * r_progress
        d_max = self.d_max * d_progress
        r = (deviation / running_deviation).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / running_deviation).clamp(-d_max, d_max)
        return r, d

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        running_mean, running_var, steps = self._running()
        finite = deviation < torch.inf  # NaN is not; and where the mean is inf or NaN, the deviation is NaN
        mean = mean.where(finite, running_mean)
        steps.add_(1)
        weight = 1 / steps.to(running_mean.dtype) if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), weight)
        running_deviation = (running_var + self.eps).sqrt()
        change = (deviation.to(running_var.dtype) - running_deviation) * weight
        change = change.where(finite, 0)
        # (sigma + change)^2 - sigma^2
        running_var.add_(change * (2 * running_deviation + change)).clamp_(min=0)

    def _running(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.running_mean, self.running_var, self.num_batches_tracked  # type: ignore[return-value]


def _limit(name: str, value: Any, at_least: int) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f'BRN: {name} must be a number >= {at_least}, got {shown(value)} of type {type(value).__name__}'
        )
    number: Any = value
    if not at_least <= number <= torch.finfo(torch.float32).max:
        finite = ', and finite in float32' if number >= at_least else ''
        raise ValueError(f'BRN: {name} must be a number >= {at_least}{finite}, got {shown(value)}')
    return float(number)


def _steps(name: str, steps: Any) -> tuple[int, int]:
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise TypeError(f'BRN: {name} must be two ints (first step, last step), got {shown(steps)}')
    first, last = (check_int('BRN', f'each of {name}', step, at_least=0) for step in steps)
    if first >= last:
        raise ValueError(f'BRN: {name} must be two ints of which the second is larger, got {(first, last)}')
    return first, last
