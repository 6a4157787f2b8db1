"""The ratios of Figure 6 are those of whole Jacobians; what one or two layers explain is left out exactly."""

import pytest
import torch
from conftest import Net, runner_for
from mmcv.cnn.bricks import ConvWS2d
from mmengine.model import BaseModel
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.analysis.fidelity import NOISE, ONE_LAYER, TWO_LAYERS, StatisticsFidelityHook
from mmdet_cbn.experiments.analysis.gradients import GradientRatioHook


class Chain(BaseModel):
    """Four convolutions with their norms, the second one skipped by an addition, in float64."""

    def __init__(self, norm=CBN):
        super().__init__(dict(type='ImgDataPreprocessor'))
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict()
        for n, (before, after) in enumerate([(3, 4), (4, 4), (4, 3), (3, 4)], start=1):
            self.backbone[f'conv{n}'] = nn.Conv2d(before, after, 3, padding=1, bias=n == 2)
            self.backbone[f'norm{n}'] = norm(after)
        self.double()

    def extract_feat(self, x, inputs=()):
        """Appends the inputs of the norms to ``inputs`` if it is a list."""
        x = x.double()
        for n in (1, 2, 3, 4):
            before, x = x, self.backbone[f'conv{n}'](x)
            if isinstance(inputs, list):
                inputs.append(x)
            x = self.backbone[f'norm{n}'](x)
            x = torch.relu(x + before if n == 2 else x)
        return x

    def forward(self, inputs, data_samples, mode='tensor'):
        return dict(loss=self.extract_feat(inputs).square().sum() / 10)


def train(tmp_path, model, hook, epochs=1):
    runner = runner_for(tmp_path, model, hook, epochs=epochs, batch_size=2)
    runner.train()
    return runner


def test_predecessors_are_followed_through_additions(tmp_path):
    hook = GradientRatioHook(every=2)
    train(tmp_path, Chain(), hook)
    before = {name[-1]: [[layer[-1] for layer in group] for group in groups] for name, groups in hook._before.items()}
    # The output of the first reaches the third by the addition too, but the nearest way counts.
    assert before == {'1': [], '2': [['1']], '3': [['2'], ['1']], '4': [['3'], ['2'], ['1']]}
    assert {(ratio.layer[-1], ratio.before) for ratio in hook.ratios} == {
        ('2', 1),
        ('3', 1),
        ('3', 2),
        ('4', 1),
        ('4', 2),
    }


@pytest.mark.slow
def test_ratios_are_those_of_whole_jacobians(tmp_path):
    """While the window holds one iteration, CBN is BN: autograd differentiates a net of BatchNorm2d."""
    hook = GradientRatioHook(every=1, draws=3000)
    runner = runner_for(tmp_path, Chain(), hook, batch_size=2, train_cfg=dict(by_epoch=False, max_iters=1))
    runner.train()
    model = Chain(nn.BatchNorm2d).train()
    model.load_state_dict(runner.model.state_dict())
    images = torch.stack([runner.train_dataloader.dataset[i]['inputs'] for i in (0, 1)])
    convs = [model.backbone[f'conv{n}'].weight for n in (1, 2, 3, 4)]

    def norms(layer, square):
        inputs = []
        model.extract_feat(images, inputs)
        x = inputs[layer - 1] - (model.backbone['conv2'].bias.view(-1, 1, 1) if layer == 2 else 0)
        statistic = (x.square() if square else x).mean(dim=(0, 2, 3))
        jacobian = [torch.autograd.grad(s, convs[:layer], retain_graph=True) for s in statistic]
        return [torch.stack(of_weight).norm().item() for of_weight in zip(*jacobian, strict=True)]

    assert len(hook.ratios) == 5
    for ratio in hook.ratios:
        layer = int(ratio.layer[-1])
        for found, square in ((ratio.mean, False), (ratio.second_moment, True)):
            of = norms(layer, square)
            assert found == pytest.approx(of[layer - 1 - ratio.before] / of[layer - 1], rel=0.05), ratio


def worst(errors, compensation, layer):
    found = [error for error in errors if error.compensation.startswith(compensation) and error.layer[-1] == layer]
    assert found
    return max(max(error.mean_error, error.var_error) for error in found)


def test_one_or_two_layers_are_exact_where_no_more_have_changed(tmp_path):
    hook = StatisticsFidelityHook(every=4, max_tau=3, samples=(8,))
    train(tmp_path, Chain(), hook, epochs=4)
    errors = hook.errors
    assert {error.compensation for error in errors} >= {ONE_LAYER, TWO_LAYERS, NOISE}
    assert max(worst(errors, kind, '1') for kind in (ONE_LAYER, TWO_LAYERS)) < 1e-12 < worst(errors, 'first', '1')
    assert worst(errors, TWO_LAYERS, '2') < 1e-12 < 1e-5 < worst(errors, ONE_LAYER, '2')
    assert worst(errors, TWO_LAYERS, '4') > 1e-5, 'the layers before the two have changed'


def mixed():
    """A chain with kinds of CBN that are not looked at: of order 2, behind other convolutions, and Naive CBN."""
    model = Chain()
    model.backbone.update(
        dict(
            norm2=CBN(4, order=2),
            conv3=ConvWS2d(4, 3, 3, padding=1),
            conv4=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
            norm4=CBN(4, unsupported='naive'),
        )
    )
    return model.double()


@pytest.mark.usefixtures('trains_on_cpu')
@pytest.mark.parametrize(('make', 'looked_at'), [(Chain, {'1', '2', '3', '4'}), (mixed, {'1'})])
@pytest.mark.parametrize('kind', [GradientRatioHook, StatisticsFidelityHook])
def test_the_training_goes_on_as_without_it(tmp_path, kind, make, looked_at):
    hook = kind(every=1) if kind is GradientRatioHook else kind(every=2, max_tau=1)
    plain, watched = (train(tmp_path / str(bool(h)), make(), h, epochs=2).model.state_dict() for h in (None, hook))
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    if kind is StatisticsFidelityHook:
        assert {error.layer[-1] for error in hook.errors} == looked_at


def test_a_model_without_such_layers_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match='backbone, neck and RoI head have no CBN of order 1'):
        train(tmp_path, Net(), GradientRatioHook())


@pytest.mark.parametrize('name', ['every', 'draws', 'layers_before'])
def test_wrong_arguments_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f'{name} must be an int >= 1, got 0'):
        GradientRatioHook(**{name: 0})
    with pytest.raises(TypeError, match=f'{name} must be an int'):
        GradientRatioHook(**{name: 1.5})
