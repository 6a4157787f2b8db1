"""The survey of a model zoo finds what trains, what not, and why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments import zoo
from mmdet_cbn.layers.conversion import active_norms

RESNET = dict(
    type='mmdet.ResNet',
    depth=18,
    norm_eval=True,
    frozen_stages=1,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'),
)


@MODELS.register_module()
class HardCoded(nn.Module):
    """A model that knows no norm_cfg."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def init_weights(self):
        pass


def test_a_simplified_model_trains_as_a_whole_and_needs_no_file_of_weights():
    model = dict(backbone=dict(RESNET), data_preprocessor=dict(batch_augments=[dict(type='Mixup')]))
    zoo.simplify(model)
    assert model['backbone'] == dict(
        type='mmdet.ResNet',
        depth=18,
        norm_eval=False,
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        init_cfg=None,
    )
    assert model['data_preprocessor']['batch_augments'] is None


@pytest.mark.parametrize(
    ('model', 'how'),
    [
        (
            dict(type='mmdet.FPN', in_channels=[4, 4], out_channels=4, num_outs=2, norm_cfg=dict(type='BN')),
            '`norm_cfg`',
        ),
        (dict(type='HardCoded'), 'conversion'),
    ],
)
def test_cbn_comes_in_by_the_norm_cfg_or_by_conversion(model, how):
    built, found = zoo.with_cbn(model, dict(window_size=2, unsupported='naive'))
    norms = [module for module in built.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found == how
    assert all(isinstance(norm, CBN) and (norm.window_size, norm.unsupported) == (2, 'naive') for norm in norms)


def test_rows_tell_what_failed_and_with_which_variant(monkeypatch):
    def train(model, data):
        if any(getattr(layer, 'samples', None) for layer in model.modules()):
            raise RuntimeError('a | b\nand more')
        for layer in model.modules():
            if isinstance(layer, CBN):
                layer.window_length = layer.window_size
                layer.naive_because = 'of a test'

    monkeypatch.setattr(zoo, '_train', train)
    row = zoo._try_config('family', 'name.py', Config(dict(model=dict(type='HardCoded'))), None)
    assert row == ('family', 'name.py', 'conversion', 1, {'of a test': 1}, r'64 samples: RuntimeError: a \| b')
    others = zoo.Family('other', '', '', 0, {}, 'no BatchNorm2d'), zoo.Family('odd', 'odd.py', '', 0, {}, 'not built')
    page = zoo.to_markdown('mmdet', [row, *others])
    assert '\n0 of 2 families' in page and '| 1: of a test |' in page and '| other | no BatchNorm2d |' in page


def test_a_model_that_fails_by_its_norm_cfg_is_converted(monkeypatch):
    def train(model, data):
        for layer in active_norms(model, CBN).values():
            if layer.window_size == 'auto':
                raise RuntimeError('by norm_cfg')
            layer.window_length = layer.window_size

    def build(model):
        torch.manual_seed(0)
        return nn.Sequential(CBN(4, window_size='auto') if model['norm_cfg']['type'] == 'CBN' else nn.BatchNorm2d(4))

    monkeypatch.setattr(zoo, '_train', train)
    monkeypatch.setattr(zoo, '_build', build)
    row = zoo._try_config('family', 'name.py', Config(dict(model=dict(norm_cfg=dict(type='BN')))), None)
    assert row.how == 'conversion; by `norm_cfg`: order 1: RuntimeError: by norm_cfg'
    assert row.layers == 1 and not row.problem


def test_layers_without_a_full_window_are_a_finding(monkeypatch):
    monkeypatch.setattr(zoo, '_train', lambda model, data: None)
    row = zoo._try_config('family', 'name.py', Config(dict(model=dict(type='HardCoded'))), None)
    assert row.problem == 'order 1: RuntimeError: windows not full: layers.1'


@MODELS.register_module()
class NeedsLargeImages(BaseModel):
    def __init__(self, kernel):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, kernel), nn.BatchNorm2d(4))

    def forward(self, images, mode):
        return dict(loss=self.layers(images).sum())


def data_that_trains(kernel, size):
    images = zoo.Zoo('mmdet', bool, lambda config, count, size: dict(images=torch.randn(count, 3, size, size)))
    config = Config(dict(model=dict(type='NeedsLargeImages', kernel=kernel)))
    return zoo._data_that_trains(images, config, 2, size)['images']


@pytest.mark.parametrize(('size', 'expected'), [(44, 44), (22, 44), (11, 224)])
def test_images_are_as_large_as_the_model_needs(size, expected):
    assert data_that_trains(40, size).shape == (2, 3, expected, expected)


def test_a_model_that_trains_on_no_size_says_why():
    with pytest.raises(RuntimeError, match='Kernel size'):
        data_that_trains(230, 100)


def test_a_config_that_names_bn_is_tried_first():
    names = ['vgg11_8xb32.py', 'vgg16bn_8xb32.py', 'vgg11bn_8xb32.py', 'vgg11bn.py']
    assert sorted(map(Path, names), key=zoo._order) == [Path(names[i]) for i in (2, 1, 3, 0)]


def test_labels_are_of_the_models_classes():
    model = dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=3))
    config = Config(dict(model=model, train_dataloader=dict()))
    data = zoo.ZOOS['mmdet'].make_data(config, 2, 64)
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        assert image.shape == (3, 64, 64) and len(sample.gt_instances) == 3
        assert sample.gt_instances.labels.min() >= 0 and sample.gt_instances.labels.max() < 2


def tool(package, family, folder):
    return [sys.executable, ROOT / 'tools/zoo.py', package, family, '--size', '64', '--out', folder]


def row_of(package, family, folder):
    subprocess.run(tool(package, family, folder), check=True)
    (row,) = json.loads((folder / f'{package}.json').read_text())
    return row


@pytest.mark.slow
def test_the_tool_tries_a_family_once(tmp_path):
    row = row_of('mmpretrain', 'mobilenet_v2', tmp_path)
    assert row['layers'] == 52 and not row['naive'] and not row['problem']
    (tmp_path / 'mmpretrain.json').write_text(json.dumps([{**row, 'config': 'not tried again'}]))
    row_of('mmpretrain', 'mobilenet_v2', tmp_path)
    assert 'not tried again' in (tmp_path / 'mmpretrain.md').read_text()
    wrong = subprocess.run(tool('mmpretrain', 'nothing', tmp_path), capture_output=True, text=True)
    assert wrong.returncode == 2 and "['nothing'] are not among the families of mmpretrain" in wrong.stderr


@pytest.mark.rows
def test_segmentors_are_tried_too(tmp_path):
    row = row_of('mmseg', 'fastscnn', tmp_path)
    assert row['layers'] == 46 and not row['naive'] and not row['problem']
