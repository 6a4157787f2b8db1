"""How far a CBN layer relied on its compensation."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .step import WindowStep


class Diagnosis(NamedTuple):
    """How far a layer relied on its compensation."""

    window_length: int  #: over how many iterations the last training forward averaged
    correction: float  #: mean distance that compensation moved the old means, in sigma of the current batch
    invalid: float  #: share of the old variances, from 0 to 1, that the maximum of Eq. 10 kept from being negative
    radial: float | None  #: mean size of :func:`radial_part` of a Conv2d, from 0 to 1; None without a gradient


@torch.no_grad()
def radial_part(weight: Tensor) -> Tensor:
    """The cosine of the angle between the weight theta_j of each channel and its gradient, [C_out].

    It is 0 with BatchNorm, whose output does not depend on the length of theta_j. Otherwise a step of gradient descent
    makes theta_j shorter (> 0) or longer (< 0).
    """
    assert weight.grad is not None
    return torch.cosine_similarity(weight.flatten(1), weight.grad.flatten(1), dim=1)


class DiagnosisRecorder:
    """Observes the steps of one layer. The sums stay on the device, so training does not wait for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._radial: Tensor | None = None  # sum and count
        # The weight of each convolution. Weakly, as the hook below holds this: the weight holds its hook.
        self._watched: WeakKeyDictionary[nn.Module, tuple[Tensor, RemovableHandle]] = WeakKeyDictionary()
        self._is_due = False  # the backward pass of a recorded step is to come

    def __call__(self, layer: Any, step: WindowStep) -> None:
        """Record a step. A hook of :meth:`CBN.register_step_hook`."""
        self._watch_gradient(step)
        self._is_due = True
        if step.past is None:
            return
        correction = (step.past.mean - step.old.mean).abs() / (step.var + layer.eps).sqrt()
        invalid = (step.past.var == 0) & (step.old.var > 0)
        # What is inf or NaN was left out of the window, so it corrected nothing.
        sums = torch.stack(
            [correction.nan_to_num(0, 0, 0).mean(), invalid.to(step.var.dtype).mean(), step.var.new_ones(())]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, window_length: int) -> Diagnosis | None:
        """Means over the steps since the last reading; None if there were none. Makes the host wait for the device."""
        if self._sums is None:
            return None
        correction, invalid, steps = self._sums.tolist()
        radial = None
        if self._radial is not None:
            total, count = self._radial.tolist()
            radial = total / count if count else None
        self._sums = self._radial = None
        return Diagnosis(window_length, correction / steps, invalid / steps, radial)

    def forget(self) -> None:
        """Begin to count anew."""
        for _, handle in self._watched.values():
            handle.remove()
        self.__dict__.update(DiagnosisRecorder().__dict__)

    def _watch_gradient(self, step: WindowStep) -> None:
        module = None if step.conv is None else step.conv.module
        # The weight of a transposed convolution has its output channels along another axis. One that is no leaf, as in
        # FullyShardedDataParallel or torch.func.functional_call, receives no gradient that stays.
        if not isinstance(module, nn.Conv2d) or not (module.weight.requires_grad and module.weight.is_leaf):
            return
        weight, handle = self._watched.get(module, (None, None))
        if weight is module.weight:
            return
        if handle is not None:
            handle.remove()
        record = WeakMethod(self._record_gradient)

        def hook(weight: Tensor) -> None:
            if (method := record()) is not None:
                method(weight)

        self._watched[module] = module.weight, module.weight.register_post_accumulate_grad_hook(hook)

    def _record_gradient(self, weight: Tensor) -> None:
        if not self._is_due:
            return
        self._is_due = False
        radial = radial_part(weight).abs()  # parts of both signs would cancel in the mean
        finite = radial.isfinite()  # a step that GradScaler skips is not
        sums = torch.stack([radial.where(finite, 0).sum(), finite.sum()])
        self._radial = sums if self._radial is None else self._radial + sums

    def __reduce__(self) -> tuple[type, tuple]:
        return DiagnosisRecorder, ()  # a copy begins to count
