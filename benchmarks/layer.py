"""What one convolution and its normalizer cost, forward and backward, beside BatchNorm:

    python benchmarks/layer.py --out benchmarks/layer.md

All kinds are timed in alternation in one process, an optimizer step included, since CBN compensates for what that
changes. The table has the median (first to third quartile) over rounds of the time relative to BatchNorm's in the same
round, and the bytes that the window holds for an old iteration, in weights of the convolution.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.benchmark import quartiles, time_in_alternation


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


KINDS: dict[str, Callable[[int, nn.Conv2d], nn.Module]] = {
    'BN': lambda channels, conv: nn.BatchNorm2d(channels),
    'GN': lambda channels, conv: nn.GroupNorm(32, channels),
    'two gradients by autograd': TwoGradients,
    'Naive CBN': lambda channels, conv: CBN(channels, order=0),
    'CBN': lambda channels, conv: CBN(channels),
    'CBN, 64 samples': lambda channels, conv: CBN(channels, samples=64),
}


def training_step(kind: str, shape: Shape, x: Tensor, dy: Tensor) -> tuple[Callable[[], None], nn.Module]:
    """A step with a convolution and normalizer of its own, and that normalizer."""
    torch.manual_seed(0)
    conv = nn.Conv2d(*shape.channels, shape.kernel, padding=shape.kernel // 2, bias=False)
    norm = KINDS[kind](shape.channels[1], conv)
    inputs = [x, *conv.parameters(), *norm.parameters()]

    def step() -> None:
        torch.autograd.grad(norm(conv(x)), inputs, dy)

    return step, norm


def window_in_weights(norm: nn.Module, shape: Shape) -> str:
    """What the window holds for an old iteration, as a multiple of the convolution's weight."""
    weight = 4 * np.prod(shape.channels) * shape.kernel**2
    if isinstance(norm, CBN):
        return f'{norm._window.nbytes / 3 / weight:.2f}'
    if isinstance(norm, TwoGradients):
        return f'{sum(t.nbytes for t in norm.past[0]) / weight:.2f}'
    return ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30, help='timed steps of each kind (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='file to write the table to')
    args = parser.parse_args()
    bar = ProgressBar(len(SHAPES) * len(KINDS) * (args.rounds + 5), file=sys.stderr)
    head = ['shape', 'BN, ms', *(cell for kind in list(KINDS)[1:] for cell in (kind, 'window'))]
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for shape in SHAPES:
        batch, *size = shape.input
        x = torch.randn(batch, shape.channels[0], *size, requires_grad=True)
        dy = torch.randn(batch, shape.channels[1], *size)
        steps, norms = zip(*(training_step(kind, shape, x, dy) for kind in KINDS), strict=True)
        seconds = np.array(time_in_alternation(steps, args.rounds, warmup=5, progress=bar.update))
        cells = [shape.name, f'{1000 * np.median(seconds[0]):.1f}']
        for own, norm in zip(seconds[1:], norms[1:], strict=True):
            ratio = quartiles(own / seconds[0])
            cells += [f'{ratio["median"]:.2f} ({ratio["q1"]:.2f} to {ratio["q3"]:.2f})', window_in_weights(norm, shape)]
        lines.append(f'| {" | ".join(cells)} |')
    machine = f'torch {torch.__version__}, {torch.get_num_threads()} threads of {platform.machine()}'
    table = '\n'.join([*lines, '', f'k = 4, {args.rounds} rounds; {machine}.', ''])
    print(f'\n{table}', end='')
    if args.out:
        args.out.write_text(table)


if __name__ == '__main__':
    main()
