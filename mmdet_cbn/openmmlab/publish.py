"""A config and a checkpoint for machines without this package: the same model, with BatchNorm."""

from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch import nn

from .with_norm import with_norm

_PACKAGE = __name__.partition('.')[0]
_OF_EVALUATION = ('eps', 'affine', 'track_running_stats', 'bias')
_OF_BATCH_NORM = ('requires_grad', 'momentum', *_OF_EVALUATION)
_LEFT_OUT = object()


def plain_config(config: Config) -> Config:
    """A config that does without this package.

    Each normalizer of this package becomes BN, which computes the same in evaluation. A model in ``WithNorm`` comes out
    of it, with the BatchNorm that it has of its own. The hooks of this package go, and so does its import.

    Args:
        config: Of a model. It does not change.

    Raises:
        ValueError: It has something else of this package, or ``WithNorm`` with a normalizer that is not the model's own
            BatchNorm in evaluation.
    """
    plain = _plain(config.to_dict())
    custom = plain.pop('custom_imports', {})
    imports = custom.get('imports', [])
    imports = [imports] if isinstance(imports, str) else imports
    others = [name for name in imports if name.partition('.')[0] != _PACKAGE]
    if others:
        plain['custom_imports'] = {**custom, 'imports': others}
    return Config(plain)


def plain_checkpoint(checkpoint: dict[str, Any], config: Config) -> dict[str, Any]:
    """The weights of a checkpoint, without the optimizer and the training log: nothing but plain data.

    Args:
        checkpoint: As mmengine saves it.
        config: Of :func:`plain_config`. mmdet's ``DetInferencer`` takes it, if it is given the checkpoint alone.

    Raises:
        ValueError: There are no weights in it.
    """
    if 'state_dict' not in checkpoint:
        raise ValueError(f'a checkpoint of mmengine has a state_dict, but this has {", ".join(map(str, checkpoint))}')
    meta = checkpoint.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter') if key in meta}
    return dict(meta={**kept, 'cfg': config.pretty_text}, state_dict=checkpoint['state_dict'])


def _plain(value: Any) -> Any:
    """``value`` of a config with BN for our normalizers; what is left out is :data:`_LEFT_OUT`."""
    if isinstance(value, list | tuple):
        return type(value)(item for item in map(_plain, value) if item is not _LEFT_OUT)
    if not isinstance(value, dict):
        return value
    found = _registered_of_ours(value.get('type'))
    if found is None:
        items = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _LEFT_OUT}
    if found is with_norm:
        norm_cfg = _plain(value['norm_cfg'])
        if norm_cfg.get('type') != 'BN' or any(key in norm_cfg for key in _OF_EVALUATION):
            raise ValueError(
                f'{_PACKAGE} is needed for WithNorm, unless its norm_cfg is of BatchNorm, CBN or BRN, and has none of '
                f'{", ".join(_OF_EVALUATION)}; it is {value["norm_cfg"]}'
            )
        others = {key: item for key, item in value.items() if key not in ('type', 'model', 'norm_cfg')}
        return _plain({**others, **value['model']})
    if isinstance(found, type) and issubclass(found, nn.BatchNorm2d):
        return {'type': 'BN', **{key: value[key] for key in _OF_BATCH_NORM if key in value}}
    if isinstance(found, type) and issubclass(found, Hook):
        return _LEFT_OUT
    raise ValueError(f'{_PACKAGE} is needed for {found.__name__}, which the config has')


def _registered_of_ours(kind: Any) -> Any:
    """The class or function that a config calls ``kind``, if this package has it."""
    found = kind
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as models:  # of the default scope, as mmengine builds
            found = models.get(kind) or HOOKS.get(kind)
    return found if str(getattr(found, '__module__', '')).partition('.')[0] == _PACKAGE else None
