"""The statistics' mathematics, function by function, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_cbn import CONVOLUTIONS
from torch import nn

from mmdet_cbn.compensation import Moved
from mmdet_cbn.compensation.first_order import CompensatedStatistics, compensate, statistics_gradients
from mmdet_cbn.layers.statistics import batch_statistics, window_statistics
from mmdet_cbn.pairing import ConvCall


def call_of(name, dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, **{'bias': False, **CONVOLUTIONS[name]}).to(dtype)
    inputs = torch.randn(3, 4, 10, 8, dtype=dtype) + 2
    return ConvCall.of(conv, inputs, conv(inputs)), conv(inputs).detach()


def statistics_of(call, x):
    mean, var = batch_statistics(x)
    shift = 0 if call.bias is None else call.bias
    with torch.no_grad():
        return CompensatedStatistics(mean - shift, var, *statistics_gradients(x, mean, call))


def stacked(*statistics):
    return type(statistics[0])(*(torch.stack(tensors) for tensors in zip(*statistics, strict=True)))


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_gradients_of_the_statistics_are_autograds(name):
    call, x = call_of(name)
    statistics = statistics_of(call, x)
    theta = call.weight.detach().requires_grad_()
    again = F.conv2d(call.input, theta, None, call.stride, call.padding, call.dilation, call.groups)
    var, mean = torch.var_mean(again, dim=(0, 2, 3), correction=0)
    # Channel j depends on its own theta_j alone (Eq. 15), so the gradient of the sum has all of them.
    (mean_grad,) = torch.autograd.grad(mean.sum(), theta, retain_graph=True)
    (var_grad,) = torch.autograd.grad(var.sum(), theta)

    torch.testing.assert_close(statistics.mean, mean)
    torch.testing.assert_close(statistics.var, var)
    torch.testing.assert_close(statistics.var_grad, var_grad)
    # One mean patch a group stands for the gradients of all of its channels.
    shared = statistics.mean_grad.reshape(call.groups, 1, -1)
    torch.testing.assert_close(shared, mean_grad.reshape(call.groups, len(theta) // call.groups, -1)[:, :1])
    torch.testing.assert_close(shared.expand(-1, len(theta) // call.groups, -1).reshape(theta.shape), mean_grad)
    torch.testing.assert_close(statistics.mean_product, (mean_grad * theta).sum((1, 2, 3)))
    torch.testing.assert_close(statistics.var_product, (var_grad * theta).sum((1, 2, 3)))


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_compensation_is_eq_7_8_and_10_in_nu(name):
    """The centred form against the paper's own, for several iterations at once."""
    call, x = call_of(name)
    past, expected = [], []
    theta = call.weight + 0.05 * torch.randn_like(call.weight)
    for step in range(3):
        call = call._replace(input=call.input + 0.3 * step)
        x = F.conv2d(call.input, call.weight, call.bias, call.stride, call.padding, call.dilation, call.groups)
        past.append(statistics_of(call, x.detach()))

        def moments(weight, call=call):
            y = F.conv2d(call.input, weight, None, call.stride, call.padding, call.dilation, call.groups)
            return torch.stack([y.mean((0, 2, 3)), y.square().mean((0, 2, 3))])

        jacobian = torch.autograd.functional.jacobian(moments, call.weight.detach())
        mu, nu = moments(call.weight) + jacobian.flatten(2) @ (theta - call.weight).flatten()
        expected.append((mu, torch.maximum(nu, mu**2) - mu**2))
    moved = compensate(stacked(*past), theta, call.groups)
    for actual, wanted in zip(moved[:2], map(torch.stack, zip(*expected, strict=True)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_window_statistics_are_those_of_all_examples_together():
    batches = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64) * torch.arange(1, 5).view(4, 1, 1, 1, 1) + 7
    var, mean = torch.var_mean(batches, dim=(1, 3, 4), correction=0)
    window_mean, window_var, share, _ = window_statistics(mean[0], var[0], Moved(mean[1:], var[1:]))
    expected_var, expected_mean = torch.var_mean(batches, dim=(0, 1, 3, 4), correction=0)
    torch.testing.assert_close(window_mean, expected_mean)
    torch.testing.assert_close(window_var, expected_var)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 4))


def test_an_iteration_that_is_not_finite_is_left_out_channel_by_channel():
    mean, var = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])
    past_mean = torch.tensor([[3.0, float('nan'), 3.0], [5.0, 5.0, 5.0]])
    past_var = torch.tensor([[2.0, 2.0, float('inf')], [2.0, 2.0, 2.0]])
    window_mean, window_var, share, valid = window_statistics(mean, var, Moved(past_mean, past_var))
    torch.testing.assert_close(window_mean, torch.tensor([3.0, 3.0, 3.0]))
    torch.testing.assert_close(window_var, torch.tensor([2 + 8 / 3, 6.0, 6.0]))
    torch.testing.assert_close(share, torch.tensor([1 / 3, 1 / 2, 1 / 2]))
    assert valid.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_float32_at_least(dtype):
    x = (torch.randn(2, 4, 6, 6) * 3 + 10).to(dtype)
    mean, var = batch_statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)))
    torch.testing.assert_close(var, x.float().var((0, 2, 3), correction=0))
