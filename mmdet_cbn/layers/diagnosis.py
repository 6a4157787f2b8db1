"""How far a CBN layer relied on its compensation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .step import WindowStep


class Diagnosis(NamedTuple):
    """How far a layer relied on its compensation."""

    window_length: int  #: over how many iterations the last training forward averaged
    correction: float  #: mean distance that compensation moved the old means, in sigma of the current batch
    invalid: float  #: share of the old variances, from 0 to 1, that the maximum of Eq. 10 kept from being negative


class DiagnosisRecorder:
    """Observes the steps of one layer. The sums stay on the device, so training does not wait for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def __call__(self, layer: Any, step: WindowStep) -> None:
        """Record a step. A hook of :meth:`CBN.register_step_hook`."""
        if step.past is None:
            return
        correction = (step.past[0] - step.old.mean).abs() / (step.var + layer.eps).sqrt()
        invalid = (step.past[1] == 0) & (step.old.var > 0)
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
        self._sums = None
        return Diagnosis(window_length, correction / steps, invalid / steps)

    def __getstate__(self) -> dict[str, Any]:
        return {'_sums': None}  # a copy begins to count
