"""The paper's compensation: a Taylor polynomial of first order (order 1; Eq. 7 and 8, Appendix B).

The paper keeps nu = E[x^2] and its gradient. The window keeps var and its gradient instead, which is the centred form
of the same. With delta = theta_t - theta_tau, a = dmu/dtheta . delta and c = dvar/dtheta . delta, Eq. 7, 8 and 10
become::

    mu'_tau  = mu_tau + a
    nu'_tau  = nu_tau + dnu/dtheta . delta = var_tau + mu_tau^2 + c + 2 mu_tau a
    var'_tau = max(nu'_tau, mu'_tau^2) - mu'_tau^2 = max(var_tau + c - a^2, 0)

In exact arithmetic this equals the paper. Here no large numbers cancel where the mean is much larger than the
deviation.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..pairing import ConvCall
from . import base
from .base import Compensation, Moved, are_of_channels
from .patches import dot_mean_grad, mean_patch


class CompensatedStatistics(NamedTuple):
    """What the window keeps of one iteration tau, to be compensated later (stacked: with a leading axis of n)."""

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    mean_grad: Tensor  #: dmu_j / dtheta_j = E[p] (Eq. 15), the same for all j of a group, [C_in, kh, kw]
    var_grad: Tensor  #: dvar_j / dtheta_j, [C_out, C_in / groups, kh, kw]
    mean_product: Tensor  #: dmu/dtheta . theta_tau, [C_out]; with it theta_tau itself need not be kept
    var_product: Tensor  #: dvar/dtheta . theta_tau, [C_out]


class FirstOrder(Compensation):
    """Moves the statistics of earlier iterations along their gradients in theta."""

    Statistics = CompensatedStatistics

    def keep(self, x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None) -> CompensatedStatistics:
        assert conv is not None
        return CompensatedStatistics(conv.without_bias(mean), var, *statistics_gradients(x, mean, conv))

    def under_current_weights(self, old: CompensatedStatistics, conv: ConvCall | None) -> Moved | None:
        assert conv is not None
        fits = old.var_grad.shape[1:] == conv.weight.shape
        return compensate(old, conv.weight, conv.groups) if fits else None

    def weight_slopes(
        self,
        old: CompensatedStatistics,
        past: Moved | None,
        conv: ConvCall,
        share: Tensor,
        factor: Tensor,
        so_far: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if past is not None:  # var' = var + c - a^2
            assert past.for_slopes is not None
            factor.addcmul_(past.for_slopes, share, value=-1)
        return old.mean_grad, _weighted_sum(share, old.var_grad, so_far)

    def could_keep(self, old: Any, num_features: int) -> bool:
        return (
            are_of_channels(num_features, old.mean, old.var, old.mean_product, old.var_product)
            and old.mean_grad.dim() == 4
            and old.var_grad.dim() == 5
            and old.var_grad.size(1) == num_features
        )


def statistics_gradients(x: Tensor, mean: Tensor, conv: ConvCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the current iteration's statistics in theta_t (Appendix B).

    Args:
        x: Output of the convolution, bias included, [N, C_out, H, W].
        mean: Mean of ``x``, bias included, [C_out], in the precision of the statistics.
        conv: The call that made ``x``.

    Returns:
        The last four members of :class:`CompensatedStatistics`.
    """
    positions = x.numel() // x.size(1)
    inputs, theta = conv.input.to(mean.dtype), conv.weight.to(mean.dtype)

    mean_grad = mean_patch(inputs, x, conv)
    # dvar_j / dtheta_j = 2 E[(x_j - mu_j) p] is the weight gradient of the convolution for the output gradient
    # 2 (x - mu) / m. The factor comes last, because that output gradient could underflow.
    var_grad = conv2d_weight(
        inputs, list(theta.shape), x - mean.view(-1, 1, 1), conv.stride, conv.padding, conv.dilation, conv.groups
    ).mul_(2 / positions)
    mean_product, var_product = _products(mean_grad.unsqueeze(0), var_grad.unsqueeze(0), theta, conv.groups)
    return mean_grad, var_grad, mean_product.squeeze(0), var_product.squeeze(0)


def compensate(old: CompensatedStatistics, weight: Tensor, groups: int) -> Moved:
    """Statistics of earlier iterations under the current weights (Eq. 7, 8 and the maximum of Eq. 10).

    Args:
        old: Statistics of n earlier iterations, stacked.
        weight: theta_t, [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.

    Returns:
        mu' and var' of each earlier iteration.
    """
    theta = weight.to(old.mean.dtype)
    mean_product, var_product = _products(old.mean_grad, old.var_grad, theta, groups)
    mean_change = mean_product - old.mean_product
    var = (var_product - old.var_product).add_(old.var)
    moved_var = var.addcmul_(mean_change, mean_change, value=-1).clamp_(min=0)
    return Moved(old.mean + mean_change, moved_var, mean_change)


def _products(mean_grad: Tensor, var_grad: Tensor, theta: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """dmu/dtheta . theta and dvar/dtheta . theta of n iterations, [n, C_out] each.

    On the CPU the result for one iteration does not depend on n, to the last bit. So unchanged weights make no
    correction at all. Matrix products do not have this property.
    """
    by_var = torch.linalg.vecdot(var_grad.reshape(len(var_grad), len(theta), -1), theta.flatten(1))
    return dot_mean_grad(mean_grad, theta, groups), by_var


def _weighted_sum(share: Tensor, var_grad: Tensor, so_far: Tensor | None) -> Tensor:
    """The sum over n iterations of ``share``, [n, C_out], times ``var_grad``, [n, C_out, ...], plus ``so_far``."""
    if len(share) > 1 and base.are_launches_dear(share):  # far slower on the CPU
        total = torch.bmm(share.t().unsqueeze(1), var_grad.flatten(2).transpose(0, 1)).view(var_grad.shape[1:])
        return total if so_far is None else total.add_(so_far)
    for share_of_one, of_one in zip(share.view(*share.shape, 1, 1, 1), var_grad, strict=True):
        so_far = share_of_one * of_one if so_far is None else so_far.addcmul_(share_of_one, of_one)
    assert so_far is not None
    return so_far
