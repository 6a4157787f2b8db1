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
# Where the data lie, how they are loaded, and what CBNBurnInHook saves and logs does not decide.
_INDIFFERENT = {
    '_scope_',
    'ann_file',
    'backend_args',
    'data_root',
    'diagnostics',
    'num_workers',
    'persistent_workers',
    'pin_memory',
    'prefetch_factor',
    'save_window',
}
# Nor do the hooks that only save, log and draw.
_INDIFFERENT_HOOKS = {'checkpoint', 'logger', 'timer', 'visualization'}


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a config that decide on the result, by dotted key."""
    decisive = {key: config[key] for key in _DECISIVE if config.get(key) is not None}
    if not decisive.get('auto_scale_lr', {}).get('enable'):
        decisive.pop('auto_scale_lr', None)
    return {key: value for key, value in _flatten(decisive) if decides(key)}


def decides(key: str) -> bool:
    """Whether the setting of a dotted key decides on the result."""
    first, *others = key.split('.')
    if first == 'default_hooks' and others and others[0] in _INDIFFERENT_HOOKS:
        return False
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
        yield from _flatten(item, f'{prefix}.{key}' if prefix else str(key))
