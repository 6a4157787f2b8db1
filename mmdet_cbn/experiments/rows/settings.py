"""Which settings of a training decide on its result."""

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.config import Config

_DECISIVE = (
    'model',
    'data_preprocessor',
    'train_dataloader',
    'val_dataloader',
    'test_dataloader',
    'val_evaluator',
    'test_evaluator',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'custom_hooks',
    'default_hooks',
    'auto_scale_lr',
    'sync_bn',
    'load_from',
)
# Where the data lie and how they are loaded does not decide.
_INDIFFERENT = {
    '_scope_',
    'ann_file',
    'backend_args',
    'data_root',
    'num_workers',
    'persistent_workers',
    'pin_memory',
    'prefetch_factor',
}
# Nor do the hooks that only save, log and draw.
_INDIFFERENT_HOOKS = {'checkpoint', 'logger', 'timer', 'visualization'}


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a config that decide on the result, by dotted key."""
    decisive = {key: config[key] for key in _DECISIVE if config.get(key) is not None}
    if not decisive.get('auto_scale_lr', {}).get('enable'):
        decisive.pop('auto_scale_lr', None)
    hooks = decisive.get('default_hooks', {})
    decisive['default_hooks'] = {key: hook for key, hook in hooks.items() if key not in _INDIFFERENT_HOOKS}
    return dict(_flatten(decisive))


def decides(option: str) -> bool:
    """Whether an option ``KEY=VALUE`` for a config decides on the result."""
    first, *others = option.partition('=')[0].split('.')
    if first == 'default_hooks':
        return not others or others[0] not in _INDIFFERENT_HOOKS
    return first in _DECISIVE and not _INDIFFERENT.intersection(others)


def _flatten(value: Any, prefix: str = '') -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in items:
        if key not in _INDIFFERENT:
            yield from _flatten(item, f'{prefix}.{key}' if prefix else str(key))
