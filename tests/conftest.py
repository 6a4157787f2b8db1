"""What several test files share: drawn images, and runs cut down to seconds, of a tiny model and of configs."""

import json
import os
import threading
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.dataset import DefaultSampler
from mmengine.device import utils as device_utils
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.data.shapes import write_shapes
from mmdet_cbn.experiments.data.varied import write_varied

ROOT = Path(__file__).parents[1]
_runs = count()  # mmengine wants a new name for each Runner of a process


class Net(BaseModel):
    """A convolution and a norm; notes the window length of each iteration."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm or CBN(4, window_size=3)
        self.lengths = []

    def forward(self, inputs, mode='tensor'):
        y = self.norm(self.conv(torch.stack(inputs)))
        self.lengths.append(getattr(self.norm, 'window_length', None))
        return dict(loss=y.square().sum() + y.sum())


def runner_for(tmp_path, model, hook, epochs=4, batch_size=1, train_cfg=None, momentum=0.9, **kwargs):
    """A Runner that trains ``model`` on four images, which are four iterations an epoch. ``hook`` may be several."""
    generator = torch.Generator().manual_seed(0)
    images = [dict(inputs=torch.randn(3, 6, 6, generator=generator, device='cpu')) for _ in range(4)]
    return Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=images,
            batch_size=batch_size,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=train_cfg or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=momentum)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=hook if isinstance(hook, list) else [hook] if hook else [],
        experiment_name=f'tiny-{next(_runs)}',
        **kwargs,
    )


@contextmanager
def served(folder):
    """The URL under which the files of ``folder`` can be read."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()


@pytest.fixture(autouse=True, scope='session')
def _few_threads():
    """The layers of the tests are so small that more threads only wait for each other."""
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(autouse=True, scope='session')
def _metafiles_are_read_once():
    """mmengine reads all of mmdet's anew for each config that inherits from mmdet, which takes a second."""
    load = config_utils.load
    config_utils.load = cache(load)
    yield
    config_utils.load = load


@pytest.fixture(autouse=True, scope='session')
def _no_row_of_the_shell():
    """Small versions would take it."""
    os.environ.pop('CBN_ROW', None)


@pytest.fixture(params=['cpu', *(['cuda'] if torch.cuda.is_available() else [])])
def device(request):
    """Each device of this machine. What a test makes is made there, if it names no other."""
    with torch.device(request.param), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param


@pytest.fixture
def trains_on_cpu(monkeypatch):
    """Where Runners train, those of new processes too. Trainings on a GPU are not equal bit for bit."""
    monkeypatch.setattr(device_utils, 'DEVICE', 'cpu')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')


@pytest.fixture(autouse=True)
def _no_leftover_of_mmengine():
    """Each Runner leaves a default scope behind, which the next one of the same name would complain of. Some tools
    quieten the log."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    yield
    logger.setLevel(level)
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory) -> Path:
    """A few drawn images in COCO format."""
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, {'train': 8, 'val': 4}, seed=3)
    return root


@pytest.fixture(scope='session')
def varied_root(shapes_root, tmp_path_factory) -> Path:
    """Views of the drawn shapes, under the names of the study's classes."""
    source, root = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('varied')
    (source / 'annotations').mkdir()
    for split in ('train', 'val'):
        (source / f'{split}2017').symlink_to(shapes_root / f'{split}2017')
        name = f'annotations/instances_{split}2017.json'
        dataset = json.loads((shapes_root / name).read_text())
        for category, word in zip(dataset['categories'], ('RBC', 'WBC', 'Platelets'), strict=False):
            category['name'] = word
        (source / name).write_text(json.dumps(dataset))
    write_varied(source, root, variants=1)
    return root


@pytest.fixture
def build_runner(shapes_root, tmp_path, monkeypatch):
    """Builds the Runner of a config under configs/; see :func:`runner_builder`."""
    return runner_builder(shapes_root, tmp_path / 'work_dir', monkeypatch)


def runner_builder(shapes_root, work_dir, monkeypatch):
    """Builds the Runner of a config under configs/, on the drawn images or on $COCO_ROOT as the config says, without
    worker processes or pretrained weights and with a log line for each iteration. ``row`` is that of a small version,
    ``options`` are --cfg-options."""
    monkeypatch.setenv('SHAPES_ROOT', str(shapes_root))

    def build(name: str, row: str = 'faster-rcnn_r50_fpn_cbn-all_1x_coco', evaluate: bool = True, **options) -> Runner:
        monkeypatch.setenv('CBN_ROW', row)
        config = Config.fromfile(ROOT / 'configs' / name)
        for loader in filter(None, (config.train_dataloader, config.val_dataloader)):
            loader.update(num_workers=0, persistent_workers=False)
        config.test_dataloader = config.val_dataloader
        if not evaluate:
            for split in ('val', 'test'):
                for key in ('dataloader', 'cfg', 'evaluator'):
                    config[f'{split}_{key}'] = None
        config.merge_from_dict(
            {
                'work_dir': str(work_dir),
                'model.backbone.init_cfg': None,
                'default_hooks.logger.interval': 1,
                'randomness': dict(seed=0),
                'experiment_name': f'config-{next(_runs)}',
                **options,
            }
        )
        return Runner.from_cfg(config)

    return build
