"""What every kind of compensation must do."""

import pytest
import torch
from torch import nn

from mmdet_cbn.compensation import base, make_compensation, second_order
from mmdet_cbn.compensation.patches import weighted_patches
from mmdet_cbn.layers.statistics import batch_statistics
from mmdet_cbn.pairing import ConvCall


@pytest.mark.parametrize('few', [False, True])
@pytest.mark.parametrize('has_others', [False, True])
@pytest.mark.parametrize('has_var_gradient', [False, True])
@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize(('order', 'samples'), [(1, None), (2, None), (1, 7), (1, 1000)])
def test_the_gradient_in_the_weight_is_autograds(
    order, samples, groups, has_var_gradient, has_others, few, monkeypatch
):
    monkeypatch.setattr(base, 'are_launches_dear', lambda tensor: few)
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups).double()
    compensation = make_compensation(order, samples)
    kept = []
    for inputs in torch.randn(3, 2, 6, 9, 8).double():
        with torch.no_grad():
            x = conv(inputs)
            kept.append(compensation.keep(x, *batch_statistics(x), ConvCall.of(conv, inputs, x)))
            conv.weight.add_(0.1 * torch.randn_like(conv.weight))
    old = compensation.Statistics(*map(torch.stack, zip(*kept, strict=True)))
    old.var[0, 3] = -10  # where the maximum of Eq. 10 takes over
    call = ConvCall.of(conv, inputs, x)
    past = compensation.under_current_weights(old, call)
    assert past.var[0, 3] == 0
    gradients = torch.randn_like(past.mean), torch.randn_like(past.var) * has_var_gradient
    expected = torch.autograd.grad(past[:2], conv.weight, gradients)
    with torch.no_grad():
        so_far = torch.randn_like(conv.weight) if has_others else None
        of_others = None if so_far is None else so_far.clone()
        factor = gradients[0] / 2
        share = gradients[1] * (past.var > 0)
        patches, var_slope = compensation.weight_slopes(old, past, call, share, factor, of_others)
        actual = (
            var_slope + weighted_patches(2 * factor, patches, conv.weight.shape) - (0 if so_far is None else so_far)
        )
    torch.testing.assert_close((actual,), expected)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('numbers_at_once', [1, 2000, 2**24])
def test_the_covariance_of_the_patches_is_that_of_all_images_together(numbers_at_once, groups, monkeypatch):
    """Parts of one image, of two, and the rest; and all three at once."""
    monkeypatch.setattr(second_order, '_NUMBERS_AT_ONCE', numbers_at_once)
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups).double()
    inputs = torch.randn(3, 4, 5, 4).double()
    with torch.no_grad():
        x = conv(inputs)
        kept = make_compensation(2, None).keep(x, *batch_statistics(x), ConvCall.of(conv, inputs, x))
    patches = nn.functional.unfold(inputs, 3, padding=1).transpose(0, 1).unflatten(0, (groups, -1)).flatten(2)
    torch.testing.assert_close(kept.covariance, torch.stack([torch.cov(group, correction=0) for group in patches]))
