"""CBN under ``torch.compile``: what depends on a layer's past is an operator that the compiler does not look into.

So a training step has no graph break on its account, and needs no new graph when the window fills or turns. Which
convolution feeds a layer is settled while the graph is made, and the normalization itself, forward and backward, is
compiled. With torch < 2.8 a training forward of the layer is no part of a graph, and nothing here is called.
"""

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from .old_torch import custom_op
from .statistics import statistics_dtype

# An operator takes tensors and numbers: so modules have numbers. They go with the module, no copy has the same.
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_next = count()

# Tensors may come as the compiler has laid them out; and what the operators do is not to be recorded and repeated.
_TAGS = [getattr(torch.Tag, name) for name in ('flexible_layout', 'cudagraph_unsafe') if hasattr(torch.Tag, name)]


@torch.compiler.assume_constant_result
def number_of(module: nn.Module) -> int:
    """The number of a module, which the compiler takes for as long as it meets that very module."""
    number = _numbers.setdefault(module, next(_next))
    _modules[number] = module
    return number


# What it changes is named, so that the calls of one layer stay in their order.
@custom_op(
    'mmdet_cbn::window_statistics',
    mutates_args=('running_mean', 'running_var', 'num_batches_tracked'),
    tags=_TAGS,
)
def window_statistics(
    x: Tensor,
    conv_input: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    layer: int,
    conv: int,
    learning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``CBN._window_statistics`` in a graph.

    Args:
        x: Output of the convolution, [N, C, H, W].
        conv_input: Its input, [N, C_in, H, W]; None for Naive CBN.
        running_mean: Buffers of the layer.
        running_var: Buffers of the layer.
        num_batches_tracked: Buffers of the layer.
        layer: Number of the layer.
        conv: Number of the convolution, if there is a ``conv_input``.
        learning: Whether a backward pass may follow.
    """
    norm: Any = _modules[layer]
    feeding = None if conv_input is None else (_modules[conv], conv_input)
    mean, var, share, call = norm._window_statistics(x, feeding, running_mean, running_var, num_batches_tracked)
    norm._windows.iteration.compiled_call = call if learning else None
    return mean, var, share


@window_statistics.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, share = (x.new_empty(x.size(1), dtype=statistics_dtype(x)) for _ in range(3))
    return mean, var, share


@custom_op('mmdet_cbn::go_back', mutates_args=(), tags=_TAGS)
def go_back(share: Tensor, dy: Tensor, layer: int) -> Tensor:
    """Tell a layer that the backward pass has come to it, with ``dy``. ``share`` comes out as it went in."""
    norm: Any = _modules[layer]
    if norm._windows.iteration.compiled_call is not None:
        norm._windows.iteration.compiled_call.go_back()
    return share.clone()


@go_back.register_fake
def _(share: Tensor, dy: Tensor, layer: int) -> Tensor:
    return torch.empty_like(share)
