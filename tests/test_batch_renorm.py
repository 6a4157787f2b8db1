"""BRN is Algorithm 1 of Ioffe's Batch Renormalization; elsewhere it is nn.BatchNorm2d."""

import copy
import pickle

import pytest
import torch
from mmcv.cnn import build_norm_layer
from test_device import DEVICE, to_cuda
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmdet_cbn import BRN

pytestmark = pytest.mark.usefixtures('device')

EARLY = dict(r_max=1.5, d_max=0.4, r_steps=(2, 7), d_steps=(1, 5), momentum=0.1)


class Oracle:
    """Algorithm 1, with autograd; mu and sigma of the running average, the limits by the count of steps."""

    def __init__(self, channels, momentum, r_max=3, d_max=5, r_steps=(5000, 40000), d_steps=(5000, 25000), eps=1e-5):
        self.mu, self.sigma = torch.zeros(channels).double(), torch.ones(channels).double().add(eps).sqrt()
        self.eps, self.alpha, self.limits, self.step = eps, momentum, (r_max, d_max, r_steps, d_steps), 0

    def __call__(self, x, gamma, beta):
        r_last, d_last, r_steps, d_steps = self.limits
        r_done, d_done = (min(max((self.step - a) / (b - a), 0), 1) for a, b in (r_steps, d_steps))
        r_max, d_max = 1 + (r_last - 1) * r_done, d_last * d_done
        mu_b = x.mean(dim=(0, 2, 3))
        sigma_b = (self.eps + (x - mu_b[:, None, None]).square().mean(dim=(0, 2, 3))).sqrt()
        r = (sigma_b / self.sigma).clip(1 / r_max, r_max).detach()
        d = ((mu_b - self.mu) / self.sigma).clip(-d_max, d_max).detach()
        x_hat = (x - mu_b[:, None, None]) / sigma_b[:, None, None] * r[:, None, None] + d[:, None, None]
        self.mu = self.mu + self.alpha * (mu_b - self.mu).detach()
        self.sigma = self.sigma + self.alpha * (sigma_b - self.sigma).detach()
        self.step += 1
        return gamma[:, None, None] * x_hat + beta[:, None, None]


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        scale, mean = 0.3 + 3 * torch.rand(2, generator=generator, device='cpu')
        x = torch.randn((2, 4, 5, 3), generator=generator, dtype=torch.float64, device='cpu') * scale + mean - 1.5
        yield x.to(torch.empty(0).device)


def layer(**arguments):
    torch.manual_seed(0)
    norm = BRN(4, **arguments).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize('arguments', [EARLY, dict(EARLY, momentum=0.5, r_max=1), dict(momentum=0.01)])
def test_output_gradients_and_running_statistics_are_the_oracles(arguments):
    norm, oracle = layer(**arguments), Oracle(4, **arguments)
    for x in batches(10):
        leaves = [t.detach().clone().requires_grad_() for t in (x, norm.weight, norm.bias)]
        expected = oracle(*leaves)
        weighting = torch.arange(x.numel()).double().sin().view_as(x)
        gradients = torch.autograd.grad((expected * weighting + expected**2).sum(), leaves)

        x.requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y * weighting + y**2).sum().backward()
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip((x.grad, norm.weight.grad, norm.bias.grad), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(norm.running_mean, oracle.mu)
        torch.testing.assert_close((norm.running_var + norm.eps).sqrt(), oracle.sigma)
    evaluated = norm.eval()(x)
    x_hat = (x - oracle.mu[:, None, None]) / oracle.sigma[:, None, None]
    torch.testing.assert_close(evaluated, norm.weight[:, None, None] * x_hat + norm.bias[:, None, None])


def test_without_gamma_and_beta_it_is_the_oracle_too():
    norm, oracle = BRN(4, affine=False, **EARLY).double(), Oracle(4, **EARLY)
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    for x in batches(10):
        torch.testing.assert_close(norm(x), oracle(x, one, zero))


def test_in_half_precision_its_statistics_stay_those_of_float32():
    norm, oracle = layer(**EARLY).float(), Oracle(4, **EARLY)
    for x in batches(10):
        x = x.bfloat16()
        y, expected = norm(x), oracle(x.double(), norm.weight.double(), norm.bias.double())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(norm.running_mean.double(), oracle.mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((norm.running_var + norm.eps).sqrt().double(), oracle.sigma, rtol=1e-4, atol=1e-5)


def test_both_limits_bind_and_then_only_the_last_ones_do():
    """Else the comparison with the oracle would show less than it seems to."""
    norm = layer(**EARLY)
    seen = []
    for x in batches(10):
        norm(x)
        seen.append(tuple(t.abs().max().item() for t in norm.iteration.first_runs[0].result))
    assert seen[0] == (1, 0), 'BatchNorm at first'
    assert max(r for r, _ in seen) == 1.5 and max(d for _, d in seen) == 0.4
    assert len({round(r, 6) for r, _ in seen}) > 3


def test_the_defaults_are_ioffes_schedule():
    norm = BRN(2)
    assert norm.momentum == 0.01
    x = torch.randn(2, 2, 4, 4) * 100 + 1000
    for steps, limits in [
        (0, (1, 0)),
        (5000, (1, 0)),
        (15000, (1 + 2 * 2 / 7, 2.5)),
        (25000, (1 + 2 * 4 / 7, 5)),
        (40000, (3, 5)),
        (90000, (3, 5)),
    ]:
        norm.reset_running_stats()
        norm.num_batches_tracked.fill_(steps)
        norm(x)
        assert [t.max().item() for t in norm.iteration.first_runs[0].result] == pytest.approx(limits)


def test_a_resumed_run_goes_on_where_it_was():
    straight, first = layer(**EARLY), layer(**EARLY)
    inputs = list(batches(8))
    outputs = [straight(x) for x in inputs]
    for x in inputs[:4]:
        first(x)
    second = layer(**EARLY)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for x, y in zip(inputs[4:], outputs[4:], strict=True):
        assert torch.equal(second(x), y)


def test_a_cumulative_average_is_one():
    norm = layer(**dict(EARLY, momentum=None))
    inputs = list(batches(3))
    for x in inputs:
        norm(x)
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_a_checkpointed_block_counts_one_step(use_reentrant):
    plain, other = layer(**EARLY), layer(**EARLY)
    for x in batches(5):
        gradients = []
        for norm in (plain, other):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            y = norm(leaf) if norm is plain else checkpoint(norm, leaf, use_reentrant=use_reentrant)
            y.square().sum().backward()
            gradients.append((leaf.grad, norm.weight.grad))
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for ours, theirs in zip(plain.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_each_of_several_checkpointed_calls_runs_again_with_its_own_correction(use_reentrant):
    """As in a head that the levels of an FPN share."""
    plain, other = layer(**EARLY), layer(**EARLY)
    for x in batches(5):
        levels = [x, x[:, :, :3] + 1, x[:, :, :, :2] * 3, *[2 * x] * use_reentrant]
        gradients = []
        for norm in (plain, other):
            norm.zero_grad()
            leaves = [level.clone().requires_grad_() for level in levels]
            ys = [
                norm(leaf) if norm is plain else checkpoint(norm, leaf, use_reentrant=use_reentrant) for leaf in leaves
            ]
            sum(y.square().sum() for y in ys).backward()
            gradients.append([leaf.grad for leaf in leaves] + [norm.weight.grad])
        torch.testing.assert_close(*gradients)


def test_checkpointed_calls_that_cannot_be_told_from_each_other_are_refused():
    norm = layer(**EARLY)
    leaves = [x.requires_grad_() for x in batches(2)]
    losses = [checkpoint(norm, leaf, use_reentrant=False).square().sum() for leaf in leaves]
    with pytest.raises(RuntimeError, match=r'BRN layer .* runs again in a checkpointed block'):
        sum(losses).backward()


def test_nothing_is_kept_of_past_iterations():
    norm = layer(**EARLY)
    for x in batches(3):
        norm(x.requires_grad_()).sum().backward()
        assert len(norm.iteration.first_runs) == 1
    assert copy.deepcopy(norm).iteration.first_runs == []


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e200])
def test_a_bad_batch_harms_its_own_channel_and_iteration_alone(bad, momentum):
    arguments = dict(EARLY, momentum=momentum)
    norm, clean = layer(**arguments), layer(**arguments)
    for number, x in enumerate(batches(8)):
        poisoned = x.clone()
        if number == 3:
            poisoned[1, 2, 3, 1] = bad
            before = clean.running_mean[2].item(), clean.running_var[2].item()
        y = norm(poisoned)
        expected = clean(x)
        if number == 3:
            assert (norm.running_mean[2].item(), norm.running_var[2].item()) == before
        assert torch.equal(y[:, [0, 1, 3]], expected[:, [0, 1, 3]])
        assert number == 3 or torch.isfinite(y).all()
    for actual, expected in zip(norm.buffers(), clean.buffers(), strict=True):
        assert torch.isfinite(actual).all()
        assert actual.dim() == 0 or torch.equal(actual[[0, 1, 3]], expected[[0, 1, 3]])


def test_replicas_of_data_parallel_are_refused_by_name():
    with pytest.raises(RuntimeError, match=r'BRN layer .* cannot be trained in torch.nn.DataParallel'):
        layer()._replicate_for_data_parallel()


def test_checkpoints_are_batchnorms():
    norm, bn = layer(**EARLY), nn.BatchNorm2d(4).double().eval()
    for x in batches(3):
        norm(x)
    bn.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(bn(x), norm.eval()(x))
    norm.load_state_dict(bn.state_dict(), strict=True)


def test_mmcv_builds_it_under_batchnorms_name():
    name, norm = build_norm_layer(dict(type='BRN', r_max=2, requires_grad=False), 4)
    assert name == 'bn' and type(norm) is BRN and norm.r_max == 2 and not norm.weight.requires_grad
    copy.deepcopy(norm)


def test_empty_and_single_value_inputs_are_batchnorms():
    norm = layer(**EARLY)
    assert norm(torch.empty(0, 4, 2, 2).double()).shape == (0, 4, 2, 2)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        norm(torch.ones(1, 4, 1, 1).double())
    with pytest.raises(ValueError, match='expected 4D input'):
        norm(torch.ones(4, 4).double())
    with pytest.raises(RuntimeError, match='expected an input of 4 channels'):
        norm(torch.ones(2, 1, 2, 2).double())
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_training_never_waits_for_the_device(momentum, affine, dtype):
    with FakeTensorMode() as mode, torch.no_grad():
        norm, fake = to_cuda(BRN(4, momentum=momentum, affine=affine), mode)
        y = norm(fake(torch.empty(2, 4, 8, 8, dtype=dtype)))
        assert y.dtype == dtype and y.device.type == DEVICE


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(num_features=0), ValueError, 'BRN: num_features must be an int >= 1, got 0'),
        (dict(track_running_stats=False), ValueError, 'BRN: track_running_stats must be True'),
        (dict(r_max=0.5), ValueError, 'BRN: r_max must be a number >= 1, got 0.5'),
        (dict(r_max=float('inf')), ValueError, 'BRN: r_max must be a number >= 1, and finite in float32, got inf'),
        (dict(d_max=1e39), ValueError, 'BRN: d_max must be a number >= 0, and finite in float32, got 1e\\+39'),
        (dict(r_steps=(0, 2**63)), ValueError, 'BRN: each of r_steps must be an int >= 0, and less than 2'),
        (dict(d_max='5'), TypeError, "BRN: d_max must be a number >= 0, got '5' of type str"),
        (dict(r_steps=5), TypeError, r'BRN: r_steps must be two ints \(first step, last step\), got 5'),
        (dict(r_steps=(5, 5)), ValueError, r'r_steps must be two ints of which the second is larger, got \(5, 5\)'),
        (dict(d_steps=(0, 1.5)), TypeError, 'BRN: each of d_steps must be an int >= 0, got 1.5'),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        BRN(**{'num_features': 4, **arguments})
