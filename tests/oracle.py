"""Cross-Iteration Batch Normalization in float64, slowly, straight from the paper's equations.

Nothing of mmdet_cbn is used. Gradients of the statistics are whole Jacobians by autograd, nu is kept as the paper keeps
it, the old weights are stored, and the backward pass is autograd's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Past(NamedTuple):
    y: Tensor
    theta: Tensor
    mu: Tensor
    nu: Tensor
    dmu: Tensor  # [C_out, *theta.shape]
    dnu: Tensor


class OracleCBN:
    """conv + CBN. ``conv_args`` are stride, padding, dilation and groups of ``F.conv2d``.

    Order 2 is the left side of Eq. 5 and 6: what the old batch's mu and nu are under theta_t. The series ends there, as
    mu is linear in the weights of the layer, and nu quadratic.
    """

    def __init__(self, window_size: int, order: int = 1, eps: float = 1e-5, **conv_args) -> None:
        self.window_size, self.order, self.eps, self.conv_args = window_size, order, eps, conv_args
        self.past: list[Past] = []

    def __call__(self, y: Tensor, theta: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        def statistics(weight: Tensor, y: Tensor = y) -> tuple[Tensor, Tensor]:
            x = F.conv2d(y.detach(), weight, **self.conv_args)
            return x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))

        x = F.conv2d(y, theta, **self.conv_args)
        mu_t, nu_t = x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))  # Algorithm 1, line 1
        mus, nus = [mu_t], [nu_t]
        for past in self.past:  # Eq. 7 and 8; theta_t is constant inside a Taylor term
            mu, nu = past.mu, past.nu
            if self.order == 1:
                delta = (theta.detach() - past.theta).flatten()
                mu = mu + past.dmu.flatten(1) @ delta
                nu = nu + past.dnu.flatten(1) @ delta
            elif self.order == 2:
                mu, nu = statistics(theta.detach(), past.y)
            mus.append(mu)
            nus.append(torch.maximum(nu, mu**2))
        mu_bar = torch.stack(mus).mean(dim=0)  # Eq. 9
        nu_bar = torch.stack(nus).mean(dim=0)  # Eq. 10
        # Eq. 11, squared as Eq. 12 wants it: the gradient of the root is infinite where all values are one.
        var_bar = nu_bar - mu_bar**2
        self.mean, self.var = mu_bar.detach(), var_bar.detach()
        self.deviation = (self.var + self.eps).sqrt()
        x_hat = (x - mu_bar[:, None, None]) / (var_bar[:, None, None] + self.eps).sqrt()  # Eq. 12

        weights = theta.detach()
        dmu, dnu = torch.autograd.functional.jacobian(statistics, weights)
        self.past = [Past(y.detach(), weights.clone(), mu_t.detach(), nu_t.detach(), dmu, dnu), *self.past][
            : self.window_size - 1
        ]
        return gamma[:, None, None] * x_hat + beta[:, None, None]  # Eq. 4
