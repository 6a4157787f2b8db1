"""Turning the normalizers of a built model into others, in place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = TypeVar('Norm', bound=_BatchNorm)


def active_norms(model: nn.Module, kind: type[Any] | tuple[type[Any], ...] = _BatchNorm) -> dict[str, Any]:
    """The batch normalizers of ``model``, of a ``kind``, that use statistics of the batch in a training step, by name.

    This leaves out those that ``model.train()`` itself puts into evaluation (mmdet's ``norm_eval`` and
    ``frozen_stages``), and those that are in evaluation while the model is in training. The modes of all modules stay
    as they are.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    active = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and module.training and (modes[module] or not modes[model])
    }
    for module, mode in modes.items():
        if isinstance(module, _BatchNorm) or next(module.children(), None) is None:
            module.train(mode)  # not the attribute alone: a CBN has more to do
        else:
            module.training = mode
    return active


def as_leaf(norm: nn.Module, input: torch.fx.Proxy) -> Any:
    """What ``torch.fx`` records of a call of ``norm``: the module, as for BatchNorm, and not what it does."""
    tracer: Any = input.tracer
    return tracer.create_proxy('call_module', tracer.path_of_module(norm), (input,), {})


def select(norms: Mapping[str, Norm], prefixes: str | Sequence[str] | None, owner: str) -> Mapping[str, Norm]:
    """The normalizers in the modules that ``prefixes`` names; all for None.

    Args:
        norms: Normalizers by name.
        prefixes: A name or several, as in ``named_modules``: ``'roi_head.bbox_head'``.
        owner: Who was given the argument, for the error message.

    Raises:
        ValueError: There are none, or a named module has none.
    """
    if prefixes is None:
        if not norms:
            raise ValueError(f'{owner}: the model has no such normalizer in training')
        return norms
    found: dict[str, Norm] = {}
    for prefix in [prefixes] if isinstance(prefixes, str) else prefixes:
        matches = {name: norm for name, norm in norms.items() if f'{name}.'.startswith(f'{prefix}.')}
        if not matches:
            raise ValueError(
                f'{owner}: prefixes must name modules that have such a normalizer in training, got {prefix!r}; '
                f'the model has them in {sorted({name.rpartition(".")[0] for name in norms})}'
            )
        found.update(matches)
    return found


def convert_all(layers: Iterable[Norm], make: Callable[[Norm], nn.Module]) -> None:
    """Give each layer the type and the settings of what ``make`` returns for it (:func:`convert_in_place`).

    Each has a random stream of its own for ``samples``. No other random stream is touched.
    """
    with torch.random.fork_rng(devices=[]):
        for layer in layers:
            torch.rand((), device='cpu')
            convert_in_place(layer, make(layer))


def convert_in_place(layer: nn.Module, other: nn.Module) -> None:
    """Give ``layer`` the type and the settings of ``other``. It keeps its parameters, buffers, hooks and mode.

    As with torch's lazy modules, whatever holds the layer, its parameters or its buffers keeps holding the right
    thing: a list in its parent, the optimizer, DistributedDataParallel.

    Raises:
        ValueError: The two have parameters or buffers of other names.
    """
    for kind in ('_parameters', '_buffers'):
        ours, theirs = (
            [name for name, own in vars(module)[kind].items() if own is not None] for module in (layer, other)
        )
        if ours != theirs:
            raise ValueError(
                f'a {type(layer).__name__} cannot become a {type(other).__name__}: '
                f'the one has {", ".join(ours) or "none"}, the other {", ".join(theirs) or "none"}'
            )
    mode = layer.training
    layer.eval()  # a CBN lets go of its convolution
    kept = {name: vars(layer)[name] for name in vars(nn.Module())}
    vars(layer).clear()
    vars(layer).update(vars(other), **kept)
    layer.__class__ = type(other)
    layer.train(mode)
