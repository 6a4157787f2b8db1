"""Checkpoints of the paper authors' released code become checkpoints of ours."""

import re
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.nn import functional

from mmdet_cbn import CBN
from mmdet_cbn.experiments.paper.released_checkpoint import convert_checkpoint, convert_state_dict, model_shapes

TOOL = ROOT / 'tools' / 'convert_checkpoint.py'
# The small version of any row of configs/cbn; without CBN_ROW, of Faster R-CNN with CBN.
SMALL = ROOT / 'configs' / 'small' / 'r18_shapes.py'
SHAPES = ('circle', 'square', 'triangle', 'star')
EPS = 1e-5


def build(config, device='cpu'):
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device(device):
        return MODELS.build(config.model).eval()


def random_weights(model, seed=0):
    """What a trained ``model`` could hold: other values in each entry, variances above 0, counts of batches."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith('num_batches_tracked'):
            state[key] = torch.randint(1, 10**6, (), generator=generator)
        elif key.endswith('running_var'):
            state[key] = 10 ** torch.empty(value.shape).uniform_(-4, 1, generator=generator)
        else:
            state[key] = torch.randn(value.shape, generator=generator)
    return state


def as_in_2019(model, state):
    """``state``, of ``model``, as the authors' code would have saved it; the background is filled with -7."""
    cbn_layers = {f'{name}.' for name, module in model.named_modules() if isinstance(module, CBN)}
    released = {}
    for key, value in state.items():
        prefix, entry = re.fullmatch(r'(.*\.)(\w+)', key).groups()
        if prefix in cbn_layers:
            if entry == 'num_batches_tracked':
                continue
            if entry == 'running_var':  # sqrt(theirs) + eps = sqrt(ours + eps)
                value = ((value.double() + EPS) ** 0.5 - EPS).pow(2).float()
        if prefix.endswith('head.fc_cls.'):
            value = torch.cat([value[-1:], value[:-1]])
        if prefix.endswith('head.fc_reg.'):
            value = torch.cat([torch.full((4, *value.shape[1:]), -7.0), value])
        if prefix.endswith('head.conv_logits.'):
            value = torch.cat([torch.full((1, *value.shape[1:]), -7.0), value])
        released[re.sub(r'^roi_head\.', '', key)] = value
    return released


@pytest.fixture(scope='module')
def faster():
    """The model of SMALL, without values, random weights for it, and those as released in 2019."""
    model = build(Config.fromfile(SMALL), 'meta')
    state = random_weights(model)
    return model, state, as_in_2019(model, state)


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs the tool on what is given, saved as IN; returns exit status and what was printed."""

    def run(checkpoint, config=SMALL, out='out.pth', **save_options):
        torch.save(checkpoint, tmp_path / 'in.pth', **save_options)
        arguments = [TOOL, tmp_path / 'in.pth', tmp_path / out, '--config', config]
        monkeypatch.setattr(sys, 'argv', [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(TOOL), run_name='__main__')
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out + captured.err

    return run


@pytest.mark.parametrize(
    ('folder', 'row', 'norm'),
    [
        ('small', 'faster-rcnn_r50_fpn_4conv1fc_1x_coco', None),
        ('small', 'faster-rcnn_r50_fpn_syncbn-head_1x_coco', 'bn'),
        ('small', 'faster-rcnn_r50_fpn_gn-head_1x_coco', 'gn'),
        ('small', 'faster-rcnn_r50_fpn_cbn-head_1x_coco', 'bn'),
        ('small', 'mask-rcnn_r50_fpn_gn-head_1x_coco', 'gn'),
        ('small', 'mask-rcnn_r50_fpn_cbn-all_1x_coco', 'bn'),
        ('cbn', 'mask-rcnn_r50_fpn_cbn-head_1x_coco', 'bn'),
    ],
)
def test_each_value_arrives_where_it_belongs(folder, row, norm, monkeypatch):
    monkeypatch.setenv('CBN_ROW', row)
    config = Config.fromfile(SMALL if folder == 'small' else ROOT / 'configs' / folder / f'{row}.py')
    model = build(config, 'meta')
    state = random_weights(model)
    released = as_in_2019(model, state)
    assert 'bbox_head.fc_cls.bias' in released and 'backbone.layer4.1.bn2.running_var' in released
    assert (f'neck.fpn_convs.3.{norm}.weight' if norm else 'neck.fpn_convs.3.conv.bias') in released

    converted, report = convert_state_dict(released, model_shapes(config))
    assert report.complete and not report.leftover and not report.inexact and report.placed == len(state)
    model.load_state_dict(converted, strict=True, assign=True)

    cbn_layers = {key for key, module in model.named_modules() if isinstance(module, CBN)}
    assert bool(cbn_layers) == ('_cbn-' in row)
    for key, value in model.state_dict().items():
        layer, _, entry = key.rpartition('.')
        if layer in cbn_layers and entry == 'num_batches_tracked':
            assert value.dtype == torch.long and value == 0
        elif layer in cbn_layers and entry == 'running_var':
            torch.testing.assert_close(value, state[key], rtol=1e-6, atol=0, msg=key)
        else:
            assert torch.equal(value, state[key]), key


def test_the_classes_of_the_heads_are_those_of_2019(monkeypatch):
    """By what the heads put out for the same features, and not by the order of weights."""
    monkeypatch.setenv('CBN_ROW', 'mask-rcnn_r50_fpn_cbn-all_1x_coco')
    config = Config.fromfile(SMALL)
    model = build(config)
    released = {key.removeprefix('roi_head.'): value for key, value in random_weights(model).items()}
    for layer, channels in (('bbox_head.fc_reg', 5 * 4), ('mask_head.conv_logits', 5)):
        for name in (f'{layer}.weight', f'{layer}.bias'):
            released[name] = torch.randn(channels, *released[name].shape[1:])
    model.load_state_dict(convert_state_dict(released, model_shapes(config))[0], strict=True)
    bbox_head, mask_head = model.roi_head.bbox_head, model.roi_head.mask_head

    def old(layer, features, function=functional.linear):
        return function(features, released[f'{layer}.weight'], released[f'{layer}.bias'])

    features = torch.randn(5, 256)
    scores, deltas = old('bbox_head.fc_cls', features), old('bbox_head.fc_reg', features).view(5, 5, 4)
    new_scores, new_deltas = bbox_head.fc_cls(features), bbox_head.fc_reg(features).view(5, 4, 4)
    features = torch.randn(2, 64, 3, 3)
    masks, new_masks = old('mask_head.conv_logits', features, functional.conv2d), mask_head.conv_logits(features)
    for new, label in enumerate(range(1, 5)):  # in 2019, class 0 was the background
        torch.testing.assert_close(new_scores[:, new], scores[:, label])
        torch.testing.assert_close(new_deltas[:, new], deltas[:, label])
        torch.testing.assert_close(new_masks[:, new], masks[:, label])
    torch.testing.assert_close(new_scores[:, bbox_head.num_classes], scores[:, 0])


def test_objectness_stays_as_it_is(faster):
    model, _, released = faster
    converted, _ = convert_state_dict(released, {k: tuple(v.shape) for k, v in model.state_dict().items()})
    assert len(released['rpn_head.rpn_cls.bias'].unique()) == 3
    for name in ('rpn_cls.weight', 'rpn_cls.bias', 'rpn_reg.weight', 'rpn_reg.bias'):
        assert torch.equal(converted[f'rpn_head.{name}'], released[f'rpn_head.{name}'])


def test_cbn_evaluates_as_the_authors_layer():
    generator = torch.Generator().manual_seed(0)
    mean, weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=torch.double) for shape in (6, 6, 6, (2, 6, 3, 3))
    )
    var = torch.tensor([1e-5, 1e-4, 1e-2, 1, 100, 0], dtype=torch.double)
    released = dict(weight=weight, bias=bias, running_mean=mean, running_var=var)
    layer = CBN(6).double().eval()
    converted, report = convert_state_dict(
        {f'bn.{name}': value for name, value in released.items()},
        {f'bn.{name}': tuple(value.shape) for name, value in layer.state_dict().items()},
    )
    layer.load_state_dict({name.removeprefix('bn.'): value for name, value in converted.items()}, strict=True)

    mean, var, weight, bias = (value.view(-1, 1, 1) for value in (mean, var, weight, bias))
    expected = (x - mean) / (var.sqrt() + EPS) * weight + bias
    torch.testing.assert_close(layer(x)[:, :5], expected[:, :5], rtol=1e-12, atol=1e-12)
    assert layer.running_var[5] == 0 and report.inexact == {'bn.running_var': 1}
    assert 'too small to carry over exactly: bn.running_var, 1 channels' in str(report)


def test_class_agnostic_layers_stay_whole():
    released = {'bbox_head.fc_reg.bias': torch.arange(4.0), 'mask_head.conv_logits.bias': torch.arange(1.0)}
    shapes = {f'roi_head.{name}': tuple(value.shape) for name, value in released.items()}
    converted, report = convert_state_dict(released, shapes)
    assert report.complete
    assert all(torch.equal(converted[f'roi_head.{name}'], value) for name, value in released.items())


def test_the_result_also_fits_mmdets_options_for_old_models(monkeypatch):
    """Those that the tool's help names."""
    monkeypatch.setenv('CBN_ROW', 'mask-rcnn_r50_fpn_cbn-all_1x_coco')
    config = Config.fromfile(SMALL)
    shapes = model_shapes(config)
    coder = dict(type='LegacyDeltaXYWHBBoxCoder')
    config.model.rpn_head.bbox_coder = config.model.roi_head.bbox_head.bbox_coder = coder
    config.merge_from_dict(
        {
            'model.rpn_head.anchor_generator': dict(type='LegacyAnchorGenerator', center_offset=0.5),
            'model.roi_head.bbox_roi_extractor.roi_layer': dict(aligned=False, sampling_ratio=2),
            'model.roi_head.mask_roi_extractor.roi_layer': dict(aligned=False, sampling_ratio=2),
            'model.test_cfg.rpn': dict(nms_pre=2000, max_per_img=2000),
        }
    )
    assert model_shapes(config) == shapes
    model = build(config)
    assert type(model.rpn_head.prior_generator).__name__ == 'LegacyAnchorGenerator'
    assert not model.roi_head.mask_roi_extractor.roi_layers[0].aligned


@pytest.mark.parametrize('form', ['of mmcv', 'bare', 'of DataParallel', 'before torch 1.6'])
def test_all_forms_of_files_convert(faster, convert, tmp_path, form):
    model, state, released = faster
    checkpoint = dict(
        meta=dict(CLASSES=list(SHAPES), epoch=12, iter=9, config='text', mmdet_version='0.6.0', time='Mon'),
        state_dict=released,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict(),
    )
    options = {}
    if form == 'bare':
        checkpoint = released
    elif form == 'of DataParallel':
        checkpoint['state_dict'] = {f'module.{name}': value for name, value in released.items()}
    elif form == 'before torch 1.6':
        options = dict(_use_new_zipfile_serialization=False)
    status, printed = convert(checkpoint, **options)
    assert status == 0 and f'{len(state)} keys of the model filled, 0 missing' in printed

    converted = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert converted.keys() == {'meta', 'state_dict'}
    assert converted['meta'] == ({} if form == 'bare' else dict(dataset_meta=dict(classes=SHAPES)))
    assert list(converted['state_dict']) == list(model.state_dict())
    assert type(converted['state_dict']) is dict
    bias = 'roi_head.bbox_head.fc_reg.bias'
    assert torch.equal(converted['state_dict'][bias], state[bias])
    assert converted['state_dict'][bias].untyped_storage().nbytes() == 4 * 16, (
        'nothing of the background is in the file'
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.pth', 'out.pth']


def test_init_detector_loads_the_result(faster, convert, tmp_path):
    _, _, released = faster
    assert convert(dict(meta=dict(CLASSES=SHAPES), state_dict=released))[0] == 0
    model = init_detector(str(SMALL), str(tmp_path / 'out.pth'), device='cpu')
    assert model.dataset_meta['classes'] == SHAPES
    loaded, written = model.state_dict(), torch.load(tmp_path / 'out.pth')['state_dict']
    assert loaded.keys() == written.keys() and all(torch.equal(loaded[key], value) for key, value in written.items())


def test_what_is_left_over_is_reported_and_not_written(faster, convert, tmp_path):
    _, _, released = faster
    status, printed = convert(dict(released, **{'mask_head.conv_logits.weight': torch.zeros(5, 64, 1, 1)}))
    assert status == 0 and '1 keys of the checkpoint left over' in printed
    assert 'left over: mask_head.conv_logits.weight [5, 64, 1, 1]\n' in printed
    assert not any('mask_head' in key for key in torch.load(tmp_path / 'out.pth')['state_dict'])


def test_a_model_that_is_not_filled_is_reported_and_nothing_written(faster, convert, tmp_path):
    _, _, released = faster
    checkpoint = {name: value for name, value in released.items() if name != 'neck.fpn_convs.0.bn.bias'}
    del checkpoint['backbone.layer1.0.bn1.running_var']
    status, printed = convert(checkpoint)
    assert status == 1 and '3 missing' in printed and 'nothing was written' in printed
    for key in ('neck.fpn_convs.0.bn.bias', 'backbone.layer1.0.bn1.running_var'):
        assert f'missing: {key} [{64 if "neck" in key else 32}]\n' in printed
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


def test_other_shapes_are_reported_and_nothing_written(faster, convert, tmp_path):
    """Here of a checkpoint with COCO's classes."""
    _, _, released = faster
    released = dict(released)
    for layer, channels in (('fc_cls', 81), ('fc_reg', 324)):
        released[f'bbox_head.{layer}.weight'] = torch.zeros(channels, 256)
        released[f'bbox_head.{layer}.bias'] = torch.zeros(channels)
    status, printed = convert(released)
    assert status == 1 and '0 missing, 4 of another shape' in printed
    for shapes in ('fc_cls.weight [81, 256] in the checkpoint, [5, 256]', 'fc_reg.bias [324] in the checkpoint, [16]'):
        assert f'of another shape: roi_head.bbox_head.{shapes} in the model\n' in printed
    assert not (tmp_path / 'out.pth').exists()


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_no_checkpoint_runs_code(faster, convert, tmp_path):
    made = tmp_path / 'made'
    for options in ({}, dict(_use_new_zipfile_serialization=False)):
        status, printed = convert(dict(state_dict=faster[2], meta=Evil(made)), **options)
        assert status == 2 and re.search(r'in\.pth was not loaded.*open', printed)
        assert not made.exists() and not (tmp_path / 'out.pth').exists()


def test_an_existing_file_stays(faster, convert, tmp_path):
    (tmp_path / 'out.pth').write_text('mine')
    status, printed = convert(faster[2])
    assert status == 2 and 'out.pth exists' in printed
    assert (tmp_path / 'out.pth').read_text() == 'mine'


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        (dict(epoch=12), 'holds no state dict'),
        (dict(state_dict=None), 'holds no state dict'),
        ([torch.zeros(1)], 'holds no state dict'),
        ({'roi_head.bbox_head.fc_cls.bias': torch.zeros(5)}, 'one of mmdetection 2.0 or later'),
    ],
)
def test_what_is_no_checkpoint_of_2019_is_refused(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint, {})


def test_unusable_arguments_are_errors(convert, tmp_path):
    (tmp_path / 'empty.py').write_text('')
    (tmp_path / 'wrong.py').write_text("model = dict(type='FasterRCNN', nonsense=1)")
    for options, message in (
        (dict(config=tmp_path / 'none.py'), 'none.py'),
        (dict(config=tmp_path / 'empty.py'), 'empty.py describes no model'),
        (dict(config=tmp_path / 'wrong.py'), 'nonsense'),
        (dict(out='none/out.pth'), 'there is no folder'),
    ):
        status, printed = convert({}, **options)
        assert status == 2 and message in printed.splitlines()[-1]


@pytest.mark.slow
def test_the_tool_is_a_command(faster, tmp_path):
    torch.save(faster[2], tmp_path / 'in.pth')
    command = [sys.executable, TOOL, 'in.pth', 'out.pth', '--config', SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith('wrote out.pth\n'), result.stderr
    assert len(torch.load(tmp_path / 'out.pth')['state_dict']) == len(faster[1])
