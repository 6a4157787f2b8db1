"""Which convolution feeds a norm, and with what input.

mmcv and mmdet call ``norm(conv(x))`` and do not tell the norm about the convolution. So a forward hook on the
convolution remembers its last call. The norm, called next, claims the call whose output is its own input.

Training shows which convolutions need the hook: while a norm does not know its convolution, all convolutions are
watched. There are no hooks in evaluation.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .old_torch import is_compiling, outside_graphs, register_hook_on_all

# Convolutions of other classes may do more to their weight or input than these forwards do.
_PLAIN_FORWARDS: list[Callable] = [nn.Conv2d.forward]
_TRANSPOSED_FORWARDS: list[Callable] = [nn.ConvTranspose2d.forward]
# These first make another weight or input, always the same from the same, and then call conv2d.
_PREPARING_FORWARDS: list[Callable] = []
try:
    from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d, wrappers
except ImportError:  # models that are not OpenMMLab's do without mmcv
    pass
else:
    _PLAIN_FORWARDS.append(wrappers.Conv2d.forward)
    _TRANSPOSED_FORWARDS.append(wrappers.ConvTranspose2d.forward)
    _PREPARING_FORWARDS += [ConvWS2d.forward, ConvAWS2d.forward, Conv2dAdaptivePadding.forward]


class ConvCall(NamedTuple):
    """One call of a zero-padded 2d convolution, with the arguments of :func:`torch.nn.functional.conv2d`.

    Other convolutions are written as one: their padding becomes a part of the input, and a transposed convolution has
    its input spread with zeros. ``weight`` is what the input is convolved with. It may be made of the parameter.
    """

    module: _ConvNd | None  #: the convolution
    input: Tensor  #: [N, C_in, H, W]
    weight: Tensor  #: theta_t, [C_out, C_in / groups, kh, kw]
    bias: Tensor | None  #: [C_out]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: _ConvNd, input: Tensor, output: Tensor) -> 'ConvCall':
        """The call ``conv(input)``, which returned ``output``.

        Gradients reach ``weight`` and ``bias``, but not ``input``.
        """
        with torch.enable_grad():  # in the first run of a re-entrant checkpoint, too
            if type(conv).forward in _TRANSPOSED_FORWARDS:
                return _as_convolution(conv, input.detach(), output)  # type: ignore[arg-type]
            if type(conv).forward in _PREPARING_FORWARDS:
                return cls(conv, *_arguments_of_conv2d(conv, input))
        padding = conv.padding
        if isinstance(padding, str) or conv.padding_mode != 'zeros':
            mode = 'constant' if conv.padding_mode == 'zeros' else conv.padding_mode
            with torch.no_grad():
                input = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return cls(conv, input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)  # type: ignore[arg-type]

    def without_bias(self, mean: Tensor) -> Tensor:
        """The mean [C_out] of the output if the convolution had no bias."""
        return mean if self.bias is None else mean - self.bias

    def with_bias(self, mean: Tensor) -> Tensor:
        """The inverse of :meth:`without_bias`."""
        return mean if self.bias is None else mean + self.bias


def _as_convolution(conv: nn.ConvTranspose2d, input: Tensor, output: Tensor) -> ConvCall:
    """A transposed convolution as a convolution of its input with zeros between, and of its flipped weight."""
    (groups, stride), (rows, columns) = (conv.groups, conv.stride), input.shape[2:]
    weight = conv.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    with torch.no_grad():
        spread = input.new_zeros(*input.shape[:2], (rows - 1) * stride[0] + 1, (columns - 1) * stride[1] + 1)
        spread[:, :, :: stride[0], :: stride[1]] = input
        padding = []
        for axis in (1, 0):  # as F.pad wants it, the last axis first
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            before = reach - conv.padding[axis]  # type: ignore[operator]
            padding += [before, output.size(axis + 2) + reach - spread.size(axis + 2) - before]
        spread = F.pad(spread, padding)
    return ConvCall(conv, spread, weight, conv.bias, (1, 1), (0, 0), conv.dilation, groups)  # type: ignore[arg-type]


def _arguments_of_conv2d(conv: _ConvNd, input: Tensor) -> tuple:
    """With what ``conv.forward(input)`` calls conv2d: input, weight, bias, stride, padding, dilation, groups."""
    try:
        with _StopAtConv2d():
            type(conv).forward(conv, input.detach())
    except _AtConv2d as stop:
        return stop.arguments
    raise RuntimeError(f'{type(conv).__name__} did not call conv2d')


class _AtConv2d(Exception):
    def __init__(self, arguments: tuple) -> None:
        self.arguments = arguments


class _StopAtConv2d(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.conv2d:
            raise _AtConv2d(args)
        return function(*args, **(kwargs or {}))


class _Remembered:
    """A call of a convolution. It keeps the input alive, because nothing else may until the norm is called."""

    def __init__(self, conv: _ConvNd, input: Tensor, output: Tensor) -> None:
        self._conv, self._input = weakref.ref(conv), input
        self._output, self._version = weakref.ref(output), version_of(output)

    def claim(self, output: Tensor) -> tuple[_ConvNd, Tensor] | None:
        """The convolution and its input; None if the call did not return ``output`` as it is now."""
        conv = self._conv()
        if conv is None or not _same(self._output(), output) or self._version != version_of(output):
            return None
        return conv, self._input


class _Calls(threading.local):
    """The calls on this thread that norms may claim."""

    def __init__(self) -> None:
        #: The last one. A norm follows its convolution at once, so this is enough, and keeps one input alive at most.
        self.last: _Remembered | None = None
        #: The last one of each convolution that a norm was told: others may be called in between.
        self.of_told: weakref.WeakKeyDictionary[_ConvNd, _Remembered] = weakref.WeakKeyDictionary()


_calls = _Calls()
# The finders in training of each convolution that they were told.
_told: weakref.WeakKeyDictionary[_ConvNd, 'weakref.WeakSet[ConvFinder]'] = weakref.WeakKeyDictionary()


class _Traced:
    """The last call in what torch.compile makes a graph of. Only the compiler looks at it. The graph itself leaves here
    a call that no norm has claimed.

    The last call of each convolution that a norm was told has an attribute of its own, because others may be called in
    between.
    """

    call: tuple[_ConvNd, Tensor, Tensor] | None = None


_traced = _Traced()


def _attribute_of(told: _ConvNd) -> str:
    return f'call_of_{id(told)}'


@outside_graphs
def remember_call(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: remember this call if ``module`` is a convolution."""
    if not isinstance(module, _ConvNd):
        return
    input = args[0] if args else next(iter(kwargs.values()), None)
    if not (isinstance(input, Tensor) and isinstance(output, Tensor)):  # as a partial convolution, which has a mask
        return
    if is_compiling():
        _traced.call = module, input, output
        if _told.get(module):
            setattr(_traced, _attribute_of(module), _traced.call)
        return
    _calls.last = _Remembered(module, input, output)
    if _told.get(module):
        _calls.of_told[module] = _calls.last


def claim_call(output: Tensor, told: _ConvNd | None = None) -> tuple[_ConvNd, Tensor] | None:
    """The convolution whose last call on this thread returned ``output``, and the input of that call.

    Args:
        output: What it returned.
        told: The convolution that the norm was told, if it was. After its call there may have been others.

    Returns:
        None if another call was the last one, if the call was not remembered, or if ``output`` was modified in place.
    """
    if is_compiling():
        if told is None:
            traced, _traced.call = _traced.call, None
        else:
            traced = getattr(_traced, _attribute_of(told), None)
            setattr(_traced, _attribute_of(told), None)
        return None if traced is None or traced[2] is not output else traced[:2]
    call = _calls.last if told is None else _calls.of_told.get(told)
    found = None if call is None else call.claim(output)
    if found is None:
        return None
    _calls.of_told.pop(found[0], None)
    if call is _calls.last:
        _calls.last = None
    return found


def weight_of(conv: nn.Module | None) -> Tensor | None:
    """The weight parameter of ``conv``; None without one. Unlike ``conv.weight``, no parametrization computes it."""
    return None if conv is None else conv._parameters.get('weight')


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return -1 if tensor.is_inference() else tensor._version  # a tensor of inference mode has none


def _same(returned: Tensor | None, output: Tensor) -> bool:
    """Whether ``output`` is ``returned``, or a view of all of it, which a full backward hook makes."""
    if returned is output or returned is None:
        return returned is output
    return output._base is returned and (output.shape, output.stride()) == (returned.shape, returned.stride())


class ConvFinder:
    """Finds the convolution, or convolutions, that feed one norm.

    It is copied and pickled with the model, and keeps what it knows.

    Args:
        conv: The convolution that feeds the norm. None to find it in training.

    Attributes:
        told: ``conv``.
    """

    def __init__(self, conv: _ConvNd | None = None) -> None:
        # The convolutions known, each with the handle of its hook while the norm is in training.
        self._handles: dict[_ConvNd, RemovableHandle | None] = {} if conv is None else {conv: None}
        self.told = conv
        self._settled = conv is not None
        self._in_training = False
        # Those that were seen since it has watched all convolutions, and whether one of them was not known.
        self._seen: set[_ConvNd] = set()
        self._has_new = False

    @property
    def convs(self) -> list[_ConvNd]:
        """The convolutions known."""
        return list(self._handles)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy must watch as its original does, or it misses the convolution in its first forward.
        self.__dict__.update(state)
        if self._in_training:
            self._join()

    def __del__(self) -> None:
        # The norm may have been replaced by one that knows nothing of this.
        for handle in self.__dict__.get('_handles', {}).values():
            if handle is not None:
                handle.remove()

    def start(self) -> None:
        """The norm is in training from now on."""
        self._in_training = True
        for conv, handle in self._handles.items():
            if handle is None:
                self._handles[conv] = conv.register_forward_hook(remember_call, prepend=True, with_kwargs=True)
        self._join()

    def _join(self) -> None:
        if self.told is not None:
            _told.setdefault(self.told, weakref.WeakSet()).add(self)
        elif not self._settled:
            watch.add(self)

    def stop(self) -> None:
        """The norm is no longer in training."""
        self._in_training = False
        for conv, handle in self._handles.items():
            if handle is not None:
                handle.remove()
                self._handles[conv] = None
        if self.told is not None:
            _told.get(self.told, weakref.WeakSet()).discard(self)
            _calls.of_told.pop(self.told, None)
        watch.discard(self)

    def find(self, output: Tensor) -> tuple[_ConvNd, Tensor] | None:
        """The convolution that has just returned ``output``, and its input.

        Returns:
            None if it is none of those known. The next forward finds it.

        Raises:
            LookupError: No convolution has just returned ``output``.
        """
        claimed = claim_call(output, self.told)
        if is_compiling() and claimed is not None:
            return claimed  # the graph keeps it
        if claimed is None:
            if self.told is not None or self in watch:
                raise LookupError
            self._settled = False
            self.start()
            return None
        conv, input = claimed
        if conv not in self._handles:
            self._handles[conv] = None
            self._has_new = True
            self.start()
        elif not self._settled and self._has_new and conv in self._seen:
            self._settle()
        if not self._settled:
            self._seen.add(conv)
        return conv, input

    def _settle(self) -> None:
        """Watch no longer. One of the convolutions has come round again, so probably all were seen that feed the norm.

        If another one comes after all, the norm watches again until that one has come.
        """
        for conv in self._handles.keys() - self._seen:  # which have been replaced
            handle = self._handles.pop(conv)
            if handle is not None:
                handle.remove()
        self._settled, self._has_new = True, False
        self._seen.clear()
        watch.discard(self)


class Watch:
    """Remembers the calls of all convolutions while a finder needs it.

    Attributes:
        finders: Those that do not know their convolution yet.
    """

    def __init__(self) -> None:
        self.finders: weakref.WeakSet[ConvFinder] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def __contains__(self, finder: ConvFinder) -> bool:
        return finder in self.finders

    def add(self, finder: ConvFinder) -> None:
        self.finders.add(finder)
        if self._handle is None:
            self._handle = register_hook_on_all(self._remember_call)

    def discard(self, finder: ConvFinder) -> None:
        self.finders.discard(finder)
        self.end_if_idle()

    def keep_only(self, finders: Iterable[ConvFinder]) -> None:
        """Forget all others."""
        self.finders &= set(finders)
        self.end_if_idle()

    def end_if_idle(self) -> None:
        """Take the hook away if nobody needs it."""
        if self._handle is not None and not self.finders:
            self._handle.remove()
            self._handle = None
            _calls.last = None  # it may be of a model that has no norm of ours

    def _remember_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not is_compiling():
            self.end_if_idle()  # the last finder may have been deleted
        remember_call(module, args, kwargs, output)


watch = Watch()


def why_unsupported(conv: _ConvNd) -> str | None:
    """Why compensation cannot handle ``conv``, to follow "because"; None if it can."""
    name, forward = type(conv).__name__, type(conv).forward
    if isinstance(conv, nn.ConvTranspose2d):
        kind, is_known = 'ConvTranspose2d', forward in _TRANSPOSED_FORWARDS
    elif isinstance(conv, nn.Conv2d):
        kind, is_known = 'Conv2d', forward in _PLAIN_FORWARDS or forward in _PREPARING_FORWARDS
        is_known = is_known and type(conv)._conv_forward is nn.Conv2d._conv_forward
    else:
        return f'it is a {name}, not a torch.nn.Conv2d or ConvTranspose2d'
    if 'forward' in vars(conv) or '_conv_forward' in vars(conv):
        return f'the forward of this {name} has been replaced'
    if not is_known:
        return f'{name} does not compute what torch.nn.{kind} does'
    if weight_of(conv) is None:
        return 'its weight is computed anew in each forward (a parametrization, weight or spectral norm)'
    return None
