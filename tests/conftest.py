"""What several test files share: drawn images, and runs of configs cut down to seconds."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmdet_cbn.shapes import write_shapes

ROOT = Path(__file__).parents[1]


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
def build_runner(shapes_root, tmp_path, monkeypatch):
    """Builds the Runner of a config under configs/, on the drawn images or on $COCO_ROOT as the config says, without
    worker processes or pretrained weights and with a log line for each iteration. ``options`` are --cfg-options."""
    monkeypatch.setenv('SHAPES_ROOT', str(shapes_root))

    def build(name: str, evaluate: bool = True, **options) -> Runner:
        config = Config.fromfile(ROOT / 'configs' / name)
        for loader in (config.train_dataloader, config.val_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
        config.test_dataloader = config.val_dataloader
        if not evaluate:
            for split in ('val', 'test'):
                for key in ('dataloader', 'cfg', 'evaluator'):
                    config[f'{split}_{key}'] = None
        config.merge_from_dict(
            {
                'work_dir': str(tmp_path / 'work_dir'),
                'model.backbone.init_cfg': None,
                'default_hooks.logger.interval': 1,
                'randomness': dict(seed=0),
                'experiment_name': f'{tmp_path.name}-{len(list(tmp_path.rglob("*.log")))}',
                **options,
            }
        )
        return Runner.from_cfg(config)

    return build
