"""Statistics of a batch (Eq. 2 and 3), of the window (Eq. 9 to 11), and their running averages.

Call the functions under torch.no_grad(), except :func:`batch_norm` and where the gradient is wanted. Statistics with
inf or NaN never enter the running averages.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compensation import Moved


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The precision of the statistics of ``x``: float32, or float64 for a float64 ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over batch and positions (Eq. 2 and 3).

    Args:
        x: [N, C, H, W], not empty.

    Returns:
        Mean [C] and variance [C], in :func:`statistics_dtype`.
    """
    x = x.to(statistics_dtype(x))
    if x.is_cpu and x.is_contiguous():
        # Three to ten times as fast here as torch.var_mean, and two to four as BatchNorm's own kernel.
        mean = x.mean(dim=(2, 3)).mean(dim=0)
        return mean, (x - mean.view(-1, 1, 1)).square_().mean(dim=(2, 3)).mean(dim=0)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


class WindowStatistics(NamedTuple):
    """Statistics over the window (Eq. 9 to 11)."""

    mean: Tensor  #: M, without the bias of the convolution, [C]
    var: Tensor  #: V, biased, [C]
    fraction: Tensor  #: of the window that is the current iteration, [C]: 1 / (n + 1), or more where some are left out
    valid: Tensor | None  #: which of n earlier iterations are not left out, [n, C]; None if there are none


def window_statistics(mean: Tensor, var: Tensor, past: Moved | None) -> WindowStatistics:
    """Statistics over the window (Eq. 9 to 11).

    A channel leaves out an earlier iteration whose statistics are inf or NaN. One bad batch must not spoil the k - 1
    that follow it.

    Args:
        mean: mu of the current iteration, [C].
        var: var of the current iteration, [C].
        past: mu' and var' of n earlier iterations; None if there are none.
    """
    if past is None:
        return WindowStatistics(mean, var, torch.ones_like(mean), None)
    # About the current mean, so that the numbers are small, and an iteration that is left out is 0.
    about = mean.new_empty(2, *past.mean.shape)
    distance, spread = about
    torch.sub(past.mean, mean, out=distance)
    torch.addcmul(past.var, distance, distance, out=spread)
    valid = spread < torch.inf  # False for NaN, too
    fraction = (valid.sum(dim=0, dtype=mean.dtype) + 1).reciprocal_()
    shift, window_var = about.where(valid, 0).sum(dim=1).mul_(fraction)
    window_var.addcmul_(var, fraction).addcmul_(shift, shift, value=-1).clamp_(min=0)
    return WindowStatistics(mean + shift, window_var, fraction, valid)


class Running(NamedTuple):
    """The buffers of a BatchNorm; None each if it does not track running statistics."""

    mean: Tensor | None  #: [C]
    var: Tensor | None  #: unbiased, [C]
    num_batches: Tensor | None  #: [], an int64


def update_running(running: Running, mean: Tensor, unbiased_var: Tensor, momentum: float | None) -> Tensor:
    """Update ``running`` in place as BatchNorm does, except in channels with inf or NaN.

    Args:
        running: The buffers.
        mean: [C].
        unbiased_var: [C].
        momentum: Weight of the new statistics; None for the cumulative average.

    Returns:
        Which channels are finite, [C].
    """
    finite = unbiased_var < torch.inf  # False for NaN; and where the mean is inf or NaN, the variance is NaN
    if running.mean is None or running.var is None or running.num_batches is None:
        return finite
    running.num_batches.add_(1)
    for average, new in ((running.mean, mean), (running.var, unbiased_var)):
        wide = torch.promote_types(average.dtype, new.dtype)
        # The cumulative average divides on the device: a Python number would make the host wait for it.
        weight = 1 / running.num_batches.to(wide) if momentum is None else momentum
        if average.dtype == new.dtype:
            average.lerp_(new.where(finite, average), weight)
        else:  # a variance can be too large for a half, and its share of the average not
            updated = average.to(wide).lerp(new.to(wide), weight).to(average.dtype)
            average.copy_(updated.where(finite & updated.isfinite(), average))
    return finite


def batch_norm(
    x: Tensor, running: Running, weight: Tensor | None, bias: Tensor | None, momentum: float | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """BatchNorm in training, to the last bit, but channels with inf or NaN keep their running statistics.

    Args:
        x: [N, C, H, W].
        running: The buffers, updated in place.
        weight: gamma, [C], or None.
        bias: beta, [C], or None.
        momentum: As in BatchNorm.
        eps: Added to the variance.

    Returns:
        The output, and which channels are finite, [C]. The latter is None without running statistics.
    """
    if running.mean is None or running.var is None or running.num_batches is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), None
    # Autograd keeps the statistics that BatchNorm updates, and they must not change afterwards. Hence the copies.
    mean, var = running.mean.clone(), running.var.clone()
    output = F.batch_norm(x, mean, var, weight, bias, True, 1.0 if momentum is None else momentum, eps)
    with torch.no_grad():
        finite = var < torch.inf
        running.num_batches.add_(1)
        for average, new in ((running.mean, mean), (running.var, var)):
            if momentum is None:
                new = average.lerp(new, 1 / running.num_batches.to(new.dtype))
            average.copy_(new.where(finite, average))
    return output, finite
