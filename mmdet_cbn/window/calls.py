"""The calls of a layer: where an iteration ends, which window belongs to which call, and which call runs again."""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from ..errors import title_of
from ..old_torch import is_compiling
from ..pairing import version_of, weight_of
from .ring import Window


def is_recomputing() -> bool:
    """Whether a checkpointed block runs again, inside the backward pass. This still belongs to the same iteration.

    A compiled graph computes such a block again by itself.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1


_FIRST_RUN, _SECOND_RUN = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__


def _reentrant_checkpoint() -> Any:
    """What autograd keeps of the outermost re-entrant checkpoint whose block runs now; None if there is none.

    Its first run records no graph. So this object stands for the graph: it lives as long, and is the same in both runs.
    """
    frame, found = sys._getframe(), None
    while frame is not None:
        # By identity: torch.compile makes code that has no hash.
        if frame.f_code is _FIRST_RUN or frame.f_code is _SECOND_RUN:
            found = frame.f_locals['ctx']
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Call:
    """One call of a layer in training. It lives as long as its part of the autograd graph.

    Attributes:
        backward_passes (int): How often a backward pass has reached any call of any layer.
    """

    backward_passes = 0

    def note_backward(self, *_: Any) -> None:
        """The backward pass has reached this call. Can be a hook of autograd's nodes."""
        Call.backward_passes += 1


@dataclass
class FirstRun:
    """A call that may run again in the backward pass, which it does if its block is checkpointed."""

    shape: torch.Size  #: of the input
    conv: nn.Module | None  #: that made the input, if it is known
    result: Any  #: what the second run uses again, because by then the layer has moved on
    call: weakref.ref[Call]  #: alive while its graph is
    checkpoint: weakref.ref[Any] | None  #: the re-entrant one in which it ran
    backward_pass: int | None = None  #: in which it ran again last


class Iteration:
    """The calls of a layer in one iteration of training.

    Attributes:
        calls (int): How many calls there were so far.
        first_runs: What they computed, and earlier ones whose backward pass is to come.
        compiled_call: The last call, if a compiled graph made it. Nothing else keeps that one alive.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.first_runs: list[FirstRun] = []
        self.compiled_call: Call | None = None
        self._last_call: weakref.ref[Call] | None = None
        # Of the last call. A weak reference to the weight itself would forbid torch.utils.swap_tensors.
        self._conv: weakref.ref[nn.Module] | None = None
        self._weight_id = self._version = 0
        self._began_after = 0  # so many backward passes
        self._records_graph = False
        self._checkpoint: weakref.ref[Any] | None = None  # of the last call

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no graph, and begins an iteration of its own.
        none = dict.fromkeys(('compiled_call', '_last_call', '_conv', '_checkpoint'))
        return {**self.__dict__, 'calls': 0, 'first_runs': [], **none}

    @property
    def last_call(self) -> Call | None:
        """The last call, if its part of the graph is alive."""
        return None if self._last_call is None else self._last_call()

    def is_over(self, windows: int = 0) -> bool:
        """Whether the next call belongs to another iteration.

        It does if a backward pass has gone through any layer since the last call, or if the weight has been changed in
        place. The output of the last call itself need not be in the loss.

        If the last call has no graph, or none any more, nobody can tell. Then an iteration has as many calls as the
        layer has windows, all with gradients or all without.

        Args:
            windows: How many there are; 0 for a layer without, for which each such call is an iteration.
        """
        weight = weight_of(None if self._conv is None else self._conv())
        has_changed = weight is not None and id(weight) == self._weight_id and version_of(weight) != self._version
        if has_changed or Call.backward_passes != self._began_after:
            return True
        if self.last_call is not None:
            return False
        records_graph = torch.is_grad_enabled() or _reentrant_checkpoint() is not None
        return self.calls >= windows or self._records_graph != records_graph

    def begin(self) -> None:
        """Start a new iteration."""
        self.calls = 0
        self.first_runs = [run for run in self.first_runs if run.call() is not None and run.backward_pass is None]

    def begin_call(self, conv: nn.Module | None = None) -> Call:
        """Add a call to the iteration. The caller starts a new one first, if :meth:`is_over` says so.

        Args:
            conv: The convolution that feeds the layer, if it is known.
        """
        call = Call()
        self._last_call = weakref.ref(call)
        self._conv = None if conv is None else weakref.ref(conv)
        weight = weight_of(conv)
        self._weight_id, self._version = id(weight), 0 if weight is None else version_of(weight)
        self._began_after = Call.backward_passes
        checkpoint = None if torch.is_grad_enabled() else _reentrant_checkpoint()
        self._checkpoint = None if checkpoint is None else weakref.ref(checkpoint)
        if checkpoint is not None:
            checkpoint.cbn_calls = [*getattr(checkpoint, 'cbn_calls', []), call]  # which it keeps alive
        self._records_graph = torch.is_grad_enabled() or checkpoint is not None
        self.calls += 1
        return call

    def note(self, shape: torch.Size, conv: nn.Module | None, result: Any) -> None:
        """Keep the ``result`` of the last call, which had an input of ``shape`` from ``conv``."""
        assert self._last_call is not None
        self.first_runs.append(FirstRun(shape, conv, result, self._last_call, self._checkpoint))

    def recall(self, layer: nn.Module, shape: torch.Size, conv: nn.Module | None = None) -> Any:
        """The result of the call that now runs again.

        Args:
            layer: Whose calls these are, for the message of an error.
            shape: Of the call's input.
            conv: That made the input, if it is known.

        Raises:
            RuntimeError: It cannot be known which call runs again.
        """
        alike = [run for run in self.first_runs if run.shape == shape and run.conv is conv]
        with_graph = [run for run in alike if run.call() is not None]
        checkpoint = _reentrant_checkpoint()
        same = [run for run in with_graph if run.checkpoint is not None and run.checkpoint() is checkpoint]
        found = same or with_graph or alike
        if len(found) != 1:
            self._refuse(
                layer,
                f'{len(found)} of its {len(self.first_runs)} calls in this iteration had inputs of {list(shape)} from '
                'that convolution',
            )
        (run,) = found
        # Another library's re-entrant checkpointing is not known here. Without a graph in the first run, each call may
        # look like an iteration of its own, and only the last one is noted. If two run again in one backward pass,
        # there were more.
        backward_pass = torch._C._current_graph_task_id()
        if not with_graph and run.backward_pass == backward_pass:
            self._refuse(layer, f'several of its calls in this iteration had inputs of {list(shape)}')
        run.backward_pass = backward_pass
        return run.result

    @staticmethod
    def _refuse(layer: nn.Module, reason: str) -> None:
        raise RuntimeError(
            f'{title_of(layer)} runs again in a checkpointed block, and it cannot be known which call that is: '
            f'{reason}. Use torch.utils.checkpoint with use_reentrant=True, each call of the layer in a block of its '
            'own, or do not checkpoint blocks that share the layer.'
        )


class CallWindows:
    """The windows of a layer: one for each of its calls in an iteration, in the order of the calls.

    A head that is shared by the levels of an FPN calls its layers once for each level. The statistics of one level say
    nothing about another level. A window whose call does not come for k - 1 iterations is given back.

    Args:
        capacity: Of each window.

    Attributes:
        current: The window of the last call.
        iteration: The calls of this iteration.
        has_dropped (bool): Whether that window has just dropped statistics of another convolution.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._windows: list[Window] = [Window(capacity)]  # the first is always there
        self.iteration = Iteration()
        self.current = self._windows[0]
        self.has_dropped = False

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows)

    def begin_iteration(self) -> None:
        """Start a new iteration."""
        if self.iteration.calls == 0:
            return
        for number, window in enumerate(self._windows):
            window.unused = 0 if number < self.iteration.calls else window.unused + 1
        # What a window has that was not used for k - 1 iterations is older than the k iterations. To give it back
        # sooner would leave none for a discriminator's second call, if it is called twice and once in turn.
        while self._windows[-1].unused >= max(self._capacity, 1):
            del self._windows[-1]
        self.iteration.begin()

    def begin_call(self, conv: nn.Conv2d | None) -> Call:
        """Add a call behind ``conv``, if that is known, and make its window the current one."""
        if self.iteration.is_over(len(self._windows)):
            self.begin_iteration()
        if self.iteration.calls == len(self._windows):
            self._windows.append(Window(self._capacity))
        self.current = self._windows[self.iteration.calls]
        self.has_dropped = self.current.set_conv(conv)
        return self.iteration.begin_call(conv)

    def state(self) -> list[dict[str, Any]]:
        """What :meth:`load` restores: plain data and copies of the tensors, on the CPU."""
        return [window.state() for window in self]

    def load(self, state: list[dict[str, Any]], kind: type, device: torch.device) -> None:
        """Restore what :meth:`state` returned, of statistics of type ``kind``, on ``device``.

        Raises:
            ValueError: The state is of windows of another capacity, or of other statistics.
        """
        windows: list[Window] = [Window(self._capacity) for _ in state]
        for window, its_state in zip(windows, state, strict=True):
            window.load(its_state, kind, device)
        self._windows, self.current = windows, windows[0]
