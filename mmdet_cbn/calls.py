"""The calls of a layer: where an iteration ends, and which window belongs to which call."""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .window import Window


class Call:
    """One call of a layer in training, alive as long as its part of the autograd graph is.

    Args:
        weight: Of the convolution that feeds the layer, if it is known.
    """

    def __init__(self, weight: Tensor | None) -> None:
        self._has_gone_back = False
        self._weight = weight
        self._version = None if weight is None else weight._version

    def go_back(self, *_: Any) -> None:
        """The backward pass has come to it: a hook of autograd's nodes, too."""
        self._has_gone_back = True

    @property
    def is_over(self) -> bool:
        """Whether the backward pass has gone through it, or the weight has been changed in place since."""
        return self._has_gone_back or (self._weight is not None and self._weight._version != self._version)


class FirstRun(NamedTuple):
    """A call of this iteration, for the second run of a checkpointed block, when the window has gone on."""

    shape: torch.Size
    conv: nn.Conv2d | None
    past: tuple[Tensor, Tensor] | None  #: mu' and var' of the earlier iterations, [n, C] each, if there were any


class CallWindows:
    """The windows of a layer: one for each of its calls in an iteration, in their order.

    A head that the levels of an FPN share calls its layers once a level, and a level's statistics say nothing of
    another's.

    Args:
        capacity: Of each window.

    Attributes:
        current: The window of the call that was begun last.
        first_runs: The calls of this iteration.
        last_call: The call that was begun last, as a weak reference.
        compiled_call: The same where it has to be kept, for lack of a graph that does.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._windows: list[Window] = [Window(capacity)]  # the first is always there
        self._begun = 0  # calls of this iteration so far
        self.current = self._windows[0]
        self._forget_graph()

    def _forget_graph(self) -> None:
        self.first_runs: list[FirstRun] = []
        self.last_call: weakref.ref[Call] | None = None
        self.compiled_call: Call | None = None

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows)

    def begin_iteration(self) -> None:
        """What is called from now on belongs to another iteration than before."""
        if self._begun > 0:
            del self._windows[self._begun :]  # of calls that the last iteration did not have
            self._begun = 0
            self.first_runs = []

    def begin_call(self, conv: nn.Conv2d | None) -> Call:
        """Take up the window of this call, behind ``conv`` if that is known.

        It begins an iteration if the backward pass has gone through the last call, the weights have changed since, or
        its graph is gone.
        """
        last = None if self.last_call is None else self.last_call()
        if last is None or last.is_over:
            self.begin_iteration()
        if self._begun == len(self._windows):
            self._windows.append(Window(self._capacity))
        self.current = self._windows[self._begun]
        self.current.belong_to(conv)
        self._begun += 1
        call = Call(None if conv is None else conv.weight)
        self.last_call = weakref.ref(call)
        return call

    def first_run(self, shape: torch.Size, conv: nn.Conv2d | None) -> FirstRun:
        """The call that a checkpointed block runs again.

        Raises:
            LookupError: It cannot be known which that is.
        """
        found = [run for run in self.first_runs if run.shape == shape and run.conv is conv]
        if len(found) != 1:
            raise LookupError(
                f'{len(found)} of its {len(self.first_runs)} calls in this iteration had inputs of {list(shape)} from '
                'that convolution'
            )
        return found[0]

    def state(self) -> list[dict[str, Any]]:
        """What :meth:`load` brings back: plain data and copies of the tensors."""
        return [window.state() for window in self]

    def load(self, state: list[dict[str, Any]], kinds: list[type]) -> None:
        """Take over what :meth:`state` returned, of statistics that are one of ``kinds``.

        Raises:
            ValueError: It is not that of windows of this capacity.
        """
        windows: list[Window] = [Window(self._capacity) for _ in state]
        for window, of_window in zip(windows, state, strict=True):
            window.load(of_window, kinds)
        self._windows, self.current = windows, windows[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'first_runs': [], 'last_call': None, 'compiled_call': None}  # a copy has no graph
