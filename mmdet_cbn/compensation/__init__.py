"""How statistics of earlier iterations are corrected for the change of the weights since then. One file a kind."""

from .base import Compensation, Moved, drop_inf_and_nan
from .first_order import FirstOrder
from .naive import Naive
from .sampled import Sampled
from .second_order import SecondOrder


def make_compensation(order: int, samples: int | None) -> Compensation:
    """The kind of an order from 0 to 2, or with ``samples`` of order 1."""
    if samples is not None:
        return Sampled(samples)
    return (Naive, FirstOrder, SecondOrder)[order]()


__all__ = ['Compensation', 'Moved', 'drop_inf_and_nan', 'make_compensation']
