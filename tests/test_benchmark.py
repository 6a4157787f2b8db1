"""tools/benchmark.py and what it measures with."""

import json
import logging
import runpy
import statistics
import sys

import pytest
import torch
from conftest import ROOT
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.cost import layers
from mmdet_cbn.experiments.cost import measure as cost
from mmdet_cbn.experiments.cost.detectors import (
    Detector,
    Settings,
    benchmark,
    make_inputs,
    measure,
    time_in_alternation,
    to_markdown,
)
from mmdet_cbn.experiments.cost.storage import StorageCounter

MASK_RCNN = ROOT / 'configs/cbn/mask-rcnn_r50_fpn_cbn-all_1x_coco.py'
SIZE, BATCH_SIZE, ROUNDS = (96, 64), 2, 3
FEW_ROIS = {
    'model.train_cfg.rcnn.sampler.num': 16,
    'model.test_cfg.rpn.max_per_img': 50,
    'model.test_cfg.rcnn.max_per_img': 10,
}


def mask_rcnn(norm_cfg=None, rois=FEW_ROIS):
    """Mask R-CNN made small, with another norm than CBN in all its parts if one is given."""
    config, small = Config.fromfile(MASK_RCNN), Config.fromfile(ROOT / 'configs/_base_/small.py')
    heads = {**small.small_box_branch, **small.small_mask_branch}
    config.merge_from_dict(dict(model=dict(small.small_model, roi_head=heads)))
    parts = ('backbone', 'neck', 'roi_head.bbox_head', 'roi_head.mask_head') if norm_cfg else ()
    norms = {f'model.{part}.norm_cfg': dict(norm_cfg, _delete_=True) for part in parts}
    config.merge_from_dict({**norms, **rois})
    return config


def detector_of(config):
    inputs, image = (make_inputs(count, SIZE, num_classes=80) for count in (BATCH_SIZE, 1))
    return Detector(config, Settings('cpu', SIZE, BATCH_SIZE), inputs, image)


def run_tool(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['benchmark.py', *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / 'tools/benchmark.py'), run_name='__main__')
        finally:
            logging.disable(logging.NOTSET)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What the tool writes of Mask R-CNN with SyncBN, which is BN in one process, and with CBN."""
    folder = tmp_path_factory.mktemp('benchmark')
    for name, norm_cfg in dict(sync_bn=dict(type='SyncBN'), cbn=None).items():
        mask_rcnn(norm_cfg, rois={}).dump(folder / f'{name}.py')
    options = ('--device', 'cpu', '--size', *SIZE, '--batch-size', BATCH_SIZE, '--rounds', ROUNDS, '--warmup', 1)
    few_rois = (f'{key}={value}' for key, value in FEW_ROIS.items())
    run_tool(folder / 'sync_bn.py', folder / 'cbn.py', *options, '--out', folder, '--cfg-options', *few_rois)
    return folder


@pytest.fixture(scope='module')
def results(folder):
    return json.loads((folder / 'table8.json').read_text())


def test_the_table_has_a_row_for_each_config_and_says_how_it_was_made(folder, results):
    table = (folder / 'table8.md').read_text()
    head, line, *rows = [text.strip('|').split('|') for text in table.splitlines() if text.startswith('|')]
    assert [cell.strip() for cell in head] == [
        'config',
        'memory (GB)',
        'inference FLOPs (G)',
        'training FLOPs (G)',
        *('training (iter/s)', 'time ratio', 'inference (iter/s)', 'time ratio'),
    ]
    assert [row[0].strip() for row in rows] == ['sync_bn', 'cbn']
    assert {len(cells) for cells in (head, line, *rows)} == {8}
    for cells, row in zip(rows, results['rows'], strict=True):
        assert float(cells[3]) == pytest.approx(row['training_flops'] / 1e9, abs=0.005)
        assert float(cells[4].split()[0]) == pytest.approx(row['training_speed']['median'], rel=0.01)
    for words in ('size (96, 64), batch_size 2', f'torch {torch.__version__}', 'SyncBN was measured as BN', 'storages'):
        assert words in table


def test_what_folds_is_folded_before_inference_is_timed():
    configs = [mask_rcnn(dict(type='GN', num_groups=2)), mask_rcnn()]
    results = benchmark(configs, Settings('cpu', SIZE, 1, rounds=1, warmup=0, fuse=True))
    norms = sum(isinstance(module, CBN | nn.BatchNorm2d) for module in detector_of(configs[1]).model.modules())
    assert [row['folded'] for row in results['rows']] == [f'0 of {norms}', f'{norms} of {norms}']
    table = to_markdown(results)
    assert 'normalizers folded' in table and f'| {norms} of {norms} |' in table and 'fuse_conv_bn' in table


def test_the_json_has_settings_and_the_raw_times_of_each_round(results):
    settings = results['settings']
    assert (settings['size'], settings['batch_size'], settings['rounds']) == (list(SIZE), BATCH_SIZE, ROUNDS)
    assert settings['device'] == 'cpu' and settings['device_name'] and settings['threads'] == torch.get_num_threads()
    assert [row['window_size'] for row in results['rows']] == [1, 4]
    first = results['rows'][0]
    for row in results['rows']:
        for phase in ('training', 'inference'):
            seconds = row[f'{phase}_seconds']
            assert len(seconds) == ROUNDS and min(seconds) > 0
            ratios = [own / other for own, other in zip(seconds, first[f'{phase}_seconds'], strict=True)]
            for found, values in (('speed', [1 / s for s in seconds]), ('time_ratio', ratios)):
                expected = dict(
                    zip(('q1', 'median', 'q3'), statistics.quantiles(values, method='inclusive'), strict=True)
                )
                assert row[f'{phase}_{found}'] == pytest.approx(expected)
    assert set(first['training_time_ratio'].values()) == set(first['inference_time_ratio'].values()) == {1}


def test_cbn_has_the_flops_of_bn_and_in_training_one_more_weight_gradient(results):
    detector = detector_of(mask_rcnn())
    last, extra = [], []
    for module in detector.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, _, out: last.append(2 * out[:, 0].numel() * conv.weight.numel()))
        if isinstance(module, CBN):
            module.register_forward_pre_hook(lambda *_: extra.append(last[-1]))
    detector.train_step()
    assert len(extra) == 36
    bn, cbn = results['rows']
    assert cbn['training_flops'] - bn['training_flops'] == sum(extra)
    assert cbn['inference_flops'] == bn['inference_flops']


def test_memory_holds_weights_gradients_optimizer_and_window(results):
    detector = detector_of(mask_rcnn())
    detector.fill_window()
    window = sum(layer.windows.current.nbytes for layer in detector.model.modules() if isinstance(layer, CBN))
    weights = sum(p.nbytes for p in detector.model.parameters())
    bn, cbn = results['rows']
    assert bn['memory_bytes'] > 3 * weights  # SGD has one number for each weight, its momentum
    assert window < cbn['memory_bytes'] - bn['memory_bytes'] < 2 * window


def test_memory_holds_what_a_step_does_not_use(monkeypatch):
    class Detector:
        name, window_size, model = 'stub', 1, nn.Module()

        def __init__(self, *_):
            self.held = torch.zeros(1000)

        def fill_window(self):
            self.gradient = torch.zeros(100)
            torch.ones(10000)

        def train_step(self):
            torch.ones(10)

        test_step = train_step

    monkeypatch.setattr('mmdet_cbn.experiments.cost.detectors.Detector', Detector)
    _, row = measure(None, Settings('cpu'))
    assert row['memory_bytes'] == 4 * (1000 + 100 + 10)


def test_the_counter_counts_each_living_storage_once():
    before = torch.ones(100)
    with StorageCounter() as counter:
        a = torch.zeros(1000)
        view = a[10:].view(-1, 3)
        assert counter.alive == 4000
        b = torch.cat([a, a])
        del b
        assert (counter.alive, counter.peak) == (4000, 12000)
        del a
        assert counter.alive == 4000
        before.sum()
        assert counter.alive == 4400
        before.resize_(200)
        del view
        assert counter.alive == 800
    assert counter.peak == 12000


def test_the_counter_finds_the_peak_of_a_training_step():
    with StorageCounter() as counter:
        model = nn.Linear(100, 10, bias=False)
        model.window = torch.zeros(25)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.ones(20, 100)
        for _ in range(2):
            counter.peak = counter.alive
            y = model(x)
            y.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    weight = momentum = gradient = 4000
    loss = gradient_of_loss = 4
    assert counter.alive == weight + momentum + x.nbytes + y.nbytes + model.window.nbytes
    assert counter.peak == counter.alive + gradient + loss + gradient_of_loss


def test_the_order_alternates_and_warm_up_is_not_timed():
    order = []
    steps = [lambda name=name: order.append(name) for name in 'abc']
    seconds = time_in_alternation(steps, rounds=3, warmup=2, synchronize=lambda: order.append('|'))
    assert ''.join(order).replace('||', '|') == '|' + '|'.join('bcacababcbcacab') + '|'
    assert [len(own) for own in seconds] == [3, 3, 3]


def test_each_norm_has_as_many_rois_as_the_config_allows():
    sampler = {'model.train_cfg.rcnn.sampler.num': 200, 'model.train_cfg.rcnn.sampler.pos_fraction': 0.5}
    detector = detector_of(mask_rcnn(dict(type='GN', num_groups=8), {**FEW_ROIS, **sampler}))
    rois = {'bbox_head': [], 'mask_head': []}
    for name, counts in rois.items():
        head = getattr(detector.model.roi_head, name)
        head.register_forward_pre_hook(lambda _, args, counts=counts: counts.append(len(args[0])))
    losses = detector.train_step()
    assert all(torch.isfinite(value) for value in losses.values())
    trained = detector.optim_wrapper.optimizer.state
    assert [name for name, p in detector.model.named_parameters() if p.requires_grad and p not in trained] == []
    detector.model.eval()
    (sample,) = detector.test_step()
    assert len(sample.pred_instances.masks) == 10
    assert rois == {'bbox_head': [2 * 200, 50], 'mask_head': [2 * 100, 10]}


def test_a_detector_is_built_without_pretrained_weights_and_with_a_number_for_auto():
    pretrained = dict(type='Pretrained', checkpoint='no/such/file.pth')
    config = mask_rcnn(dict(type='CBN', window_size='auto'))
    config.model.backbone.init_cfg = pretrained
    detector = detector_of(config)
    assert detector.window_size == 8
    assert config.model.backbone.init_cfg == pretrained
    again = detector_of(config)
    for one, other in zip(detector.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sync_bn_becomes_bn():
    detector = detector_of(mask_rcnn(dict(type='SyncBN')))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in detector.model.modules())


def test_a_window_that_is_not_full_is_refused():
    detector = detector_of(mask_rcnn())
    detector.model.backbone.layer2[0].bn1.burn_in = True
    with pytest.raises(
        RuntimeError, match=r"after 4 training steps.* 'backbone.layer2.0.bn1' .* has 1 of 4 iterations"
    ):
        detector.fill_window()


@pytest.mark.parametrize(
    ('gpus', 'expected'), [(0, ('cpu', (320, 192), 1)), (1, ('cuda', (1333, 800), 4))], ids=['cpu', 'cuda']
)
def test_the_defaults_are_the_papers_where_there_is_a_gpu(gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    settings = Settings()
    assert (settings.device, settings.size, settings.batch_size) == expected


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no_such.py'], 'CONFIG must be a file, got no_such.py'),
        ([ROOT / 'configs/_base_/small.py'], 'CONFIG must be of a detector'),
        ([MASK_RCNN, '--device', 'tpu'], 'device must be one of cpu'),
        ([MASK_RCNN, '--size', 31, 64], 'size must be an int >= 32, got 31'),
        ([MASK_RCNN, '--batch-size', 0], 'batch_size must be an int >= 1, got 0'),
        ([MASK_RCNN, '--rounds', 0], 'rounds must be an int >= 1, got 0'),
        ([MASK_RCNN, '--warmup', -1], 'warmup must be an int >= 0, got -1'),
        ([MASK_RCNN, '--seed', -1], 'seed must be an int >= 0, got -1'),
        ([], 'the following arguments are required: CONFIG'),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run_tool(*arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_no_config_is_refused():
    with pytest.raises(ValueError, match='configs must be one or more'):
        benchmark([], Settings('cpu'))


def test_the_slow_peer_computes_what_cbn_does():
    outputs = []
    for kind in ('CBN, gradient batch', 'two gradients by autograd'):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
        norm = layers.KINDS[kind](6, conv).double()
        optimizer = torch.optim.SGD([*conv.parameters(), *norm.parameters()], lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            x = torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64)
            y = norm(conv(x))
            optimizer.zero_grad()
            y.sin().sum().backward()
            optimizer.step()
        outputs.append((y.detach(), conv.weight.detach(), norm.weight.detach()))
    torch.testing.assert_close(*outputs)


def test_operators_that_launch_a_kernel_are_counted():
    x = torch.randn(2, 3)
    with layers.OperatorCounter() as counter:
        x.t()[1:].expand(2, 2, 2).detach()
        torch.empty(3), x.new_empty(3), torch.empty_like(x), x.shape
        assert counter.count == 0
        x.mul_(2), x.copy_(x.neg()), x.t().reshape(6), torch.zeros(3)
        assert counter.count == 5
    shape = layers.Shape('small', (32, 32), 3, (2, 5, 5))
    # Two convolutions, two times BatchNorm's kernel, and the count of batches.
    assert layers.count_operators('BN', shape) == 5
    assert layers.count_operators('Naive CBN', shape) < layers.count_operators('CBN', shape)


@pytest.mark.parametrize('scope', cost.SCOPES)
@pytest.mark.parametrize('kind', cost.KINDS_OF_CBN)
def test_the_cost_is_measured_of_normalizers_that_can_be_built(scope, kind):
    model = cost.config_of(scope, kind).model
    heads = build_norm_layer(model.neck.norm_cfg, 4)[1]
    backbone = build_norm_layer(model.backbone.norm_cfg, 4)[1]
    assert (type(heads) is CBN) == (kind != 'BN') and (type(backbone) is CBN) == (kind != 'BN' and scope == 'all')
    assert kind == 'BN' or (heads.gradient == 'batch') == (kind == 'batch')


@pytest.mark.slow
def test_the_cost_is_measured_from_layers_to_inference(monkeypatch):
    """With small layers and a small detector."""
    shapes = (layers.Shape('3x3', (32, 32), 3, (2, 9, 9)), layers.Shape('1x1', (32, 32), 1, (2, 9, 9)))
    config_of = cost.config_of

    def small(scope, kind):
        model = config_of(scope, kind).model
        heads = {f'roi_head.{name}.norm_cfg': model.roi_head[name].norm_cfg for name in ('bbox_head', 'mask_head')}
        norms = {'backbone.norm_cfg': model.backbone.norm_cfg, 'neck.norm_cfg': model.neck.norm_cfg, **heads}
        config = mask_rcnn()
        config.merge_from_dict({f'model.{name}': dict(norm, _delete_=True) for name, norm in norms.items()})
        return config

    for module in (layers, cost):
        monkeypatch.setattr(module, 'SHAPES', shapes)
    monkeypatch.setattr(cost, 'SMALL', (128, 96))
    monkeypatch.setattr(cost, 'config_of', small)
    for kind in layers._COMPILED:
        monkeypatch.delitem(layers.KINDS, kind)
    raw = cost.measure_cost(Settings('cpu', SIZE, 2, rounds=1, warmup=0), layer_rounds=1)
    page = cost.page_of(raw)
    rows = [line for line in page.splitlines() if line.endswith(('| yes |', '| no |'))]
    assert len(rows) == len(raw['rows']) == 5 + 2 + 2 * (9 + 2) + 2
    for row in rows[-2:]:
        assert ', equal |' in row
    assert 'images of 96x64: 2 for times and FLOPs, 4 for memory' in page
    assert page.count('\n| 3x3 |') == page.count('\n| 1x1 |') == 1, 'the times of the layers'


def test_kernels_are_compared_where_a_gpu_has_counted_them(monkeypatch):
    monkeypatch.setattr(cost, 'count_operators', lambda kind, shape: 5)
    kernels = {'3x3': dict.fromkeys(layers.KINDS, 7), '1x1': dict.fromkeys(layers.KINDS, 50)}
    rows = cost.launch_rows(kernels)
    assert [row.measured for row in rows] == ['5, BN 5', '5, BN 5', '50, BN 50', '50, BN 50']
    assert [row.met for row in rows] == [True, True, False, False]
    assert '\n| 3x3 | 7 | 7 |' in cost.kernel_table(kernels)
