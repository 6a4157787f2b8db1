"""How the weights before normalizers grow, and which part of their gradient only makes them longer.

BatchNorm's output does not depend on the length of a channel's weight theta_j, so the gradient is orthogonal to
theta_j. With a window this holds only as far as the gradient goes through the window.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...arguments import check_int
from ...hooks.model import model_of
from ...layers.diagnosis import radial_part


class WeightState(NamedTuple):
    """A convolution and the normalizer behind it. Means are over channels j."""

    iteration: int  #: finished iterations
    layer: str  #: the normalizer
    norm: float  #: mean of ||theta_j||
    radial: float  #: mean of <theta_j, g_j> / (||theta_j|| ||g_j||), g_j the gradient: > 0 makes theta_j shorter
    size_of_radial: float  #: mean of its absolute value
    offset: float  #: mean of |running mean| / running deviation


class WeightStateHook(Hook):
    """Records a :class:`WeightState` of each BatchNorm, CBN too, that follows a convolution.

    Args:
        every: Iterations from one record to the next.
        out: CSV file to write after training; None for ``weights.csv`` in the work_dir.

    Attributes:
        states (list[WeightState]): What was found.

    Raises:
        TypeError: ``every`` is not an int.
        ValueError: ``every`` is less than 1.
    """

    priority = 'LOW'

    def __init__(self, every: int = 50, out: str | Path | None = None) -> None:
        self.every = check_int('WeightStateHook', 'every', every, at_least=1)
        self.out = out
        self.states: list[WeightState] = []
        self._paired: set[str] = set()  # norms
        self._found: list[tuple[str, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._records = False

    def before_train(self, runner: Runner) -> None:
        model = model_of(runner)
        self._norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        last: list[tuple[nn.Conv2d, Tensor]] = []
        handles = [
            module.register_forward_hook(lambda conv, _, output: last.__setitem__(slice(None), [(conv, output)]))
            for module in model.modules()
            if isinstance(module, nn.Conv2d)
        ]

        def pair(name: str) -> Any:
            def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
                if last and last[0][1] is args[0] and name not in self._paired:
                    self._paired.add(name)
                    weight = last[0][0].weight
                    if weight.requires_grad:
                        weight.register_post_accumulate_grad_hook(lambda weight: self._look(name, weight))

            return hook

        handles += [norm.register_forward_pre_hook(pair(name)) for name, norm in self._norms.items()]
        self._handles = handles

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._records = (runner.iter + 1) % self.every == 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        while self._handles:  # all norms have met their convolutions
            self._handles.pop().remove()
        for name, numbers in self._found:
            rounded = [float(f'{number:.4g}') for number in numbers.tolist()]  # for a small file
            self.states.append(WeightState(runner.iter + 1, name, *rounded))
        self._found.clear()

    def after_train(self, runner: Runner) -> None:
        out = Path(self.out or Path(runner.work_dir) / 'weights.csv')
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, 'w', newline='', encoding='utf-8') as stream:
            writer = csv.writer(stream, lineterminator='\n')
            writer.writerow(WeightState._fields)
            writer.writerows(self.states)

    @torch.no_grad()
    def _look(self, name: str, weight: Tensor) -> None:
        if not self._records or weight.grad is None:
            return
        radial = radial_part(weight)
        norm = self._norms[name]
        offset = norm.running_mean.abs() / (norm.running_var + norm.eps).sqrt()  # type: ignore[union-attr, operator]
        numbers = [weight.flatten(1).norm(dim=1).mean(), radial.mean(), radial.abs().mean(), offset.mean()]
        self._found.append((name, torch.stack(numbers)))


_PANELS = {
    'norm': r'length of $\theta_j$, from the first record',
    'radial': r'radial part of the gradient: $\cos(\theta_j, g_j)$',
    'size_of_radial': 'its absolute value',
    'offset': r'$|\mu_j| / \sigma_j$, running statistics',
}


def has_states(file: Path) -> bool:
    """Whether :class:`WeightStateHook` wrote ``file``, a CSV file."""
    with open(file, newline='', encoding='utf-8') as stream:
        return next(csv.reader(stream), None) == list(WeightState._fields)


def read_states(file: Path) -> list[WeightState]:
    """What :class:`WeightStateHook` wrote."""
    with open(file, newline='', encoding='utf-8') as stream:
        rows = list(csv.reader(stream))[1:]
    return [WeightState(int(row[0]), row[1], *map(float, row[2:])) for row in rows]


def plot_weights(states: dict[str, list[WeightState]]) -> Figure:
    """The four numbers over the training, each the mean over the layers, with a line for each training."""
    figure = Figure(figsize=(10, 7), layout='constrained')
    panels: Any = figure.subplots(2, 2)
    for (field, title), axes in zip(_PANELS.items(), panels.flat, strict=True):
        for name, records in states.items():
            of_iteration = defaultdict(list)
            first: dict[str, float] = {}
            for state in records:
                value = getattr(state, field)
                if field == 'norm':
                    value /= first.setdefault(state.layer, value)
                of_iteration[state.iteration].append(value)
            axes.plot(list(of_iteration), [sum(v) / len(v) for v in of_iteration.values()], label=name)
        axes.set_title(title, fontsize='medium')
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel('iterations')
    panels[0][0].legend(fontsize='small')
    return figure
