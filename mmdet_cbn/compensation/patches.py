"""Patches of a convolution's input: p, what the kernel sees at one position of the output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairing import ConvCall
from . import base

_slice = torch.ops.aten.slice.Tensor


def mean_patch(inputs: Tensor, x: Tensor, conv: ConvCall) -> Tensor:
    """E[p], the mean of the patches over batch and positions (Eq. 15), [C_in, kh, kw].

    A kernel element sees some rows and some columns of the input, and zeros beyond. The sum goes over each in turn.

    Args:
        inputs: Input of the convolution in the precision of the statistics, [N, C_in, H_in, W_in].
        x: Output of the convolution, [N, C_out, H, W].
        conv: The call.
    """
    few = base.are_launches_dear(inputs)
    if tuple(conv.weight.shape[2:]) == (1, 1) and not any(conv.padding):  # half of a ResNet-50; twice as fast so
        seen = _slice(_slice(inputs, 2, 0, None, conv.stride[0]), 3, 0, None, conv.stride[1])
        means = seen.mean(dim=(0, 2, 3)) if few else seen.mean(dim=(2, 3)).mean(dim=0)  # the latter fast on a CPU
        return means.view(-1, 1, 1)
    if few:
        return _mean_windows(inputs, x, conv)
    sums = inputs.sum(dim=0) if len(inputs) > 1 else inputs.squeeze(0)  # of one image, the sum would be a copy
    for axis, stride, padding, dilation in zip((1, 2), conv.stride, conv.padding, conv.dilation, strict=True):
        firsts = range(-padding, conv.weight.size(axis + 1) * dilation - padding, dilation)
        reach = (x.size(axis + 1) - 1) * stride + 1
        seen = [_slice(sums, axis, max(f, f % stride), max(f + reach, 0), stride) for f in firsts]
        sums = torch.stack([part.sum(dim=axis) for part in seen], dim=axis)
    return sums / (x.numel() // x.size(1))


def _mean_windows(inputs: Tensor, x: Tensor, conv: ConvCall) -> Tensor:
    """:func:`mean_patch` by few operators. On a CPU it takes two to four times as long with large maps."""
    seen = inputs.mean(dim=0)
    if any(conv.padding):
        top, left = conv.padding
        seen = F.pad(seen, (left, left, top, top))
    for axis, stride, dilation in zip((1, 2), conv.stride, conv.dilation, strict=True):
        windows = seen.unfold(axis, (x.size(axis + 1) - 1) * stride + 1, dilation)
        seen = windows.narrow(axis, 0, conv.weight.size(axis + 1))[..., ::stride].mean(dim=-1)
    return seen


def dot_mean_grad(mean_grad: Tensor, theta: Tensor, groups: int) -> Tensor:
    """dmu/dtheta . theta of n iterations, [n, C_out].

    Args:
        mean_grad: E[p] of each, [n, C_in, kh, kw].
        theta: [C_out, C_in / groups, kh, kw].
        groups: Groups of the convolution.
    """
    by_group = theta.reshape(groups, len(theta) // groups, -1)
    return torch.linalg.vecdot(mean_grad.reshape(len(mean_grad), groups, 1, -1), by_group).flatten(1)


def weighted_patches(factors: Tensor, patches: Tensor, shape: torch.Size) -> Tensor:
    """The sum of n patches, or mean patches, each times a factor for each output channel, like the weight.

    Args:
        factors: [n, C_out].
        patches: [n, C_in, kh, kw] or [n, C_in * kh * kw].
        shape: Of the weight, [C_out, C_in / groups, kh, kw].
    """
    by_group = patches.reshape(len(patches), -1, shape[1] * shape[2] * shape[3]).transpose(0, 1)
    sums = torch.bmm(factors.unflatten(1, (len(by_group), -1)).permute(1, 2, 0), by_group)
    return sums.reshape(shape)


def all_patches(inputs: Tensor, x: Tensor, conv: ConvCall) -> Tensor:
    """The patches at all positions, [groups, D, n * H * W], D = C_in / groups kh kw.

    Args:
        inputs: Input of the convolution for n images, [n, C_in, H_in, W_in].
        x: Output of the convolution, [N, C_out, H, W], for its height and width.
        conv: The call.
    """
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


def patches_at(conv: ConvCall, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The patches at n positions of the output, [n, C_in * kh * kw].

    Args:
        conv: The call.
        image: Number of the image, [n].
        row: Row of the output, [n].
        column: Column of the output, [n].
    """
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
