"""Cross-Iteration Batch Normalization in float64, slowly, straight from the paper's equations.

The oracle uses nothing else of mmdet_cbn. Gradients of the statistics are whole Jacobians by autograd. It keeps nu, as
the paper does, and the old weights, and the backward pass is autograd's.

The tests hold the layer against it, and so does :mod:`mmdet_cbn.experiments.preflight` on a user's machine.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Past(NamedTuple):
    y: Tensor
    theta: Tensor
    mu: Tensor
    nu: Tensor
    dmu: Tensor  # [C_out, *theta.shape]
    dnu: Tensor


class OracleCBN:
    """conv + CBN. ``convolve`` is the convolution, as a function of input and weight; it also takes ``conv_args``.

    Order 2 is the left side of Eq. 5 and 6: what the old batch's mu and nu are under theta_t. The series ends there, as
    mu is linear in the weights of the layer, and nu quadratic.

    ``gradient`` is that of CBN. Autograd makes all of them, because each is a function of the same value in which some
    terms are constant.
    """

    def __init__(
        self,
        window_size: int,
        order: int = 1,
        eps: float = 1e-5,
        gradient: Any = 'batch',
        convolve: Callable[..., Tensor] = F.conv2d,
        **conv_args: Any,
    ) -> None:
        self.window_size, self.order, self.eps, self.gradient = window_size, order, eps, gradient
        self.convolve = partial(convolve, **conv_args)
        self.past: list[Past] = []

    def __call__(self, y: Tensor, theta: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        def statistics(weight: Tensor, y: Tensor = y) -> tuple[Tensor, Tensor]:
            x = self.convolve(y.detach(), weight)
            return x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))

        follows_theta = self.gradient not in ('batch', 'projection')  # then y has a gradient of its own below
        x = self.convolve(y.detach() if follows_theta else y, theta)
        mu_t, nu_t = x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))  # Algorithm 1, line 1
        mus, nus = [mu_t], [nu_t]
        # theta_t is constant inside a Taylor term, or not: the text of section 3.3 allows both.
        moving = theta if follows_theta else theta.detach()
        for past in self.past:  # Eq. 7 and 8
            mu, nu = past.mu, past.nu
            if self.order == 1:
                delta = (moving - past.theta).flatten()
                mu = mu + past.dmu.flatten(1) @ delta
                nu = nu + past.dnu.flatten(1) @ delta
            elif self.order == 2:
                mu, nu = statistics(moving, past.y)
            mus.append(mu)
            nus.append(torch.maximum(nu, mu**2))
        mu_bar = torch.stack(mus).mean(dim=0)  # Eq. 9
        nu_bar = torch.stack(nus).mean(dim=0)  # Eq. 10
        # Eq. 11, squared as Eq. 12 wants it: the gradient of the root is infinite where all values are one.
        var_bar = nu_bar - mu_bar**2
        self.mean, self.var = mu_bar.detach(), var_bar.detach()
        self.deviation = (self.var + self.eps).sqrt()

        if self.gradient == 'projection':  # as Batch Renormalization with constant r and d
            var_t = nu_t - mu_t**2
            x_hat = self._normalize(x, mu_t, var_t)
            r = (var_t + self.eps).sqrt().detach() / self.deviation
            d = (mu_t.detach() - self.mean) / self.deviation
            output = self._scale(x_hat * r[:, None, None] + d[:, None, None], gamma, beta)
        elif follows_theta:  # theta sees the window; to y, the batch stands for a part of the earlier iterations
            for_theta = self._scale(self._normalize(x, mu_bar, var_bar), gamma, beta)
            x = self.convolve(y, theta.detach())
            mu, nu = x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))
            stand_in = {'weights': 0.0, 'window': 1.0}.get(self.gradient, self.gradient)
            share = 1 / len(mus) + stand_in * (1 - 1 / len(mus))
            mu = self.mean + share * (mu - mu.detach())
            nu = nu_bar.detach() + share * (nu - nu.detach())
            for_y = self._scale(self._normalize(x, mu, nu - mu**2), gamma.detach(), beta.detach())
            output = for_theta + (for_y - for_y.detach())
        else:
            output = self._scale(self._normalize(x, mu_bar, var_bar), gamma, beta)

        weights = theta.detach()
        dmu, dnu = torch.autograd.functional.jacobian(statistics, weights)
        self.past = [Past(y.detach(), weights.clone(), mu_t.detach(), nu_t.detach(), dmu, dnu), *self.past][
            : self.window_size - 1
        ]
        return output

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()  # Eq. 12

    @staticmethod
    def _scale(x_hat: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return gamma[:, None, None] * x_hat + beta[:, None, None]  # Eq. 4


def batches(
    count: int, seed: int = 1, shape: tuple[int, ...] = (2, 4, 9, 7), dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    """Inputs of ``shape`` [N, C, H, W] whose mean and scale differ from batch to batch, on torch's default device."""
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(0, dtype=dtype)
    for _ in range(count):
        scale, mean = 0.5 + 2 * torch.rand(2, generator=generator, device='cpu')
        yield (torch.randn(shape, generator=generator, dtype=dtype, device='cpu') * scale + mean).to(like)


def loss_of(y: Tensor) -> Tensor:
    """A loss whose gradient is different everywhere and not constant in ``y``."""
    weight = torch.arange(y.numel(), dtype=y.dtype, device=y.device).view_as(y).sin()
    return (weight * y + 0.1 * y**2).sum() / len(y)


def deviation(
    norm: nn.BatchNorm2d,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> float:
    """How far a layer behind a convolution is from the oracle, in five training steps.

    Args:
        norm: A CBN layer, or a BatchNorm, which is CBN of a window of 1. It gets new gamma and beta, and is trained.
        device: To train on.
        dtype: Of autocast; float32 for none.
        memory_format: Of the images and of the weight of the convolution.

    Returns:
        The largest difference of an output or of a gradient (of input, weight, gamma or beta) from the oracle's in
        float64 on the CPU, as a share of the largest number of that tensor.
    """
    torch.manual_seed(0)
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(conv, norm).to(device).to(memory_format=memory_format).train()  # type: ignore[call-overload]
    # All samples of the layer are the exact polynomial of second order.
    order = 2 if getattr(norm, 'samples', None) else getattr(norm, 'order', 0)
    gradient = getattr(norm, 'gradient', 'batch')
    oracle = OracleCBN(getattr(norm, 'window_size', 1), order, norm.eps, gradient, padding=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    worst = 0.0
    for batch in batches(5, shape=(2, channels, 12, 10), dtype=torch.float32):
        x = batch.to(device=device, memory_format=memory_format).requires_grad_()
        leaves = [t.detach().cpu().double().requires_grad_() for t in (x, conv.weight, norm.weight, norm.bias)]
        expected = oracle(*leaves)
        loss_of(expected).backward()
        optimizer.zero_grad()
        with nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype):
            y = model(x)
        loss_of(y.float()).backward()
        trained = (x, conv.weight, norm.weight, norm.bias)
        ours, theirs = [y, *(leaf.grad for leaf in trained)], [expected.detach(), *(leaf.grad for leaf in leaves)]
        for found, right in zip(ours, theirs, strict=True):
            assert found is not None and right is not None
            difference = (found.detach().cpu().double() - right).abs().max() / right.abs().max()
            worst = max(worst, difference.nan_to_num(torch.inf).item())
        optimizer.step()
    return worst
