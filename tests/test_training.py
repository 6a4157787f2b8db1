"""Detectors train through mmdet's Runner, on images."""

import math
import os
from itertools import chain

import pytest
import torch
from mmengine.hub import get_config

from mmdet_cbn import CBN, CBNBurnInHook, SwitchNormHook
from mmdet_cbn.experiments.data.shapes import CLASSES

DETECTORS = ('faster-rcnn', 'mask-rcnn')
# With images of COCO at hand, the same on them.
DATA = ['shapes', *(['coco'] if os.environ.get('COCO_ROOT') else [])]


def losses(runner):
    """Every loss that was logged, by name, with its values over the iterations."""
    scalars = runner.message_hub.log_scalars
    return {name: buffer.data[0].tolist() for name, buffer in scalars.items() if 'loss' in name}


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.slow
def test_a_few_iterations_have_finite_losses(build_runner, detector, data):
    runner = build_runner(
        f'small/r18_{data}.py',
        f'{detector}_r50_fpn_cbn-all_1x_coco',
        evaluate=False,
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_interval=99),
        custom_hooks=[dict(type='CBNBurnInHook', burn_in_iters=1)],
        log_processor=dict(by_epoch=False),
    )
    before = {name: p.clone() for name, p in runner.model.named_parameters()}
    runner.train()
    found = losses(runner)
    assert ('train/loss_mask' in found) == (detector == 'mask-rcnn')
    assert all(len(values) == 4 and all(map(math.isfinite, values)) for values in found.values())
    assert runner.message_hub.get_scalar('train/cbn_window').data[0].tolist() == [1, 1, 2, 3]
    layers = [m for m in runner.model.modules() if isinstance(m, CBN)]
    assert {layer.window_length for layer in layers} == {3}
    unchanged = [name for name, p in runner.model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def retinanet(build_runner, norm_cfg, iterations, config='retinanet/retinanet_r50_fpn_1x_coco.py', **options):
    """A small detector of one stage, all of it with the norm; burn-in is an iteration long."""
    model = get_config(f'mmdet::{config}').model
    model.backbone.update(depth=18, init_cfg=None, norm_cfg=norm_cfg, norm_eval=False, frozen_stages=-1)
    model.neck.update(in_channels=[64, 128, 256, 512], out_channels=16, norm_cfg=norm_cfg)
    model.bbox_head.update(num_classes=len(CLASSES), in_channels=16, feat_channels=16, norm_cfg=norm_cfg)
    return build_runner(
        'small/r18_shapes.py',
        evaluate=False,
        model=dict(model.to_dict(), _delete_=True),
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_interval=99),
        custom_hooks=[dict(type='CBNBurnInHook', burn_in_iters=1)],
        log_processor=dict(by_epoch=False),
        **options,
    )


@pytest.mark.parametrize(
    'config', ['retinanet/retinanet_r50_fpn_1x_coco.py', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py']
)
@pytest.mark.slow
def test_a_head_shared_by_the_levels_of_the_fpn_has_a_window_for_each(build_runner, config):
    runner = retinanet(build_runner, dict(type='CBN', window_size=3), 4, config)
    runner.train()
    assert runner.message_hub.get_scalar('train/cbn_window').data[0].tolist() == [1, 1, 2, 3]
    layers = [m for m in runner.model.bbox_head.modules() if isinstance(m, CBN)]
    assert len(layers) == 8
    for layer in layers:
        assert [len(window) for window in layer.windows] == [2] * 5
    assert all(math.isfinite(value) for values in losses(runner).values() for value in values)


def test_auto_reads_the_batch_size_from_mmdets_batch_sampler(build_runner):
    parts = ('backbone', 'neck', 'roi_head.bbox_head')
    runner = build_runner(
        'small/r18_shapes.py',
        **{f'model.{part}.norm_cfg.window_size': 'auto' for part in parts},
        **{'train_dataloader.batch_size': 3},
    )
    CBNBurnInHook(burn_in_iters=0).before_train(runner)
    layers = [m for m in runner.model.modules() if isinstance(m, CBN)]
    assert len(layers) == 32 and {layer.window_size for layer in layers} == {6}


@pytest.mark.parametrize('where', ['head', 'all'])
@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.slow
def test_the_papers_recipes_train_an_iteration_after_burn_in(build_runner, shapes_root, detector, where):
    """At a small image size; everything else as it is."""
    runner = build_runner(
        f'cbn/{detector}_r50_fpn_cbn-{where}_1x_coco.py',
        evaluate=False,
        **{
            'train_dataloader.dataset.data_root': str(shapes_root),
            'train_dataloader.dataset.metainfo': dict(classes=CLASSES),
            'train_dataloader.dataset.pipeline.2.scale': (128, 96),
            'train_dataloader.batch_size': 1,
            'model.train_cfg.rcnn.sampler.num': 32,
            'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=99),
            'custom_hooks': [dict(type='CBNBurnInHook', burn_in_iters=0)],
            'log_processor': dict(by_epoch=False),
        },
    )
    runner.train()
    assert all(map(math.isfinite, chain(*losses(runner).values())))
    active = [m for m in runner.model.modules() if isinstance(m, CBN) and m.training]
    assert {layer.window_length for layer in active} == {2}
    assert len(active) == 8 + 4 + 4 * (detector == 'mask-rcnn') + 42 * (where == 'all')


FASTER = [
    *('4conv1fc', 'bn-head', 'syncbn-head', 'gn-head', 'brn-head', 'cbn-head'),
    *('bn-all', 'syncbn-all', 'gn-all', 'cbn-all', 'bn-syncbn-8-head'),
]
MASK = ['4conv1fc', 'bn-head', 'syncbn-head', 'gn-head', 'cbn-head', 'cbn-all']


@pytest.mark.parametrize(
    'row', [*(f'faster-rcnn_r50_fpn_{n}' for n in FASTER), *(f'mask-rcnn_r50_fpn_{n}' for n in MASK)]
)
@pytest.mark.slow
def test_every_kind_of_row_trains_and_is_evaluated_in_its_small_version(build_runner, row):
    runner = build_runner(
        'small/r18_shapes.py',
        f'{row}_1x_coco',
        **{
            'train_cfg.max_epochs': 2,
            'train_dataloader.dataset.indices': 2,
            'val_dataloader.dataset.indices': 1,
        },
    )
    hook = next((hook for hook in runner.hooks if isinstance(hook, CBNBurnInHook | SwitchNormHook)), None)
    if isinstance(hook, CBNBurnInHook):
        hook.length = 1
    elif hook is not None:
        hook.epoch = 1
    runner.train()
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in losses(runner).values())
    assert 'loss_mask' in str(losses(runner)) or row.startswith('faster')
    results = runner.message_hub.log_scalars
    assert len(results['val/coco/bbox_mAP'].data[0]) == 2
    assert ('val/coco/segm_mAP' in results) == row.startswith('mask')
    if 'syncbn-8' in row:
        assert type(runner.model.neck.fpn_convs[0].bn).__name__ == 'SyncBatchNorm'
