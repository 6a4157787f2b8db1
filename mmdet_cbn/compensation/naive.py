"""Naive CBN: no compensation (order 0)."""

from typing import Any, NamedTuple

from torch import Tensor

from ..pairing import ConvCall
from .base import Compensation, Moved, are_of_channels


class NaiveStatistics(NamedTuple):
    """What the window keeps of one iteration tau (stacked: with a leading axis of n)."""

    mean: Tensor  #: mu_tau, [C]
    var: Tensor  #: var_tau, [C]


class Naive(Compensation):
    """Takes the statistics of earlier iterations as they were."""

    Statistics = NaiveStatistics
    needs_conv = False

    def keep(self, x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None) -> NaiveStatistics:
        return NaiveStatistics(mean, var)

    def under_current_weights(self, old: NaiveStatistics, conv: ConvCall | None) -> Moved:
        return Moved(old.mean, old.var)

    def could_keep(self, old: Any, num_features: int) -> bool:
        return are_of_channels(num_features, old.mean, old.var)
