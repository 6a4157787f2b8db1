"""Rows of the paper's tables as tools/reproduce.py trains them, at full size, for a few epochs of one image; every
other config of configs/cbn, on a small image; and the configs for one GPU. `make test-all` runs these, `make test` does
not.
"""

import csv
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from conftest import ROOT
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_cbn.experiments.cost.detectors import make_inputs
from mmdet_cbn.experiments.data.shapes import write_shapes
from mmdet_cbn.experiments.paper.coco import COCO
from mmdet_cbn.experiments.preflight import weights_file, weights_url
from mmdet_cbn.experiments.rows.runs import Setting, Trial
from mmdet_cbn.experiments.rows.table import Row, Table

pytestmark = pytest.mark.rows

# Table and row, and all that is not as in the paper but the images: few epochs, of one iteration each.
ROWS = {
    ('5', 'cbn-all'): ('train_cfg.max_epochs=3', 'custom_hooks.0.burn_in_epochs=1'),
    ('5', 'gn-all'): ('train_cfg.max_epochs=1',),
    ('5', 'brn-head'): ('train_cfg.max_epochs=1',),
    ('6', 'mask-r101-syncbn'): ('train_cfg.max_epochs=1',),
    ('7', 'epoch-8'): ('train_cfg.max_epochs=2', 'custom_hooks.0.epoch=1'),
}
TABLE_AND_ROW = {
    (table.number, row.name): (table, row) for table in COCO for row in table.rows if (table.number, row.name) in ROWS
}
OTHERS = sorted(
    {file.stem for file in (ROOT / 'configs' / 'cbn').glob('*.py')} - {row.config for _, row in TABLE_AND_ROW.values()}
)
FROZEN = ('backbone.conv1.', 'backbone.bn1.', 'backbone.gn1.', 'backbone.layer1.')
COCO_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory) -> Path:
    """A COCO of one image to train on and one to validate on: of $COCO_ROOT, drawn ones where that is not set."""
    root = tmp_path_factory.mktemp('coco')
    given = os.environ.get('COCO_ROOT')
    if given:
        source = Path(given)
    else:
        source = tmp_path_factory.mktemp('drawn')
        write_shapes(source, {'train': 2}, size=(640, 480), seed=3)
    # A part of COCO may have one of its files alone.
    file = min(source.glob('annotations/instances_*2017.json'), key=lambda file: file.stat().st_size)
    dataset = json.loads(file.read_text())
    if not given:
        names = zip(COCO_IDS, CocoDataset.METAINFO['classes'], strict=True)
        dataset['categories'] = [dict(id=index, name=name) for index, name in names]
    (root / 'annotations').mkdir()
    full = {annotation['image_id'] for annotation in dataset['annotations'] if not annotation['iscrowd']}
    images = [image for image in dataset['images'] if image['id'] in full][:2]
    for split, part in (('train', images[:1]), ('val', images[1:])):
        ids = {image['id'] for image in part}
        annotations = [annotation for annotation in dataset['annotations'] if annotation['image_id'] in ids]
        text = json.dumps({**dataset, 'images': part, 'annotations': annotations})
        (root / 'annotations' / f'instances_{split}2017.json').write_text(text)
        (root / f'{split}2017').symlink_to(source.resolve() / file.stem.removeprefix('instances_'))
    return root


def disturb(model: nn.Module) -> None:
    """Give each normalizer numbers of its own. Otherwise it would not be seen whether they were loaded."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            for number in (module.weight, module.bias):
                number.data += 0.1 * torch.randn_like(number)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn_like(module.running_mean)
            module.running_var += torch.rand_like(module.running_var)


def file_of(weights: str) -> str:
    """The name of the file that mmengine downloads these weights to."""
    return weights_file(weights_url(weights)).name


@pytest.fixture(scope='module')
def torch_home(tmp_path_factory):
    """A TORCH_HOME with all that the configs would download: files of the same names and layouts, of random numbers."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp('torch_home')
    folder = home / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    for depth in (50, 101):
        model = getattr(torchvision.models, f'resnet{depth}')(zero_init_residual=True)
        disturb(model)
        # Parameters and tensors without the number of batches, which is younger than these files.
        state = {key: v for key, v in model.state_dict(keep_vars=True).items() if 'num_batches' not in key}
        torch.save(OrderedDict(state), folder / file_of(f'torchvision://resnet{depth}'))
    init_default_scope('mmdet')
    model = MODELS.build(dict(type='ResNet', depth=50, norm_cfg=dict(type='GN', num_groups=32)))
    model.init_weights()
    disturb(model)
    torch.save(dict(state_dict=model.state_dict()), folder / file_of('open-mmlab://detectron/resnet50_gn'))
    yield home
    shutil.rmtree(home)


def weights_for(config: Config, torch_home: Path) -> dict[str, torch.Tensor]:
    """What the file that a config names has for the backbone, by its name in the detector."""
    loaded = torch.load(torch_home / 'hub' / 'checkpoints' / file_of(config.model.backbone.init_cfg.checkpoint))
    loaded = loaded.get('state_dict', loaded)
    return {f'backbone.{key}': value for key, value in loaded.items() if not key.startswith('fc.')}


class Trained(NamedTuple):
    table: Table
    row: Row
    options: tuple[str, ...]
    output: str  #: of tools/reproduce.py
    work_dir: Path  #: of all trials
    config: Config  #: as mmengine noted it
    model: nn.Module  #: without numbers
    checkpoint: dict  #: of the last epoch
    log: list[dict]  #: by iteration
    weights: dict[str, torch.Tensor]  #: that it began from


# In one process each, so that a row is trained once.
IN_GROUPS = [pytest.param(row, marks=pytest.mark.xdist_group(' '.join(row)), id=' '.join(row)) for row in ROWS]


@pytest.fixture(scope='module', params=IN_GROUPS)
def trained(request, coco_root, torch_home, tmp_path_factory):
    """A row that tools/reproduce.py trained and evaluated as the README has it."""
    number, name = request.param
    options = ROWS[request.param]
    work_dir = tmp_path_factory.mktemp('work_dirs') / 'paper'
    command = ['tools/reproduce.py', '--table', number, '--rows', name, '--gpus', '1', '--trials', '1']
    result = subprocess.run(
        [sys.executable, *command, '--work-dir', str(work_dir), '--cfg-options', *options],
        cwd=ROOT,
        env={**os.environ, 'COCO_ROOT': str(coco_root), 'TORCH_HOME': str(torch_home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    table, row = TABLE_AND_ROW[request.param]
    trial = Trial(row, 0, Setting(ROOT, work_dir, gpus=1, options=options))
    (config_file,) = trial.work_dir.glob('*/vis_data/config.py')
    config = Config.fromfile(config_file)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(deepcopy(config.model)).train()  # mmdet writes into what it builds from
    lines = [json.loads(line) for line in (config_file.parent / 'scalars.json').read_text().splitlines()]
    yield Trained(
        table=table,
        row=row,
        options=options,
        output=result.stdout,
        work_dir=work_dir,
        config=config,
        model=model,
        checkpoint=torch.load(trial.last_checkpoint(), weights_only=False),
        log=[line for line in lines if 'lr' in line],
        weights=weights_for(config, torch_home),
    )
    shutil.rmtree(work_dir)


def test_the_recipe_is_the_papers_but_for_the_epochs(trained):
    recipe = Config.fromfile(ROOT / 'configs' / trained.row.file)
    assert trained.config.model == recipe.model
    assert trained.config.train_dataloader.dataset.pipeline == recipe.train_dataloader.dataset.pipeline
    assert [step.scale for step in recipe.train_pipeline if step.type == 'Resize'] == [(1333, 800)]


def test_it_trains_to_the_end_with_finite_losses(trained):
    assert [line['step'] for line in trained.log] == [*range(1, trained.config.train_cfg.max_epochs + 1)]
    for line in trained.log:
        losses = {key: value for key, value in line.items() if 'loss' in key}
        assert len(losses) == 5 + trained.row.name.startswith('mask') and all(map(math.isfinite, losses.values()))


def test_it_begins_from_the_weights(trained):
    assert 'missing keys in source state_dict' not in trained.output
    state = trained.checkpoint['state_dict']
    assert trained.weights.keys() == {key for key in state if key.startswith('backbone.') and 'num_batches' not in key}
    for key, loaded in trained.weights.items():
        if 'running_' not in key:
            assert (state[key] - loaded).norm() < 0.01 * loaded.norm(), key


def test_what_is_frozen_stays_and_all_else_moves(trained):
    """The optimizer's state has the last step of each parameter. Rounding may swallow the first one of the warm-up."""
    state, steps = trained.checkpoint['state_dict'], trained.checkpoint['optimizer']['state']
    moved = {key for key, loaded in trained.weights.items() if not torch.equal(state[key], loaded)}
    for number, (name, parameter) in enumerate(trained.model.named_parameters()):
        assert (number in steps) == parameter.requires_grad == (not name.startswith(FROZEN)), name
        if number in steps:
            step = trained.log[-1]['lr'] * steps[number]['momentum_buffer']
            assert step.isfinite().all() and step.any(), name
            if len(trained.log) > 1 or (step.abs() > torch.finfo(step.dtype).eps * state[name].abs()).any():
                assert not torch.equal(state[name] + step, state[name]), name
                assert name in moved or name not in trained.weights
    for key in trained.weights:
        if key.startswith(FROZEN) or 'running_' in key:
            stays = key.startswith(FROZEN) or 'all' not in trained.row.name
            assert (key not in moved) == stays, key


def test_cbn_has_a_window_after_burn_in(trained):
    windows = [1, 1, 2] if trained.row.name == 'cbn-all' else [None] * len(trained.log)
    assert [line.get('cbn_window') for line in trained.log] == windows


def test_bn_becomes_syncbn(trained):
    switched = 'after 1 epochs, 12 layers of BN became SyncBN.' in trained.output
    assert switched == (trained.table.number == '7')


def test_the_report_shows_it_apart_from_the_paper(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['report.py', str(trained.work_dir), '--out', str(tmp_path)])
    runpy.run_path(str(ROOT / 'tools' / 'report.py'), run_name='__main__')
    text = (tmp_path / f'{trained.table.name}.md').read_text()
    assert text.count('| ours, 1 trial, not as in the paper (1) |') == 1 and '| difference |' not in text
    (note,) = re.findall(r"\(1\) Other settings, the paper's in brackets: (.*)\.\n", text)
    changed = ['GPUs = 1 (4)', *(option.replace('=', ' = ') for option in trained.options)]
    for difference, expected in zip(note.split('; '), sorted(changed), strict=True):
        assert difference.startswith(expected)
    with open(tmp_path / f'{trained.table.name}.csv', newline='') as stream:
        lines = [line for line in csv.DictReader(stream) if line['row'] == trained.row.name]
    assert lines and all(line['paper'] and line['ours'] and not line['difference'] for line in lines)
    assert {(line['trials'], line['as in the paper']) for line in lines} == {('1', 'False')}
    nothing = 'finished (nothing was detected: AP 0)' in trained.output
    assert (f'Nothing was detected, which counts as AP 0: {trained.row.name} (1 of 1 trial).' in text) == nothing


@pytest.mark.parametrize('name', OTHERS)
def test_every_other_config_trains_from_its_weights(name, torch_home, monkeypatch):
    """A step, on a small image with few RoIs; everything else is the config's."""
    monkeypatch.setenv('TORCH_HOME', str(torch_home))
    monkeypatch.setenv('COCO_ROOT', 'elsewhere')
    config = Config.fromfile(ROOT / 'configs' / 'cbn' / f'{name}.py')
    config.model.train_cfg.rcnn.sampler.num = 32
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model)).train()
    model.init_weights()
    state = model.state_dict()
    weights = weights_for(config, torch_home)
    assert weights.keys() == {key for key in state if key.startswith('backbone.') and 'num_batches' not in key}
    assert all(torch.equal(state[key], loaded) for key, loaded in weights.items())

    data = model.data_preprocessor(make_inputs(1, (128, 96), num_classes=80), training=True)
    loss, losses = model.parse_losses(model(**data, mode='loss'))
    assert all(math.isfinite(value) for value in losses.values()), losses
    loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith(FROZEN), key
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), key


@pytest.mark.parametrize('name', sorted(file.stem for file in (ROOT / 'configs' / 'zoo').glob('*.py')))
def test_a_config_for_one_gpu_trains_and_evaluates(name, coco_root, tmp_path):
    """From scratch, for an epoch of one image, or three with a burn-in of one; everything else is the config's."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'coco').symlink_to(coco_root)
    config = ROOT / 'configs' / 'zoo' / f'{name}.py'
    hooks = [hook.type for hook in Config.fromfile(config).get('custom_hooks', [])]
    burn_in = [f'custom_hooks.{hooks.index("CBNBurnInHook")}.burn_in_epochs=1'] if 'cbn' in name else []
    windows = [1, 1, 2] if burn_in else [None]
    epochs = len(windows)
    options = [f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}', 'model.backbone.init_cfg=None']
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'train.py', config, '--cfg-options', *options, *burn_in],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    (scalars,) = tmp_path.glob(f'work_dirs/{name}/*/vis_data/scalars.json')
    log = [line for line in map(json.loads, scalars.read_text().splitlines()) if 'lr' in line]
    assert all(math.isfinite(line['loss']) for line in log)
    assert [line.get('cbn_window') for line in log] == windows
    assert log[-1].get('cbn_without_window') == (0 if burn_in else None)
