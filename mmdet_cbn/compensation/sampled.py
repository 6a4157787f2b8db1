"""Compensation by samples: the patches at a few positions show how the statistics change with theta.

It needs no gradient and contains all orders of the Taylor series. Its error comes from sampling instead. With all
positions it is exact for the layer.
"""

import ctypes
import random
import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairing import ConvCall
from .base import Compensation, Moved, are_of_channels
from .patches import patches_at, weighted_patches

_GOLDEN_RATIO = (5**0.5 - 1) / 2


class SampledStatistics(NamedTuple):
    """What the window keeps of one iteration tau, with n samples (stacked: with a leading axis of iterations)."""

    mean: Tensor  #: mu_tau, [C_out]
    var: Tensor  #: var_tau, [C_out]
    patches: Tensor  #: p, [n, C_in * kh * kw]
    share: Tensor  #: of each patch in the sample, [n]: 1 / n, and 0 where there were fewer positions
    sample_mean: Tensor  #: mean over the sample under theta_tau, [C_out]
    sample_var: Tensor  #: biased variance over the sample under theta_tau, [C_out]


class Sampled(Compensation):
    """Moves the statistics of earlier iterations as the statistics of their samples move.

    The positions come from random numbers of the layer's own. No other stream is touched, and a seeded run draws the
    same positions again. Layers that are built without drawing weights between them, as in a block of mmdet's ResNet,
    draw the same positions.

    Args:
        samples: Positions of each iteration.

    Attributes:
        draws (int): Number of the next draw. It is all of the stream's state.
    """

    Statistics = SampledStatistics

    def __init__(self, samples: int) -> None:
        self.samples = samples
        # The state is only read. It changes from layer to layer where weights are drawn between them.
        # By its address, because fake tensors (torch.export, tests) would take part in any operation on it.
        state = torch.get_rng_state()
        self.draws = zlib.crc32(ctypes.string_at(state.data_ptr(), state.nbytes)) << 31

    def keep(self, x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None) -> SampledStatistics:
        assert conv is not None
        start = random.Random(self.draws).random()
        self.draws += 1
        kept = sampled_statistics(x, conv.without_bias(mean), var, conv, self.samples, start)
        return pad_samples(kept, self.samples)

    def under_current_weights(self, old: SampledStatistics, conv: ConvCall | None) -> Moved | None:
        assert conv is not None
        fits = old.patches.size(-1) * conv.weight.size(0) == conv.weight.numel() * conv.groups
        return compensate_samples(old, conv.weight, conv.groups) if fits else None

    def weight_slopes(
        self,
        old: SampledStatistics,
        past: Moved | None,
        conv: ConvCall,
        share: Tensor,
        factor: Tensor,
        so_far: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        patches = old.patches.flatten(0, 1)
        distance = _distances(old, conv.weight, conv.groups)[1] if past is None else past.for_slopes
        assert distance is not None
        # With the mean m over the sample: d sum of s (x - m)^2 / dtheta = 2 sum of s (x - m) p
        of_patches = 2 * share.unsqueeze(1) * old.share.unsqueeze(2) * distance
        var_slope = weighted_patches(of_patches.flatten(0, 1), patches, conv.weight.shape)
        mean_patches = torch.bmm(old.share.unsqueeze(1), old.patches).squeeze(1)
        mean_patches = mean_patches.unflatten(1, (-1, *conv.weight.shape[2:]))
        return mean_patches, var_slope if so_far is None else var_slope.add_(so_far)

    def could_keep(self, old: Any, num_features: int) -> bool:
        return (
            are_of_channels(num_features, old.mean, old.var, old.sample_mean, old.sample_var)
            and old.patches.dim() == 3
            and old.share.dim() == 2
        )

    def state(self) -> dict[str, Any]:
        return dict(draws=self.draws)

    def load_state(self, state: dict[str, Any]) -> None:
        draws = state.get('draws', self.draws)  # files of version 0.1 have the state of another generator
        if not isinstance(draws, int):
            raise TypeError(f'it has {draws!r} draws of random numbers')
        self.draws = draws


def sampled_statistics(
    x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall, samples: int, start: float
) -> SampledStatistics:
    """What to keep of the current iteration.

    Args:
        x: Output of the convolution, bias included, [N, C_out, H, W].
        mean: Mean of ``x`` without the bias, [C_out], in the precision of the statistics.
        var: Variance of ``x``, [C_out].
        conv: The call that made ``x``.
        samples: How many positions. If there are no more than that, all are taken.
        start: Random number from 0 to 1 that chooses the positions.
    """
    positions_in_all, (height, width) = x.numel() // x.size(1), x.shape[2:]
    if positions_in_all <= samples:
        positions = torch.arange(positions_in_all, device=x.device)
    else:
        # Multiples of the golden ratio from a random start. Each position is as likely as any other, and they spread
        # evenly, in step with no row or column of the map.
        end = start + (samples - 1) * _GOLDEN_RATIO
        places = torch.linspace(start, end, samples, dtype=torch.float64, device=x.device).frac_()
        positions = (places * positions_in_all).long()
    place = [positions // (height * width), positions // width % height, positions % width]
    patches = patches_at(conv, *place).to(mean.dtype)
    if x.dtype == mean.dtype:
        outputs = torch.ops.aten.index.Tensor(x.permute(0, 2, 3, 1), place)
        if conv.bias is not None:
            outputs = outputs - conv.bias
    else:  # x is rounded, so its difference from the outputs under theta_t would be one of precisions
        outputs = _outputs(patches, conv.weight.to(mean.dtype), conv.groups)
    share = mean.new_full((len(patches),), 1 / len(patches))
    sample_mean, distance = _from_mean(outputs.unsqueeze(0), share.unsqueeze(0))
    sample_var = _variance(distance, share.unsqueeze(0))
    return SampledStatistics(mean, var, patches, share, sample_mean.squeeze(0), sample_var.squeeze(0))


def pad_samples(statistics: SampledStatistics, samples: int) -> SampledStatistics:
    """Add patches of share 0 until there are ``samples``: a window keeps the same number of each iteration."""
    missing = samples - len(statistics.patches)
    if missing == 0:
        return statistics
    patches, share = F.pad(statistics.patches, (0, 0, 0, missing)), F.pad(statistics.share, (0, missing))
    return statistics._replace(patches=patches, share=share)


def compensate_samples(old: SampledStatistics, weight: Tensor, groups: int) -> Moved:
    """Statistics of earlier iterations under the current weights, by the change that their samples show.

    Args:
        old: Statistics of k earlier iterations, stacked.
        weight: theta_t, [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.

    Returns:
        mu' and var' of each earlier iteration, and the distances of the samples, [k, n, C_out].
    """
    mean, distance = _distances(old, weight, groups)
    var = _variance(distance, old.share)
    moved_var = (old.var + (var - old.sample_var)).clamp_(min=0)
    return Moved(old.mean + (mean - old.sample_mean), moved_var, distance)


def _outputs(patches: Tensor, theta: Tensor, groups: int) -> Tensor:
    """theta . p of n patches [n, C_in * kh * kw], [n, C_out]."""
    if groups == 1:
        return patches @ theta.flatten(1).T
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.einsum('ngd,gcd->ngc', patches.reshape(len(patches), groups, -1), by_group).flatten(1)


def _distances(old: SampledStatistics, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """:func:`_from_mean` of the samples of k iterations under ``weight``."""
    x = _outputs(old.patches.flatten(0, 1), weight.to(old.mean.dtype), groups)
    return _from_mean(x.unflatten(0, old.patches.shape[:2]), old.share)


def _from_mean(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [k, C_out] over samples x [k, n, C_out] with a ``share`` [k, n] each, and x - mean."""
    mean = torch.bmm(share.unsqueeze(1), x)
    return mean.squeeze(1), x - mean


def _variance(distance: Tensor, share: Tensor) -> Tensor:
    """Biased variance [k, C_out] over samples of such a distance from their mean, with a ``share`` each."""
    return torch.bmm(share.unsqueeze(1), distance.square()).squeeze(1)
