"""How a normalizer learns which convolution feeds it, and with what input, from the order of calls alone.

mmcv and mmdet call ``norm(conv(x))`` and tell the norm nothing of the convolution. So a forward hook on the convolution
remembers its last call, and the norm, called next, takes that call over if its own input is the very output of it.

Which convolutions need the hook is found out in training: while a norm does not know them, the calls of all
convolutions are watched on its behalf. In evaluation there are no hooks.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from .old_torch import is_compiling, outside_graphs, register_hook_on_all


class ConvCall(NamedTuple):
    """One call of a zero-padded 2d convolution, in the terms of :func:`torch.nn.functional.conv2d`."""

    input: Tensor  #: [N, C_in, H, W]
    weight: Tensor  #: [C_out, C_in / groups, kh, kw]
    bias: Tensor | None  #: [C_out]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d, input: Tensor) -> 'ConvCall':
        """The call ``conv(input)``, the padding brought into ``input`` where it is not a plain number of zeros."""
        padding = conv.padding
        if isinstance(padding, str) or conv.padding_mode != 'zeros':
            mode = 'constant' if conv.padding_mode == 'zeros' else conv.padding_mode
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return cls(input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


class _Remembered(NamedTuple):
    conv: _ConvNd
    input: Tensor  # a strong reference: nothing else may keep the input alive until the norm is called
    output: weakref.ref
    version: int


# The last call on this thread; a norm follows its convolution at once, so that one is enough, and no more than one
# input is ever kept alive.
_last = threading.local()


class _Traced:
    """The last call in what torch.compile makes a graph of: no tensors yet, and only ever looked at by the compiler."""

    call: tuple[_ConvNd, Tensor, Tensor] | None = None


_traced = _Traced()


@outside_graphs
def remember_call(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: remember this call, if ``module`` is a convolution."""
    if not isinstance(module, _ConvNd):
        return
    input = args[0] if args else kwargs['input']
    if is_compiling():
        _traced.call = module, input, output
    elif not output.is_inference():
        _last.call = _Remembered(module, input, weakref.ref(output), output._version)


def take_call(output: Tensor) -> tuple[_ConvNd, Tensor] | None:
    """The convolution that returned ``output``, unchanged since, in the last call on this thread, and its input.

    Returns:
        None where the last call was another one, was not remembered, or ``output`` has been modified in place.
    """
    if is_compiling():
        traced, _traced.call = _traced.call, None
        return None if traced is None or traced[2] is not output else traced[:2]
    call: _Remembered | None = getattr(_last, 'call', None)
    if call is None or not _are_one(call.output(), output) or call.version != output._version:
        return None
    _last.call = None
    return call.conv, call.input


def _are_one(returned: Tensor | None, output: Tensor) -> bool:
    """Whether the two are one tensor, or the latter the whole of the former: a full backward hook makes such a view."""
    if returned is output or returned is None:
        return returned is output
    return output._base is returned and (output.shape, output.stride()) == (returned.shape, returned.stride())


class ConvFinder:
    """Finds the convolution, or convolutions, that feed one norm.

    It is copied and pickled with the model that both belong to, and what it knows with it.
    """

    def __init__(self) -> None:
        # The convolutions known, with the handle of the hook that each has while the norm is in training.
        self._handles: dict[_ConvNd, RemovableHandle | None] = {}
        self._settled = False
        self._in_training = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy must watch as its original does, or it misses the convolution in its first forward.
        self.__dict__.update(state)
        if self._in_training and not self._settled:
            _watch.add(self)

    def start(self) -> None:
        """The norm is in training from now on."""
        self._in_training = True
        for conv, handle in self._handles.items():
            if handle is None:
                self._handles[conv] = conv.register_forward_hook(remember_call, with_kwargs=True)
        if not self._settled:
            _watch.add(self)

    def stop(self) -> None:
        """The norm is in training no longer."""
        self._in_training = False
        for conv, handle in self._handles.items():
            if handle is not None:
                handle.remove()
                self._handles[conv] = None
        _watch.discard(self)

    def find(self, output: Tensor) -> tuple[_ConvNd, Tensor] | None:
        """The convolution that has just returned ``output``, and its input.

        Returns:
            None if it is not known (someone replaced it); it will be found in the next forward.

        Raises:
            LookupError: No convolution has just returned ``output``.
        """
        taken = take_call(output)
        if is_compiling() and taken is not None:
            return taken  # for the graph, once and for all
        if taken is None:
            if self in _watch:
                raise LookupError
            self.stop()
            self._handles.clear()
            self._settled = False
            self.start()
            return None
        conv, input = taken
        if conv not in self._handles:
            self._handles[conv] = None
            self.start()
        elif not self._settled:
            # It has come round again, so by now all that feed the norm in one iteration have been seen.
            self._settled = True
            _watch.discard(self)
        return conv, input


class _Watch:
    """Remembers the calls of all convolutions as long as there is a finder that needs it."""

    def __init__(self) -> None:
        self._finders: weakref.WeakSet[ConvFinder] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def __contains__(self, finder: ConvFinder) -> bool:
        return finder in self._finders

    def add(self, finder: ConvFinder) -> None:
        self._finders.add(finder)
        if self._handle is None:
            self._handle = register_hook_on_all(self._remember_call)

    def discard(self, finder: ConvFinder) -> None:
        self._finders.discard(finder)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._handle is not None and not self._finders:
            self._handle.remove()
            self._handle = None

    def _remember_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not is_compiling():
            self._end_if_idle()  # the last finder may have been deleted
        remember_call(module, args, kwargs, output)


_watch = _Watch()


# Convolutions of other classes may do more to their weight or input than these forwards do.
_PLAIN_FORWARDS: tuple[Callable, ...] = (nn.Conv2d.forward, MMCVConv2d.forward)


def unsupported_because(conv: _ConvNd) -> str | None:
    """Why first-order compensation cannot handle ``conv``, or None if it can."""
    if not isinstance(conv, nn.Conv2d):
        return f'it is a {type(conv).__name__}, not a torch.nn.Conv2d'
    if type(conv).forward not in _PLAIN_FORWARDS or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f'{type(conv).__name__} does not compute what torch.nn.Conv2d does'
    if 'weight' not in conv._parameters:
        return 'its weight is computed anew in each forward (a parametrization, weight or spectral norm)'
    return None
