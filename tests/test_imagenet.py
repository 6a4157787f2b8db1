"""The rows of the paper's ImageNet tables have its settings (section 4.1). Their small versions train on Imagenette."""

import json
import runpy
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmdet_cbn import BRN, CBN
from mmdet_cbn.experiments import zoo
from mmdet_cbn.experiments.paper.imagenet import (
    FIGURE3,
    FIGURE5,
    IMAGENET,
    TABLE2,
    TABLE3,
    TABLE4,
    TABLE9,
)
from mmdet_cbn.experiments.rows.runs import recipe_of
from mmdet_cbn.experiments.study.classification import CLASSIFICATION, CLASSIFICATION_RATES
from mmdet_cbn.window.size import suggested_window_size

CONFIGS = ROOT / 'configs'
NORM_LAYERS = (nn.BatchNorm2d, nn.GroupNorm)
NORMS = {'BN': nn.BatchNorm2d, 'GN': nn.GroupNorm, 'BRN': BRN, 'CBN': CBN}


def config_of(row):
    return recipe_of(row, CONFIGS)


def window_size_of(row):
    config = config_of(row)
    size = config.model.backbone.norm_cfg.get('window_size', 1)
    return suggested_window_size(config.train_dataloader.batch_size) if size == 'auto' else size


def test_each_config_is_of_a_row():
    used = {row.config for table in IMAGENET for row in table.rows}
    assert used == {file.stem for file in (CONFIGS / 'imagenet').glob('*.py')}


@pytest.mark.parametrize('table', IMAGENET, ids=lambda table: table.name)
def test_all_rows_have_the_papers_schedule(table):
    for row in table.rows:
        config = config_of(row)
        images = config.train_dataloader.batch_size
        optimizer = dict(type='SGD', lr=0.1 * images / 32, momentum=0.9, weight_decay=0.0001)
        assert config.optim_wrapper == dict(optimizer=optimizer), 'no weight is left out of the decay'
        assert config.train_cfg.max_epochs == config.param_scheduler.T_max == 100
        assert config.param_scheduler.type == 'CosineAnnealingLR'
        network = row.labels[0] if table is TABLE4 else 'ResNet-18'
        crop, flip = config.train_dataloader.dataset.pipeline[1:3]
        size = 299 if network == 'Inception-v3' else 224
        assert (crop.type, crop.scale, flip.type) == ('RandomResizedCrop', size, 'RandomFlip')
        assert config.val_dataloader.dataset.pipeline[2].crop_size == size
        if 'ResNet' in network:
            assert (f'ResNet-{config.model.backbone.depth}', config.model.head.num_classes) == (network, 1000)
            assert config.model.backbone.zero_init_residual is False, 'gamma is 1 at the start (section 3.1)'


@pytest.mark.parametrize(('norm', 'type', 'groups'), [('IN', 'IN', None), ('LN', 'GN', 1), ('GN', 'GN', 32)])
def test_table2_has_the_normalizers_that_do_not_look_at_the_batch(norm, type, groups):
    (row,) = (row for row in TABLE2.rows if row.labels == (norm,))
    norm_cfg = config_of(row).model.backbone.norm_cfg
    assert (norm_cfg.type, norm_cfg.get('num_groups')) == (type, groups)


def test_table3_has_16_images_in_the_window():
    for row in TABLE3.rows:
        norm, images = row.labels
        config = config_of(row)
        assert (config.model.backbone.norm_cfg.type, config.train_dataloader.batch_size) == (norm, images)
        if norm == 'CBN':
            assert images * window_size_of(row) == max(images, 16)
            assert config.model.backbone.norm_cfg.gradient == 'batch'
            assert config.custom_hooks[0].burn_in_epochs == 25
    assert sum(not row.paper for row in TABLE3.rows) == 2, 'BN and BRN with 1 image give no result'


@pytest.mark.slow
@pytest.mark.parametrize('row', TABLE4.rows, ids=lambda row: row.name)
def test_table4_has_the_normalizer_in_the_whole_network(row):
    network, norm, images = row.labels
    config = config_of(row)
    assert config.train_dataloader.batch_size == images
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
    norms = [module for module in model.modules() if isinstance(module, NORM_LAYERS)]
    number = {'ResNet-50': 53, 'VGG-16': 13, 'Inception-v3': 94, 'DenseNet-121': 121, 'MobileNet-v2': 52}[network]
    assert len(norms) == number and {type(module) for module in norms} == {NORMS[norm]}
    assert {module.eps for module in norms} == {0.001 if network == 'Inception-v3' else 1e-5}
    for module in norms:
        if norm == 'CBN':
            assert (module.gradient, module.unsupported) == ('batch', 'naive' if 'Dense' in network else 'error')
    assert norm != 'CBN' or (window_size_of(row), config.custom_hooks[0].burn_in_epochs) == (4, 25)


@pytest.mark.slow
@pytest.mark.parametrize('row', [row for row in TABLE4.rows if 'CBN' in row.labels], ids=lambda row: row.labels[0])
def test_the_networks_of_table4_train_with_cbn(row):
    config = config_of(row)
    config.model.backbone.norm_cfg.window_size = 2
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = zoo._build({**config.model, 'data_preprocessor': config.data_preprocessor})
        size = config.train_dataloader.dataset.pipeline[1].scale
        zoo._train(model, zoo.ZOOS['mmpretrain'].make_data(config, 2, size))
    layers = [module for module in model.modules() if isinstance(module, CBN)]
    assert all(layer.window_length == 2 for layer in layers)
    # DenseNet: the first norm of each of 58 pairs, of 3 transitions, and the last one see concatenated maps.
    assert sum(layer.naive_because is not None for layer in layers) == (62 if 'Dense' in row.labels[0] else 0)


def test_a_model_without_batchnorm_is_refused():
    with pytest.raises(ValueError, match=r'WithNorm: model must have layers .*, mmpretrain\.AlexNet has none'):
        MODELS.build(dict(type='WithNorm', model=dict(type='mmpretrain.AlexNet'), norm_cfg=dict(type='GN')))


def test_table9_has_the_orders():
    norms = [config_of(row).model.backbone.norm_cfg for row in TABLE9.rows]
    assert [norm.get('order', 1) for norm in norms] == [1, 0, 1, 2] and norms[0].type == 'BN'
    assert {config_of(row).train_dataloader.batch_size for row in TABLE9.rows} == {4}
    assert [window_size_of(row) for row in TABLE9.rows] == [1, 4, 4, 4], '3 iterations for the approximation'


def test_figure3_has_the_sizes_of_the_window():
    for row in FIGURE3.rows:
        method, k = row.labels
        config = config_of(row)
        assert config.train_dataloader.batch_size == (4 * k if method == 'BN' else 4)
        assert window_size_of(row) == (1 if method == 'BN' else k)
        assert config.model.backbone.norm_cfg.get('order', 1) == (0 if method == 'Naive CBN' else 1)


def test_figure5_has_the_burn_in():
    for row in FIGURE5.rows:
        config, epochs = config_of(row), row.labels[1]
        if epochs == 100:
            assert config.model.backbone.norm_cfg.type == 'BN'
        else:
            assert config.custom_hooks[0].burn_in_epochs == epochs
    versions = [config_of(row._replace(small='imagenette')) for row in FIGURE5.rows if row.labels[1] < 100]
    assert [version.custom_hooks[0].burn_in_epochs for version in versions] == [0, 0, 1, 2, 4, 6], 'of 8 epochs'


@pytest.mark.parametrize('table', [CLASSIFICATION, CLASSIFICATION_RATES], ids=lambda table: table.name)
def test_our_study_has_the_papers_rate_for_each_image(table):
    for row in table.rows:
        method = row.labels[0]
        config = config_of(row)
        images, rate = config.train_dataloader.batch_size, row.labels[1] if table is CLASSIFICATION_RATES else 1
        assert f'{images} images' in method or images == row.labels[1]
        assert config.optim_wrapper.optimizer.lr == pytest.approx(0.1 / (4 * 32) * images * rate)
        assert row.small == 'imagenette' and config.train_cfg.max_epochs == config.param_scheduler.T_max == 4
        norm = config.model.backbone.norm_cfg
        if 'CBN' in method:
            assert images * window_size_of(row) == 16
            assert config.custom_hooks[0].burn_in_epochs == (0 if 'burn-in 0' in method else 1)
            assert norm.get('order', 1) == (0 if 'Naive' in method else 2 if 'order 2' in method else 1)
            assert 'gradient' not in method or f'gradient {norm.gradient}' in f'{method},'
        else:
            assert method.startswith(norm.type)
        if norm.type == 'BRN':
            iterations = 4 * 9469 / images
            shares = [step / iterations for step in (*norm.r_steps, *norm.d_steps)]
            assert shares == pytest.approx([5 / 130, 40 / 130, 5 / 130, 25 / 130], abs=2e-3), "as in BRN's own paper"


@pytest.fixture
def imagenette(tmp_path, monkeypatch):
    """Two random images of each of ten classes, in the folders of Imagenette."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in range(10):
            folder = tmp_path / 'imagenette' / split / f'n{name}'
            folder.mkdir(parents=True)
            for number in range(2):
                cv2.imwrite(str(folder / f'{number}.jpg'), rng.integers(0, 256, (112, 130, 3), dtype=np.uint8))
    monkeypatch.setenv('IMAGENETTE_ROOT', str(tmp_path / 'imagenette'))


@pytest.mark.parametrize('norm', ['bn', 'gn', 'brn', 'cbn', 'in', 'ln'])
def test_the_small_version_of_each_config_trains_and_is_evaluated(norm, imagenette, tmp_path):
    row = next(row for table in IMAGENET for row in table.rows if f'_{norm}_' in row.config)
    config = config_of(row._replace(small='imagenette', times_images=1 / 8))
    changes = {'train_cfg.max_epochs': 1, 'param_scheduler.T_max': 1, 'work_dir': str(tmp_path)}
    config.merge_from_dict({**changes, **({'custom_hooks.0.burn_in_epochs': 0} if norm == 'cbn' else {})})
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        runner = Runner.from_cfg(config)
        runner.train()
    assert 0 <= runner.message_hub.get_scalar('val/accuracy/top1').current() <= 100
    assert runner.message_hub.get_scalar('train/loss').current() < 100
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
    norms = [module for module in runner.model.modules() if isinstance(module, kinds)]
    expected = {**NORMS, 'IN': nn.InstanceNorm2d, 'LN': nn.GroupNorm}[norm.upper()]
    assert len(norms) == 20 and {type(module) for module in norms} == {expected}
    assert norm != 'cbn' or {module.window_length for module in norms} == {4}


@pytest.mark.slow
def test_a_row_is_trained_and_reported(imagenette, tmp_path, monkeypatch):
    def tool(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')

    arguments = ['--table', '3', '--rows', 'cbn-4', '--small', 'imagenette', '--gpus', '1', '--trials', '1']
    changes = ['train_cfg.max_epochs=1', 'param_scheduler.T_max=1', 'custom_hooks.0.burn_in_epochs=0']
    with pytest.raises(SystemExit) as end:
        tool('reproduce.py', *arguments, '--work-dir', tmp_path / 'runs', '--cfg-options', *changes)
    assert end.value.code == 0
    (metrics,) = (tmp_path / 'runs').rglob('test/*/*.json')
    top1 = json.loads(metrics.read_text())['accuracy/top1']
    tool('report.py', tmp_path / 'runs', '--table', '3', '--out', tmp_path / 'report')
    assert f'| ours, 1 trial, not as in the paper (1) | {top1:.1f} |' in (tmp_path / 'report/table3.md').read_text()


@MODELS.register_module()
class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4).eval()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), self.bn])
        nn.init.zeros_(self.bn.weight)
        self.bn.running_mean.fill_(7)
        self.bn.bias.requires_grad_(False)


@pytest.mark.parametrize('norm_cfg', [dict(type='CBN'), dict(type='GN', num_groups=2)])
def test_new_layers_begin_with_what_the_old_ones_have(norm_cfg):
    model = MODELS.build(dict(type='WithNorm', model=dict(type='TwoNames'), norm_cfg=norm_cfg))
    assert model.bn is model.layers[1] and type(model.bn) in (CBN, nn.GroupNorm) and not model.bn.training
    assert not model.bn.weight.any() and model.bn.weight.requires_grad and not model.bn.bias.requires_grad
    assert norm_cfg['type'] == 'GN' or (model.bn.running_mean == 7).all()


@MODELS.register_module()
class OwnPreprocessor(BaseModel):
    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, inputs, mode='tensor'):
        return self.bn(inputs)


def test_a_config_with_its_data_preprocessor_apart_builds_a_model_with_norm():
    """The Runner adds it to the config of the model, which is WithNorm's here."""
    apart = dict(data_preprocessor=dict(type='ImgDataPreprocessor'))
    model = MODELS.build(dict(type='WithNorm', model=dict(type='OwnPreprocessor'), norm_cfg=dict(type='CBN'), **apart))
    assert type(model.data_preprocessor) is ImgDataPreprocessor and type(model.bn) is CBN
