"""How well the compensated statistics agree with those that old images really have under the current weights.

What is left is the end of the Taylor series, for samples the sampling, and for all of them that the layers before have
changed too, which the paper leaves out (Eq. 5 and 6).
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..arguments import check_int
from ..cbn import CBN
from ..conversion import active_norms
from ..convolution import ConvCall
from ..statistics import (
    CompensatedStatistics,
    SampledStatistics,
    batch_statistics,
    compensate,
    compensate_samples,
    sampled_statistics,
    statistics_gradients,
    window_statistics,
)

# The yardstick: how far the statistics of another batch are off, of the last iteration or the one before.
NOISE = 'another batch instead'
_PARTS = ('backbone', 'neck', 'roi_head')


class Error(NamedTuple):
    """How far one compensation is off in one layer, means over its channels."""

    iteration: int  #: finished iterations
    layer: str
    tau: int  #: how many updates of the weights ago the images were seen
    compensation: str
    mean_error: float  #: |mu' - mu| / sigma
    var_error: float  #: |var' - var| / var


class _Old(NamedTuple):
    """A layer in an old iteration."""

    mean: Tensor
    var: Tensor
    window_mean: Tensor
    window_var: Tensor
    exact: CompensatedStatistics
    sampled: dict[int, SampledStatistics]  # by the number of samples


class _Iteration(NamedTuple):
    """What runs again later."""

    inputs: Tensor
    rois: dict[str, Tensor]  # by the kind of RoI head
    layers: dict[str, _Old]


class StatisticsFidelityHook(Hook):
    """Compares predicted with true statistics in the course of a training, on which it has no influence.

    After every ``every``-th iteration the images of the last ``max_tau`` iterations run through backbone and neck
    again, and the RoIs of then through the RoI heads, in training mode and with the weights of now. What comes into a
    CBN there has the true statistics. The layer hands on what its window of then would make of it, had that moved as
    far as this batch's statistics have: so what comes into the next layers differs from what came then by the change of
    the weights alone.

    Args:
        every: Iterations from one comparison to the next.
        max_tau: How many iterations to look back; less than ``every``.
        samples: Numbers of samples to try.

    Attributes:
        errors (list[Error]): What was found.

    Raises:
        TypeError: A number that is not an int.
        ValueError: A number that is not allowed.
        RuntimeError: When training begins, if backbone, neck and RoI head have no CBN of order 1 in training.
    """

    priority = 'LOW'

    def __init__(self, every: int = 10, max_tau: int = 7, samples: Sequence[int] = (64, 256)) -> None:
        check_int('StatisticsFidelityHook', 'max_tau', max_tau, at_least=1)
        check_int('StatisticsFidelityHook', 'every', every, at_least=max_tau + 1)
        for number in samples:
            check_int('StatisticsFidelityHook', 'each of samples', number, at_least=2)
        self.every, self.max_tau, self.samples = every, max_tau, tuple(samples)
        self.errors: list[Error] = []
        self._random = random.Random(0)
        self._past: deque[_Iteration] = deque(maxlen=max_tau)
        self._replayed: dict[str, _Old] | None = None
        self._now = (0, 0)  # iteration and tau of what is replayed

    def before_train(self, runner: Runner) -> None:
        """Watch the layers."""
        self._model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = {
            name: norm
            for name, norm in active_norms(self._model).items()
            if isinstance(norm, CBN) and norm.order == 1 and name.split('.')[0] in _PARTS
        }
        if not layers:
            raise RuntimeError(
                'StatisticsFidelityHook: backbone, neck and RoI head have no CBN of order 1 in training to look at. '
                "Give them norm_cfg=dict(type='CBN') in the config."
            )
        for name, layer in layers.items():
            layer._cross_iteration_forward = partial(  # type: ignore[method-assign]
                self._forward, name, layer, layer._cross_iteration_forward
            )

        for kind, extractor in self._roi_extractors().items():
            extractor.register_forward_pre_hook(partial(self._note_rois, kind))

    def _roi_extractors(self) -> dict[str, nn.Module]:
        """Those of the RoI heads by their kind; heads of several stages, or without one, are not looked at."""
        head = getattr(self._model, 'roi_head', None)
        found = {kind: getattr(head, f'{kind}_roi_extractor', None) for kind in ('bbox', 'mask')}
        if found['mask'] is found['bbox']:
            del found['mask']
        return {kind: module for kind, module in found.items() if hasattr(module, 'num_inputs')}  # type: ignore[misc]

    def _note_rois(self, kind: str, extractor: nn.Module, args: tuple) -> None:
        if extractor.training and self._replayed is None and len(args[1]) > 0:
            self._rois[kind] = args[1]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to note what will be compared later."""
        self._current: dict[str, _Old] = {}
        self._rois: dict[str, Tensor] = {}
        self._is_needed = -(runner.iter + 1) % self.every < self.max_tau

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Keep this iteration, and compare if it is time."""
        if self._current:
            inputs = self._model.data_preprocessor(data_batch, training=True)['inputs']
            self._past.appendleft(_Iteration(inputs, self._rois, self._current))
        if (runner.iter + 1) % self.every == 0:
            if len(self._past) == self.max_tau:  # fewer where burn-in has just ended
                self._compare(runner.iter + 1)
            self._past.clear()

    @torch.no_grad()
    def _compare(self, iteration: int) -> None:
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        for tau, old in enumerate(self._past, start=1):
            self._replayed, self._now = old.layers, (iteration, tau)
            features = self._model.extract_feat(old.inputs)
            extractors = self._roi_extractors()
            for kind, rois in old.rois.items():
                in_rois = extractors[kind](features[: extractors[kind].num_inputs], rois)
                getattr(self._model.roi_head, f'{kind}_head')(in_rois)
        self._replayed = None
        # Other normalizers on the way have counted the old images once more.
        for name, buffer in self._model.named_buffers():
            buffer.copy_(buffers[name])

    def _forward(
        self,
        name: str,
        layer: CBN,
        forward: Callable[[Tensor, tuple[nn.Conv2d, Tensor]], Tensor],
        input: Tensor,
        feeding: tuple[nn.Conv2d, Tensor],
    ) -> Tensor:
        """In the place of the layer's own."""
        conv = ConvCall.of(*feeding)
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            if self._replayed is not None:
                return self._replay(name, layer, input, conv)
            if self._is_needed and name not in self._current:  # there it is where a checkpointed block runs again
                self._current[name] = self._note(layer, input, conv)
        return forward(input, feeding)

    def _note(self, layer: CBN, input: Tensor, conv: ConvCall) -> _Old:
        batch_mean, var = batch_statistics(input)
        mean = batch_mean if conv.bias is None else batch_mean - conv.bias
        past = layer._past_statistics(conv)
        window_mean, window_var = (mean, var) if past is None else window_statistics(mean, var, *past)[:2]
        exact = CompensatedStatistics(mean, var, *statistics_gradients(input, batch_mean, conv))
        sampled = {n: sampled_statistics(input, mean, var, conv, n, self._random.random()) for n in self.samples}
        return _Old(mean, var, window_mean, window_var, exact, sampled)

    def _replay(self, name: str, layer: CBN, input: Tensor, conv: ConvCall) -> Tensor:
        old = self._replayed[name]  # type: ignore[index]
        batch_mean, var = batch_statistics(input)
        mean = batch_mean if conv.bias is None else batch_mean - conv.bias
        predictions = {
            'none (Naive CBN)': (old.mean, old.var),
            'first order (the paper)': compensate(_stacked(old.exact), conv.weight, conv.groups),
        }
        for n, sampled in old.sampled.items():
            predictions[f'{n} samples'] = compensate_samples(_stacked(sampled), conv.weight, conv.groups)
        other = self._past[0 if self._now[1] > 1 else 1].layers.get(name) if self.max_tau > 1 else None
        if other is not None:
            predictions[NOISE] = other.mean, other.var
        for compensation, (predicted_mean, predicted_var) in predictions.items():
            mean_error = ((predicted_mean - mean).abs() / (var + layer.eps).sqrt()).mean().item()
            var_error = ((predicted_var - var).abs() / (var + layer.eps)).mean().item()
            self.errors.append(Error(self._now[0], name, self._now[1], compensation, mean_error, var_error))
        moved_mean = old.window_mean + (batch_mean - old.mean)
        moved_var = old.window_var * ((var + layer.eps) / (old.var + layer.eps))
        return F.batch_norm(input, moved_mean, moved_var, layer.weight, layer.bias, eps=layer.eps)


def _stacked(statistics: Any) -> Any:
    """With the leading axis of a window of one."""
    return type(statistics)(*(tensor.unsqueeze(0) for tensor in statistics))


def to_markdown(errors: Iterable[Error], taus: Sequence[int]) -> str:
    """Means over layers and iterations, a row for each compensation."""
    errors = list(errors)
    heads = [f'{of}, tau = {tau}' for of in ('mean, in sigma', 'variance, relative') for tau in taus]
    lines = [f'| compensation | {" | ".join(heads)} |', '|---' * (len(heads) + 1) + '|']
    for compensation in dict.fromkeys(error.compensation for error in errors):
        of_tau = {
            tau: np.mean([e[-2:] for e in errors if e.compensation == compensation and e.tau == tau], axis=0)
            for tau in taus
        }
        cells = [f'{of_tau[tau][of]:.4f}' for of in (0, 1) for tau in taus]
        lines.append(f'| {compensation} | {" | ".join(cells)} |')
    return '\n'.join([*lines, ''])
