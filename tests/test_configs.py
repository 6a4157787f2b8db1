"""Each config builds, and has the paper's normalizers, trainable parts and schedule (section 4.2)."""

import re

import pytest
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_cbn import CBN

# Config: normalizer of the backbone, whether it is active; detector.
RECIPES = {
    'faster-rcnn_r50_fpn_cbn-head_1x_coco': (nn.BatchNorm2d, False, 'FasterRCNN'),
    'faster-rcnn_r50_fpn_cbn-all_1x_coco': (CBN, True, 'FasterRCNN'),
    'mask-rcnn_r50_fpn_cbn-head_1x_coco': (nn.BatchNorm2d, False, 'MaskRCNN'),
    'mask-rcnn_r50_fpn_cbn-all_1x_coco': (CBN, True, 'MaskRCNN'),
}
SMALL = [path.stem for path in sorted((ROOT / 'configs' / 'small').glob('*.py'))]


def load(folder, name):
    config = Config.fromfile(ROOT / 'configs' / folder / f'{name}.py')
    init_default_scope('mmdet')
    return config


def build(config):
    return MODELS.build(config.model).train()


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)]


def test_the_config_in_the_readme_builds():
    (snippet,) = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    config = Config.fromstring(snippet, '.py')
    init_default_scope('mmdet')
    model = build(config)
    assert sum(isinstance(m, CBN) and m.training for m in model.modules()) == 42 + 8 + 4
    assert config.custom_hooks[0].type == 'CBNBurnInHook'


def test_every_config_is_tested():
    assert {path.stem for path in (ROOT / 'configs' / 'cbn').glob('*.py')} == set(RECIPES)
    assert len(SMALL) == 4


@pytest.mark.parametrize('name', RECIPES)
def test_the_right_normalizer_is_in_the_right_place(name):
    backbone_norm, active, detector = RECIPES[name]
    config = load('cbn', name)
    model = build(config)
    assert type(model).__name__ == detector

    assert {type(m) for m in norms(model.backbone)} == {backbone_norm}
    early = norms(model.backbone.bn1) + norms(model.backbone.layer1)
    late = [m for m in norms(model.backbone) if m not in early]
    assert len(early) == 1 + 3 * 3 + 1 and len(late) == (4 + 6 + 3) * 3 + 3
    assert not any(m.training for m in early), 'conv1 and conv2_x stay frozen'
    assert all(m.training == active for m in late)

    assert [type(m) for m in norms(model.neck)] == [CBN] * 8, 'four lateral and four output convolutions'
    assert [type(m) for m in norms(model.roi_head.bbox_head)] == [CBN] * 4, '4conv1fc'
    assert type(model.roi_head.bbox_head).__name__ == 'Shared4Conv1FCBBoxHead'
    assert len(model.roi_head.bbox_head.shared_fcs) == 1
    if detector == 'MaskRCNN':
        assert [type(m) for m in norms(model.roi_head.mask_head)] == [CBN] * 4
    assert norms(model.rpn_head) == [], 'never in the RPN'
    assert {(m.window_size, m.order) for m in norms(model) if isinstance(m, CBN)} == {(4, 1)}


@pytest.mark.parametrize('name', RECIPES)
def test_the_right_parameters_are_trained(name):
    model = build(load('cbn', name))
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    stem = ('backbone.conv1.', 'backbone.bn1.', 'backbone.layer1.')
    assert frozen == {key for key, _ in model.named_parameters() if key.startswith(stem)}


@pytest.mark.parametrize('name', RECIPES)
def test_data_and_schedule_are_the_papers(name, monkeypatch):
    monkeypatch.delenv('COCO_ROOT', raising=False)
    config = load('cbn', name)
    assert config.train_dataloader.batch_size == 4
    assert config.auto_scale_lr == dict(enable=False, base_batch_size=16)
    optimizer = config.optim_wrapper.optimizer
    assert optimizer == dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
    assert config.train_cfg.max_epochs == 12
    assert [s.milestones for s in config.param_scheduler if s.type == 'MultiStepLR'] == [[8, 11]]
    assert config.custom_hooks == [dict(type='CBNBurnInHook', burn_in_epochs=3)]
    assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='torchvision://resnet50')
    assert config.train_dataloader.dataset.data_root == 'data/coco'


def plain(value):
    """``value`` without the scopes that mmengine notes where a config of another package is inherited."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize('name', RECIPES)
def test_the_data_are_mmdets_but_for_root_and_batch(name, monkeypatch):
    """coco_instance.py is made from coco_detection.py, and must come out as mmdet's own."""
    monkeypatch.setenv('COCO_ROOT', '/elsewhere')
    config = plain(load('cbn', name).to_dict())
    kind = 'instance' if name.startswith('mask') else 'detection'
    original = plain(get_config(f'mmdet::_base_/datasets/coco_{kind}.py').to_dict())
    for key in ('train_pipeline', 'test_pipeline'):
        assert config[key] == original[key]
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        ours, theirs = config[loader], original[loader]
        assert ours['dataset'].pop('data_root') == '/elsewhere'
        theirs['dataset'].pop('data_root')
        if loader == 'train_dataloader':
            for changed in ('batch_size', 'num_workers'):
                ours.pop(changed), theirs.pop(changed)
        assert ours == theirs
    for evaluator in ('val_evaluator', 'test_evaluator'):
        assert config[evaluator].pop('ann_file') == '/elsewhere/annotations/instances_val2017.json'
        original[evaluator].pop('ann_file')
        assert config[evaluator] == original[evaluator]


@pytest.mark.parametrize('name', SMALL)
def test_small_configs_are_the_recipe_made_small(name):
    config = load('small', name)
    model = build(config)
    assert model.backbone.depth == 18 and config.model.backbone.init_cfg is None
    assert {type(m) for m in norms(model)} == {CBN} and all(m.training for m in norms(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(norms(model.roi_head.bbox_head)) == 4 and norms(model.rpn_head) == []
    if name.startswith('mask'):
        assert len(norms(model.roi_head.mask_head)) == 4
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
