"""Running statistics that inf and NaN cannot spoil."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
        # The cumulative average divides on the device: a Python number would make the host wait for it.
        weight = 1 / running.num_batches.to(average.dtype) if momentum is None else momentum
        average.lerp_(new.to(average.dtype).where(finite, average), weight)
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
