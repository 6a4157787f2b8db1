"""Whether a machine is ready for the rows of the paper's tables: the checks of tools/preflight.py.

Each check yields a :class:`Result` for each thing that it looks at. A check that fails in a way of its own raises.
"""

import copy
import hashlib
import json
import math
import platform
import re
import shutil
import statistics
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import mmcv
import mmdet
import mmengine
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, checkpoint
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.cbn import CBN
from ..openmmlab.tools import leave_process_group
from .cost.detectors import Detector, Settings, make_inputs, time_in_alternation
from .cost.layers import count_kernels
from .cost.storage import StorageCounter
from .oracle import deviation, loss_of
from .paper.coco import COCO
from .rows.runs import recipe_of
from .rows.table import Row

IMAGES = {'train': 118287, 'val': 5000}  # of COCO 2017
TRAINED_IMAGES = 117266  # of the train split: mmdet leaves out images without objects
SIZE = (1333, 800)  # width and height of the images of a row
CHANNELS = 16
KINDS: dict[str, Callable[[], CBN]] = {
    'order=0': lambda: CBN(CHANNELS, window_size=3, order=0),
    'order=1': lambda: CBN(CHANNELS, window_size=3),
    "order=1, gradient='batch'": lambda: CBN(CHANNELS, window_size=3, gradient='batch'),  # the paper's rows
    'order=2': lambda: CBN(CHANNELS, window_size=3, order=2),
    'samples': lambda: CBN(CHANNELS, window_size=3, samples=1024),  # more than there are positions: all of them
}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
MOST_DEVIATION = 5  # times BatchNorm's: two layers of the same precision round differently
SECONDS_TO_START = 900  # for processes to import all that they need, which takes minutes on a busy machine
SECONDS_TO_MEET = 180  # from then on, for them to find each other, train and end

Status = Literal['ok', 'NOT OK', 'not applicable here']


class Result(NamedTuple):
    """What a check found."""

    subject: str
    status: Status
    found: str
    advice: str = ''  #: what to do about it


@dataclass(frozen=True)
class Machine:
    """What is checked, and for what.

    Args:
        row: The row to be trained.
        configs: The folder of the configs.
        work_dir: The folder for the runs, there or not.
        gpus: GPUs to train on, as of tools/reproduce.py.
        trials: How often each row is to be trained.
        options: Further --cfg-options of the training, by key.
    """

    row: Row
    configs: Path
    work_dir: Path
    gpus: int = 4
    trials: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return 'cuda' if torch.cuda.is_available() else 'cpu'

    @cached_property
    def config(self) -> Config:
        """Of the row."""
        return self._of(self.row)

    @cached_property
    def all_configs(self) -> list[Config]:
        """Of every training run that tools/reproduce.py makes for the paper's tables and figures."""
        runs = {row.run: row for table in COCO if table.number != '8' for row in table.rows}
        return [self._of(row) for row in runs.values()]

    def _of(self, row: Row) -> Config:
        config = recipe_of(row, self.configs)
        config.merge_from_dict(dict(self.options))
        return config


def check_software(machine: Machine) -> Iterator[Result]:
    """Versions, GPUs, and the compiled operators of torchvision and mmcv on the device that trains."""
    packages = (torch, mmcv, mmengine, mmdet)
    # That they are supported ones is seen when mmdet_cbn is imported.
    found = ', '.join(f'{package.__name__} {package.__version__}' for package in packages)
    yield Result('versions', 'ok', f'Python {platform.python_version()}, {found}, numpy {version("numpy")}')

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    advice = 'Give the number of GPUs that you have: --gpus. docs/reproduction.md tells what else to change then.'
    if not names:
        build = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU alone'
        yield Result(
            'GPUs',
            'NOT OK' if machine.gpus > 1 else 'not applicable here',
            f'torch is built for {build} and finds no GPU, so the checks run on the CPU',
            'If there is a GPU, install its driver, and a torch that is built for its CUDA version.',
        )
    elif len(names) < machine.gpus:
        yield Result('GPUs', 'NOT OK', f'{len(names)} of {machine.gpus}: {", ".join(names)}', advice)
    else:
        yield Result('GPUs', 'ok', ', '.join(names))

    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 9], [4, 4, 9, 9]], device=machine.device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=machine.device)
    yield _tried('torchvision', lambda: _run_torchvision(boxes, scores), 'Install the one that goes with this torch.')
    yield _tried(
        f'mmcv operators, {machine.device}',
        lambda: _run_mmcv(boxes, scores),
        'Compile mmcv with its operators, for the GPU with FORCE_CUDA=1 and nvcc, as the README tells.',
    )


def _run_torchvision(boxes: torch.Tensor, scores: torch.Tensor) -> str:
    import torchvision

    torchvision.ops.nms(boxes, scores, 0.5)
    return f'torchvision {torchvision.__version__}'


def _run_mmcv(boxes: torch.Tensor, scores: torch.Tensor) -> str:
    from mmcv import ops

    kept = len(ops.nms(boxes, scores, 0.5)[1])
    if kept != 2:
        raise RuntimeError(f'NMS kept {kept} of 3 boxes, not 2')
    image = torch.rand(1, 2, 16, 16, device=boxes.device, requires_grad=True)
    rois = nn.functional.pad(boxes, (1, 0))
    ops.RoIAlign(7)(image, rois).sum().backward()
    return 'NMS and RoIAlign run, backward too'


def check_data(machine: Machine) -> Iterator[Result]:
    """COCO: annotation files, and whether the images that they name are there."""
    for split in IMAGES:
        dataset = machine.config[f'{split}_dataloader'].dataset
        root = Path(dataset.data_root)
        annotations, images = root / dataset.ann_file, root / dataset.data_prefix.img
        advice = f'Put COCO 2017 under {root}, or name its folder in the environment variable COCO_ROOT.'
        if not annotations.is_file() or not images.is_dir():
            missing = annotations if not annotations.is_file() else images
            yield Result(f'COCO, {split}', 'NOT OK', f'{missing} is missing', advice)
            continue
        try:
            names = {image['file_name'] for image in json.loads(annotations.read_bytes())['images']}
        except (ValueError, LookupError, TypeError) as error:
            yield Result(f'COCO, {split}', 'NOT OK', f'{annotations} is damaged ({error})', 'Get it again.')
            continue
        missing_images = names - {file.name for file in images.iterdir()}
        if missing_images:
            found = f'{len(missing_images)} of {len(names)} images are missing in {images}, as {min(missing_images)}'
            yield Result(f'COCO, {split}', 'NOT OK', found, advice)
        elif len(names) != IMAGES[split]:
            found = f'{annotations} has {len(names)} images, COCO 2017 has {IMAGES[split]}'
            yield Result(f'COCO, {split}', 'NOT OK', found, advice)
        else:
            yield Result(f'COCO, {split}', 'ok', f'{len(names)} images in {images}')


def check_weights(machine: Machine) -> Iterator[Result]:
    """The pretrained weights of all rows: whole in torch's cache, or to be had from where mmengine takes them."""
    inits = [config.model.backbone.get('init_cfg') or {} for config in machine.all_configs]  # none from scratch
    names = sorted({init['checkpoint'] for init in inits if 'checkpoint' in init})
    urls = [weights_url(name) for name in names]  # one by one: it changes mmengine meanwhile
    with ThreadPoolExecutor() as pool:  # without a network, each takes half a minute to find that out
        yield from pool.map(_check_weights, names, urls)


def _check_weights(name: str, url: str) -> Result:
    file = weights_file(url)
    if not file.is_file():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=15):
                return Result(name, 'ok', f'to be downloaded when training begins, from {url}')
        except (OSError, ValueError) as error:
            return Result(name, 'NOT OK', f'{url} cannot be reached ({error})', f'Download it elsewhere, to {file}.')
    digest = re.search(r'-([0-9a-f]{8,})\.', file.name)  # torch's convention: how the SHA-256 begins
    if digest and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest[1]):
        found = f'{file} is not what its name says: its SHA-256 does not begin with {digest[1]}'
        return Result(name, 'NOT OK', found, 'Remove the file. It is downloaded again when training begins.')
    return Result(name, 'ok', str(file))


def weights_url(name: str) -> str:
    """Where mmengine downloads the weights from that ``init_cfg`` names, as ``'torchvision://resnet50'``."""
    with mock.patch.object(checkpoint, 'load_from_http', lambda url, **_: dict(url=url)):
        return CheckpointLoader.load_checkpoint(name, logger='silent')['url']


def weights_file(url: str) -> Path:
    """Where mmengine keeps what it has downloaded from ``url``."""
    return Path(torch.hub.get_dir()) / 'checkpoints' / url.rpartition('/')[2]


def check_disk(machine: Machine) -> Iterator[Result]:
    """Free space for the checkpoints."""
    place = next(
        folder for folder in [machine.work_dir.absolute(), *machine.work_dir.absolute().parents] if folder.exists()
    )
    free = shutil.disk_usage(place).free
    row, everything = (
        machine.trials * sum(checkpoint_bytes(config) for config in configs)
        for configs in ([machine.config], machine.all_configs)
    )
    trials = f'{machine.trials} trial{"s" * (machine.trials > 1)}'
    found = (
        f'{free / 1e9:.0f} GB are free in {place}; {machine.row.name} takes {row / 1e9:.0f} GB, and all tables and '
        f'figures {everything / 1e9:.0f} GB, with {trials} each'
    )
    advice = 'Take another --work-dir, or --cfg-options default_hooks.checkpoint.max_keep_ckpts=2.'
    yield Result('disk', 'ok' if free > row else 'NOT OK', found, '' if free > everything else advice)


def checkpoint_bytes(config: Config) -> int:
    """What the checkpoints of a training take: weights, and as much again for the momentum of what is trained."""
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(copy.deepcopy(config.model))  # mmdet's detectors write into their config
    tensors = [*model.state_dict().values(), *(p for p in model.parameters() if p.requires_grad)]
    saved = config.train_cfg.max_epochs // config.default_hooks.checkpoint.interval
    kept = config.default_hooks.checkpoint.get('max_keep_ckpts', -1)
    return sum(t.numel() * t.element_size() for t in tensors) * (min(saved, kept) if kept > 0 else saved)


def check_layer(machine: Machine) -> Iterator[Result]:
    """The layer on the device that trains, beside the float64 oracle. BatchNorm's own deviation is the yardstick."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f'CBN in {str(dtype).removeprefix("torch.")}, {machine.device}'
        if dtype != torch.float32 and not has_autocast(machine.device, dtype):
            yield Result(name, 'not applicable here', f'this torch does not train with it on this {machine.device}')
            continue
        found = {
            f'{kind}, {layout}': deviation(build(), machine.device, dtype, memory_format)
            for kind, build in dict(BN=lambda: nn.BatchNorm2d(CHANNELS), **KINDS).items()
            for layout, memory_format in MEMORY_FORMATS.items()
        }
        yardstick = max(found.pop(f'BN, {layout}') for layout in MEMORY_FORMATS)
        worst = max(found, key=found.__getitem__)
        text = (
            f'{len(found)} kinds are within {found[worst]:.1e} of the float64 oracle ({worst} is the farthest), '
            f'BN within {yardstick:.1e}'
        )
        if found[worst] <= MOST_DEVIATION * yardstick:
            yield Result(name, 'ok', text)
        else:
            yield Result(name, 'NOT OK', text, 'Do not train with CBN here. Please report this table as an issue.')


def has_autocast(device: str, dtype: torch.dtype) -> bool:
    """Whether a GPU has bfloat16, and torch has autocast to ``dtype``: on the CPU to float16 since torch 2.3."""
    if device == 'cuda' and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported()
    return device == 'cuda' or dtype == torch.bfloat16 or hasattr(torch.amp, 'GradScaler')


def check_waiting(machine: Machine) -> Iterator[Result]:
    """That training never makes the host wait for the GPU, and how many kernels a layer launches."""
    if machine.device == 'cpu':
        for subject in ('no waiting for the GPU', 'kernels'):
            yield Result(subject, 'not applicable here', 'only a GPU can show it')
        return
    kernels, waits = {}, []
    for kind, build in dict(BN=lambda: nn.BatchNorm2d(CHANNELS), **KINDS).items():
        step = _training_step(build(), machine.device)
        for _ in range(4):  # until the window is full, and whatever torch sets up once is there
            step()
        try:
            with _no_waiting():
                step()
        except RuntimeError as error:
            waits.append(f'{kind}: {_first_line(error)}')
        kernels[kind] = count_kernels(step)
    if waits:
        advice = 'Training works, but slower than it could be. Please report this table as an issue.'
        yield Result('no waiting for the GPU', 'NOT OK', '; '.join(waits), advice)
    else:
        yield Result('no waiting for the GPU', 'ok', f'in a training step of {", ".join(kernels)}')
    found = ', '.join(f'{kind} {count}' for kind, count in kernels.items())
    yield Result('kernels', 'ok', f'of a training step of a convolution and a layer: {found}')


def _training_step(norm: nn.Module, device: str) -> Callable[[], None]:
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, CHANNELS, 32, 32, device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()

    return step


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def check_processes(machine: Machine) -> Iterator[Result]:
    """That processes train together: over NCCL one for each GPU, over gloo two where there is none."""
    gpus = torch.cuda.device_count()
    backend, count = ('nccl', min(gpus, machine.gpus)) if gpus else ('gloo', 2)
    subject = f'{count} process{"es" * (count > 1)}, {backend}'
    with tempfile.TemporaryDirectory() as folder:
        meet = f'{folder}/meet'
        context = multiprocessing.start_processes(
            train_together, args=(count, backend, meet), nprocs=count, join=False, start_method='spawn'
        )
        have_started = False
        end = time.monotonic() + SECONDS_TO_START
        try:
            while not context.join(timeout=1):
                if not have_started and all(started_file(meet, rank).exists() for rank in range(count)):
                    have_started = True
                    end = time.monotonic() + SECONDS_TO_MEET
                if time.monotonic() <= end:
                    continue
                if have_started:
                    found = f'no end after {SECONDS_TO_MEET} s'
                    advice = 'NCCL_DEBUG=INFO tells more. Often a firewall or an interface is the cause.'
                else:
                    found = f'not started after {SECONDS_TO_START} s'
                    advice = 'The machine is too busy, or its disk too slow, to import torch and mmdet.'
                yield Result(subject, 'NOT OK', found, advice)
                return
        except multiprocessing.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        finally:
            for process in context.processes:
                process.kill()
    yield Result(subject, 'ok', 'the weights are equal after 3 steps of DistributedDataParallel')


def started_file(meet: str, rank: int) -> Path:
    """The file that tells that a process has imported everything and begins."""
    return Path(f'{meet}-{rank}')


def train_together(rank: int, processes: int, backend: str, meet: str) -> None:
    """Train a layer in one of several processes, each on batches of its own.

    Args:
        rank: Of this process.
        processes: How many there are.
        backend: ``'nccl'`` or ``'gloo'``.
        meet: A file that is not there yet, by which they find each other.

    Raises:
        RuntimeError: The weights differ from those of another process afterwards.
    """
    started_file(meet, rank).touch()
    on_gpu = backend == 'nccl'
    device = torch.device('cuda', rank) if on_gpu else torch.device('cpu')
    if on_gpu:
        torch.cuda.set_device(device)
    # The others may still be importing.
    timeout = timedelta(seconds=SECONDS_TO_START + SECONDS_TO_MEET)
    distributed.init_process_group(backend, f'file://{meet}', timeout, world_size=processes, rank=rank)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), CBN(8, window_size=2)).to(device)
    parallel = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(parallel(torch.randn(2, 3, 16, 16, device=device))).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        everywhere = [torch.empty_like(parameter) for _ in range(processes)]
        distributed.all_gather(everywhere, parameter.detach())
        if not all(torch.equal(other, parameter) for other in everywhere):
            raise RuntimeError(f'after 3 steps, {name} differs between processes')
    del parallel
    leave_process_group()


def check_step(machine: Machine) -> Iterator[Result]:
    """A training step of the row at full size, on random images: what training it will take."""
    batch_size = machine.config.train_dataloader.batch_size
    settings = Settings(machine.device, SIZE, batch_size)
    num_classes = machine.config.model.roi_head.bbox_head.num_classes
    inputs = make_inputs(batch_size, SIZE, num_classes)
    counter = StorageCounter()
    with nullcontext() if settings.on_cuda else counter:
        detector = Detector(machine.config, settings, inputs, inputs)
        if settings.on_cuda:
            detector.fill_window()
            (seconds,) = time_in_alternation([detector.train_step], 5, warmup=3, synchronize=torch.cuda.synchronize)
        else:
            (seconds,) = time_in_alternation([detector.train_step], 1)
    peak = torch.cuda.max_memory_allocated() if settings.on_cuda else counter.peak
    step = statistics.median(seconds)
    found = f'{step:.2f} s, peak memory {peak / 1e9:.1f} GB, with {batch_size} images of {SIZE[0]}x{SIZE[1]}'
    if not settings.on_cuda:
        advice = 'Train it on GPUs.'
        yield Result(f'a step of {machine.row.name}', 'ok', f'{found}; the first step, on this CPU', advice)
        return
    iterations = machine.config.train_cfg.max_epochs * math.ceil(TRAINED_IMAGES / (machine.gpus * batch_size))
    yield Result(
        f'a step of {machine.row.name}',
        'ok',
        f'{found}; {iterations} iterations on {machine.gpus} GPUs take {iterations * step / 3600:.1f} hours, without '
        'loading images, synchronization and evaluation',
    )


CHECKS: dict[str, Callable[[Machine], Iterator[Result]]] = {
    'software': check_software,
    'data': check_data,
    'weights': check_weights,
    'disk': check_disk,
    'layer': check_layer,
    'waiting': check_waiting,
    'processes': check_processes,
    'step': check_step,
}


def run_check(name: str, machine: Machine) -> Iterator[Result]:
    """The results of the check ``name`` of :data:`CHECKS`. One that raises is a result, too."""
    try:
        yield from CHECKS[name](machine)
    except Exception as error:
        traceback.print_exc()
        yield Result(name, 'NOT OK', f'{type(error).__name__}: {_first_line(error)}', 'The whole error is above.')


def _tried(subject: str, attempt: Callable[[], str], advice: str) -> Result:
    try:
        return Result(subject, 'ok', attempt())
    except Exception as error:
        return Result(subject, 'NOT OK', _first_line(error), advice)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
