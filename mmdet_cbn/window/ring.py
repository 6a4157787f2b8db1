"""The window: the statistics of the last k - 1 iterations, in a ring of preallocated tensors."""

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Statistics = TypeVar('Statistics', bound=NamedTuple)


class Window(Generic[Statistics]):
    """The statistics of the most recent iterations. A new one overwrites the oldest.

    All iterations count alike in the average (Eq. 9 and 10), so the order in time does not matter to who reads.

    The window is not a part of any state dict. It starts afresh if new statistics are on another device, or have
    another precision or other shapes.

    Args:
        capacity: How many iterations to keep, k - 1.

    Attributes:
        unused (int): For how many iterations the layer has not used it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.unused = 0
        self._conv: nn.Module | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self._ring: Statistics | None = None
        self._next = 0
        self._length = 0

    def set_conv(self, conv: nn.Module | None) -> bool:
        """Say which convolution made the statistics that are pushed next. Those of another one are forgotten.

        Returns:
            Whether some were forgotten.
        """
        is_other = not (self._conv is conv or self._conv is None or len(self) == 0)
        if is_other:
            self.clear()
        self._conv = conv
        return is_other

    def __len__(self) -> int:
        """How many iterations are there."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._ring is None else sum(tensor.nbytes for tensor in self._ring)

    def push(self, statistics: Statistics) -> None:
        """Keep the statistics of one more iteration, a named tuple of tensors. A full window drops the oldest."""
        if not self._fits(statistics):
            self.clear()
            with torch.inference_mode(False):  # the training that follows must be able to write to it
                kind: Any = type(statistics)
                self._ring = kind(
                    *(torch.empty(self.capacity, *t.shape, dtype=t.dtype, device=t.device) for t in statistics)
                )
        slots = [ring.select(0, self._next) for ring in self._ring]  # type: ignore[union-attr]
        torch._foreach_copy_(slots, list(statistics))  # one launch for all, on a GPU
        self._next = (self._next + 1) % self.capacity
        self._length = min(self._length + 1, self.capacity)

    def stacked(self) -> Statistics | None:
        """All iterations as one named tuple of tensors with a leading axis of ``len(self)``; None if there are none.

        The tensors are views. The next :meth:`push` changes them.
        """
        if self._ring is None or self._length == 0:  # the latter where a push has failed
            return None
        if self._length == self.capacity:
            return self._ring
        return type(self._ring)(*(ring.narrow(0, 0, self._length) for ring in self._ring))

    def state(self) -> dict[str, Any]:
        """What :meth:`load` restores: plain data and copies of the tensors, on the CPU."""
        if self._ring is None:
            return dict(kind=None)
        tensors = {
            name: tensor.to('cpu', copy=True) for name, tensor in zip(self._ring._fields, self._ring, strict=True)
        }
        return dict(kind=type(self._ring).__name__, next=self._next, length=self._length, tensors=tensors)

    def load(self, state: dict[str, Any], kind: type[Statistics], device: torch.device) -> None:
        """Restore what :meth:`state` returned.

        Args:
            state: What it returned.
            kind: Type of the statistics.
            device: Where to put them.

        Raises:
            ValueError: The state is of a window of another capacity, or of other statistics.
        """
        self.clear()
        if state['kind'] is None:
            return
        if state['kind'] != kind.__name__:
            raise ValueError(f'it has {state["kind"]!r}, not {kind.__name__}: order or samples are others')
        ring: Statistics = kind(**state['tensors'])  # type: ignore[call-overload]
        length, next_slot = state['length'], state['next']
        if not all(isinstance(tensor, Tensor) and tensor.shape[:1] == (self.capacity,) for tensor in ring):
            raise ValueError(f'it is of another window_size than {self.capacity + 1}')
        if not ring[0].is_floating_point() or len({(tensor.dtype, tensor.layout) for tensor in ring}) > 1:
            raise ValueError('it has no statistics of one precision')
        if not (isinstance(length, int) and isinstance(next_slot, int)):
            raise TypeError(f'it has {length!r} iterations and writes to place {next_slot!r}')
        if not (0 < length <= self.capacity and 0 <= next_slot < self.capacity):
            raise ValueError(f'it has {length} iterations and writes to place {next_slot}')
        self._ring = kind(*(tensor.to(device) for tensor in ring))
        self._length, self._next = length, next_slot

    def _fits(self, statistics: Statistics) -> bool:
        return type(self._ring) is type(statistics) and all(
            ring.shape[1:] == tensor.shape and ring.dtype == tensor.dtype and ring.device == tensor.device
            for ring, tensor in zip(self._ring, statistics, strict=True)
        )
