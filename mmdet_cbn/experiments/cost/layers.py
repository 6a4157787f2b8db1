"""What one convolution and its normalizer cost, forward and backward, beside BatchNorm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...layers.cbn import CBN
from ...layers.gradient import GRADIENTS
from .detectors import Settings, time_in_alternation


class Shape(NamedTuple):
    name: str
    channels: tuple[int, int]
    kernel: int
    input: tuple[int, int, int]  # [N, H, W]


SHAPES = (
    Shape('256 to 256, 3x3, 256 RoIs of 7x7', (256, 256), 3, (256, 7, 7)),
    Shape('256 to 256, 3x3, 64 RoIs of 14x14', (256, 256), 3, (64, 14, 14)),
    Shape('64 to 64, 3x3, 2 maps of 48x80', (64, 64), 3, (2, 48, 80)),
    Shape('512 to 256, 1x1, 2 maps of 28x28', (512, 256), 1, (2, 28, 28)),
)


class TwoGradients(nn.BatchNorm2d):
    """The slow peer: CBN with both gradients of the statistics by autograd and the old weights kept, k = 4."""

    def __init__(self, channels: int, conv: nn.Conv2d) -> None:
        super().__init__(channels)
        self.conv = [conv]  # in a list, lest it become a part
        self.past: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        theta = self.conv[0].weight
        mean, square = x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))
        gradients = [torch.autograd.grad(s.sum(), theta, retain_graph=True)[0] for s in (mean, square)]
        with torch.no_grad():
            moved = [
                [s + (gradient * (theta - old)).sum(dim=(1, 2, 3)) for s, gradient in zip(p[:2], p[2:4], strict=True)]
                for p in self.past
                for old in p[4:]
            ]
            self.past = [(mean.detach(), square.detach(), *gradients, theta.clone()), *self.past][:3]
        means, squares = (torch.stack(all_of) for all_of in zip((mean, square), *moved, strict=True))
        window_mean = means.mean(dim=0)
        window_var = torch.maximum(squares, means.square()).mean(dim=0) - window_mean.square()
        gamma, beta, m, v = (t.view(-1, 1, 1) for t in (self.weight, self.bias, window_mean, window_var))
        return gamma * (x - m) / (v + self.eps).sqrt() + beta


def _cbn(**arguments: Any) -> Callable[[int, nn.Conv2d], nn.Module]:
    return lambda channels, conv: CBN(channels, **arguments)


KINDS: dict[str, Callable[[int, nn.Conv2d], nn.Module]] = {
    'BN': lambda channels, conv: nn.BatchNorm2d(channels),
    'SyncBN in one process': lambda channels, conv: revert_sync_batchnorm(nn.SyncBatchNorm(channels)),
    'GN': lambda channels, conv: nn.GroupNorm(32, channels),
    'two gradients by autograd': TwoGradients,
    'Naive CBN': _cbn(order=0),
    'CBN': _cbn(),
    'CBN, 64 samples': _cbn(samples=64),
    **{f'CBN, gradient {kind}': _cbn(gradient=kind) for kind in GRADIENTS},
}
_COMPILED = {f'{kind}, compiled': kind for kind in ('BN', 'CBN', 'CBN, 64 samples')}  # by torch.compile
KINDS.update({compiled: KINDS[kind] for compiled, kind in _COMPILED.items()})


def _tensors(shape: Shape) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    batch, *size = shape.input
    x = torch.randn(batch, shape.channels[0], *size, requires_grad=True)
    return x, torch.randn(batch, shape.channels[1], *size)


def training_step(kind: str, shape: Shape, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward of a convolution and normalizer of its own, k = 4.

    The weights stay what they are: that is the same work.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(*shape.channels, shape.kernel, padding=shape.kernel // 2, bias=False)
    model = nn.Sequential(conv, KINDS[kind](shape.channels[1], conv))
    inputs = [x, *model.parameters()]
    if kind in _COMPILED:
        model.compile(dynamic=False)

    def step() -> None:
        torch.autograd.grad(model(x), inputs, dy)

    return step


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that compute something. On a GPU each of them launches a kernel, or more than one.

    Attributes:
        count (int): Without views, and without tensors that are made and not filled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken, made = (
            {leaf.untyped_storage()._cdata for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), out)
        )
        makes_one = bool(made - taken) and 'empty' not in func._schema.name
        self.count += makes_one or func._schema.is_mutable
        return out


def count_operators(kind: str, shape: Shape) -> int:
    """Operators of a training step with a full window, as :class:`OperatorCounter` counts them on a CPU."""
    step = training_step(kind, shape, *_tensors(shape))
    for _ in range(4):
        step()
    with OperatorCounter() as counter:
        step()
    return counter.count


def count_kernels(step: Callable[[], Any]) -> int:
    """What ``step`` launches on a GPU: kernels, and copies and fills of memory."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def measure_layers(
    rounds: int, settings: Settings, progress: Callable[[], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, int]]]:
    """Training steps on the device of ``settings``, by name of the shape and kind.

    Args:
        rounds: Timed steps of each kind.
        settings: Of which the device is read.
        progress: Called after each timed step and warmup, ``(rounds + 5) * len(SHAPES) * len(KINDS)`` times.

    Returns:
        Seconds of each round, all kinds in alternation; and the kernels of a step, empty for a CPU.
    """
    seconds, kernels = {}, {}
    with torch.device(settings.device):
        for shape in SHAPES:
            torch._dynamo.reset()  # it compiles one function only so often
            x, dy = _tensors(shape)
            steps = {kind: training_step(kind, shape, x, dy) for kind in KINDS}
            times = time_in_alternation(list(steps.values()), rounds, 5, settings.synchronize, progress)
            seconds[shape.name] = dict(zip(KINDS, times, strict=True))
            if settings.on_cuda:
                kernels[shape.name] = {kind: count_kernels(step) for kind, step in steps.items()}
    return seconds, kernels
