"""The setting without drift: while weights stand still, it is CBN; and with its gradient, BatchNorm of more images."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.study.no_drift import RunAgainHook


class Detector(nn.Module):
    """Two convolutions with norms in a backbone, one in a neck."""

    def __init__(self, norm):
        super().__init__()
        self.backbone = nn.Sequential(*unit(3, 4, norm), *unit(4, 5, norm))
        self.neck = Neck(nn.Sequential(*unit(5, 4, norm)))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.neck(self.backbone(x))[0]


def unit(in_channels, out_channels, norm):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm(out_channels), nn.ReLU()


class Neck(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return (self.layers(x),)


def gradients(model, batches, hook=None):
    """Of the last of ``batches``. Weights stand still."""
    runner = SimpleNamespace(model=model, epoch=0, train_dataloader=None)
    if hook is not None:
        hook.before_train(runner)
    for x in batches:
        if hook is not None:
            hook.before_train_iter(runner, 0)
        model.zero_grad()
        y = model(x)
        assert len(y) == len(x)
        y.sin().square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def batches():
    """Each window of 3 has the same images, so that windows of later layers, too, do not depend on when they ran."""
    torch.manual_seed(1)
    return torch.randn(3, 2, 3, 9, 9).double().repeat(4, 1, 1, 1, 1)


def pair(**arguments):
    """A detector with BatchNorm and one with CBN, of the same weights."""
    torch.manual_seed(0)
    model = Detector(nn.BatchNorm2d).double()
    return model, CBN.convert_batchnorm(copy.deepcopy(model), window_size=3, **arguments)


def test_without_its_gradient_it_is_cbn(batches):
    model, cbn = pair(gradient='batch')
    torch.testing.assert_close(
        gradients(model, batches, RunAgainHook(burn_in_epochs=0, gradient=False, window_size=3)),
        gradients(cbn, batches),
    )


def test_with_its_gradient_it_is_batchnorm_of_all_images(batches):
    model, _ = pair()
    actual = gradients(copy.deepcopy(model), batches, RunAgainHook(burn_in_epochs=0, gradient=True, window_size=3))
    model(batches[-3:].flip(0).flatten(0, 1))[:2].sin().square().sum().backward()
    torch.testing.assert_close(actual, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_the_weight_of_the_last_layer_has_this_gradient_with_gradient_weights_too(batches):
    """Not so the others: earlier images have their weights before them in later layers."""
    model, cbn = pair(gradient='weights')
    whole = gradients(model, batches, RunAgainHook(burn_in_epochs=0, gradient=True, window_size=3))
    ours = gradients(cbn, batches)
    torch.testing.assert_close(ours['neck.layers.0.weight'], whole['neck.layers.0.weight'])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours['backbone.0.weight'], whole['backbone.0.weight'])


def test_there_is_no_window_during_burn_in_and_in_evaluation(batches):
    model, _ = pair()
    plain = copy.deepcopy(model)
    hook = RunAgainHook(burn_in_epochs=1, gradient=False, window_size=3)
    torch.testing.assert_close(gradients(model, batches, hook), gradients(plain, batches))
    hook.before_train_iter(SimpleNamespace(epoch=1), 0)
    seen = []
    model.backbone[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for x in batches[:2]:
        model(x)
    model.eval()
    assert len(model(batches[0])) == 2
    assert seen == [2, 4, 2]
