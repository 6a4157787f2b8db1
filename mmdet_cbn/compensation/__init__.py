"""How statistics of earlier iterations are corrected for the change of the weights since then. One file a kind."""

from .base import Compensation, Moved, drop_inf_and_nan
from .first_order import FirstOrder
from .naive import Naive
from .sampled import Sampled
from .second_order import SecondOrder

#: A new kind is one file and one entry here.
KINDS: tuple[type[Compensation], ...] = (Naive, FirstOrder, SecondOrder, Sampled)


def make_compensation(order: int, samples: int | None) -> Compensation:
    """The kind that a layer's arguments ask for.

    Raises:
        ValueError: There is no such kind.
    """
    for kind in KINDS:
        made = kind.of(order, samples)
        if made is not None:
            return made
    raise ValueError(f'there is no compensation of order={order} and samples={samples}')


__all__ = ['KINDS', 'Compensation', 'Moved', 'drop_inf_and_nan', 'make_compensation']
