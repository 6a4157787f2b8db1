"""Mixed precision: statistics and compensation stay in float32, and the result stays near float32's."""

import copy

import pytest
import torch
from test_cbn import batches, conv_and_norm, loss_of
from test_training import losses, retinanet
from torch import nn

from mmdet_cbn import CBN

HAS_FLOAT16_ON_CPU = hasattr(torch.amp, 'GradScaler')  # torch >= 2.3
HALF = pytest.mark.parametrize('dtype', [torch.bfloat16, *[torch.float16] * HAS_FLOAT16_ON_CPU], ids=str)
KINDS = pytest.mark.parametrize(
    'kind',
    [dict(), dict(order=0), dict(order=2), dict(samples=20), dict(gradient='window'), dict(gradient='projection')],
    ids=str,
)


@pytest.mark.parametrize('kind', [dict(), dict(samples=64)], ids=str)
@pytest.mark.slow
def test_a_detector_trains_in_bfloat16_as_in_float32(build_runner, monkeypatch, kind):
    """Backbone, FPN and shared head, with mmengine's AmpOptimWrapper, which asks for a GPU for float16's sake."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    found = []
    for options in ({}, {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}):
        norm_cfg = dict(type='CBN', window_size=3, **kind)
        runner = retinanet(build_runner, norm_cfg, iterations=6, **options)
        runner.train()
        found.append(losses(runner)['train/loss'])
        layers = [m for m in runner.model.modules() if isinstance(m, CBN)]
        assert len(layers) == 36 and {layer.window_length for layer in layers} == {3}
        assert {t.dtype for layer in layers for t in layer.windows.current.stacked()} == {torch.float32}
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=3e-3)


@HALF
@KINDS
def test_outputs_and_statistics_stay_near_those_of_float32(dtype, kind):
    model = conv_and_norm(window_size=3, dtype=torch.float32, **kind)
    single = copy.deepcopy(model)
    for x in batches(4, dtype=torch.float32):
        with torch.autocast('cpu', dtype):
            y = model(x)
        loss_of(y.float()).backward()
        assert y.dtype == dtype
        assert {t.dtype for t in (*model[1].windows.current.stacked(), *model[1].parameters())} == {torch.float32}
        torch.testing.assert_close(y.float(), single(x), rtol=0.02, atol=0.02)
        for net in (model, single):
            with torch.no_grad():
                net[0].weight.mul_(1.01)


@HALF
@pytest.mark.parametrize('kind', [dict(), dict(samples=10_000)], ids=str)
def test_compensation_sees_a_change_of_the_weights_that_their_half_would_not(dtype, kind):
    model = conv_and_norm(window_size=2, dtype=torch.float32, **kind)
    steps = []
    model[1].register_step_hook(lambda layer, step: steps.append(step))
    first, second = batches(2, dtype=torch.float32)
    with torch.autocast('cpu', dtype):
        model(first)
        mean = model[1].windows.current.stacked().mean[0].clone()
        change = 2e-5
        with torch.no_grad():
            model[0].weight.mul_(1 + change)
        stays = (model[0].weight / (1 + change)).to(dtype) == model[0].weight.to(dtype)
        assert stays.float().mean() > 0.9
        model(second)
    past_mean = steps[1].past.mean[0]
    # The mean is linear in the weights.
    torch.testing.assert_close(past_mean - mean, change * mean, rtol=0.05, atol=1e-6)


if HAS_FLOAT16_ON_CPU:

    @KINDS
    def test_float16_with_a_grad_scaler_trains_near_float32_and_survives_a_step_left_out(kind):
        model = conv_and_norm(window_size=3, dtype=torch.float32, **kind)
        single = copy.deepcopy(model)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.002) for net in (model, single)]
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**20)  # too much at first
        scales = []
        for x in batches(30, dtype=torch.float32):
            with torch.autocast('cpu', torch.float16):
                y = model(x)
            scaler.scale(loss_of(y)).backward()
            before = model[0].weight.clone()
            scaler.step(optimizers[0])
            scaler.update()
            scales.append(scaler.get_scale())
            loss_of(single(x)).backward()
            if not torch.equal(model[0].weight, before):
                optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert 2 < scales[-1] < 2.0**18, 'some steps were left out, not all'
        assert model[1].window_length == 3
        for actual, expected in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_the_backward_pass_is_in_full_precision_under_autocast_too():
    """torch.compile traces it there, where BatchNorm's has no product of matrices and so does not care."""
    gradients = []
    for under_autocast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 16, 3), CBN(16, gradient='window'))
        for _ in range(4):
            model.zero_grad()
            with torch.autocast('cpu', torch.bfloat16):
                loss = model(torch.randn(2, 16, 8, 8)).float().pow(3).mean()
            with torch.autocast('cpu', torch.bfloat16, enabled=under_autocast):
                loss.backward()
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
