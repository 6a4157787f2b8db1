"""How well the compensated statistics agree with those that old images really have under the current weights.

What is left is the end of the Taylor series, for samples the sampling, and for all of them that the layers before have
changed too, which the paper leaves out (Eq. 5 and 6).
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ...arguments import check_bool, check_int
from ...compensation.first_order import CompensatedStatistics, compensate, statistics_gradients
from ...compensation.sampled import SampledStatistics, compensate_samples, sampled_statistics
from ...hooks.model import model_of
from ...layers.statistics import batch_statistics
from .replay import OldIteration, Replay, Seen, predecessors

ONE_LAYER = 'second order (one layer, exact)'
TWO_LAYERS = 'two layers, exact'
# The yardstick: how far the statistics of another batch are off, of the last iteration or the one before.
NOISE = 'another batch instead'


class Error(NamedTuple):
    """How far one compensation is off in one layer, means over its channels."""

    iteration: int  #: finished iterations
    layer: str
    tau: int  #: how many updates of the weights ago the images were seen
    compensation: str
    mean_error: float  #: |mu' - mu| / sigma
    var_error: float  #: |var' - var| / var


class _Kept(NamedTuple):
    """An old iteration, with what CBN would keep of it."""

    iteration: OldIteration
    first_order: dict[str, CompensatedStatistics]
    sampled: dict[str, dict[int, SampledStatistics]]  # by the number of samples


class StatisticsFidelityHook(Hook):
    """Compares predicted with true statistics in the course of a training, on which it has no influence.

    After every ``every``-th iteration the images of the last ``max_tau`` iterations run through backbone and neck
    again, and the RoIs of then through the RoI heads, in training mode and with the weights of now (:class:`Replay`).
    What comes into a CBN there has the true statistics.

    Besides what the layer can do, this tries what would be left if it knew all of the change of its own convolution (a
    Taylor polynomial of second order, which is exact for one layer), and of that and the layers just before it (the
    "more than one layer" of section 4.4): the images run with the weights of then elsewhere.

    Args:
        every: Iterations from one comparison to the next.
        max_tau: How many iterations to look back; less than ``every``.
        samples: Numbers of samples to try.
        two_layers: Whether to try two layers. It takes a forward to each layer, for each tau.

    Attributes:
        errors (list[Error]): What was found.

    Raises:
        TypeError: A number that is not an int, or ``two_layers`` that is not a bool.
        ValueError: A number that is not allowed.
        RuntimeError: When training begins, if backbone, neck and RoI head have no CBN of order 1 in training.
    """

    priority = 'LOW'

    def __init__(
        self, every: int = 10, max_tau: int = 7, samples: Sequence[int] = (64, 256), two_layers: bool = True
    ) -> None:
        check_int('StatisticsFidelityHook', 'max_tau', max_tau, at_least=1)
        check_int('StatisticsFidelityHook', 'every', every, at_least=max_tau + 1)
        for number in samples:
            check_int('StatisticsFidelityHook', 'each of samples', number, at_least=2)
        self.every, self.max_tau, self.samples = every, max_tau, tuple(samples)
        self.two_layers = check_bool('StatisticsFidelityHook', 'two_layers', two_layers)
        self.errors: list[Error] = []
        self._random = random.Random(0)
        self._past: deque[_Kept] = deque(maxlen=max_tau)
        self._before: dict[str, list[list[str]]] | None = None

    def before_train(self, runner: Runner) -> None:
        """Watch the layers."""
        model = model_of(runner)
        self._replay = Replay(model, self._note)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to keep what will be compared later."""
        self._first_order: dict[str, CompensatedStatistics] = {}
        self._sampled: dict[str, dict[int, SampledStatistics]] = {}
        self._replay.begin_iteration(-(runner.iter + 1) % self.every < self.max_tau)

    def _note(self, name: str, seen: Seen) -> None:
        _, conv, x, batch_mean, mean, var = seen
        self._first_order[name] = CompensatedStatistics(mean, var, *statistics_gradients(x, batch_mean, conv))
        self._sampled[name] = {
            n: sampled_statistics(x, mean, var, conv, n, self._random.random()) for n in self.samples
        }

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Keep this iteration, and compare if it is time."""
        iteration = self._replay.end_iteration(data_batch)
        if iteration is not None:
            self._past.appendleft(_Kept(iteration, self._first_order, self._sampled))
        if (runner.iter + 1) % self.every == 0:
            if len(self._past) == self.max_tau:  # fewer where burn-in has just ended
                self._compare(runner.iter + 1)
            self._past.clear()

    def _compare(self, number: int) -> None:
        if self._before is None and self.two_layers:
            self._before = predecessors(self._replay, self._past[0].iteration)
        with torch.no_grad():
            for tau, old in enumerate(self._past, start=1):
                other = self._past[0 if tau > 1 else 1] if self.max_tau > 1 else None
                predictions = self._predictions(old, other)

                def visit(name: str, seen: Seen, tau: int = tau, predictions: _Predictions = predictions) -> None:
                    for compensation, (mean, var) in predictions[name].items():
                        true_var = seen.var + seen.layer.eps
                        mean_error = ((mean - seen.mean).abs() / true_var.sqrt()).mean().item()
                        var_error = ((var - seen.var).abs() / true_var).mean().item()
                        self.errors.append(Error(number, name, tau, compensation, mean_error, var_error))

                self._replay.run(old.iteration, visit)

    def _predictions(self, old: _Kept, other: _Kept | None) -> '_Predictions':
        found: _Predictions = {}
        for name, kept in old.first_order.items():
            conv = self._replay.convs[name]
            of_layer = found[name] = {
                'none (Naive CBN)': (kept.mean, kept.var),
                'first order (the paper)': compensate(_stacked(kept), conv.weight, conv.groups)[:2],
            }
            for n, sampled in old.sampled[name].items():
                of_layer[f'{n} samples'] = compensate_samples(_stacked(sampled), conv.weight, conv.groups)[:2]
        self._add_exact(found, old.iteration)
        if other is not None:
            for name, kept in other.first_order.items():
                if name in found:
                    found[name][NOISE] = kept.mean, kept.var
        return found

    def _add_exact(self, found: '_Predictions', old: OldIteration) -> None:
        """Add what old images have where only the layer itself has changed, or it and the ones before it."""
        of_now = {name: conv.weight.data for name, conv in self._replay.convs.items()}

        def visit_alone(name: str, seen: Seen) -> None:
            conv = seen.conv
            x = F.conv2d(conv.input, of_now[name], None, conv.stride, conv.padding, conv.dilation, conv.groups)
            found[name][ONE_LAYER] = batch_statistics(x)

        with self._replay.weights_of(old, but=set()):
            self._replay.run(old, visit_alone)
        for name, before in (self._before or {}).items():

            def visit(visited: str, seen: Seen, name: str = name) -> None:
                if visited == name:
                    found[name][TWO_LAYERS] = seen.mean, seen.var

            if name in found:
                with self._replay.weights_of(old, but={name, *(before[0] if before else ())}):
                    self._replay.run(old, visit, last=name)


_Predictions = dict[str, dict[str, tuple[Tensor, Tensor]]]  # mean and variance, by layer and compensation


def _stacked(statistics: Any) -> Any:
    """With the leading axis of a window of one."""
    return type(statistics)(*(tensor.unsqueeze(0) for tensor in statistics))
