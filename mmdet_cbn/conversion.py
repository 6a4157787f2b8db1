"""Turning the normalizers of a built model into others, in place."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = TypeVar('Norm', bound=_BatchNorm)


def active_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalizers of ``model`` that a training step would feed with statistics of the batch, by name.

    Those are left out that ``model.train()`` itself puts into evaluation (mmdet's ``norm_eval`` and ``frozen_stages``),
    and those that are in evaluation while the model is in training. The modes of all modules stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    active = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and (modes[module] or not modes[model])
    }
    for module, mode in modes.items():
        if next(module.children(), None) is None:
            module.train(mode)  # not the attribute alone: a CBN has more to do
        else:
            module.training = mode
    return active


def under(prefixes: str | Sequence[str] | None, norms: Mapping[str, Norm], owner: str) -> Mapping[str, Norm]:
    """Those of ``norms`` that are, or lie in, one of the modules named by ``prefixes``; all for None.

    Args:
        prefixes: A name or several, as in ``named_modules``: ``'roi_head.bbox_head'``.
        norms: Normalizers by name.
        owner: Who was given the argument, for the error message.

    Raises:
        ValueError: There are none, or none under one of the prefixes.
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


def become(layer: nn.Module, other: nn.Module) -> None:
    """Turn ``layer`` into what ``other`` is, but with the parameters, buffers, hooks and mode that it has.

    In place, as torch's lazy modules do it: whatever holds the layer, its parameters or its buffers (a list in its
    parent, the optimizer, DistributedDataParallel) keeps holding the right thing.

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
