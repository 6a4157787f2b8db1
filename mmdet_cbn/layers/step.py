"""What surrounds the statistics of one training step: precision, checkpointed blocks and warnings."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from ..compensation import Moved
from ..old_torch import is_autocast_enabled
from ..pairing import ConvCall
from ..window.calls import Call, is_recomputing
from .gradient import StatisticsGradient
from .statistics import Running


class WindowStep(NamedTuple):
    """What one training step of a CBN layer has computed. All but ``x`` have the precision of the statistics."""

    x: Tensor  #: the layer's input, [N, C, H, W]
    conv: ConvCall | None  #: the call that made ``x``; None if the layer needs no convolution
    mean: Tensor  #: of the batch, [C]
    var: Tensor  #: of the batch, biased, [C]
    old: Any  #: what the window kept of n earlier iterations, stacked; None if there are none
    past: Moved | None  #: mean and variance of these under the current weights, [n, C] each
    window_mean: Tensor  #: without the bias of the convolution, [C]
    biased_window_mean: Tensor  #: with the current bias of the convolution, [C]
    window_var: Tensor  #: [C]
    fraction: Tensor  #: of the window that is the current iteration, [C]
    gradient: StatisticsGradient  #: for the backward pass


_CachingMode: Any = getattr(checkpoint, '_CachingTorchDispatchMode', ())  # an old torch has no such mode


def _outside_selective_checkpointing() -> AbstractContextManager:
    """Keep operators from torch's selective activation checkpointing.

    It hands their outputs to the second run of a block, one by one, and that run leaves the statistics out.
    """
    is_selective = isinstance(_get_current_dispatch_mode(), _CachingMode)
    return _pop_mode_temporarily() if is_selective else nullcontext()


def once_per_step(method: Callable) -> Callable:
    """Run a layer's step once for each call, without gradients and in full precision.

    A checkpointed block runs again in the backward pass. Then the statistics of the first run are used again, and the
    layer does not change.

    Args:
        method: ``(layer, x, conv, running)`` to a :class:`WindowStep`. It changes the window.

    Returns:
        ``(layer, x, conv, running)`` to mean, bias included, variance, gradient and the call.
    """

    @wraps(method)
    def step(
        layer: Any, x: Tensor, conv: ConvCall | None, running: Running
    ) -> tuple[Tensor, Tensor, StatisticsGradient, Call]:
        module = None if conv is None else conv.module
        windows = layer.windows
        if is_recomputing():
            return *windows.iteration.recall(layer, x.shape, module), Call()
        call = windows.begin_call(module)
        was_empty = len(windows.current) == 0
        device = x.device.type
        # It takes as long as some of the statistics, so it is made only where autocast is on.
        full_precision = torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), full_precision, _outside_selective_checkpointing():
            made: WindowStep = method(layer, x, conv, running)
        if windows.has_dropped or (made.past is None and not was_empty):
            layer.warn_once('its window has statistics of another convolution, which are dropped')
        result = made.biased_window_mean, made.window_var, made.gradient
        windows.iteration.note(x.shape, module, result)
        return *result, call

    return step
