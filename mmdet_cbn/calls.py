"""The calls of a layer: where an iteration ends, and which window belongs to which call."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import title_of
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


@dataclass
class FirstRun:
    """What a call of this iteration computed, for a checkpointed block, which runs again in the backward pass."""

    shape: torch.Size  #: of its input
    conv: nn.Module | None  #: that made the input, if that is known
    result: Any  #: what the second run takes over, since the layer has gone on when it comes
    had_graph: bool
    backward_pass: int | None = None  #: in which it ran again last


class Iteration:
    """The calls of a layer in one iteration of training.

    Attributes:
        calls (int): How many there were so far.
        first_runs: What they computed.
        compiled_call: The last call, where it has to be kept because no graph keeps it.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.first_runs: list[FirstRun] = []
        self.compiled_call: Call | None = None
        self._last_call: weakref.ref[Call] | None = None
        self._records_graph = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'first_runs': [], 'compiled_call': None, '_last_call': None}  # a copy has no graph

    @property
    def last_call(self) -> Call | None:
        """The call that was begun last, if its part of the graph is alive."""
        return None if self._last_call is None else self._last_call()

    @property
    def is_over(self) -> bool:
        """Whether the backward pass has gone through the last call, the weights have changed, or its graph is gone."""
        return self.last_call is None or self.last_call.is_over

    def begin(self) -> None:
        """What is called from now on belongs to another iteration than before."""
        self.calls = 0
        self.first_runs = []

    def begin_call(self, weight: Tensor | None) -> Call:
        """One more call, behind a convolution of ``weight`` if that is known. It begins an iteration if one is over."""
        if self.is_over:
            self.begin()
        call = Call(weight)
        self._last_call = weakref.ref(call)
        self._records_graph = torch.is_grad_enabled()
        self.calls += 1
        return call

    def note(self, shape: torch.Size, conv: nn.Module | None, result: Any) -> None:
        """Keep the ``result`` of the call that was begun last, with an input of ``shape`` from ``conv``."""
        self.first_runs.append(FirstRun(shape, conv, result, self._records_graph))

    def recall(self, shape: torch.Size, conv: nn.Module | None) -> Any:
        """The result of the call that now runs again, with an input of ``shape`` from ``conv``.

        Raises:
            LookupError: It cannot be known which call that is.
        """
        found = [run for run in self.first_runs if run.shape == shape and run.conv is conv]
        if len(found) != 1:
            raise LookupError(
                f'{len(found)} of its {len(self.first_runs)} calls in this iteration had inputs of {list(shape)} from '
                'that convolution'
            )
        (run,) = found
        # Re-entrant checkpointing records no graph in the first run, so each call passes for an iteration of its own
        # and only the last one is noted here. If two run again in one backward pass, there were more.
        backward_pass = torch._C._current_graph_task_id()
        if not run.had_graph and run.backward_pass == backward_pass:
            raise LookupError(f'several of its calls in this iteration had inputs of {list(shape)}')
        run.backward_pass = backward_pass
        return run.result


def recall(layer: nn.Module, iteration: Iteration, shape: torch.Size, conv: nn.Module | None = None) -> Any:
    """As :meth:`Iteration.recall`, of a ``layer``.

    Raises:
        RuntimeError: It cannot be known which call runs again; the message names the layer.
    """
    try:
        return iteration.recall(shape, conv)
    except LookupError as error:
        raise RuntimeError(
            f'{title_of(layer)} runs again in a checkpointed block, and it cannot be known which call that is: '
            f'{error}. Use use_reentrant=False, or checkpoint no block that shares the layer.'
        ) from None


class CallWindows:
    """The windows of a layer: one for each of its calls in an iteration, in their order.

    A head that the levels of an FPN share calls its layers once a level, and a level's statistics say nothing of
    another's.

    Args:
        capacity: Of each window.

    Attributes:
        current: The window of the call that was begun last.
        iteration: The calls of this iteration.
        misfit (bool): Whether that window had statistics behind another convolution, which it has dropped.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._windows: list[Window] = [Window(capacity)]  # the first is always there
        self.iteration = Iteration()
        self.current = self._windows[0]
        self.misfit = False

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows)

    def begin_iteration(self) -> None:
        """What is called from now on belongs to another iteration than before."""
        if self.iteration.calls > 0:
            del self._windows[self.iteration.calls :]  # of calls that the last iteration did not have
            self.iteration.begin()

    def begin_call(self, conv: nn.Conv2d | None) -> Call:
        """Take up the window of this call, behind ``conv`` if that is known."""
        if self.iteration.is_over:
            self.begin_iteration()
        if self.iteration.calls == len(self._windows):
            self._windows.append(Window(self._capacity))
        self.current = self._windows[self.iteration.calls]
        self.misfit = not self.current.belong_to(conv)
        return self.iteration.begin_call(None if conv is None else conv.weight)

    def state(self) -> list[dict[str, Any]]:
        """What :meth:`load` brings back: plain data and copies of the tensors, on the CPU."""
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
