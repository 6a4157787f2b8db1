"""CBN under ``torch.compile``: the compiler does not look into what depends on a layer's past.

That part is an operator. So the layer breaks no graph, and the compiler makes no new graph when the window fills or
turns. While a graph is made, it is settled which convolution feeds the layer. The normalization itself, forward and
backward, is compiled. With torch < 2.13 the layer is no part of a graph in training, and nothing here is called.
"""

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from ..old_torch import custom_op, is_compiling
from ..pairing import ConvCall
from .gradient import StatisticsGradient, has_fraction, has_slopes, number_of_patches
from .statistics import Running, statistics_dtype

# An operator takes tensors and numbers, so modules have numbers. A copy of a module has another number.
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_next = count()

# Tensors may come as the compiler has laid them out, and a CUDA graph must not record and repeat the operators.
_TAGS = [getattr(torch.Tag, name) for name in ('flexible_layout', 'cudagraph_unsafe') if hasattr(torch.Tag, name)]


@torch.compiler.assume_constant_result
def number_of(module: nn.Module) -> int:
    """The number of a module. A graph keeps it for as long as it is called with this very module."""
    number = _numbers.setdefault(module, next(_next))
    _modules[number] = module
    return number


@torch.compiler.assume_constant_result
def eps_of(norm: Any) -> float:
    """``norm.eps``, which a graph keeps. With ``dynamic=True`` the attribute would be a symbol, and torch 2.13 fails to
    give a symbol to the autograd function of a second call."""
    return norm.eps


def opaque_to_compiler(method: Callable) -> Callable:
    """Make a step of CBN one operator in a compiled graph. Otherwise it is called as it is.

    Args:
        method: ``(layer, x, conv, running)`` to ``(mean, var, gradient, call)``.
    """

    @wraps(method)
    def step(layer: Any, x: Tensor, conv: ConvCall | None, running: Running) -> tuple:
        if not is_compiling():
            return method(layer, x, conv, running)
        tensors: list[Tensor | None] = [None] * 3
        settings = [-1]
        if conv is not None:
            tensors = [conv.input, conv.weight, conv.bias]
            settings = [number_of(conv.module), *conv.stride, *conv.padding, *conv.dilation, conv.groups]
        is_learning = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, layer.weight, layer.bias)
        )
        number = number_of(layer)
        slope_shape: list[int] = []
        patches = number_of_patches(layer.gradient, layer.window_size)
        if conv is not None and has_slopes(layer.gradient, conv.weight):
            slope_shape = list(conv.weight.shape)
        members_of = has_fraction(layer.gradient), slope_shape, patches, layer.gradient == 'projection'
        with torch.no_grad():
            mean, var, *gradient = _step_operator(x, *tensors, *running, number, settings, is_learning, *members_of)
        # An operator returns no None.
        members = [None if tensor.numel() == 0 else tensor for tensor in gradient]
        return mean, var, StatisticsGradient(*members), number

    return step


# The operator names what it changes, so that the calls of one layer stay in their order.
@custom_op(
    'mmdet_cbn::window_statistics',
    mutates_args=('running_mean', 'running_var', 'num_batches_tracked'),
    tags=_TAGS,
)
def _step_operator(
    x: Tensor,
    conv_input: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    layer: int,
    conv: list[int],
    is_learning: bool,
    has_fraction: bool,
    slope_shape: list[int],
    patches: int,
    projects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A step of CBN in a graph.

    Args:
        x: Output of the convolution, [N, C, H, W].
        conv_input: The tensors of :class:`ConvCall`; None if no convolution is needed.
        conv_weight: As before.
        conv_bias: As before.
        running_mean: Buffers of the layer.
        running_var: Buffers of the layer.
        num_batches_tracked: Buffers of the layer.
        layer: Number of the layer.
        conv: Number of the convolution, and its stride, padding, dilation and groups, if there is a ``conv_input``.
        is_learning: Whether a backward pass may follow.
        has_fraction: Whether the layer's gradient has a fraction. Only the compiler looks at this and what follows.
        slope_shape: Of the weight; empty if it receives no gradient from the layer.
        patches: How many patches that gradient has.
        projects: Whether the gradient has mean and variance of the batch.

    Returns:
        Mean, variance, and the members of :class:`StatisticsGradient`, which are empty for None.
    """
    norm: Any = _modules[layer]
    found: ConvCall | None = None
    if conv_input is not None and conv_weight is not None:
        module: Any = _modules[conv[0]]
        weight = conv_weight.detach().requires_grad_(bool(slope_shape))  # which asks for its slopes
        found = ConvCall(
            module, conv_input, weight, conv_bias, (conv[1], conv[2]), (conv[3], conv[4]), (conv[5], conv[6]), conv[7]
        )
    mean, var, made, call = norm.window_step(x, found, Running(running_mean, running_var, num_batches_tracked))
    norm.windows.iteration.compiled_call = call if is_learning else None
    members = [var.new_empty(0) if tensor is None else tensor.contiguous() for tensor in made]
    members[4:] = [tensor.clone() for tensor in members[4:]]  # while the window is empty, these are mean and var
    return mean, var, *members


@_step_operator.register_fake
def _(x: Tensor, conv_input: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    has_fraction, slope_shape, patches, projects = others[-4:]
    of_channels, none = [x.size(1)], [0]
    fraction = of_channels if has_fraction else none
    slopes = [none] * 3
    if slope_shape:
        assert conv_input is not None
        slopes = [slope_shape, [patches, conv_input.size(1), *slope_shape[2:]], [2, patches, *of_channels]]
    batch = of_channels if projects else none
    shapes = [of_channels, of_channels, fraction, *slopes, batch, batch]
    return tuple(x.new_empty(shape, dtype=statistics_dtype(x)) for shape in shapes)


@custom_op('mmdet_cbn::note_backward', mutates_args=(), tags=_TAGS)
def note_backward(var: Tensor, dy: Tensor, layer: int) -> Tensor:
    """Tell a layer that the backward pass, with ``dy``, has reached it. Returns a copy of ``var``."""
    norm: Any = _modules[layer]
    if norm.windows.iteration.compiled_call is not None:
        norm.windows.iteration.compiled_call.note_backward()
    return var.clone()


@note_backward.register_fake
def _(var: Tensor, dy: Tensor, layer: int) -> Tensor:
    return torch.empty_like(var)
