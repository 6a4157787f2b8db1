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
import torch.nn.functional as F
from torch import Tensor

from ..compensation import Compensation, Moved, drop_inf_and_nan
from ..pairing import ConvCall
from .statistics import WindowStatistics

GradientName = Literal['batch', 'weights', 'window', 'projection']
GRADIENTS: tuple[str, ...] = get_args(GradientName)
Gradient = GradientName | float
DEFAULT_GRADIENT: Gradient = 0.25  # the best in our study, docs/results.md


class StatisticsGradient(NamedTuple):
    """What the backward pass of one step needs besides M and V, in the precision of the statistics.

    Beside what goes through x, M and V depend on theta_j, the weight of output channel j, by n mean patches p_i::

        dM/dtheta_j = sum over i of factors_0ij p_i
        dV/dtheta_j = var_slope_j + 2 sum over i of factors_1ij p_i
    """

    fraction: Tensor | None = None  #: of M and V that counts as a function of x, [C]; None for all of them
    var_slope: Tensor | None = None  #: like the weight; it and the next two are None without a gradient in theta
    patches: Tensor | None = None  #: p, [n, C_in, kh, kw]; n is :func:`number_of_patches`
    factors: Tensor | None = None  #: of the patches in M and in V, [2, n, C]
    mean: Tensor | None = None  #: of the batch, [C], where its own projection is taken instead
    var: Tensor | None = None  #: of the batch, [C], where its own projection is taken instead


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


def number_of_patches(gradient: Gradient, window_size: int) -> int:
    """Of :class:`StatisticsGradient`: one for each earlier iteration of a full window, and one where the batch's own
    slope is taken back. It does not change while the window fills."""
    return window_size if stand_in(gradient) else window_size - 1


def statistics_gradient(
    gradient: Gradient,
    window_size: int,
    compensation: Compensation,
    conv: ConvCall | None,
    mean: Tensor,
    kept: Any,
    old: Any,
    past: Moved | None,
    window: WindowStatistics,
) -> StatisticsGradient:
    """What the backward pass needs.

    Args:
        gradient: One of :data:`GRADIENTS`, or a number from 0 to 1.
        window_size: k.
        compensation: Of the layer.
        conv: The call that made x; None if the compensation does not need it.
        mean: Of the batch, bias included, [C].
        kept: What the window will keep of the batch. Its inf and NaN become 0, except in mean and variance.
        old: What it kept of n earlier iterations, stacked; None if there are none.
        past: mu' and var' of these; None if there are none.
        window: What the layer normalizes with.
    """
    if gradient == 'projection':
        return StatisticsGradient(mean=mean, var=kept.var)
    rest = stand_in(gradient) or 0.0
    fraction = window.fraction
    own_part = fraction if rest == 0 else torch.rsub(fraction, rest, alpha=rest - 1)  # f + rest (1 - f)
    of_x = own_part if has_fraction(gradient) else None
    if conv is None or not has_slopes(gradient, conv.weight):
        return StatisticsGradient(of_x)
    drop_inf_and_nan(kept)
    number = number_of_patches(gradient, window_size)
    if past is None or window.valid is None:
        patches = fraction.new_zeros(number, conv.input.size(1), *conv.weight.shape[2:])
        factors = fraction.new_zeros(2, number, len(fraction))
        return StatisticsGradient(of_x, torch.zeros_like(conv.weight, dtype=fraction.dtype), patches, factors)
    share = window.valid * fraction  # dM / dmu' and dV / dvar'; dV / dmu' = 2 share (mu' - M) (Eq. 9 to 11)
    of_var = share * (past.var > 0)  # not where Eq. 10 takes its maximum
    factor = (past.mean - window.mean).mul_(share)
    patches, var_slope = compensation.weight_slopes(old, past, conv, of_var, factor, None)
    parts = [(patches, share, factor)]
    if rest > 0:
        # With the batch in place of the window, theta receives through x what is beyond f. It is taken back here.
        taken_back = (fraction - own_part).unsqueeze(0)
        of_batch = type(kept)(*(tensor.unsqueeze(0) for tensor in kept))
        factor = taken_back * (kept.mean - window.mean)
        patches, var_slope = compensation.weight_slopes(of_batch, None, conv, taken_back, factor, var_slope)
        parts.append((patches, taken_back, factor))
    all_patches, shares, factors_of_var = zip(*parts, strict=True)
    patches, factors = torch.cat(all_patches), torch.cat([*shares, *factors_of_var]).unflatten(0, (2, -1))
    if missing := number - len(patches):
        patches, factors = F.pad(patches, (0,) * 7 + (missing,)), F.pad(factors, (0, 0, 0, missing))
    factors.nan_to_num_(0, 0, 0)  # of iterations that are left out
    return StatisticsGradient(of_x, var_slope, patches, factors)
