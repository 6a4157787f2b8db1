"""Compensation by samples: exact with all positions, right on average with fewer, touching no other random stream."""

import random

import pytest
import torch
from test_cbn import CONVOLUTIONS, batches, conv_and_norm, loss_of
from test_statistics import stacked
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.compensation.sampled import compensate_samples, sampled_statistics
from mmdet_cbn.experiments.oracle import OracleCBN
from mmdet_cbn.layers.statistics import batch_statistics
from mmdet_cbn.pairing import ConvCall

pytestmark = pytest.mark.usefixtures('device')


def of(conv, x):
    """Mean without the bias, and variance, of what ``conv`` makes of ``x``, and the call."""
    y = conv(x)
    mean, var = batch_statistics(y)
    return y, mean - (0 if conv.bias is None else conv.bias), var, ConvCall.of(conv, x, y)


def sample(conv, x, samples, start):
    y, mean, var, call = of(conv, x)
    return sampled_statistics(y, mean, var, call, samples, start)


@torch.no_grad()
def moved(name):
    """A convolution and two inputs; ``change`` moves its weights."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, **{'bias': False, **CONVOLUTIONS[name]}).double()
    inputs = list(batches(2, shape=(2, 4, 10, 8)))
    return conv, inputs, lambda: conv.weight.add_(0.3 * torch.randn_like(conv.weight))


@torch.no_grad()
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_with_all_positions_it_is_exact(name):
    """The variance is quadratic in the weights, so that second order is all there is."""
    conv, inputs, change = moved(name)
    past = []
    for x in inputs:
        past.append(sample(conv, x, 10**4, start=0.0))
        change()
    mean, var, _ = compensate_samples(stacked(*past), conv.weight, conv.groups)
    for i, x in enumerate(inputs):
        _, true_mean, true_var, _ = of(conv, x)
        torch.testing.assert_close(mean[i], true_mean)
        torch.testing.assert_close(var[i], true_var)


@torch.no_grad()
@pytest.mark.parametrize('name', ['3x3 padded', '3x3 stride 2', 'groups and bias', '3x5 uneven'])
def test_with_fewer_it_is_right_on_average_and_the_better_the_more_there_are(name):
    conv, (x, _), change = moved(name)
    random.seed(1)
    starts = [random.random() for _ in range(1500)]
    before = {n: [sample(conv, x, n, start) for start in starts] for n in (4, 16)}
    change()
    _, true_mean, true_var, _ = of(conv, x)
    errors = {}
    for n, draws in before.items():
        means, variances, _ = compensate_samples(stacked(*draws), conv.weight, conv.groups)
        for results, truth, kept in ((means, true_mean, draws[0].mean), (variances, true_var, draws[0].var)):
            # Of the change there was. The variance over n samples lacks one part in n of it.
            off = (results.mean(dim=0) - truth).abs().max() / (truth - kept).abs().max()
            assert off < (0.05 if results is means else 0.05 + 2 / n), (n, off)
        errors[n] = (means - true_mean).square().mean().sqrt() + (variances - true_var).square().mean().sqrt()
    assert errors[16] < 0.7 * errors[4]


@torch.no_grad()
def test_the_layer_averages_the_old_batches_under_the_current_weights():
    model = conv_and_norm(window_size=3, samples=10**4)
    conv, norm = model
    seen = []
    for x in batches(5):
        seen = [*seen, x][-3:]
        y = model(x)
        outputs = [conv(old) for old in seen]
        means = torch.stack([out.mean(dim=(0, 2, 3)) for out in outputs])
        variances = torch.stack([out.var(dim=(0, 2, 3), correction=0) for out in outputs])
        mean, var = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
        gamma, beta, mean, var = (t.view(-1, 1, 1) for t in (norm.weight, norm.bias, mean, var))
        torch.testing.assert_close(y, gamma * (conv(x) - mean) / (var + norm.eps).sqrt() + beta)
        conv.weight.add_(0.2 * torch.randn_like(conv.weight))


def train(samples, seed, steps=5):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), CBN(4, window_size=3, samples=samples)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 144).sin().view_as(model[0].weight))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches(steps):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    return model[0].weight.detach()


def test_a_seeded_run_is_reproducible_and_another_seed_draws_other_positions():
    assert torch.equal(train(8, seed=0), train(8, seed=0))
    assert not torch.equal(train(8, seed=0), train(8, seed=1))
    assert torch.equal(train(10**4, seed=0), train(10**4, seed=1)), 'nothing else depends on the seed here'


def test_other_random_streams_are_untouched():
    model = conv_and_norm(window_size=3, samples=8)
    states = random.getstate(), torch.get_rng_state()
    for x in batches(3):
        model(x)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_positions_are_equally_likely_and_spread():
    """Each of 64 places of a map is drawn as often; no draw sticks to a few rows or columns."""
    conv = nn.Conv2d(1, 1, 1, bias=False).double()
    nn.init.ones_(conv.weight)
    x = torch.arange(64.0).double().view(1, 1, 8, 8)
    drawn = []
    with torch.no_grad():
        for i in range(640):
            patches = sample(conv, x, 8, start=(i + 0.5) / 640).patches.flatten().long()
            assert len(set((patches // 8).tolist())) >= 5 and len(set((patches % 8).tolist())) >= 4
            drawn.append(patches)
    counts = torch.cat(drawn).bincount(minlength=64)
    assert counts.min() >= 79 and counts.max() <= 81, 'of 640 x 8 draws'


def test_bytes_held_by_the_window():
    conv, norm = nn.Conv2d(256, 256, 3, padding=1, bias=False), CBN(256, window_size=4, samples=64)
    for _ in range(5):
        norm(conv(torch.randn(2, 256, 7, 7)))
    in_weights = norm.windows.current.nbytes / conv.weight.nbytes / 3
    assert in_weights <= 0.3, 'an old iteration; the authors hold three'


def test_in_mixed_precision_unchanged_weights_change_nothing(device):
    """Else the difference between the two precisions would be taken for one of the weights."""
    conv, norm = nn.Conv2d(8, 8, 3), CBN(8, window_size=3, samples=16)
    with torch.autocast(device, torch.bfloat16):
        norm(conv(torch.randn(2, 8, 9, 9)))
        past = norm.windows.current.stacked()
    mean, var, _ = compensate_samples(past, conv.weight.detach(), 1)
    assert past.mean.dtype == torch.float32
    torch.testing.assert_close(mean, past.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, past.var, rtol=1e-5, atol=1e-6)


def test_where_there_are_fewer_positions_the_window_goes_on_and_is_exact():
    """However many there are: as small maps of images of unlike sizes."""
    model, oracle = conv_and_norm(window_size=4, samples=64), OracleCBN(4, order=2, padding=1)
    for number, (height, width) in enumerate([(4, 5), (3, 3), (5, 6), (4, 5), (2, 3), (5, 6)]):
        (x,) = batches(1, seed=number, shape=(2, 4, height, width))
        y = model(x)
        torch.testing.assert_close(y, oracle(x, model[0].weight, model[1].weight, model[1].bias))
        assert model[1].window_length == min(number + 1, 4)
        with torch.no_grad():
            model[0].weight.add_(0.1 * torch.randn_like(model[0].weight))
