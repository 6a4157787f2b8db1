"""What CBN costs beside BatchNorm, measured and counted, with the targets that we set ourselves."""

import gc
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.utils import ProgressBar
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ...layers.cbn import CBN
from ..configs import dicts_in
from ..markdown import table
from .detectors import (
    Detector,
    Settings,
    benchmark,
    make_inputs,
    quartiles,
    time_in_alternation,
)
from .layers import KINDS, SHAPES, count_operators, measure_layers
from .storage import StorageCounter

SCOPES = {'heads': 'mask-rcnn_r50_fpn_cbn-head_1x_coco', 'all': 'mask-rcnn_r50_fpn_cbn-all_1x_coco'}
KINDS_OF_CBN: dict[str, dict[str, Any] | None] = {  # arguments of CBN; None: BN
    'BN': None,
    'first order': {},
    'batch': dict(gradient='batch'),
    'sampled': dict(samples=64),
    'sampled, k = 2': dict(samples=64, window_size=2),
    'sampled, k = 8': dict(samples=64, window_size=8),
}
NUM_CLASSES = 80
SMALL = 448, 320


class Target(NamedTuple):
    measure: str
    target: str
    measured: str
    met: bool


def config_of(scope: str, kind: str) -> Config:
    """Mask R-CNN R50 with CBN in the heads or throughout, its CBN changed to ``kind``.

    The gradient is the default where the kind names none.
    """
    config = get_config(f'mmdet_cbn::cbn/{SCOPES[scope]}.py')
    arguments = KINDS_OF_CBN[kind]
    for node in dicts_in(config.model):
        if node.get('type') == 'CBN':
            node.pop('gradient', None)
            if arguments is None:
                node['type'] = 'BN'
                node.pop('window_size', None)
            else:
                node.update(arguments)
    return config


def at_most(measure: str, most: float, values: float | np.ndarray, remark: str = '') -> Target:
    """A row whose median must be at most ``most``."""
    if isinstance(values, int):
        target, measured = str(most), str(values)
    else:
        target, measured = f'{most:.2f}', spread(values) if np.ndim(values) else f'{values:.4f}'
    return Target(measure, f'<= {target}', f'{measured}{remark and ", "}{remark}', float(np.median(values)) <= most)


def spread(values: Any) -> str:
    """Median (first to third quartile)."""
    return '{median:.3f} ({q1:.3f} to {q3:.3f})'.format(**quartiles(values))


def ratios(seconds: dict[str, list[float]], kind: str, base: str = 'BN') -> np.ndarray:
    """Of the times of two kinds in the same round."""
    return np.array(seconds[kind]) / np.array(seconds[base])


def layer_rows(times: dict[str, dict[str, list[float]]]) -> list[Target]:
    first, batch, peer, sampled = (
        sorted((ratios(seconds, *kinds) for seconds in times.values()), key=np.median)
        for kinds in (
            ['CBN'],
            ['CBN', 'CBN, gradient batch'],
            ['CBN, gradient batch', 'two gradients by autograd'],
            ['CBN, 64 samples'],
        )
    )
    name = 'convolution and norm, time / BN,'
    return [
        at_most(f'{name} first order, worst shape', 1.40, first[-1]),
        at_most('the same / with the gradient `batch`', 1.03, batch[-1]),
        at_most('with the gradient `batch` / two gradients by autograd', 0.75, peer[-1]),
        at_most(f'{name} sampled, median shape', 1.06, float(np.median([np.median(ratio) for ratio in sampled]))),
        at_most(f'{name} sampled, worst shape', 1.15, sampled[-1]),
    ]


def launch_rows(kernels: dict[str, dict[str, int]]) -> list[Target]:
    """Operators of a layer, and its kernels where a GPU has counted them."""
    kinds = ('BN', 'CBN', 'CBN, 64 samples')
    counts = {'operators': {kind: max(count_operators(kind, shape) for shape in SHAPES) for kind in kinds}}
    if kernels:
        counts['kernels'] = {kind: max(of_shape[kind] for of_shape in kernels.values()) for kind in kinds}
    return [
        at_most(f'convolution and norm, {what} of a step, {kind}, worst shape', most, count[key], f'BN {count["BN"]}')
        for what, count in counts.items()
        for kind, key, most in (('first order', 'CBN', 30), ('sampled', 'CBN, 64 samples', 35))
    ]


def layer_table(times: dict[str, dict[str, list[float]]]) -> str:
    others = list(KINDS)[1:]
    rows = [
        [shape, f'{1000 * np.median(seconds["BN"]):.1f}', *(spread(ratios(seconds, kind)) for kind in others)]
        for shape, seconds in times.items()
    ]
    return table(['shape', 'BN, ms', *others], rows)


def kernel_table(kernels: dict[str, dict[str, int]]) -> str:
    return table(['shape', *KINDS], [[shape, *of_shape.values()] for shape, of_shape in kernels.items()])


def feeding_convolutions(detector: Detector) -> list[tuple[CBN, nn.Conv2d, int]]:
    """Each CBN in training, the convolution that feeds it, and the FLOPs of one weight gradient of that, in a step."""
    found = []
    last: tuple[nn.Conv2d, int]

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal last
        if isinstance(module, nn.Conv2d):
            last = module, 2 * output.numel() * module.weight[0].numel()

    def pair(module: nn.Module, _: Any) -> None:
        if isinstance(module, CBN) and module.training:
            found.append((module, *last))

    with register_module_forward_hook(remember), register_module_forward_pre_hook(pair):
        detector.train_step()
    return found


def peak_memory(config: Config, settings: Settings) -> int:
    """The most bytes alive in a training step, with full windows."""
    gc.collect()
    one, inputs = (make_inputs(count, settings.size, NUM_CLASSES) for count in (1, settings.batch_size))
    with StorageCounter() as counter:
        detector = Detector(config, settings, one, one)
        detector.fill_window()
        detector.inputs = inputs
        counter.peak = counter.alive
        detector.train_step()
    return counter.peak


def step_rows(
    scope: str, results: dict[str, dict[str, Any]], peaks: dict[str, int], gradient_flops: int
) -> list[Target]:
    """Of a training step of the whole detector."""
    seconds = {kind: row['training_seconds'] for kind, row in results.items()}
    flops = {kind: row['training_flops'] for kind, row in results.items()}
    first, sampled = ratios(seconds, 'first order'), ratios(seconds, 'sampled')
    batch = ratios(seconds, 'first order', 'batch')
    growth = ratios(seconds, 'sampled, k = 8') - ratios(seconds, 'sampled, k = 2')
    beyond = (flops['first order'] - gradient_flops) / flops['BN']
    with_it = f'with it {flops["first order"] / flops["BN"]:.3f}'
    return [
        at_most(f'{scope}, first order: time / BN', 1.22 if scope == 'heads' else 1.30, first),
        at_most(f'{scope}, first order: time / with the gradient `batch`', 1.03, batch),
        at_most(f'{scope}, sampled: time / BN', 1.03, sampled),
        at_most(f'{scope}, sampled: time for k = 8 less that for k = 2, / BN', 0.02, growth),
        at_most(f'{scope}, first order: FLOPs / BN, without a weight gradient for each CBN', 1.01, beyond, with_it),
        at_most(f'{scope}, sampled: FLOPs / BN', 1.01, flops['sampled'] / flops['BN']),
        at_most(f'{scope}, first order: peak memory / BN', 1.03, peaks['first order'] / peaks['BN']),
        at_most(
            f'{scope}, first order: peak memory / with the gradient `batch`',
            1.01,
            peaks['first order'] / peaks['batch'],
        ),
        at_most(f'{scope}, sampled: peak memory / BN', 1.01, peaks['sampled'] / peaks['BN']),
    ]


def window_rows(scope: str, settings: Settings) -> list[Target]:
    """Bytes that the windows hold for an old iteration, in weights of the convolutions."""
    rows = []
    for kind, most in (('first order', 1.1), ('sampled', 0.3)):
        detector = detector_of(scope, kind, settings)
        detector.fill_window()
        layers = feeding_convolutions(detector)
        held = [
            (cbn.windows.current.nbytes / cbn.windows.current.capacity, conv.weight.nbytes) for cbn, conv, _ in layers
        ]
        windows, weights = map(sum, zip(*held, strict=True))
        worst = f'{max(window / weight for window, weight in held):.3f} in the worst layer'
        rows.append(at_most(f'{scope}, {kind}: window an old iteration / weights', most, windows / weights, worst))
    return rows


def inference_rows(settings: Settings) -> list[Target]:
    """CBN throughout, in evaluation, with BN's checkpoint."""
    bn, cbn = detectors = [detector_of('all', kind, settings) for kind in ('BN', 'first order')]
    for _ in range(3):
        bn.train_step()  # for running statistics that are not 0 and 1
    cbn.model.load_state_dict(bn.model.state_dict())
    rows = []
    for name in ('inference', 'inference after fuse_conv_bn'):
        predictions = []
        for detector in detectors:
            detector.model.eval()
            if 'fuse' in name:
                detector.fuse()
            predictions.append(detector.test_step()[0].pred_instances)
        equal = all(torch.equal(value, predictions[1][key]) for key, value in predictions[0].items())
        steps = [detector.test_step for detector in detectors]
        seconds = time_in_alternation(steps, 2 * settings.rounds, warmup=2, synchronize=settings.synchronize)
        rows.append(
            at_most(f'{name}: time / BN', 1.02, np.divide(seconds[1], seconds[0]), 'equal' if equal else 'UNEQUAL')
        )
        rows[-1] = rows[-1]._replace(target=f'{rows[-1].target}, equal bit for bit', met=rows[-1].met and equal)
    return rows


def detector_of(scope: str, kind: str, settings: Settings) -> Detector:
    """With inputs of a size whose smallest map has more than 64 positions."""
    one = make_inputs(1, SMALL, NUM_CLASSES)
    return Detector(config_of(scope, kind), settings, one, one)


def measure_cost(settings: Settings, layer_rounds: int) -> dict[str, Any]:
    """Measure all, with progress bars on stderr.

    Args:
        settings: Of the detectors whose steps are timed.
        layer_rounds: Timed steps of each single layer.

    Returns:
        All that was measured, as plain data.
    """
    bar = ProgressBar(len(SHAPES) * len(KINDS) * (layer_rounds + 5), file=sys.stderr)
    layers, kernels = measure_layers(layer_rounds, settings, bar.update)
    found = layer_rows(layers) + launch_rows(kernels)
    paper = replace(settings, batch_size=4)
    raw: dict[str, Any] = dict(settings=settings.described(), layers=layers, kernels=kernels)
    for scope in SCOPES:
        configs = {kind: config_of(scope, kind) for kind in KINDS_OF_CBN}
        results = dict(zip(configs, benchmark(list(configs.values()), settings)['rows'], strict=True))
        peaks = {kind: peak_memory(configs[kind], paper) for kind in ('BN', 'first order', 'batch', 'sampled')}
        inputs = make_inputs(settings.batch_size, settings.size, NUM_CLASSES)
        gradients = sum(
            flops for *_, flops in feeding_convolutions(Detector(configs['first order'], settings, inputs, inputs))
        )
        found += step_rows(scope, results, peaks, gradients) + window_rows(scope, settings)
        raw[scope] = dict(results=results, peaks=peaks, weight_gradient_flops=gradients)
    found += inference_rows(settings)
    raw['rows'] = [row._asdict() for row in found]
    return raw


def page_of(raw: dict[str, Any]) -> str:
    """What :func:`measure_cost` returned, in Markdown."""
    settings = raw['settings']
    where = '{device_name}, {threads} CPU threads, torch {torch}'.format(**settings)
    width, height = settings['size']
    images = f'{settings["batch_size"]} for times and FLOPs, 4 for memory' if settings['batch_size'] != 4 else '4'
    kernels = f'\n\nKernels of such a step, with copies and fills of memory:\n\n{kernel_table(raw["kernels"])}'
    rows = [[row['measure'], row['target'], row['measured'], 'yes' if row['met'] else 'no'] for row in raw['rows']]
    return (
        f'Measured by `tools/cost.py` on {where}. Times are medians (first to third quartile) over rounds in which '
        'all kinds take turns.\n\n'
        '## Single layers\n\n'
        'One convolution and its normalizer, forward and backward, time / BN. "Two gradients by autograd" is a plain '
        'version of CBN, for comparison.\n\n'
        f'{layer_table(raw["layers"])}{kernels * bool(raw["kernels"])}\n\n'
        '## Detectors, and our targets\n\n'
        'The targets are what we aim at. Operators are counted on a CPU, without views; on a GPU each launches one '
        'kernel or more. The detector is Mask R-CNN R50 FPN with 4conv1fc heads, k = 4, on images of '
        f'{width}x{height}: {images}. Memory is the most bytes that tensors hold at one time. "First order" is '
        '`order=1` and "sampled" is `samples=64`, both with the default gradient if no other is named. "Heads" is CBN '
        'in FPN and heads, "all" in the backbone too.\n\n'
        f'{table(["measure", "target", "measured", "met"], rows)}\n'
    )
