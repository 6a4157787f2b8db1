"""A trained detector leaves for where it is used: mmdet's inference API, ONNX, a machine without this plugin."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, runner_builder
from mmcv.cnn import fuse_conv_bn
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.analysis.classifier import MultiLabelClassifier
from mmdet_cbn.openmmlab.publish import plain_config

pytestmark = pytest.mark.slow

HAS_DYNAMO = hasattr(getattr(torch.export, 'Dim', None), 'DYNAMIC')  # torch >= 2.6
EXPORTERS = pytest.mark.parametrize(
    'dynamo', [False, *[True] * HAS_DYNAMO], ids=['torchscript', 'dynamo'][: 1 + HAS_DYNAMO]
)

WITHOUT_PLUGIN = """
import sys
sys.modules['mmdet_cbn'] = None  # to import it raises ModuleNotFoundError
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.runner import load_checkpoint
config, checkpoint, image, out = sys.argv[1:]
detector = init_detector(config, checkpoint, device='cpu')
load_checkpoint(detector, checkpoint, strict=True)
torch.save(dict(inference_detector(detector, image).pred_instances.items()), out)
"""


@pytest.fixture(scope='module')
def runner(shapes_root, tmp_path_factory):
    """It has trained a detector with full windows, and left a checkpoint, one to publish and the config."""
    scale = (128, 80)
    with pytest.MonkeyPatch.context() as monkeypatch:
        runner = runner_builder(shapes_root, tmp_path_factory.mktemp('trained'), monkeypatch)(
            'small/r18_shapes.py',
            **{
                'train_dataloader.dataset.pipeline.2.scale': scale,
                **{f'{split}_dataloader.dataset.pipeline.1.scale': scale for split in ('val', 'test')},
                'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5, val_begin=99),
                'custom_hooks': [dict(type='CBNBurnInHook', burn_in_iters=1)],
                'default_hooks.checkpoint.by_epoch': False,
                'default_hooks.checkpoint.published_keys': ['meta', 'state_dict'],
                'log_processor': dict(by_epoch=False),
            },
        )
        runner.train()
    assert {layer.window_length for layer in cbn_layers(runner.model)} == {4}
    return runner


@pytest.fixture
def detector(runner):
    """As training has left it."""
    return copy.deepcopy(runner.model).train()


@pytest.fixture(scope='module')
def config(runner):
    """Path of the config that the Runner has written beside its checkpoints."""
    return str(Path(runner.work_dir, 'r18_shapes.py'))


@pytest.fixture(scope='module')
def checkpoint(runner):
    return str(Path(runner.work_dir, 'iter_5.pth'))


@pytest.fixture(scope='module')
def bn_config(runner):
    return plain_config(runner.cfg)


@pytest.fixture(scope='module')
def images(shapes_root):
    return [str(path) for path in sorted((shapes_root / 'val2017').glob('*.png'))]


def cbn_layers(model):
    return [module for module in model.modules() if isinstance(module, CBN)]


def detections(detector, batches):
    with torch.no_grad():
        return [sample.pred_instances for batch in batches for sample in detector.eval().test_step(batch)]


def assert_same(actual, expected):
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.bboxes, expected.bboxes)


def assert_close(actual, expected):
    """To what single precision leaves of scores from 0 to 1, and of pixels. Equal scores may come in any order."""
    assert len(actual) == len(expected)
    near = actual.labels.unsqueeze(1) == expected.labels
    near &= (actual.scores.unsqueeze(1) - expected.scores).abs() <= 1e-6
    near &= ((actual.bboxes.unsqueeze(1) - expected.bboxes).abs() <= 1e-3).all(dim=2)
    assert near.any(dim=0).all() and near.any(dim=1).all()


def export(part, example, path, dynamo):
    """A file that takes any batch size."""
    batch = dict(dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}]) if dynamo else dict(dynamic_axes=dict(x={0: 'batch'}))
    exporter = dict(dynamo=dynamo) if HAS_DYNAMO else {}
    torch.onnx.export(part, (example,), str(path), input_names=['x'], verbose=False, **exporter, **batch)
    onnx.checker.check_model(path, full_check=True)
    return path


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: tuple(map(torch.from_numpy, session.run(None, dict(x=x.numpy()))))


def run_cbn_parts_in_onnxruntime(detector, tmp_path, dynamo):
    """All of the detector that has CBN layers. Proposals, RoIAlign and NMS between and behind stay mmdet's own."""
    trunk, head = nn.Sequential(detector.backbone, detector.neck).eval(), detector.roi_head.bbox_head.eval()
    assert len(cbn_layers(detector)) == len(cbn_layers(trunk)) + len(cbn_layers(head))
    files = [
        export(trunk, torch.randn(2, 3, 96, 128), tmp_path / 'trunk.onnx', dynamo),
        export(head, torch.randn(2, 64, 7, 7), tmp_path / 'head.onnx', dynamo),
    ]
    detector.extract_feat, head.forward = map(in_onnxruntime, files)


@EXPORTERS
def test_in_onnxruntime_it_detects_what_it_does_in_pytorch_at_any_batch_size(detector, runner, tmp_path, dynamo):
    samples = [sample for batch in runner.val_dataloader for sample in zip(*batch.values(), strict=True)]
    keys = ('inputs', 'data_samples')
    batches = [
        pseudo_collate([dict(zip(keys, sample, strict=True)) for sample in part])
        for part in (samples[:1], samples[:3], samples)
    ]
    expected = detections(detector, copy.deepcopy(batches))
    run_cbn_parts_in_onnxruntime(detector, tmp_path, dynamo)
    for ours, theirs in zip(detections(detector, batches), expected, strict=True):
        assert len(ours) > 0
        assert_close(ours, theirs)


@EXPORTERS
def test_the_exported_graph_is_that_of_batchnorm(detector, bn_config, tmp_path, dynamo):
    plain = MODELS.build(bn_config.model)
    plain.load_state_dict(detector.state_dict())
    graphs = []
    for name, model in (('cbn', detector), ('bn', plain)):
        head = model.eval().roi_head.bbox_head
        graphs.append(onnx.load(export(head, torch.randn(2, 64, 7, 7), tmp_path / f'{name}.onnx', dynamo)))
    ours, theirs = graphs
    assert not ours.functions and {node.domain for node in ours.graph.node} == {''}
    assert [(n.op_type, *n.attribute) for n in ours.graph.node] == [
        (n.op_type, *n.attribute) for n in theirs.graph.node
    ]
    assert sorted(t.raw_data for t in ours.graph.initializer) == sorted(t.raw_data for t in theirs.graph.initializer)


def assert_train_the_same(models, runner):
    """One more iteration, with full windows."""
    batch = next(iter(runner.train_dataloader))
    losses = []
    for model in models:
        torch.manual_seed(0)  # the regions are sampled
        inputs = model.train().data_preprocessor(copy.deepcopy(batch), training=True)
        loss, values = model.parse_losses(model(**inputs, mode='loss'))
        loss.backward()
        losses.append(values)
        assert {layer.window_length for layer in cbn_layers(model)} == {4}
    assert losses[0] == losses[1]
    ours, theirs = ([p.grad for p in model.parameters() if p.grad is not None] for model in models)
    assert all(map(torch.equal, ours, theirs))


@EXPORTERS
def test_after_an_export_training_goes_on_as_if_there_had_been_none(detector, runner, tmp_path, dynamo):
    untouched = copy.deepcopy(detector)
    export(detector.eval().roi_head.bbox_head, torch.randn(2, 64, 7, 7), tmp_path / 'head.onnx', dynamo)
    assert_train_the_same([detector, untouched], runner)


def test_in_training_a_trace_is_refused(detector):
    """As of mmengine's get_model_complexity_info."""
    with pytest.raises(RuntimeError, match=r'cannot be exported in training: call model\.eval\(\) before'):
        torch.jit.trace(detector.train().roi_head.bbox_head, torch.randn(2, 64, 7, 7))


def test_in_training_torch_export_is_refused_and_training_goes_on_as_if_it_had_not_been_tried(
    detector, runner, tmp_path
):
    untouched = copy.deepcopy(detector)
    head, x = detector.roi_head.bbox_head, torch.randn(2, 64, 7, 7)
    if HAS_DYNAMO:
        with pytest.raises(torch.onnx.OnnxExporterError, match=r'call model\.eval\(\) before'):
            export(head, x, tmp_path / 'head.onnx', dynamo=True)
    else:
        with pytest.raises(Exception, match=r'disable'):  # by torch: graphs end before the layer
            torch.export.export(head, (x,))
    assert_train_the_same([detector, untouched], runner)


@pytest.mark.parametrize('training', [False, True], ids=['in_evaluation', 'in_training'])
def test_fused_into_its_convolutions_it_detects_the_same(detector, runner, tmp_path, training):
    batches = list(runner.val_dataloader)
    expected = detections(detector, copy.deepcopy(batches))
    fused = fuse_conv_bn(detector.train(training))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    in_pytorch = detections(fused, copy.deepcopy(batches))
    run_cbn_parts_in_onnxruntime(fused, tmp_path, dynamo=False)
    for ours, exported, theirs in zip(in_pytorch, detections(fused, batches), expected, strict=True):
        assert len(ours) > 0
        assert_close(ours, theirs)
        assert_close(exported, theirs)


@pytest.mark.parametrize(
    ('pattern', 'variables'),
    [
        ('iter_5-????????.pth', {}),
        # As saved by mmengine, a checkpoint holds more than plain data, which torch >= 2.6 refuses if not told so.
        ('iter_5.pth', dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1')),
    ],
    ids=['published', 'as_saved'],
)
def test_without_the_plugin_a_batchnorm_config_loads_the_checkpoint_and_detects_the_same(
    runner, detector, bn_config, images, tmp_path, pattern, variables
):
    (file,) = Path(runner.work_dir).glob(pattern)
    bn_config.dump(tmp_path / 'bn.py')
    theirs = detected_without_plugin(tmp_path / 'bn.py', file, images[0], tmp_path, variables)
    assert len(theirs) > 0
    assert_same(theirs, detections(detector, runner.val_dataloader)[0])


def detected_without_plugin(config, checkpoint, image, tmp_path, variables=MappingProxyType({})):
    arguments = [config, checkpoint, image, tmp_path / 'detections.pth']
    environment = {name: value for name, value in os.environ.items() if not name.startswith('TORCH_FORCE')}
    subprocess.run(
        [sys.executable, '-c', WITHOUT_PLUGIN, *arguments], env=environment | variables, check=True, cwd=tmp_path
    )
    return InstanceData(**torch.load(tmp_path / 'detections.pth'))


def publish(*arguments):
    return subprocess.run([sys.executable, ROOT / 'tools/publish.py', *arguments], capture_output=True, text=True)


def test_what_the_tool_publishes_detects_the_same_without_the_plugin(
    runner, detector, config, checkpoint, images, tmp_path
):
    result = publish(config, checkpoint, tmp_path / 'published')
    assert result.returncode == 0, result.stderr
    written = [tmp_path / 'published' / name for name in ('config.py', 'model.pth')]
    assert all(str(path) in result.stdout for path in written)
    published = torch.load(written[1], weights_only=True)
    assert set(published) == {'meta', 'state_dict'}
    assert Config.fromfile(written[0]).pretty_text == published['meta']['cfg']
    expected = detections(detector, runner.val_dataloader)[0]
    assert_same(detected_without_plugin(*written, images[0], tmp_path), expected)
    inferencer = DetInferencer(weights=str(written[1]), device='cpu', show_progress=False)
    assert inferencer(images[0], no_save_vis=True)['predictions'][0]['scores'] == expected.scores.tolist()


def test_the_tool_publishes_nothing_that_does_not_fit(config, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=False)
    del state['state_dict']['backbone.conv1.weight']
    torch.save(state, tmp_path / 'partial.pth')
    torch.save(dict(weights=1), tmp_path / 'other.pth')
    for file, message in (('partial.pth', 'backbone.conv1.weight'), ('other.pth', 'state_dict')):
        result = publish(config, tmp_path / file, tmp_path / 'published')
        assert result.returncode == 2 and message in result.stderr
        assert not (tmp_path / 'published').exists()
    for text, message in (('x = 1', 'has no model'), ("model = dict(type='RetinaNett')", 'RetinaNett'), ('x =', '')):
        (tmp_path / 'wrong.py').write_text(text)
        result = publish(tmp_path / 'wrong.py', checkpoint, tmp_path / 'published')
        assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr
    result = publish(config, checkpoint, tmp_path)
    assert result.returncode == 2 and 'must not exist' in result.stderr


def test_a_config_that_needs_more_of_the_plugin_is_refused_by_name():
    config = Config(dict(model=dict(type='mmdet.MultiLabelClassifier', backbone=dict(norm_cfg=dict(type='CBN')))))
    with pytest.raises(ValueError, match=MultiLabelClassifier.__name__):
        plain_config(config)


@pytest.mark.parametrize(
    ('imports', 'left'), [(['mmdet_cbn'], None), ('mmdet_cbn.layers', None), (['a', 'mmdet_cbn'], ['a'])]
)
def test_of_a_published_config_other_imports_and_hooks_stay(imports, left):
    config = Config(
        dict(
            custom_imports=dict(imports=imports),
            norm_cfg=dict(type='BRN', eps=0.1, r_steps=(1, 2)),
            custom_hooks=[dict(type='CBNBurnInHook', burn_in_epochs=1), dict(type='EMAHook')],
        )
    )
    plain = plain_config(config)
    assert plain.get('custom_imports', dict(imports=None))['imports'] == left
    assert plain.norm_cfg == dict(type='BN', eps=0.1) and plain.custom_hooks == [dict(type='EMAHook')]


def test_init_detector_detects_what_the_trained_model_does(runner, detector, config, checkpoint, images):
    loaded = init_detector(config, checkpoint, device='cpu')
    assert len(cbn_layers(loaded)) == len(cbn_layers(detector))
    expected = detections(detector, runner.val_dataloader)
    for result, theirs in zip(inference_detector(loaded, images), expected, strict=True):
        assert_same(result.pred_instances, theirs)


@pytest.mark.parametrize('with_config', [True, False], ids=['config', 'config_of_the_checkpoint'])
def test_det_inferencer_detects_what_the_trained_model_does(
    runner, detector, config, checkpoint, images, tmp_path, with_config
):
    inferencer = DetInferencer(config if with_config else None, checkpoint, device='cpu', show_progress=False)
    found = inferencer(images[0], out_dir=str(tmp_path), pred_score_thr=0)['predictions'][0]
    expected = detections(detector, runner.val_dataloader)[0]
    assert found == {name: expected[name].tolist() for name in ('bboxes', 'labels', 'scores')}
    assert (tmp_path / 'vis' / Path(images[0]).name).stat().st_size > 0


@pytest.mark.parametrize('norm_cfg', [dict(type='CBN', window_size=8), dict(type='BRN'), dict(type='BN')])
def test_a_published_config_has_what_was_in_with_norm(norm_cfg):
    inner = dict(type='mmdet.ResNet', depth=18)
    config = Config(dict(model=dict(backbone=dict(type='WithNorm', model=inner, norm_cfg=norm_cfg))))
    assert plain_config(config).model.backbone == inner
    config.model.backbone.init_cfg = dict(type='Pretrained')
    assert plain_config(config).model.backbone == {**inner, 'init_cfg': dict(type='Pretrained')}
    del config.model.backbone.init_cfg
    for other in (dict(type='GN', num_groups=4), {**norm_cfg, 'eps': 0.1}):
        config.model.backbone.norm_cfg = other
        with pytest.raises(ValueError, match='mmdet_cbn is needed for WithNorm, unless its norm_cfg is of BatchNorm'):
            plain_config(config)
