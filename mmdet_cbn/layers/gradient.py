"""How M and V, the statistics of the window, depend on the current iteration: what the backward pass of CBN follows.

The loss of the current iteration depends on M and V (Eq. 9 to 11) in three ways:

- through x, the current batch, which is a fraction f = 1 / k of them;
- through theta, the weight of the convolution, because Eq. 7 and 8 move the earlier statistics along with it;
- through the weights of all layers before, which have changed the earlier statistics, too. The window does not know
  how.

The paper fixes the activations of earlier iterations. "Gradients are backpropagated to the network weights and
activations at the current iteration, i.e., theta_t and x_t" (section 3.3), and theta_t also stands in Eq. 7 and 8. So
its text allows both of the first two. The authors' code follows the first alone.

========== ============================== ===================================
gradient   M and V as a function of x     M and V as a function of theta
========== ============================== ===================================
batch      the fraction f                 through x
weights    the fraction f                 through x, and Eq. 7 and 8: exact
window     all of them: the batch stands  as with ``weights``
           for the whole window
a number   f + number (1 - f): it stands  as with ``weights``
           for so much of the rest
projection none; but dx is projected as   through x
           BatchNorm of the batch does it
========== ============================== ===================================

So ``weights`` is the number 0, and ``window`` is 1.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..compensation import Compensation, drop_inf_and_nan
from ..pairing import ConvCall

GradientName = Literal['batch', 'weights', 'window', 'projection']
GRADIENTS: tuple[str, ...] = get_args(GradientName)
Gradient = GradientName | float


class StatisticsGradient(NamedTuple):
    """What the backward pass of one step needs besides M and V, in the precision of the statistics."""

    fraction: Tensor | None  #: of M and V that counts as a function of x, [C]; None for all of them
    mean_slope: Tensor | None  #: dM / dtheta beside what goes through x, like the weight; None for 0
    var_slope: Tensor | None  #: dV / dtheta beside what goes through x, like the weight; None for 0
    mean: Tensor | None  #: of the batch, [C], where its own projection is taken instead
    var: Tensor | None  #: of the batch, [C], where its own projection is taken instead


def stand_in(gradient: Gradient) -> float | None:
    """For how much of the earlier iterations the batch stands; None if theta has no gradient through the window."""
    if isinstance(gradient, str):
        return {'weights': 0.0, 'window': 1.0}.get(gradient)
    return gradient


def has_fraction(gradient: Gradient) -> bool:
    """Whether a part alone of M and V counts as a function of x."""
    return gradient != 'projection' and stand_in(gradient) != 1


def has_slopes(gradient: Gradient, weight: Tensor) -> bool:
    """Whether the convolution's ``weight`` receives a gradient through the window."""
    return stand_in(gradient) is not None and weight.requires_grad


def statistics_gradient(
    gradient: Gradient,
    compensation: Compensation,
    conv: ConvCall | None,
    mean: Tensor,
    kept: Any,
    old: Any,
    past: tuple[Tensor, Tensor] | None,
    window: tuple[Tensor, Tensor, Tensor],
) -> StatisticsGradient:
    """What the backward pass needs.

    Args:
        gradient: One of :data:`GRADIENTS`, or a number from 0 to 1.
        compensation: Of the layer.
        conv: The call that made x; None if the compensation does not need it.
        mean: Of the batch, bias included, [C].
        kept: What the window will keep of the batch. Its inf and NaN become 0, except in mean and variance.
        old: What it kept of n earlier iterations, stacked; None if there are none.
        past: mu' and var' of these, [n, C] each; None if there are none.
        window: M, without the bias, V and f, [C] each.
    """
    window_mean, _, fraction = window
    if gradient == 'projection':
        return StatisticsGradient(None, None, None, mean, kept.var)
    rest = stand_in(gradient) or 0.0
    own_part = None
    if has_fraction(gradient):
        own_part = fraction if rest == 0 else fraction + rest * (1 - fraction)
    if conv is None or not has_slopes(gradient, conv.weight):
        return StatisticsGradient(own_part, None, None, None, None)
    drop_inf_and_nan(kept)
    if past is None:
        mean_slope, var_slope = (torch.zeros_like(conv.weight, dtype=fraction.dtype) for _ in range(2))
        return StatisticsGradient(own_part, mean_slope, var_slope, None, None)

    def slopes(statistics: Any, moved: tuple[Tensor, Tensor], share: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        # Eq. 9 to 11, for a share of the window: dM / dmu' = share, dV / dvar' = share, dV / dmu' = 2 share (mu' - M)
        of_mean = compensation.weight_gradient(statistics, moved, conv, share, None)
        return of_mean, compensation.weight_gradient(statistics, moved, conv, 2 * share * distance, share)

    # What is left out with inf or NaN has no share.
    valid = past[0].isfinite() & past[1].isfinite()
    distance = (past[0] - window_mean).where(valid, 0)
    mean_slope, var_slope = slopes(old, past, fraction.where(valid, 0), distance)
    if rest > 0:
        # With the batch in place of the window, theta receives through x what is beyond f. It is taken back here.
        excess = (rest * (1 - fraction)).unsqueeze(0)
        batch = type(kept)(*(tensor.unsqueeze(0) for tensor in kept))
        own = kept.mean.unsqueeze(0), kept.var.unsqueeze(0)
        own_mean_slope, own_var_slope = slopes(batch, own, excess, own[0] - window_mean)
        mean_slope -= own_mean_slope
        var_slope -= own_var_slope
    return StatisticsGradient(own_part, mean_slope, var_slope, None, None)
