"""The mathematics of Cross-Iteration Batch Normalization as pure functions of tensors.

Eq. and Appendix numbers are those of the paper (Yao et al., Cross-Iteration Batch Normalization). Symbols:

- x: the output of the convolution that feeds the layer, without the bias of the convolution (which cancels, as it does
  before any batch normalization); theta: the weight of that convolution; p: the patch of its input under the kernel at
  one position, so that x_j = theta_j . p in output channel j;
- mu, var: mean and biased variance of x over the m = N * H * W positions of one iteration (Eq. 2 and 3);
- tau: an earlier iteration, t: the current one, delta = theta_t - theta_tau.

The paper keeps nu = E[x^2] and its gradient; kept here are var and its gradient, the centred form of the same. With
a = dmu/dtheta . delta and c = dvar/dtheta . delta, Eq. 7, 8 and 10 become::

    mu'_tau  = mu_tau + a
    nu'_tau  = nu_tau + dnu/dtheta . delta = var_tau + mu_tau^2 + c + 2 mu_tau a
    var'_tau = max(nu'_tau, mu'_tau^2) - mu'_tau^2 = max(var_tau + c - a^2, 0)

and Eq. 9 and 11 become the mean of mu' and the mean of var' plus the variance of mu' over the window. That is equal to
the paper in exact arithmetic, and no large numbers cancel where the mean is much larger than the deviation.

All statistics are float32, or float64 where x is. The functions are not meant to be differentiated: call them under
torch.no_grad().
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .convolution import ConvCall


class CompensatedStatistics(NamedTuple):
    """What the window keeps of one iteration tau for first-order compensation (stacked: with a leading axis of n)."""

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    mean_grad: Tensor  #: dmu_j / dtheta_j = E[p] (Eq. 15): the same for all j of a group, [C_in, kh, kw]
    var_grad: Tensor  #: dvar_j / dtheta_j, [C_out, C_in / groups, kh, kw]
    mean_product: Tensor  #: dmu/dtheta . theta_tau, [C_out]; stands in for theta_tau, which nobody needs besides
    var_product: Tensor  #: dvar/dtheta . theta_tau, [C_out]


class NaiveStatistics(NamedTuple):
    """What the window keeps of one iteration without compensation (order 0, Naive CBN)."""

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]


class SecondOrderStatistics(NamedTuple):
    """What the window keeps of one iteration tau for second-order compensation (stacked: with a leading axis of n).

    mu is linear in theta and var is quadratic, so the Taylor polynomial of second order is exact for the layer:
    var = theta . Cov(p) theta.
    """

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    mean_grad: Tensor  #: dmu_j / dtheta_j = E[p], [C_in, kh, kw]
    covariance: (
        Tensor  #: Cov(p), half of the second derivative of var_j in theta_j, [groups, D, D], D = C_in / groups kh kw
    )
    mean_product: Tensor  #: dmu/dtheta . theta_tau, [C_out]
    var_product: Tensor  #: theta_tau . Cov(p) theta_tau, [C_out]


class SampledStatistics(NamedTuple):
    """What the window keeps of one iteration tau for compensation by n samples (stacked: with a leading axis).

    The patches under n positions show how mean and variance change with theta, without a gradient and to all orders.
    """

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    patches: Tensor  #: p, [n, C_in * kh * kw]
    share: Tensor  #: of each patch in the sample, [n]: 1 / n, and 0 where there were fewer positions
    sample_mean: Tensor  #: mean over the sample under theta_tau, [C_out]
    sample_var: Tensor  #: biased variance over the sample under theta_tau, [C_out]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over batch and positions (Eq. 2 and 3).

    Args:
        x: [N, C, H, W], not empty.

    Returns:
        Mean [C] and variance [C].
    """
    x = x.to(statistics_dtype(x))
    if x.is_cpu and x.is_contiguous():
        # Three to ten times as fast here as torch.var_mean, and two to four as BatchNorm's own kernel.
        mean = x.mean(dim=(2, 3)).mean(dim=0)
        return mean, (x - mean.view(-1, 1, 1)).square_().mean(dim=(2, 3)).mean(dim=0)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The precision of the statistics of ``x``: float32, or float64 for a float64 ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


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
    inputs = conv.input.to(mean.dtype)
    theta = conv.weight.to(mean.dtype)

    mean_grad = _input_sums(inputs, x, conv) / positions
    # dvar_j / dtheta_j = 2 E[(x_j - mu_j) p] is the weight gradient of the convolution for the output gradient
    # 2 (x - mu) / m; the factor comes last, lest that gradient become tiny.
    var_grad = conv2d_weight(
        inputs, list(theta.shape), x - mean.view(-1, 1, 1), conv.stride, conv.padding, conv.dilation, conv.groups
    ) * (2 / positions)
    mean_product, var_product = _products(mean_grad.unsqueeze(0), var_grad.unsqueeze(0), theta, conv.groups)
    return mean_grad, var_grad, mean_product.squeeze(0), var_product.squeeze(0)


def second_order_gradients(x: Tensor, mean: Tensor, conv: ConvCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second derivatives of the current iteration's statistics in theta_t.

    Args:
        x: Output of the convolution, bias included, [N, C_out, H, W].
        mean: Mean of ``x``, [C_out], in the precision of the statistics.
        conv: The call that made ``x``.

    Returns:
        The last four members of :class:`SecondOrderStatistics`.
    """
    positions = x.numel() // x.size(1)
    inputs, theta = conv.input.to(mean.dtype), conv.weight.to(mean.dtype)
    mean_grad = _input_sums(inputs, x, conv) / positions
    center = mean_grad.view(conv.groups, -1, 1)
    covariance = theta.new_zeros(conv.groups, center.size(1), center.size(1))
    of_an_image = mean_grad.numel() * positions // len(x)  # kh kw times as much as of the input
    for images in inputs.split(max(1, _NUMBERS_AT_ONCE // of_an_image)):
        patches = _all_patches(images, x, conv) - center
        covariance.baddbmm_(patches, patches.mT)
    covariance /= positions
    mean_product = _first_product(mean_grad.unsqueeze(0), theta, conv.groups)
    var_product = _quadratic(covariance.unsqueeze(0), theta)
    return mean_grad, covariance, mean_product.squeeze(0), var_product.squeeze(0)


def _all_patches(inputs: Tensor, x: Tensor, conv: ConvCall) -> Tensor:
    """The input under the kernel at all positions, [groups, D, positions]."""
    (top, left), (kernel_height, kernel_width) = conv.padding, conv.weight.shape[2:]
    seen = F.pad(inputs, (left, left, top, top))
    seen = _shifted(seen, 2, kernel_height, x.size(2), conv.stride[0], conv.dilation[0])  # [n, C, kh, H, .]
    seen = _shifted(seen, 4, kernel_width, x.size(3), conv.stride[1], conv.dilation[1])  # [n, C, kh, H, kw, W]
    seen = seen.permute(1, 2, 4, 0, 3, 5)
    return seen.reshape(conv.groups, -1, len(inputs) * x.size(2) * x.size(3))


def _shifted(seen: Tensor, axis: int, elements: int, size: int, stride: int, dilation: int) -> Tensor:
    """What each kernel element sees along an axis, ``size`` long, with a new axis of kernel elements before it."""
    reach = (size - 1) * stride + 1
    return torch.stack([_slice(seen, axis, i * dilation, i * dilation + reach, stride) for i in range(elements)], axis)


_NUMBERS_AT_ONCE = 2**24


def _quadratic(covariance: Tensor, theta: Tensor) -> Tensor:
    """theta . Cov(p) theta of n iterations, [n, C_out]."""
    groups = covariance.size(1)
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.linalg.vecdot(by_group @ covariance, by_group).flatten(1)


def _input_sums(inputs: Tensor, x: Tensor, conv: ConvCall) -> Tensor:
    """Sum of the patches p over batch and positions, [C_in, kh, kw].

    A kernel element sees some rows and some columns of the input, and zeros beyond; the sum goes over either in turn.
    """
    sums = inputs.sum(dim=0) if len(inputs) > 1 else inputs.squeeze(0)  # of one image, the sum would be a copy
    for axis, stride, padding, dilation in zip((1, 2), conv.stride, conv.padding, conv.dilation, strict=True):
        firsts = range(-padding, conv.weight.size(axis + 1) * dilation - padding, dilation)
        reach = (x.size(axis + 1) - 1) * stride + 1
        seen = [_slice(sums, axis, max(f, f % stride), max(f + reach, 0), stride) for f in firsts]
        sums = torch.stack([part.sum(dim=axis) for part in seen], dim=axis)
    return sums


_slice = torch.ops.aten.slice.Tensor


def _products(mean_grad: Tensor, var_grad: Tensor, theta: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """dmu/dtheta . theta and dvar/dtheta . theta of n iterations, [n, C_out] each.

    The result for one iteration does not depend on how many there are, down to the last bit on the CPU: so weights that
    have not changed since make no correction at all. That is not so for matrix products.
    """
    by_var = torch.linalg.vecdot(var_grad.reshape(len(var_grad), len(theta), -1), theta.flatten(1))
    return _first_product(mean_grad, theta, groups), by_var


def _first_product(mean_grad: Tensor, theta: Tensor, groups: int) -> Tensor:
    """dmu/dtheta . theta of n iterations, [n, C_out]."""
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.linalg.vecdot(mean_grad.reshape(len(mean_grad), groups, 1, -1), by_group).flatten(1)


def _outputs(patches: Tensor, theta: Tensor, groups: int) -> Tensor:
    """theta . p of n patches [n, C_in * kh * kw], [n, C_out]."""
    if groups == 1:
        return patches @ theta.flatten(1).T
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.einsum('ngd,gcd->ngc', patches.reshape(len(patches), groups, -1), by_group).flatten(1)


def compensate(past: CompensatedStatistics, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Statistics of earlier iterations under the current weights (Eq. 7, 8 and the maximum of Eq. 10).

    Args:
        past: Statistics of n earlier iterations, stacked.
        weight: theta_t, [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.

    Returns:
        mu' and var' of each earlier iteration, [n, C_out] each.
    """
    theta = weight.to(past.mean.dtype)
    mean_product, var_product = _products(past.mean_grad, past.var_grad, theta, groups)
    mean_change = mean_product - past.mean_product
    var_change = var_product - past.var_product
    return past.mean + mean_change, (past.var + var_change - mean_change.square()).clamp(min=0)


def compensate_second_order(past: SecondOrderStatistics, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Statistics of earlier iterations under the current weights, exact where the layers before have not changed.

    Args:
        past: Statistics of n earlier iterations, stacked.
        weight: theta_t, [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.

    Returns:
        mu' and var' of each earlier iteration, [n, C_out] each.
    """
    theta = weight.to(past.mean.dtype)
    mean_change = _first_product(past.mean_grad, theta, groups) - past.mean_product
    var_change = _quadratic(past.covariance, theta) - past.var_product
    return past.mean + mean_change, (past.var + var_change).clamp_(min=0)


def sampled_statistics(
    x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall, samples: int, start: float
) -> SampledStatistics:
    """What to keep of the current iteration for compensation by samples.

    Args:
        x: Output of the convolution, bias included, [N, C_out, H, W].
        mean: Mean of ``x`` without the bias, [C_out], in the precision of the statistics.
        var: Variance of ``x``, [C_out].
        conv: The call that made ``x``.
        samples: How many positions; where there are no more than that, all are taken.
        start: Random number from 0 to 1 that chooses the positions.
    """
    count, (height, width) = x.numel() // x.size(1), x.shape[2:]
    if count <= samples:
        positions = torch.arange(count, device=x.device)
    else:
        # Multiples of the golden ratio from a random start: each position is as likely as any other, and they spread
        # evenly, in step with no row or column of the map.
        end = start + (samples - 1) * _GOLDEN_RATIO
        places = torch.linspace(start, end, samples, dtype=torch.float64, device=x.device).frac_()
        positions = (places * count).long()
    place = [positions // (height * width), positions // width % height, positions % width]
    patches = _patches(conv, *place).to(mean.dtype)
    if x.dtype == mean.dtype:
        outputs = torch.ops.aten.index.Tensor(x.permute(0, 2, 3, 1), place)
        if conv.bias is not None:
            outputs = outputs - conv.bias
    else:  # lest the difference from the current weights be that between two precisions
        outputs = _outputs(patches, conv.weight.to(mean.dtype), conv.groups)
    share = mean.new_full((len(patches),), 1 / len(patches))
    sample_mean, sample_var = _over_samples(outputs.unsqueeze(0), share.unsqueeze(0))
    return SampledStatistics(mean, var, patches, share, sample_mean.squeeze(0), sample_var.squeeze(0))


def pad_samples(statistics: SampledStatistics, samples: int) -> SampledStatistics:
    """The same with ``samples`` patches, the last of which do not count: a window wants as many of each iteration."""
    missing = samples - len(statistics.patches)
    if missing == 0:
        return statistics
    patches, share = F.pad(statistics.patches, (0, 0, 0, missing)), F.pad(statistics.share, (0, missing))
    return statistics._replace(patches=patches, share=share)


_GOLDEN_RATIO = (5**0.5 - 1) / 2


def _patches(conv: ConvCall, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The input under the kernel at n positions of the output, [n, C_in * kh * kw]."""
    inputs = conv.input.permute(0, 2, 3, 1)
    seen, inside = [], []
    for at, axis in ((row, 0), (column, 1)):
        stride, padding, dilation = conv.stride[axis], conv.padding[axis], conv.dilation[axis]
        elements = torch.arange(-padding, conv.weight.size(axis + 2) * dilation - padding, dilation, device=at.device)
        # [n, kh] or [n, kw], beyond the input where that is padded
        wanted = torch.add(elements, at.unsqueeze(1), alpha=stride)
        seen.append(wanted.clamp(0, inputs.size(axis + 1) - 1) if padding else wanted)
        inside.append(seen[axis] == wanted)
    where = [image.view(-1, 1, 1), seen[0].unsqueeze(2), seen[1].unsqueeze(1)]
    patches = torch.ops.aten.index.Tensor(inputs, where)  # [n, kh, kw, C_in]
    if any(conv.padding):
        patches = patches * (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(3)
    return patches.permute(0, 3, 1, 2).flatten(1)


def _over_samples(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over samples with a ``share`` [k, n] each, of k iterations [k, n, C_out]; [k, C_out]."""
    share = share.unsqueeze(1)
    mean = torch.bmm(share, x)
    return mean.squeeze(1), torch.bmm(share, (x - mean).square_()).squeeze(1)


def compensate_samples(past: SampledStatistics, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Statistics of earlier iterations under the current weights, by the change that their samples show.

    Args:
        past: Statistics of n earlier iterations, stacked.
        weight: theta_t, [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.

    Returns:
        mu' and var' of each earlier iteration, [n, C_out] each.
    """
    x = _outputs(past.patches.flatten(0, 1), weight.to(past.mean.dtype), groups)
    mean, var = _over_samples(x.unflatten(0, past.patches.shape[:2]), past.share)
    return past.mean + (mean - past.sample_mean), (past.var + (var - past.sample_var)).clamp_(min=0)


def window_statistics(mean: Tensor, var: Tensor, past_mean: Tensor, past_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the window (Eq. 9 to 11).

    An earlier iteration whose statistics are inf or NaN is left out of the average of that channel: one bad batch must
    not spoil the k - 1 that follow it.

    Args:
        mean: mu of the current iteration, [C].
        var: var of the current iteration, [C].
        past_mean: mu' of the n earlier iterations, [n, C].
        past_var: var' of the n earlier iterations, [n, C].

    Returns:
        Mean [C], biased variance [C], and the share [C] that the current iteration has in them: 1 / (n + 1), more where
        earlier iterations were left out.
    """
    # About the current mean, so that the numbers are small, and one that is left out is 0.
    distance = past_mean - mean
    spread = torch.addcmul(past_var, distance, distance)
    valid = spread < torch.inf  # which NaN is not either
    share = (valid.sum(dim=0, dtype=mean.dtype) + 1).reciprocal_()
    shift = distance.where(valid, 0).sum(dim=0) * share
    window_var = (spread.where(valid, 0).sum(dim=0) + var) * share
    return mean + shift, window_var.addcmul_(shift, shift, value=-1).clamp_(min=0), share
