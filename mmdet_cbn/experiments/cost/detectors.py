"""Memory, FLOPs and speed of detectors side by side: Table 8 of the paper (section 4.4) for any configs of mmdet."""

import copy
import gc
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmengine.utils import ProgressBar
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils.flop_counter import FlopCounterMode

from ...arguments import check_int
from ...layers.cbn import CBN
from ...window.size import suggested_window_size
from ..configs import dicts_in
from ..markdown import table
from .storage import StorageCounter

BOXES_PER_IMAGE = 8  # an image of COCO has 7 on average
NOTES = (
    'Images, boxes and masks are random and the same for each config, 1 image in inference. Weights are random, from '
    'one seed; the learning rate is 0.',
    'In training every second proposal counts as positive, in inference every RoI is sure of its class, so that each '
    'config has as many RoIs as its sampler and max_per_img allow (if it has as many proposals), whatever its norm.',
    'FLOPs are those of convolutions and matrix products, 2 for a multiplication with addition; a training step is '
    "forward, backward and optimizer. The paper's own FLOPs are of another definition.",
    'Speeds and time ratios are the median (first to third quartile) over rounds. In a round each config has one step, '
    'in rotating order; a time ratio is that to the first config in the same round. The window of CBN is full.',
)
FUSE_NOTE = "Before inference was timed, mmcv's fuse_conv_bn folded normalizers into the convolutions before them."
CUDA_NOTE = "Memory is the peak of torch's CUDA allocator in a training step; 1 GB is 10^9 bytes."
CPU_NOTE = 'Memory is the peak of all tensor storages alive in a training step; 1 GB is 10^9 bytes.'


@dataclass
class Settings:
    """What is measured, and how often.

    Args:
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:<index>'``; None for CUDA where there is one.
        size: Width and height of the images in pixels, before the config's padding; None for the paper's 1333 x 800 on
            CUDA, 320 x 192 on the CPU.
        batch_size: Images of a training step; None for the paper's 4 on CUDA, 1 on the CPU. Inference has 1.
        rounds: Timed steps of each config, in training and in inference.
        warmup: Rounds before those; the steps that fill CBN's window come before them.
        seed: Of weights and RoI sampling. mmdet's helper draws the same images whatever the seed.
        fuse: Whether to fold normalizers into convolutions before inference, with mmcv's ``fuse_conv_bn``.

    Raises:
        TypeError: A number that is not an int.
        ValueError: A number that is too small, or a device that torch does not know or find.
    """

    device: str = None  # type: ignore[assignment]
    size: tuple[int, int] = None  # type: ignore[assignment]
    batch_size: int = None  # type: ignore[assignment]
    rounds: int = 10
    warmup: int = 2
    seed: int = 0
    fuse: bool = False

    def __post_init__(self) -> None:
        gpus = torch.cuda.device_count()
        allowed = ['cpu', *(['cuda'] if gpus else []), *(f'cuda:{index}' for index in range(gpus))]
        if self.device is None:
            self.device = allowed[min(gpus, 1)]
        if self.device not in allowed:
            raise ValueError(f'benchmark: device must be one of {", ".join(allowed)} here, got {self.device!r}')
        if self.size is None:
            self.size = (1333, 800) if self.on_cuda else (320, 192)
        if self.batch_size is None:
            self.batch_size = 4 if self.on_cuda else 1
        for length in self.size:
            check_int('benchmark', 'size', length, at_least=32)
        for name, least in dict(batch_size=1, rounds=1, warmup=0, seed=0).items():
            check_int('benchmark', name, getattr(self, name), least)

    @property
    def on_cuda(self) -> bool:
        return self.device != 'cpu'

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def described(self) -> dict[str, Any]:
        """The settings, and the machine and software under them."""
        if self.on_cuda:
            name = torch.cuda.get_device_name(self.device)
        else:
            cpuinfo = Path('/proc/cpuinfo')
            found = re.search(r'model name\s*: (.+)', cpuinfo.read_text()) if cpuinfo.exists() else None
            name = found[1] if found else platform.processor() or platform.machine()
        software = dict(torch=torch.__version__, cuda=torch.version.cuda, threads=torch.get_num_threads())
        return {**asdict(self), 'device_name': name, **software}


class AlternatingAssigner:
    """Assigns every second proposal to a box of the ground truth, these in turn, whatever the overlap.

    How many proposals of random weights overlap a box differs from norm to norm, and with it the mask head's work.
    """

    def assign(self, pred_instances: Any, gt_instances: Any, *_: Any, **__: Any) -> AssignResult:
        """As mmdet's assigners: ``priors`` [n, 4] to the boxes of ``gt_instances``."""
        boxes = len(gt_instances.labels)
        number = torch.arange(len(pred_instances.priors), device=gt_instances.labels.device)
        positive, box = number % 2 == 0, number // 2 % boxes
        labels = gt_instances.labels[box].where(positive, -1)
        return AssignResult(boxes, (box + 1) * positive, positive.float(), labels)


def _one_class_each(head: BBoxHead, _: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Forward hook: in inference RoI n is surely of class n, as no RoI of random weights passes ``score_thr``."""
    if head.training:
        return None
    scores, boxes = output  # [RoIs, classes + 1], the background last
    classes = torch.arange(len(scores), device=scores.device) % (scores.size(1) - 1)
    return 10 * nn.functional.one_hot(classes, scores.size(1)).to(scores.dtype), boxes


def make_inputs(batch_size: int, size: tuple[int, int], num_classes: int) -> dict[str, Any]:
    """What a dataloader gives, at random: images [3, height, width] in uint8, boxes, labels below ``num_classes`` and
    masks. ``size`` is width and height."""
    boxes = [BOXES_PER_IMAGE] * batch_size
    data = demo_mm_inputs(batch_size, (3, *reversed(size)), boxes, num_classes + 1, with_mask=True)
    for sample in data['data_samples']:
        sample.gt_instances.labels -= 1  # the helper begins at 1
        # A dataloader gives uint8; the helper's float64 would take longer to the GPU than the mask head takes there.
        sample.gt_instances.masks.masks = sample.gt_instances.masks.masks.astype(np.uint8)
    return data


class Detector:
    """The detector of a config, with random weights and in training mode, and its steps.

    Args:
        config: A config of mmdet; it is not changed.
        settings: Of which device, batch size and seed are read.
        inputs: Of a training step.
        image: Of an inference step.

    Attributes:
        window_size (int): The longest window of the CBN layers that are in training; 1 without any.
    """

    def __init__(self, config: Config, settings: Settings, inputs: dict[str, Any], image: dict[str, Any]) -> None:
        self.name, self.inputs, self.image = Path(config.filename).stem, inputs, image
        cfg = copy.deepcopy(config.model)
        cfg.setdefault('data_preprocessor', config.get('data_preprocessor'))
        for node in dicts_in(cfg):
            if any('Pretrained' in str(init.get('type')) for init in dicts_in(node.get('init_cfg'))):
                node['init_cfg'] = None
            node.pop('pretrained', None)
        for node in dicts_in((cfg.get('train_cfg') or {}).get('rcnn')):
            if 'MaxIoUAssigner' in str(node.get('type')):
                node.clear()
                node['type'] = AlternatingAssigner
        init_default_scope(config.get('default_scope') or 'mmdet')
        set_random_seed(settings.seed)
        model = MODELS.build(cfg)
        model.init_weights()
        # One process has no SyncBN: mmengine's Runner does the same.
        self.model = revert_sync_batchnorm(model).to(settings.device).train()
        for module in self.model.modules():
            if isinstance(module, BBoxHead):
                module.register_forward_hook(_one_class_each)
            if isinstance(module, CBN) and module.window_size == 'auto':
                module.window_size = suggested_window_size(settings.batch_size)
        self._cbn = {name: m for name, m in self.model.named_modules() if isinstance(m, CBN) and m.training}
        self.window_size = max((int(layer.window_size) for layer in self._cbn.values()), default=1)
        self.optim_wrapper = build_optim_wrapper(self.model, config.optim_wrapper)
        # The optimizer and CBN's compensation do all their work on a change of 0 too, and random weights that grew to
        # inf or NaN would take work away elsewhere.
        for group in self.optim_wrapper.param_groups:
            group['lr'] = 0.0

    def train_step(self) -> dict[str, Tensor]:
        """Forward, backward and optimizer; returns the losses."""
        return self.model.train_step(self.inputs, self.optim_wrapper)

    @torch.no_grad()
    def test_step(self) -> list[Any]:
        """Inference, of a model in evaluation mode; returns mmdet's data samples."""
        return self.model.test_step(self.image)

    def fuse(self) -> str:
        """Fold normalizers into convolutions; returns how many of how many."""
        before = self._count_norms()
        self.model = fuse_conv_bn(self.model)
        return f'{before - self._count_norms()} of {before}'

    def _count_norms(self) -> int:
        return sum(isinstance(module, NormBase | nn.GroupNorm) for module in self.model.modules())

    def fill_window(self) -> None:
        """Train until the window of each CBN layer is full; one step without CBN, which makes the optimizer's state.

        Raises:
            RuntimeError: A window is not full, so that CBN would look cheaper than it is.
        """
        for _ in range(self.window_size):
            self.train_step()
        for name, layer in self._cbn.items():
            if layer.window_length != layer.window_size:
                raise RuntimeError(
                    f"benchmark: after {self.window_size} training steps, the window of the CBN layer '{name}' of "
                    f'{self.name} has {layer.window_length} of {layer.window_size} iterations'
                )


def measure(config: Config, settings: Settings, *inputs: Any) -> tuple[Detector, dict[str, Any]]:
    """The detector of a config, its window full, and ``config``, ``window_size``, ``memory_bytes``, ``training_flops``
    and ``inference_flops`` of it. It has the arguments of :class:`Detector`."""
    gc.collect()
    counter = StorageCounter()
    before = torch.cuda.memory_allocated(settings.device) if settings.on_cuda else 0
    # The counter sees the model come to be: gradients and windows are held where nobody would find them later.
    with nullcontext() if settings.on_cuda else counter:
        detector = Detector(config, settings, *inputs)
        detector.fill_window()
        if settings.on_cuda:
            torch.cuda.reset_peak_memory_stats(settings.device)
        counter.peak = counter.alive
        detector.train_step()
    peak = torch.cuda.max_memory_allocated(settings.device) - before if settings.on_cuda else counter.peak
    row = dict(config=detector.name, window_size=detector.window_size, memory_bytes=peak)
    for phase, step in (('training', detector.train_step), ('inference', detector.test_step)):
        detector.model.train(phase == 'training')
        with FlopCounterMode(display=False) as flops:
            step()
        row[f'{phase}_flops'] = flops.get_total_flops()
    return detector, row


def time_in_alternation(
    steps: Sequence[Callable[[], Any]],
    rounds: int,
    warmup: int = 0,
    synchronize: Callable[[], Any] = lambda: None,
    progress: Callable[[], Any] = lambda: None,
) -> list[list[float]]:
    """Time ``steps`` one after the other, round after round, each round beginning one further.

    So a machine that grows slower or faster meanwhile does so for all. ``warmup`` more rounds come first, untimed.
    ``synchronize`` waits for the device; ``progress`` is called after each step.

    Returns:
        Seconds, [len(steps)][rounds].
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(-warmup, rounds):
        for turn in range(len(steps)):
            index = (number + turn) % len(steps)
            synchronize()
            start = time.perf_counter()
            steps[index]()
            synchronize()
            if number >= 0:
                seconds[index].append(time.perf_counter() - start)
            progress()
    return seconds


def quartiles(values: np.ndarray) -> dict[str, float]:
    """First quartile, median and third quartile."""
    return dict(zip(('q1', 'median', 'q3'), np.percentile(values, (25, 50, 75)).tolist(), strict=True))


def benchmark(configs: Sequence[Config], settings: Settings) -> dict[str, Any]:
    """Measure the detectors of ``configs``, with a progress bar on stderr.

    Returns:
        ``settings``, with machine and software; ``notes`` on what the numbers mean; and ``rows``, one for each config:
        what :func:`measure` found, and for ``training`` and ``inference`` the ``*_seconds`` of each round and the
        quartiles of ``*_speed`` in iterations per second and of ``*_time_ratio`` to the first config. With ``fuse``
        also ``folded``, from :meth:`Detector.fuse`.

    Raises:
        ValueError: No config.
        RuntimeError: As :meth:`Detector.fill_window`.
    """
    if not configs:
        raise ValueError('benchmark: configs must be one or more, got none')
    numbers = [node.get('num_classes') for config in configs for node in dicts_in(config.model)]
    num_classes = min((number for number in numbers if isinstance(number, int)), default=1)
    inputs, image = (make_inputs(count, settings.size, num_classes) for count in (settings.batch_size, 1))

    if settings.on_cuda:
        torch.cuda.set_device(torch.device(settings.device).index or 0)
        x = torch.ones(1, 1, device=settings.device, requires_grad=True)
        (x @ x).sum().backward()  # what the libraries allocate once shall not count for the first config

    bar = ProgressBar(len(configs) * (1 + 2 * (settings.warmup + settings.rounds)), file=sys.stderr)
    detectors, rows = [], []
    for config in configs:
        detector, row = measure(config, settings, inputs, image)
        detectors.append(detector)
        rows.append(row)
        bar.update()
    for phase, step in (('training', 'train_step'), ('inference', 'test_step')):
        for detector, row in zip(detectors, rows, strict=True):
            detector.model.train(phase == 'training')
            if phase == 'inference' and settings.fuse:
                row['folded'] = detector.fuse()
        steps = [getattr(detector, step) for detector in detectors]
        seconds = np.array(
            time_in_alternation(steps, settings.rounds, settings.warmup, settings.synchronize, bar.update)
        )
        for row, own in zip(rows, seconds, strict=True):
            row[f'{phase}_seconds'] = own.tolist()
            row[f'{phase}_speed'] = quartiles(1 / own)
            row[f'{phase}_time_ratio'] = quartiles(own / seconds[0])
    sys.stderr.write('\n')

    notes = [*NOTES, CUDA_NOTE if settings.on_cuda else CPU_NOTE]
    if settings.fuse:
        notes.append(FUSE_NOTE)
    if any('SyncBN' in str(config.model) for config in configs):
        notes.append('SyncBN was measured as BN in one process, without its synchronization.')
    return dict(settings=settings.described(), notes=notes, rows=rows)


def to_markdown(results: dict[str, Any]) -> str:
    """The results of :func:`benchmark` as a table, with settings and notes under it."""
    is_fused = results['settings']['fuse']
    heads = [
        'config',
        'memory (GB)',
        'inference FLOPs (G)',
        'training FLOPs (G)',
        'training (iter/s)',
        'time ratio',
        'inference (iter/s)',
        'time ratio',
        *(['normalizers folded'] if is_fused else []),
    ]
    rows = []
    for row in results['rows']:
        gigas = [f'{row[key] / 1e9:.2f}' for key in ('memory_bytes', 'inference_flops', 'training_flops')]
        times = [row[f'{phase}_{key}'] for phase in ('training', 'inference') for key in ('speed', 'time_ratio')]
        cells = (f'{t["median"]:.3g} ({t["q1"]:.3g} to {t["q3"]:.3g})' for t in times)
        rows.append([row['config'], *gigas, *cells, *([row['folded']] if is_fused else [])])
    settings = ', '.join(f'{key} {value}' for key, value in results['settings'].items())
    return '\n'.join(
        [table(heads, rows), '', f'Settings: {settings}.', '', *(f'- {note}' for note in results['notes']), '']
    )
