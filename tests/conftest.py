"""What several test files share: drawn images, and configs cut down to seconds."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_cbn.shapes import write_shapes

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'


@pytest.fixture(autouse=True, scope='session')
def _few_threads():
    """The layers of the tests are so small that more threads only wait for each other."""
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(autouse=True)
def _no_leftover_scope():
    """Each Runner leaves a default scope behind, which the next one of the same name would complain of."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory) -> Path:
    """A few drawn images in COCO format."""
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, {'train': 8, 'val': 4}, seed=3)
    return root


@pytest.fixture
def small_config(shapes_root, tmp_path, monkeypatch):
    """Loads a config of configs/small for a run of seconds on the drawn images, logging every iteration."""
    monkeypatch.setenv('SHAPES_ROOT', str(shapes_root))

    def load(name: str, **options) -> Config:
        config = Config.fromfile(CONFIGS / 'small' / name)
        config.merge_from_dict(
            {
                'work_dir': str(tmp_path / 'work_dir'),
                'train_dataloader.num_workers': 0,
                'train_dataloader.persistent_workers': False,
                'val_dataloader.num_workers': 0,
                'val_dataloader.persistent_workers': False,
                'default_hooks.logger.interval': 1,
                'randomness': dict(seed=0),
                'log_level': 'WARNING',
                **options,
            }
        )
        config.test_dataloader = config.val_dataloader
        return config

    return load


def coco_root() -> str | None:
    """Where the user keeps COCO images, if anywhere."""
    return os.environ.get('COCO_ROOT')
