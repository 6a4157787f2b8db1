"""Compensation by a Taylor polynomial of second order (order 2; Table 9).

mu is linear in theta and var is quadratic: var = theta . Cov(p) theta. So the polynomial is exact for the layer. Only
the change of the layers before is left out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pairing import ConvCall
from .base import Compensation, Moved, are_of_channels
from .patches import all_patches, dot_mean_grad, mean_patch

_NUMBERS_AT_ONCE = 2**24  # of all patches, which together can be too many for the memory


class SecondOrderStatistics(NamedTuple):
    """What the window keeps of one iteration tau (stacked: with a leading axis of n). D = C_in / groups kh kw."""

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    mean_grad: Tensor  #: dmu_j / dtheta_j = E[p], [C_in, kh, kw]
    covariance: Tensor  #: Cov(p), half of the second derivative of var_j in theta_j, [groups, D, D]
    mean_product: Tensor  #: dmu/dtheta . theta_tau, [C_out]
    var_product: Tensor  #: theta_tau . Cov(p) theta_tau, [C_out]


class SecondOrder(Compensation):
    """Computes the statistics of earlier iterations under theta_t from mean and covariance of their patches."""

    Statistics = SecondOrderStatistics

    def keep(self, x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None) -> SecondOrderStatistics:
        assert conv is not None
        return SecondOrderStatistics(conv.without_bias(mean), var, *second_order_gradients(x, mean, conv))

    def under_current_weights(self, old: SecondOrderStatistics, conv: ConvCall | None) -> Moved | None:
        assert conv is not None
        if old.mean_grad.shape[1:] != (conv.weight.size(1) * conv.groups, *conv.weight.shape[2:]):
            return None
        theta = conv.weight.to(old.mean.dtype)
        mean_change = dot_mean_grad(old.mean_grad, theta, conv.groups) - old.mean_product
        var_change = _quadratic(old.covariance, theta) - old.var_product
        return Moved(old.mean + mean_change, (old.var + var_change).clamp_(min=0))

    def weight_slopes(
        self,
        old: SecondOrderStatistics,
        past: Moved | None,
        conv: ConvCall,
        share: Tensor,
        factor: Tensor,
        so_far: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        theta = conv.weight.to(old.mean.dtype).reshape(1, conv.groups, -1, old.covariance.size(-1))
        # d(theta . Cov(p) theta) / dtheta = 2 Cov(p) theta
        factors = 2 * share.view(len(old.mean), conv.groups, -1, 1)
        var_slope = torch.matmul(factors * theta, old.covariance).sum(dim=0).view(conv.weight.shape)
        return old.mean_grad, var_slope if so_far is None else var_slope.add_(so_far)

    def could_keep(self, old: Any, num_features: int) -> bool:
        return (
            are_of_channels(num_features, old.mean, old.var, old.mean_product, old.var_product)
            and old.mean_grad.dim() == 4
            and old.covariance.dim() == 4
        )


def second_order_gradients(x: Tensor, mean: Tensor, conv: ConvCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second derivatives of the current iteration's statistics in theta_t.

    Args:
        x: Output of the convolution, [N, C_out, H, W].
        mean: Mean of ``x``, [C_out], for the precision of the statistics.
        conv: The call that made ``x``.

    Returns:
        The last four members of :class:`SecondOrderStatistics`.
    """
    positions = x.numel() // x.size(1)
    inputs, theta = conv.input.to(mean.dtype), conv.weight.to(mean.dtype)
    mean_grad = mean_patch(inputs, x, conv)
    center = mean_grad.view(conv.groups, -1, 1)
    covariance = theta.new_zeros(conv.groups, center.size(1), center.size(1))
    numbers_of_an_image = mean_grad.numel() * positions // len(x)  # kh kw times as many as the input has
    for images in inputs.split(max(1, _NUMBERS_AT_ONCE // numbers_of_an_image)):
        patches = all_patches(images, x, conv) - center
        covariance.baddbmm_(patches, patches.mT)
    covariance /= positions
    mean_product = dot_mean_grad(mean_grad.unsqueeze(0), theta, conv.groups)
    var_product = _quadratic(covariance.unsqueeze(0), theta)
    return mean_grad, covariance, mean_product.squeeze(0), var_product.squeeze(0)


def _quadratic(covariance: Tensor, theta: Tensor) -> Tensor:
    """theta . Cov(p) theta of n iterations, [n, C_out]."""
    groups = covariance.size(1)
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.linalg.vecdot(by_group @ covariance, by_group).flatten(1)
