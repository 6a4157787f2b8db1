"""How a normalizer learns which convolution feeds it, and with what input, from the order of calls alone.

mmcv and mmdet call ``norm(conv(x))`` and tell the norm nothing of the convolution. So a forward hook on the convolution
remembers its last call, and the norm, called next, takes that call over if its own input is the very output of it.

Which convolutions need the hook is found out in training: as long as a norm is *watched*, every convolution called
anywhere is remembered. The norm puts the hook on the one whose output it receives, and ends the watch when it meets
that convolution again. The hook is a plain function without state, so that copies and pickles of the model keep it.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle


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
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_watch_handle: RemovableHandle | None = None


def remember_call(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a convolution that feeds a norm: remember this call."""
    if (module.training or torch.is_grad_enabled()) and isinstance(module, _ConvNd) and not output.is_inference():
        input = args[0] if args else kwargs['input']
        _last.call = _Remembered(module, input, weakref.ref(output), output._version)


def watch(norm: nn.Module) -> None:
    """Begin to remember the calls of all convolutions, on behalf of ``norm``."""
    global _watch_handle
    _watched.add(norm)
    if _watch_handle is None:
        _watch_handle = register_module_forward_hook(_watch_module, with_kwargs=True)


def unwatch(norm: nn.Module) -> None:
    """End the watch for ``norm``."""
    _watched.discard(norm)
    _end_idle_watch()


def is_watched(norm: nn.Module) -> bool:
    """Whether the calls of all convolutions are being remembered on behalf of ``norm``."""
    return norm in _watched


def _end_idle_watch() -> None:
    global _watch_handle
    if _watch_handle is not None and not _watched:
        _watch_handle.remove()
        _watch_handle = None


def _watch_module(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if isinstance(module, _ConvNd):
        _end_idle_watch()  # a watched norm may have been deleted
        remember_call(module, args, kwargs, output)


def is_followed(conv: nn.Module) -> bool:
    """Whether ``conv`` has the hook that remembers its calls."""
    return any(hook is remember_call for hook in conv._forward_hooks.values())


def follow(conv: nn.Module) -> None:
    """Put the hook that remembers its calls on ``conv``."""
    conv.register_forward_hook(remember_call, with_kwargs=True)


def take_call(output: Tensor) -> tuple[_ConvNd, Tensor] | None:
    """The convolution that returned ``output``, unchanged since, in the last call on this thread, and its input.

    Returns:
        None where the last call was another one or ``output`` has been modified in place.
    """
    call: _Remembered | None = getattr(_last, 'call', None)
    if call is None or call.output() is not output or call.version != output._version:
        return None
    _last.call = None
    return call.conv, call.input


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
