"""Each config has the paper's normalizers, trainable parts and schedule (section 4.2), each small version its row's."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_cbn import BRN, CBN
from mmdet_cbn.experiments.paper.coco import COCO

NORMS = {'BN': nn.BatchNorm2d, 'SyncBN': MODELS.get('SyncBN'), 'GN': nn.GroupNorm, 'BRN': BRN, 'CBN': CBN}
FIXED = 'fixed BN'


class Recipe(NamedTuple):
    detector: str
    depth: int
    backbone: str  # in the words of Table 5
    heads: str
    hook: dict | None = None


BURN_IN = dict(type='CBNBurnInHook', burn_in_epochs=3)

# Read from the rows of Tables 5 to 8.
RECIPES = {
    'faster-rcnn_r50_fpn_4conv1fc': Recipe('FasterRCNN', 50, FIXED, '-'),
    'faster-rcnn_r50_fpn_bn-head': Recipe('FasterRCNN', 50, FIXED, 'BN'),
    'faster-rcnn_r50_fpn_syncbn-head': Recipe('FasterRCNN', 50, FIXED, 'SyncBN'),
    'faster-rcnn_r50_fpn_gn-head': Recipe('FasterRCNN', 50, FIXED, 'GN'),
    'faster-rcnn_r50_fpn_brn-head': Recipe('FasterRCNN', 50, FIXED, 'BRN'),
    'faster-rcnn_r50_fpn_cbn-head': Recipe('FasterRCNN', 50, FIXED, 'CBN', BURN_IN),
    'faster-rcnn_r50_fpn_bn-all': Recipe('FasterRCNN', 50, 'BN', 'BN'),
    'faster-rcnn_r50_fpn_syncbn-all': Recipe('FasterRCNN', 50, 'SyncBN', 'SyncBN'),
    'faster-rcnn_r50_fpn_gn-all': Recipe('FasterRCNN', 50, 'GN', 'GN'),
    'faster-rcnn_r50_fpn_cbn-all': Recipe('FasterRCNN', 50, 'CBN', 'CBN', BURN_IN),
    'faster-rcnn_r101_fpn_gn-head': Recipe('FasterRCNN', 101, FIXED, 'GN'),
    'faster-rcnn_r101_fpn_syncbn-head': Recipe('FasterRCNN', 101, FIXED, 'SyncBN'),
    'faster-rcnn_r101_fpn_cbn-head': Recipe('FasterRCNN', 101, FIXED, 'CBN', BURN_IN),
    **{
        f'faster-rcnn_r50_fpn_bn-syncbn-{epoch}-head': Recipe(
            'FasterRCNN', 50, FIXED, 'BN', dict(type='SwitchNormHook', epoch=epoch, source='BN', to='SyncBN')
        )
        for epoch in (8, 9, 10, 11)
    },
    'mask-rcnn_r50_fpn_4conv1fc': Recipe('MaskRCNN', 50, FIXED, '-'),
    'mask-rcnn_r50_fpn_bn-head': Recipe('MaskRCNN', 50, FIXED, 'BN'),
    'mask-rcnn_r50_fpn_gn-head': Recipe('MaskRCNN', 50, FIXED, 'GN'),
    'mask-rcnn_r50_fpn_syncbn-head': Recipe('MaskRCNN', 50, FIXED, 'SyncBN'),
    'mask-rcnn_r50_fpn_cbn-head': Recipe('MaskRCNN', 50, FIXED, 'CBN', BURN_IN),
    'mask-rcnn_r50_fpn_cbn-all': Recipe('MaskRCNN', 50, 'CBN', 'CBN', BURN_IN),
    'mask-rcnn_r101_fpn_gn-head': Recipe('MaskRCNN', 101, FIXED, 'GN'),
    'mask-rcnn_r101_fpn_syncbn-head': Recipe('MaskRCNN', 101, FIXED, 'SyncBN'),
    'mask-rcnn_r101_fpn_cbn-head': Recipe('MaskRCNN', 101, FIXED, 'CBN', BURN_IN),
}


def load(path):
    config = Config.fromfile(ROOT / 'configs' / f'{path}.py')
    init_default_scope('mmdet')
    return config


def build(config):
    with torch.device('meta'):  # no memory, no random numbers
        return MODELS.build(config.model).train()


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)]


def heads_of(model):
    """The parts with a normalizer in the rows' heads, and how many each has: 4 lateral and 4 output convolutions in the
    FPN, 4 in each head."""
    mask_head = [(model.roi_head.mask_head, 4)] if model.roi_head.with_mask else []
    return [(model.neck, 8), (model.roi_head.bbox_head, 4), *mask_head]


def check_heads(model, heads):
    for part, count in heads_of(model):
        assert [type(m) for m in norms(part)] == ([] if heads == '-' else [NORMS[heads]] * count)
    assert norms(model.rpn_head) == [], 'never in the RPN'
    for m in norms(model):
        if isinstance(m, CBN):
            assert (m.window_size, m.order, m.gradient) == (4, 1, 'batch'), (
                'as in the paper and the code of its authors'
            )
        elif isinstance(m, nn.GroupNorm):
            assert m.num_groups == 32


@pytest.fixture(scope='module', params=RECIPES)
def row(request):
    """Recipe, config and model of each row, with COCO elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('COCO_ROOT', '/elsewhere')
        config = load(f'cbn/{request.param}_1x_coco')
    return RECIPES[request.param], config, build(config)


def test_every_config_is_tested():
    assert {path.stem for path in (ROOT / 'configs' / 'cbn').glob('*.py')} == {f'{name}_1x_coco' for name in RECIPES}


@pytest.mark.parametrize('table', COCO, ids=lambda table: table.name)
def test_the_rows_of_the_tables_name_configs_with_what_their_labels_say(table):
    assert len({row.name for row in table.rows}) == len(table.rows)
    for row in table.rows:
        recipe = RECIPES[row.config.removesuffix('_1x_coco')]
        if table.number == '5':
            assert (recipe.detector, recipe.depth, recipe.backbone, recipe.heads) == ('FasterRCNN', 50, *row.labels)
        elif table.number == '6':
            detector = dict(faster='FasterRCNN', mask='MaskRCNN')[table.name.partition('-')[2]]
            assert recipe[:4] == (detector, int(row.labels[0][1:-4]), FIXED, row.labels[1])
        elif table.number == '7':
            assert row.labels == (f'epoch {recipe.hook["epoch"]}',)
        elif table.number == '8':
            assert recipe[:4] == ('MaskRCNN', 50, FIXED, *row.labels)
        else:
            assert recipe[:3] == ('FasterRCNN', 50, FIXED)


@pytest.mark.parametrize('row', COCO[5].rows, ids=lambda row: row.name)
def test_figure_3_varies_the_window_and_its_kind(row):
    method, k = row.labels
    config = load(f'cbn/{row.config}')
    config.merge_from_dict(row.options_for(config))
    found = [m for m in norms(build(config)) if m.training]
    kind, order = {'BN': (nn.BatchNorm2d, None), 'Naive CBN': (CBN, 0), 'CBN': (CBN, 1)}[method]
    assert len(found) == 12 and {type(m) for m in found} == {kind}
    images = config.train_dataloader.batch_size
    assert config.optim_wrapper.optimizer.lr == pytest.approx(0.02 * images / 4)
    if kind is CBN:
        assert {(m.window_size, m.order) for m in found} == {(k, order)} and images == 4
    else:
        assert images == 4 * k


@pytest.mark.parametrize('row', COCO[6].rows, ids=lambda row: row.name)
def test_figure_5_varies_the_burn_in(row):
    config = load(f'cbn/{row.config}')
    config.merge_from_dict(row.options_for(config))
    if row.labels[1] == config.train_cfg.max_epochs:
        assert config.model.neck.norm_cfg.type == 'BN', 'burn-in to the end is BN'
    else:
        assert config.custom_hooks == [dict(type='CBNBurnInHook', burn_in_epochs=row.labels[1])]


def test_the_right_normalizer_is_in_the_right_place(row):
    recipe, config, model = row
    assert type(model).__name__ == recipe.detector and model.backbone.depth == recipe.depth

    active = recipe.backbone != FIXED
    assert {type(m) for m in norms(model.backbone)} == {NORMS[recipe.backbone if active else 'BN']}
    early = norms(model.backbone.bn1 if hasattr(model.backbone, 'bn1') else model.backbone.gn1)
    early += norms(model.backbone.layer1)
    late = [m for m in norms(model.backbone) if m not in early]
    blocks = {50: 4 + 6 + 3, 101: 4 + 23 + 3}[recipe.depth]
    assert len(early) == 1 + 3 * 3 + 1 and len(late) == blocks * 3 + 3
    if recipe.backbone != 'GN':
        assert not any(m.training for m in early), 'conv1 and conv2_x stay frozen'
        assert all(m.training == active for m in late)

    check_heads(model, recipe.heads)
    assert type(model.roi_head.bbox_head).__name__ == 'Shared4Conv1FCBBoxHead'
    assert len(model.roi_head.bbox_head.shared_convs) == 4 and len(model.roi_head.bbox_head.shared_fcs) == 1
    assert config.get('custom_hooks') == (recipe.hook and [recipe.hook])


def test_the_right_parameters_are_trained(row):
    _, _, model = row
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    stem = ('backbone.conv1.', 'backbone.bn1.', 'backbone.gn1.', 'backbone.layer1.')
    assert frozen == {key for key, _ in model.named_parameters() if key.startswith(stem)}


def test_schedule_and_pretraining_are_the_papers(row):
    recipe, config, _ = row
    assert config.train_dataloader.batch_size == 4
    assert config.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert config.optim_wrapper.optimizer == dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
    assert config.train_cfg.max_epochs == 12
    assert config.default_hooks.sync_buffers == dict(type='SyncBuffersHook')
    assert [s.milestones for s in config.param_scheduler if s.type == 'MultiStepLR'] == [[8, 11]]
    weights, mean, std, to_rgb = (
        f'torchvision://resnet{recipe.depth}',
        [123.675, 116.28, 103.53],
        [58.395, 57.12, 57.375],
        True,
    )
    if recipe.backbone == 'GN':
        weights, mean, std, to_rgb = 'open-mmlab://detectron/resnet50_gn', mean[::-1], [1, 1, 1], False
    assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=weights)
    data = config.model.data_preprocessor
    assert (data.mean, data.std, data.bgr_to_rgb) == (mean, std, to_rgb)


def test_the_gn_backbone_is_that_of_mmdets_gn_config():
    ours, theirs = (
        load('cbn/faster-rcnn_r50_fpn_gn-all_1x_coco'),
        get_config('mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'),
    )
    assert plain(ours.model.backbone.to_dict()) == plain(theirs.model.backbone.to_dict())
    for key in ('mean', 'std', 'bgr_to_rgb'):
        assert ours.model.data_preprocessor[key] == theirs.model.data_preprocessor[key]


def plain(value):
    """``value`` without the scopes that mmengine notes where a config of another package is inherited."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, list) else value


@cache
def mmdets_data(kind):
    return plain(get_config(f'mmdet::_base_/datasets/coco_{kind}.py').to_dict())


def test_the_data_are_mmdets_but_for_root_and_batch(row):
    """instance_1x.py is made from detection_1x.py, and must come out as mmdet's own."""
    config = plain(row[1].to_dict())
    original = deepcopy(mmdets_data('instance' if row[0].detector == 'MaskRCNN' else 'detection'))
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


def test_without_coco_root_the_data_lie_in_mmdets_place(monkeypatch):
    monkeypatch.delenv('COCO_ROOT', raising=False)
    config = load('cbn/faster-rcnn_r50_fpn_cbn-head_1x_coco')
    assert config.train_dataloader.dataset.data_root == config.val_dataloader.dataset.data_root == 'data/coco'


@pytest.mark.parametrize(
    ('name', 'data'), [*((name, 'shapes') for name in RECIPES), *((name, 'coco') for name in list(RECIPES)[::7])]
)
def test_a_small_version_is_its_row_made_small(name, data, monkeypatch):
    recipe = RECIPES[name]
    monkeypatch.setenv('CBN_ROW', f'{name}_1x_coco')
    config = load(f'small/r18_{data}')
    model = build(config)
    assert type(model).__name__ == recipe.detector
    active = recipe.backbone != FIXED
    assert model.backbone.depth == 18 and config.model.backbone.init_cfg is None
    assert {type(m) for m in norms(model.backbone)} == {NORMS[recipe.backbone if active else 'BN']}
    assert recipe.backbone == 'GN' or all(m.training == active for m in norms(model.backbone))
    check_heads(model, recipe.heads)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert config.get('custom_hooks') == (recipe.hook and [recipe.hook])
    assert config.train_cfg.max_epochs == 12
    assert [s.milestones for s in config.param_scheduler if s.type == 'MultiStepLR'] == [[8, 11]]
    assert config.row == f'{name}_1x_coco' and name in config.work_dir
    assert model.roi_head.bbox_head.num_classes == dict(coco=80, shapes=4)[data]


@pytest.mark.parametrize('name', RECIPES)
def test_a_pretrained_small_version_is_its_row_made_small(name, monkeypatch):
    recipe = RECIPES[name]
    monkeypatch.setenv('CBN_ROW', f'{name}_1x_coco')
    config = load('small/r18_pretrained')
    model = build(config)
    assert type(model).__name__ == recipe.detector
    active = recipe.backbone != FIXED
    assert {type(m) for m in norms(model.backbone)} == {NORMS[recipe.backbone if active else 'BN']}
    for part, count in heads_of(model)[1:]:
        assert [type(m) for m in norms(part)] == ([] if recipe.heads == '-' else [NORMS[recipe.heads]] * count)
    assert {m.num_groups for m in norms(model) if isinstance(m, nn.GroupNorm)} <= {8}
    frozen = {key.split('.')[1] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'conv1', 'gn1' if recipe.backbone == 'GN' else 'bn1', 'layer1'}, 'as in the row'
    assert recipe.backbone == 'GN' or all(m.training == active for m in norms(model.backbone.layer2))
    weights = config.model.backbone.init_cfg
    assert weights.prefix == 'backbone.' and ('_gn_' in weights.checkpoint) == (recipe.backbone == 'GN')
    assert config.get('custom_hooks') == (recipe.hook and [recipe.hook])
    assert config.optim_wrapper.optimizer == dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=0.0001)
    assert (config.train_dataloader.batch_size, config.train_cfg.max_epochs) == (4, 12)
    if recipe.detector == 'FasterRCNN':
        on_photographs = load('small/r18_facemask')
        assert on_photographs.model.roi_head.bbox_head.num_classes == 2
        assert on_photographs.model.backbone == config.model.backbone


def test_128_images_of_coco_are_trained_and_evaluated_apart(monkeypatch, tmp_path):
    dataset = dict(
        images=[dict(id=n, file_name=f'{n}.jpg', width=64, height=48) for n in range(128)],
        annotations=[
            dict(id=n + 1, image_id=n, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0, segmentation=[])
            for n in range(128)
        ],
        categories=[dict(id=1, name='person')],
    )
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/instances_train2017.json').write_text(json.dumps(dataset))
    monkeypatch.setenv('CBN_ROW', 'mask-rcnn_r50_fpn_cbn-head_1x_coco')
    monkeypatch.setenv('COCO128_ROOT', str(tmp_path))
    config = load('small/r18_coco128')
    datasets = [DATASETS.build(loader.dataset) for loader in (config.train_dataloader, config.val_dataloader)]
    train, val = ({data.get_data_info(n)['img_id'] for n in range(len(data))} for data in datasets)
    assert (len(train), len(val)) == (96, 32) and not train & val


def test_the_config_in_the_readme_builds():
    (snippet,) = re.findall(r'```python\n(_base_ = .*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    config = Config.fromstring(snippet, '.py')
    init_default_scope('mmdet')
    model = build(config)
    assert sum(isinstance(m, CBN) and m.training for m in model.modules()) == 42 + 8 + 4
    assert config.custom_hooks[0].type == 'CBNBurnInHook'


def test_mim_finds_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [model for file in index['Import'] for model in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert {model['Name'] for model in models} == {f'{name}_1x_coco' for name in RECIPES}
    for model in models:
        assert model['Config'] == f'configs/cbn/{model["Name"]}.py'
        assert 'Results' not in model and 'Weights' not in model, 'none has been trained'


def test_the_package_carries_them(tmp_path):
    source = tmp_path / 'source'
    ignored = shutil.ignore_patterns('.*env*', '.git', '*.egg-info', '__pycache__', 'build', 'data', 'work_dirs')
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    build_wheel = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        tmp_path,
        source,
    ]
    subprocess.run(build_wheel, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ('model-index.yml', 'configs/*/*.py', 'configs/*/metafile.yml', 'tools/*.py', 'tools/*.sh'):
        files = {f'mmdet_cbn/.mim/{path.relative_to(ROOT)}' for path in ROOT.glob(pattern)}
        assert files and files <= names


def test_a_config_can_inherit_from_ours(tmp_path):
    """Without the scopes that mmengine would note in what is taken over: normalizers refuse a norm_cfg with one."""
    child = tmp_path / 'child.py'
    child.write_text(
        "_base_ = 'mmdet_cbn::cbn/faster-rcnn_r50_fpn_gn-head_1x_coco.py'\n"
        'norm_cfg = dict(_base_.norm_cfg, num_groups=16)\n'
        'model = dict(neck=dict(norm_cfg=norm_cfg))\n'
        'train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))\n'
    )
    config = Config.fromfile(child)
    init_default_scope('mmdet')
    model = build(config)
    assert {m.num_groups for m in norms(model.neck)} == {16}
    assert {m.num_groups for m in norms(model.roi_head)} == {32}
    assert get_config('mmdet_cbn::cbn/mask-rcnn_r101_fpn_cbn-head_1x_coco.py').model.backbone.depth == 101


def test_the_learning_rate_is_that_of_the_images_of_a_step():
    """Otherwise --auto-scale-lr would scale it twice."""
    checked = 0
    for folder, gpus in (('cbn', 4), ('zoo', 1), ('small', 1)):
        for path in (ROOT / 'configs' / folder).glob('*.py'):
            config = Config.fromfile(path)
            if 'auto_scale_lr' in config:
                assert config.auto_scale_lr.base_batch_size == gpus * config.train_dataloader.batch_size, path.name
                checked += 1
    assert checked > 30
