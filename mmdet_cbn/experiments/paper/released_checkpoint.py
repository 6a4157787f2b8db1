"""Converts checkpoints of the authors' released code (mmdetection of 2019) to the names and class order of mmdet 3.

mmdet's own ``upgrade_model_version.py`` is not called: it drops the wrong end of the biases of ``fc_reg`` and
``conv_logits`` and shifts the bias of ``rpn_cls``, and it knows nothing of CBN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

Shape = tuple[int, ...]

_EPS = 1e-5  # of the authors' layer, of mmcv's build_norm_layer and of CBN
_CHANNELS_PER_CLASS = {'fc_reg': 4, 'conv_logits': 1}


@dataclass(frozen=True)
class Report:
    """Which keys of a checkpoint found a place in a model. ``str`` gives one line per unmatched key.

    Attributes:
        placed: Number of keys of the model that got a value.
        leftover: Keys of the checkpoint that have no place in the model, and their shapes.
        missing: Keys of the model that got nothing, and their shapes.
        mismatched: Keys of the model, and the shapes in the checkpoint and in the model, which do not fit.
        inexact: Keys of variances so small that BatchNorm adds more to them than the authors' layer does, and in how
            many channels; these are 0 now, and their outputs are smaller than in the released model.
    """

    placed: int
    leftover: dict[str, Shape]
    missing: dict[str, Shape]
    mismatched: dict[str, tuple[Shape, Shape]]
    inexact: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether the converted checkpoint loads strictly."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        lines = [
            f'{self.placed} keys of the model filled, {len(self.missing)} missing, {len(self.mismatched)} of another '
            f'shape; {len(self.leftover)} keys of the checkpoint left over'
        ]
        lines += (f'missing: {key} {list(shape)}' for key, shape in self.missing.items())
        for key, (released, shape) in self.mismatched.items():
            lines.append(f'of another shape: {key} {list(released)} in the checkpoint, {list(shape)} in the model')
        lines += (f'left over: {key} {list(shape)}' for key, shape in self.leftover.items())
        lines += (f'too small to carry over exactly: {key}, {n} channels' for key, n in self.inexact.items())
        return '\n'.join(lines)


def model_shapes(config: Config) -> dict[str, Shape]:
    """The shape of each entry of the state dict of ``config``'s model. No weights are made.

    Raises:
        ValueError: ``config`` describes no model.
    """
    if 'model' not in config:
        raise ValueError(f'{config.filename} describes no model')
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')), torch.device('meta'):
        model = MODELS.build(config.model)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def convert_checkpoint(checkpoint: Any, shapes: Mapping[str, Shape]) -> tuple[dict[str, Any], Report]:
    """Convert a checkpoint of the authors' code to mmdet 3.

    Args:
        checkpoint: As loaded: a state dict, or a dict with one under ``'state_dict'`` and perhaps ``'meta'``; with
            or without the ``module.`` of DataParallel. It is not changed.
        shapes: Of the model that is to load the result, from :func:`model_shapes`.

    Returns:
        The result, which holds the state dict and the class names, but no optimizer: it can be tested and trained on,
        not resumed. And the report; unless that is complete, the result is too little for the model.

    Raises:
        ValueError: ``checkpoint`` holds no state dict, or one of mmdetection 2.0 or later.
    """
    released = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(released, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in released.items()
    ):
        raise ValueError('the checkpoint holds no state dict')
    if all(name.startswith('module.') for name in released):
        released = {name.removeprefix('module.'): value for name, value in released.items()}
    if any(name.startswith('roi_head.') for name in released):
        raise ValueError('the checkpoint is one of mmdetection 2.0 or later: it has keys roi_head.*')
    state_dict, report = convert_state_dict(released, shapes)

    meta = checkpoint.get('meta')
    classes = meta.get('CLASSES') if isinstance(meta, Mapping) else None
    kept: dict[str, Any] = {}
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        kept = dict(dataset_meta=dict(classes=tuple(classes)))  # where mmdet 3 looks for them
    return dict(meta=kept, state_dict=state_dict), report


def convert_state_dict(released: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> tuple[dict[str, Tensor], Report]:
    """Convert a state dict of the authors' code to the names and class order of mmdet 3.

    The heads go into ``roi_head``; the background goes from the first class to the last, and box regression and masks
    lose it. The authors' CBN, known by its lack of ``num_batches_tracked``, divides by sqrt(var) + eps; its variance is
    changed such that BatchNorm's sqrt(var + eps) comes to the same.

    Args:
        released: Weights by their names of 2019.
        shapes: Of the model that is to load the result, from :func:`model_shapes`.

    Returns:
        The entries for the keys of ``shapes`` that have one of the right shape, in that order, and the report.
    """
    state_dict: dict[str, Tensor] = {}
    missing, mismatched, inexact = {}, {}, {}
    for key, shape in shapes.items():
        name = key.removeprefix('roi_head.')
        layer, _, entry = name.rpartition('.')
        of_cbn = f'{layer}.running_var' in released and f'{layer}.num_batches_tracked' not in released
        if of_cbn and entry == 'num_batches_tracked':
            state_dict[key] = torch.tensor(0)
            continue
        if name not in released:
            missing[key] = shape
            continue
        value = _in_class_order(layer, released[name].detach())
        if of_cbn and entry == 'running_var':
            var = (value.double().sqrt() + _EPS).square() - _EPS
            if negative := int((var < 0).sum()):
                inexact[key] = negative
            value = var.clamp(min=0).to(value.dtype)
        if value.shape == shape:
            state_dict[key] = value
        else:
            mismatched[key] = tuple(released[name].shape), shape
    known = {key.removeprefix('roi_head.') for key in shapes}
    leftover = {name: tuple(value.shape) for name, value in released.items() if name not in known}
    return state_dict, Report(len(state_dict), leftover, missing, mismatched, inexact)


def _in_class_order(layer: str, value: Tensor) -> Tensor:
    """Weight [channels, ...] or bias [channels] of ``layer`` in the order of classes of mmdet 3."""
    kind = layer.rpartition('.')[-1]
    if kind == 'fc_cls':
        return value.roll(-1, dims=0)
    channels = _CHANNELS_PER_CLASS.get(kind)
    # A class-agnostic layer has the channels of one class and no background. rpn_cls, a sigmoid, has none either.
    if channels is None or len(value) == channels:
        return value
    return value[channels:].clone()  # torch.save would write what a view leaves out, too
