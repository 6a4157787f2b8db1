"""Normalizers of a built model become others in place: everything that holds them keeps holding the right thing."""

import copy

import pytest
import torch
from mmdet.models.backbones import ResNet
from torch import nn

from mmdet_cbn import BRN, CBN, pairing
from mmdet_cbn.layers.conversion import active_norms, convert_in_place


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def net():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Sequential(Block(), Block()), nn.Conv2d(3, 2, 1))
    model(torch.randn(2, 3, 8, 8))  # statistics that are not those of the start
    return model


def of_type(model, kind):
    return [name for name, module in model.named_modules() if type(module) is kind]


def train(model, optimizer, steps=3):
    for step in range(steps):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_all_batchnorms_become_cbn_and_train():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, steps=1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert CBN.convert_batchnorm(model, window_size=3, order=1) is model
    assert of_type(model, CBN) == ['0.bn', '1.0.bn', '1.1.bn'] and of_type(model, nn.BatchNorm2d) == []
    after = (model.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    train(model, optimizer)
    for block in (model[0], *model[1]):
        assert (block.bn.window_size, block.bn.order, block.bn.window_length) == (3, 1, 3)
        assert not torch.equal(block.bn.weight, before[0]['0.bn.weight'])
        assert 'momentum_buffer' in optimizer.state[block.bn.weight]


def test_evaluation_is_unchanged():
    model, x = net().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    CBN.convert_batchnorm(model)
    assert len(of_type(model, CBN)) == 3 and not any(module.training for module in model.modules())
    assert torch.equal(model(x), expected)


def test_layers_that_are_cbn_already_stay_as_they_are():
    model = nn.Sequential(Block(), CBN.convert_batchnorm(Block(), window_size=7))
    CBN.convert_batchnorm(model)
    assert [block.bn.window_size for block in model] == [4, 7]


@pytest.mark.parametrize('prefixes', ['1', ['1.0', '1.1.bn']])
def test_only_what_is_under_the_prefixes(prefixes):
    model = CBN.convert_batchnorm(net(), prefixes)
    assert of_type(model, nn.BatchNorm2d) == ['0.bn'] and of_type(model, CBN) == ['1.0.bn', '1.1.bn']


def test_a_prefix_is_a_whole_name():
    model = nn.ModuleDict(dict(a=Block(), ab=Block()))
    assert of_type(CBN.convert_batchnorm(model, 'a'), CBN) == ['a.bn']


def test_frozen_layers_stay_batchnorms():
    """mmdet's are put into evaluation by train() itself, a user's own by eval()."""
    model = nn.ModuleDict(dict(backbone=ResNet(18, frozen_stages=1, norm_eval=False), a=Block(), b=Block()))
    model['b'].bn.eval()
    CBN.convert_batchnorm(model)
    frozen = of_type(model, nn.BatchNorm2d)
    assert [name for name in frozen if not name.startswith('backbone.layer1.')] == ['backbone.bn1', 'b.bn']
    assert len(frozen) == 1 + 4 + 1 and len(of_type(model, CBN)) == 20 - 5 + 1
    assert model['a'].bn.training and not model['b'].bn.training

    evaluated = nn.ModuleDict(dict(backbone=ResNet(18, norm_eval=True), a=Block())).eval()
    CBN.convert_batchnorm(evaluated)
    assert of_type(evaluated, CBN) == ['a.bn']


def test_one_layer_in_two_places_stays_one():
    model = nn.Sequential(Block(), Block())
    model[1].bn = model[0].bn
    CBN.convert_batchnorm(model)
    assert type(model[1].bn) is CBN and model[1].bn is model[0].bn


def test_arguments_and_missing_parts_are_kept():
    bn = nn.BatchNorm2d(3, eps=0.1, momentum=None, affine=False, track_running_stats=False)
    cbn = CBN.convert_batchnorm(bn)
    assert cbn is bn and type(bn) is CBN
    assert (bn.eps, bn.momentum, bn.weight, bn.running_mean) == (0.1, None, None, None)
    assert (bn.track_running_stats, bn.window_size, bn.order) == (False, 4, 1)


def test_sync_batchnorm_becomes_cbn_too():
    assert type(CBN.convert_batchnorm(nn.SyncBatchNorm(3))) is CBN


def test_hooks_and_their_handles_stay():
    block, calls = Block(), []
    handle = block.bn.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    block.bn.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append('backward'))
    CBN.convert_batchnorm(block)
    block(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == [CBN, 'backward'] and block.bn.window_length == 1
    handle.remove()
    block(torch.randn(2, 3, 8, 8))
    assert calls == [CBN, 'backward']


def test_a_cbn_lets_go_of_its_convolution_when_it_becomes_another():
    block = CBN.convert_batchnorm(Block())
    for _ in range(3):
        block(torch.randn(2, 3, 8, 8))
    assert len(block.conv._forward_hooks) == 1
    convert_in_place(block.bn, nn.BatchNorm2d(3))
    assert type(block.bn) is nn.BatchNorm2d and block.bn.training
    assert len(block.conv._forward_hooks) == 0
    assert vars(block.bn).keys() == vars(nn.BatchNorm2d(3)).keys(), 'nothing of CBN is left'
    block(torch.randn(2, 3, 8, 8))


def test_looking_for_active_norms_changes_no_mode():
    model = nn.ModuleDict(dict(backbone=ResNet(18, norm_eval=True), a=CBN.convert_batchnorm(Block())))
    model['backbone'].layer2.eval()
    for mode in (None, False):
        if mode is not None:
            model.train(mode)
        before = {name: module.training for name, module in model.named_modules()}
        assert list(active_norms(model)) == ['a.bn']
        assert {name: module.training for name, module in model.named_modules()} == before
    assert not model['a'].conv._forward_hooks and model['a'].bn.finder not in pairing.watch, 'still in evaluation'


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda: CBN.convert_batchnorm(nn.Conv2d(3, 3, 1)), ValueError, 'the model has no such normalizer in training'),
        (
            lambda: CBN.convert_batchnorm(CBN.convert_batchnorm(Block())),
            ValueError,
            'all 1 BatchNorms of the model in training are CBN',
        ),
        (
            lambda: CBN.convert_batchnorm(net(), ['1', '2']),
            ValueError,
            r"prefixes must name modules that have .*, got '2'; the model has them in \['0', '1.0', '1.1'\]",
        ),
        (lambda: CBN.convert_batchnorm(net(), 5), TypeError, 'prefixes must be a name, a list of names or None, got 5'),
        (lambda: CBN.convert_batchnorm(net(), []), ValueError, 'prefixes must hold at least one name, got'),
        (lambda: CBN.convert_batchnorm(net(), window_size=0), ValueError, 'window_size must be an int >= 1'),
        (
            lambda: convert_in_place(nn.BatchNorm2d(3), nn.GroupNorm(1, 3)),
            ValueError,
            'a BatchNorm2d cannot become a GroupNorm',
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_changes_when_an_argument_is_wrong():
    model = net()
    with pytest.raises(ValueError, match="got 'nothing'"):
        CBN.convert_batchnorm(model, ['0', 'nothing'])
    assert of_type(model, CBN) == []


def test_brn_becomes_cbn_and_back():
    block = Block()
    convert_in_place(block.bn, BRN(3))
    CBN.convert_batchnorm(block)
    assert type(block.bn) is CBN and not hasattr(block.bn, 'r_max')


class BatchNormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class NamedBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize('kind', [BatchNormAndReLU, NamedBatchNorm])
def test_a_batch_norm_that_does_more_is_refused_by_name(kind):
    model = nn.ModuleDict(dict(neck=nn.BatchNorm2d(4), head=nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))))
    if kind is NamedBatchNorm:
        assert type(CBN.convert_batchnorm(model)['head'][1]) is CBN
        return
    with pytest.raises(ValueError, match=r"'head\.1' is a BatchNormAndReLU, which does more than BatchNorm"):
        CBN.convert_batchnorm(model)
    assert type(model['neck']) is nn.BatchNorm2d, 'nothing has changed'
    assert type(CBN.convert_batchnorm(model, prefixes='neck')['neck']) is CBN


@pytest.mark.parametrize('affine', [True, False])
def test_a_batch_norm_without_beta_stays_without_it(affine):
    norm = nn.BatchNorm2d(3, affine=affine)
    norm.register_parameter('bias', None)  # as with bias=False, of a newer torch
    model = CBN.convert_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 3), norm))
    assert type(model[1]) is CBN and dict(model[1].named_parameters()).keys() == ({'weight'} if affine else set())
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert model[1].window_length == 3


@pytest.mark.parametrize('kind', [CBN, BRN])
def test_fx_takes_a_layer_as_one_as_it_does_batch_norm(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ['placeholder', 'call_module', 'call_module', 'output']
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        traced(x).sum().backward()
    assert getattr(model[1], 'window_length', 3) == 3
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


def test_converted_layers_draw_samples_of_their_own_and_leave_other_random_numbers_alone():
    blocks = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.BatchNorm1d(3))
    before = torch.get_rng_state()
    CBN.convert_batchnorm(model, samples=8)
    assert torch.equal(torch.get_rng_state(), before)
    draws = {layer.compensation.draws for layer in model if isinstance(layer, CBN)}
    assert len(draws) == 3 and type(model[-1]) is nn.BatchNorm1d


def test_to_look_for_active_norms_leaves_no_norm_watching():
    """One with a part of its own, as timm's norms with their activation."""

    class WithActivation(CBN):
        def __init__(self, *args):
            super().__init__(*args)
            self.activation = nn.ReLU()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), WithActivation(4)).eval()
    assert list(active_norms(model, CBN)) == ['1']
    assert not model[1].training and model[1].finder not in pairing.watch
