"""Trainings that are only looked at."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner


def runner_for_training_alone(
    config_file: Path, cfg_options: dict[str, Any] | None, work_dir: Path, hooks: Iterable[Hook]
) -> Runner:
    """A runner that trains a config with further hooks, without evaluation and checkpoints."""
    config = Config.fromfile(config_file)
    config.merge_from_dict(cfg_options or {})
    config.work_dir = str(work_dir)
    config.default_hooks.checkpoint = None
    for split in ('val', 'test'):
        for key in ('dataloader', 'cfg', 'evaluator'):
            config[f'{split}_{key}'] = None
    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    return runner
