"""The layer is the paper's method, and where it is not in training, it is nn.BatchNorm2d."""

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvAWS2d, ConvModule, ConvWS2d, build_conv_layer, build_norm_layer, fuse_conv_bn
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmdet_cbn import CBN, pairing
from mmdet_cbn.compensation import base
from mmdet_cbn.compensation.first_order import compensate
from mmdet_cbn.experiments.oracle import OracleCBN, batches, loss_of
from mmdet_cbn.layers.gradient import GRADIENTS
from mmdet_cbn.layers.statistics import Running, update_running
from mmdet_cbn.old_torch import IS_BEFORE_2_6

pytestmark = pytest.mark.usefixtures('device')

CONVOLUTIONS = {
    '1x1': dict(kernel_size=1),
    '3x3 padded': dict(kernel_size=3, padding=1),
    '3x3 stride 2': dict(kernel_size=3, padding=1, stride=2),
    '5x5': dict(kernel_size=5, padding=2),
    '1x1 stride 2': dict(kernel_size=1, stride=2),
    '3x3 dilated': dict(kernel_size=3, padding=2, dilation=2),
    '3x5 uneven': dict(kernel_size=(3, 5), padding=(0, 3), stride=(2, 1), dilation=(1, 2)),
    'groups': dict(kernel_size=3, padding=1, groups=2),
    'depthwise': dict(kernel_size=3, padding=1, groups=4),
    'bias': dict(kernel_size=3, padding=1, bias=True),
    'groups and bias': dict(kernel_size=3, stride=2, groups=2, bias=True),
    'wide padding': dict(kernel_size=3, padding=3, stride=3),
}


@pytest.fixture
def told(caplog):
    """What the layers have told mmengine's log so far, as a function of words in it."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield lambda words: [record.getMessage() for record in caplog.records if words in record.getMessage()]
    logger.removeHandler(caplog.handler)


def conv_and_norm(seed=0, dtype=torch.float64, conv=CONVOLUTIONS['3x3 padded'], **norm_args):
    torch.manual_seed(seed)
    norm = CBN(4, **norm_args)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return nn.Sequential(nn.Conv2d(4, 4, **{'bias': False, **conv}), norm).to(dtype)


ALL_GRADIENTS = [*GRADIENTS, 0.25]
ORDERS_AND_GRADIENTS = [(0, 'batch'), (0, 'projection'), *((order, kind) for order in (1, 2) for kind in ALL_GRADIENTS)]


@pytest.mark.parametrize(('order', 'gradient'), ORDERS_AND_GRADIENTS)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_output_and_gradients_are_the_oracles_over_sgd_steps(name, order, gradient):
    model = conv_and_norm(conv=CONVOLUTIONS[name], window_size=3, order=order, gradient=gradient)
    conv = model[0]
    how = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
    oracle = OracleCBN(3, order, gradient=gradient, **how)
    if order == 0:
        conv.bias = None  # without compensation the layer does not know the bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    assert_trains_as_the_oracle(model, oracle, optimizer, steps=6)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_it_is_so_where_launches_are_dear(name, monkeypatch):
    """As on a GPU, where other operators compute the same."""
    monkeypatch.setattr(base, 'are_launches_dear', lambda tensor: True)
    test_output_and_gradients_are_the_oracles_over_sgd_steps(name, order=1, gradient=0.25)


def assert_trains_as_the_oracle(model, oracle, optimizer, steps, effective=lambda weight: weight):
    """A convolution and its norm, which follows what ``effective`` makes of the weight."""
    conv, norm = model
    for step, x in enumerate(batches(steps)):
        x.requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        loss_of(y).backward()

        leaves = [t.detach().clone().requires_grad_() for t in (x, conv.weight, norm.weight, norm.bias)]
        expected = oracle(leaves[0], effective(leaves[1]), *leaves[2:])
        gradients = torch.autograd.grad(loss_of(expected), leaves)

        assert norm.window_length == min(step + 1, 3)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        for actual, right in zip((x, conv.weight, norm.weight, norm.bias), gradients, strict=True):
            torch.testing.assert_close(actual.grad, right, rtol=1e-8, atol=1e-9)
        if conv.bias is not None:
            torch.testing.assert_close(conv.bias.grad, torch.zeros_like(conv.bias), rtol=0, atol=1e-10)
        optimizer.step()


def standardized(weight):
    return (weight - weight.mean(dim=(1, 2, 3), keepdim=True)) / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)


def standardized_anew(weight):
    """With gamma 1 and beta 0, as ConvAWS2d has them if no checkpoint is loaded."""
    deviation = (weight.var(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return (weight - weight.mean(dim=(1, 2, 3), keepdim=True)) / deviation


TRANSPOSED = {
    'stride 2': dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    'uneven': dict(kernel_size=(4, 3), stride=(2, 3), padding=(1, 0), output_padding=(0, 1), dilation=(1, 2)),
    'groups': dict(kernel_size=2, stride=2, groups=2),
    'cut': dict(kernel_size=2, padding=2),
}
# For each: the convolution, and the same as a function of the input and of the weight which the statistics depend on.
OTHERS = {
    **{
        f'transposed, {name}': (
            lambda how=how: nn.ConvTranspose2d(4, 4, **how),
            lambda x, weight, how=how: F.conv_transpose2d(
                x, weight, **{key: value for key, value in how.items() if key != 'kernel_size'}
            ),
            lambda weight: weight,
        )
        for name, how in TRANSPOSED.items()
    },
    "mmcv's transposed": (
        lambda: build_conv_layer(dict(type='deconv'), 4, 4, 3, stride=2),
        lambda x, weight: F.conv_transpose2d(x, weight, stride=2),
        lambda weight: weight,
    ),
    'ConvWS': (
        lambda: ConvWS2d(4, 4, 3, padding=1, groups=2),
        lambda x, weight: F.conv2d(x, weight, padding=1, groups=2),
        standardized,
    ),
    'ConvAWS': (
        lambda: ConvAWS2d(4, 4, 3, stride=2),
        lambda x, weight: F.conv2d(x, weight, stride=2),
        standardized_anew,
    ),
    'adaptive padding': (
        lambda: Conv2dAdaptivePadding(4, 4, 3, stride=2),
        lambda x, weight: F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, stride=2),  # of an odd number of rows and columns
        lambda weight: weight,
    ),
}


@pytest.mark.parametrize(
    ('order', 'samples', 'gradient'), [(1, None, 'batch'), (1, None, 0.25), (2, None, 'weights'), (1, 1000, 'window')]
)
@pytest.mark.parametrize('name', OTHERS)
def test_with_other_convolutions_too_it_is_the_oracle(name, order, samples, gradient):
    torch.manual_seed(0)
    make, convolve, effective = OTHERS[name]
    norm = CBN(4, window_size=3, order=order, samples=samples, gradient=gradient)
    model = nn.Sequential(make(), norm).double()
    assert model[0].bias is not None
    oracle = OracleCBN(3, 2 if samples else order, gradient=gradient, convolve=convolve)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    assert_trains_as_the_oracle(model, oracle, optimizer, steps=5, effective=effective)


def replaced_data(parameters):
    """An optimizer that computes new tensors: the parameters get them as their data."""
    for parameter in parameters:
        parameter.data = parameter.data - 0.01 * parameter.grad


def replaced_parameters(model):
    """One that makes new parameters."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() - 0.01 * parameter.grad))


OPTIMIZERS = {
    'in place': lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1).step,
    'AdamW': lambda model: torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1).step,
    'foreach': lambda model: torch.optim.RMSprop(model.parameters(), lr=0.001, foreach=True).step,
    'new data': lambda model: lambda: replaced_data(model.parameters()),
    'new parameters': lambda model: lambda: replaced_parameters(model),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_any_way_to_change_the_weights_agrees_with_the_oracle(optimizer):
    model = conv_and_norm(window_size=3, conv=CONVOLUTIONS['1x1'])
    oracle = OracleCBN(3)
    step = OPTIMIZERS[optimizer](model)
    for number, x in enumerate(batches(6)):
        y = model(x)
        conv, norm = model
        torch.testing.assert_close(y, oracle(x, conv.weight, norm.weight, norm.bias))
        assert norm.window_length == min(number + 1, 3)
        model.zero_grad()
        loss_of(y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        step()


def test_float32_is_close_to_the_oracle():
    model = conv_and_norm(dtype=torch.float32, window_size=4)
    oracle = OracleCBN(4, padding=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for x in batches(6, dtype=torch.float32):
        y = model(x)
        expected = oracle(x.double(), *(p.detach().double() for p in (model[0].weight, model[1].weight, model[1].bias)))
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss_of(y).backward()
        optimizer.step()


def test_a_mean_far_larger_than_the_deviation_does_not_cancel_in_float32():
    model = conv_and_norm(dtype=torch.float32, conv=dict(kernel_size=1), window_size=3)
    oracle = OracleCBN(3)
    for x in batches(4):
        x = x + 300
        y = model(x.float())
        expected = oracle(x.float().double(), *(p.detach().double() for p in (model[0].weight, *model[1].parameters())))
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            model[0].weight.mul_(1.001)


def test_invalid_old_statistics_are_replaced_as_in_eq_10():
    """A step so large that first order predicts a negative variance."""
    model = conv_and_norm(window_size=2)
    steps = []
    model[1].register_step_hook(lambda layer, step: steps.append(step))
    oracle = OracleCBN(2, padding=1)
    first, second = batches(2)
    model(first)
    oracle(first, model[0].weight, model[1].weight, model[1].bias)
    with torch.no_grad():
        model[0].weight.mul_(-1.5)
    y = model(second)
    assert (steps[1].past.var == 0).all(), 'the step was meant to make the prediction invalid'
    torch.testing.assert_close(y, oracle(second, model[0].weight, model[1].weight, model[1].bias))


def test_window_size_1_is_batchnorm():
    model = conv_and_norm(window_size=1)
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(4).double())
    reference.load_state_dict(model.state_dict())
    for x in batches(3):
        results = []
        for net in (model, reference):
            inputs = x.clone().requires_grad_()
            y = net(inputs)
            results.append([y, *torch.autograd.grad(loss_of(y), [inputs, *net.parameters()]), *net.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert model[1].window_length == 1


@pytest.mark.parametrize('name', ['3x3 padded', 'groups and bias', 'depthwise'])
def test_unchanged_weights_make_no_correction_to_the_last_bit(name):
    model = conv_and_norm(window_size=8, dtype=torch.float32, conv=CONVOLUTIONS[name])
    for x in batches(9, dtype=torch.float32):
        model(x)
    past = model[1].windows.current.stacked()
    mean, var, _ = compensate(past, model[0].weight.detach(), model[0].groups)
    assert torch.equal(mean, past.mean) and torch.equal(var, past.var)


def test_burn_in_is_batchnorm_and_the_window_fills_by_one_afterwards():
    model = conv_and_norm(window_size=3)
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(4).double())
    reference.load_state_dict(model.state_dict())
    model[1].burn_in = True
    for x in batches(2):
        assert torch.equal(model(x), reference(x))
        assert model[1].window_length == 1
    model[1].burn_in = False
    lengths = []
    for x in batches(5):
        model(x)
        lengths.append(model[1].window_length)
    assert lengths == [1, 2, 3, 3, 3]


class Operations(TorchDispatchMode):
    """Notes every operator that is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


# Of [C] numbers each: they keep inf and NaN out of the running statistics.
GUARD = {
    'aten.clone': 2,
    'aten.lt': 1,
    'aten.where': 2,
    'aten.copy_': 2,
    'aten.all': 1,
    'aten.logical_not': 1,
    'aten.add_': 1,
}


@pytest.mark.parametrize('mode', ['burn-in', 'k = 1', 'evaluation'])
@pytest.mark.parametrize('samples', [None, 8])
def test_without_a_window_no_operator_on_the_input_is_called_beyond_batchnorms(mode, samples):
    model = conv_and_norm(window_size=1 if mode == 'k = 1' else 3, samples=samples)
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(4).double())
    model[1].burn_in = mode == 'burn-in'
    for x in batches(2):
        called = []
        for net in (model, reference):
            net.train(mode != 'evaluation')
            with Operations() as operations:
                loss_of(net(x)).backward()
            called.append(Counter(str(func.overloadpacket) for func in operations.called))
        assert called[0] - called[1] == ({} if mode == 'evaluation' else GUARD)
        assert not called[1] - called[0]


@pytest.mark.parametrize('momentum', [0.1, 0.7, None])
def test_running_statistics_of_the_batch_are_batchnorms(momentum):
    model = conv_and_norm(window_size=4, momentum=momentum, running_stats='batch')
    reference = nn.BatchNorm2d(4, momentum=momentum).double()
    for x in batches(5):
        model(x)
        reference(model[0](x))
        for actual, expected in zip(model[1].buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(samples=10_000)], ids=str)
def test_running_statistics_of_the_window_are_those_of_all_its_examples(kind):
    """The variance unbiased, as BatchNorm has it; with a bias of the convolution, which is in what is normalized."""
    model = conv_and_norm(conv=CONVOLUTIONS['bias'], window_size=3, momentum=0.3, **kind)
    seen, mean, var = [], torch.zeros(4).double(), torch.ones(4).double()
    for number, x in enumerate(batches(6, shape=(1, 4, 9, 7))):
        model(x)
        seen = [*seen, model[0](x).detach()][-3:]  # the weights stay
        mean.lerp_(torch.cat(seen).mean(dim=(0, 2, 3)), 0.3)
        var.lerp_(torch.cat(seen).var(dim=(0, 2, 3)), 0.3)
        torch.testing.assert_close(model[1].running_mean, mean)
        torch.testing.assert_close(model[1].running_var, var)
        assert model[1].num_batches_tracked == number + 1
    with torch.no_grad():
        model[0].weight.mul_(1.1)
        model(x * float('nan'))
    torch.testing.assert_close(model[1].running_mean, mean)


def test_running_statistics_of_the_window_are_the_oracles_while_weights_change():
    model = conv_and_norm(window_size=3, momentum=0.3, conv=CONVOLUTIONS['1x1'])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oracle = OracleCBN(3)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for number, x in enumerate(batches(5), start=1):
        y = model(x)
        oracle(x, model[0].weight, model[1].weight, model[1].bias)
        count = min(number, 3) * y.numel() / y.size(1)
        mean.lerp_(oracle.mean, 0.3)
        var.lerp_(oracle.var * count / (count - 1), 0.3)
        torch.testing.assert_close(model[1].running_mean, mean)
        torch.testing.assert_close(model[1].running_var, var)
        optimizer.zero_grad()
        loss_of(y).backward()
        optimizer.step()


def test_without_running_statistics_evaluation_uses_the_batch_as_batchnorm_does():
    model = conv_and_norm(window_size=3, track_running_stats=False)
    for x in batches(3):
        model(x)
    reference = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    reference.load_state_dict(model[1].state_dict())
    model.eval()
    assert torch.equal(model(x), reference(model[0](x)))


@pytest.mark.parametrize('burn_in', [False, True])
def test_running_statistics_stop_where_track_running_stats_is_set_to_false(burn_in):
    model = conv_and_norm(window_size=3)
    model[1].burn_in = burn_in
    model[1].track_running_stats = False
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    for x in batches(3):
        model(x)
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_affine_parameters():
    model = conv_and_norm(window_size=3)
    plain = nn.Sequential(copy.deepcopy(model[0]), CBN(4, affine=False, window_size=3)).double()
    nn.init.ones_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    for x in batches(4):
        torch.testing.assert_close(plain(x), model(x))
    loss_of(plain(x)).backward()
    loss_of(model(x)).backward()
    torch.testing.assert_close(plain[0].weight.grad, model[0].weight.grad)


def test_evaluation_is_batchnorms_bit_for_bit_and_leaves_the_window_alone():
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    reference = nn.BatchNorm2d(4).double().eval()
    reference.load_state_dict(model[1].state_dict())
    before = [t.clone() for t in model[1].windows.current.stacked()]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), reference(model[0](x)))
    assert all(torch.equal(a, b) for a, b in zip(before, model[1].windows.current.stacked(), strict=True))
    assert model[1].window_length == 3
    model.train()
    model(x)
    assert model[1].window_length == 3


def test_checkpoints_are_batchnorms_in_both_directions():
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    bn = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    assert list(model.state_dict()) == list(bn.state_dict())
    bn.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(bn.eval()(x), model.eval()(x))
    model.train()
    model.load_state_dict(bn.state_dict(), strict=True)
    model(x)
    assert model[1].window_length == 1, 'the window of other weights must not be used'


def test_mmcv_fuses_it_into_the_convolution():
    model = nn.Sequential()
    model.conv, model.bn = conv_and_norm(window_size=3, conv=dict(kernel_size=3, bias=True))
    for x in batches(4):
        model(x)
    model.eval()
    expected = model(x)
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert not any(isinstance(m, CBN) for m in fused.modules())
    torch.testing.assert_close(fused(x), expected)


def test_build_norm_layer_builds_it_like_a_batchnorm():
    name, layer = build_norm_layer(dict(type='CBN', requires_grad=False, window_size=2, order=0), 8, postfix=1)
    assert name == 'bn1' and isinstance(layer, CBN) and isinstance(layer, nn.BatchNorm2d)
    assert (layer.window_size, layer.order, layer.eps) == (2, 0, 1e-5)
    assert not any(p.requires_grad for p in layer.parameters())
    assert 'window_size=2, order=0' in repr(layer)


def test_paramwise_cfg_treats_it_as_the_norm_that_it_is():
    model = conv_and_norm(conv=dict(kernel_size=3, bias=True))
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5),
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0),
        ),
    )
    settings = {id(group['params'][0]): (group['lr'], group['weight_decay']) for group in wrapper.param_groups}
    conv, norm = model
    assert [settings[id(p)] for p in norm.parameters()] == [(0.1, 0), (0.1, 0)]
    assert [settings[id(p)] for p in conv.parameters()] == [(0.1, 0.5), (0.2, 0.5)]


class TorchvisionStyle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, bias=False), CBN(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), CBN(8)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x))


NORM_CFG = dict(type='CBN', requires_grad=True)
STRUCTURES = {
    'ConvModule': lambda: ConvModule(4, 8, 3, norm_cfg=NORM_CFG),
    'ConvModule with bias': lambda: ConvModule(4, 8, 3, norm_cfg=NORM_CFG, bias=True),
    'ConvModule with reflect padding': lambda: ConvModule(
        4, 8, 3, padding=1, norm_cfg=NORM_CFG, padding_mode='reflect'
    ),
    'BasicBlock': lambda: BasicBlock(4, 4, norm_cfg=NORM_CFG),
    'Bottleneck': lambda: Bottleneck(4, 1, norm_cfg=NORM_CFG),
    'downsample': lambda: BasicBlock(
        4, 8, 2, norm_cfg=NORM_CFG, downsample=nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), CBN(8))
    ),
    'torchvision style': TorchvisionStyle,
    'padding same': lambda: nn.Sequential(nn.Conv2d(4, 8, (2, 3), padding='same'), CBN(8)),
    'padding valid': lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding='valid'), CBN(8)),
    'circular padding': lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode='circular'), CBN(8)),
}


def norm_calls(model, inputs):
    """(conv, norm, mean of what the norm was given) of every norm(conv(x)) in one forward."""
    outputs, found = [], []

    def after_conv(conv, args, output):
        outputs.append((output, conv))

    def before_norm(norm, args):
        conv = next(conv for output, conv in outputs if output is args[0])
        found.append((conv, norm, args[0].mean((0, 2, 3))))

    handles = [m.register_forward_hook(after_conv) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(before_norm) for m in model.modules() if isinstance(m, CBN)]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize('name', STRUCTURES)
def test_every_layer_finds_its_convolution_and_predicts_its_change(name):
    """The prediction of the mean is exact in the layer's own weights. So if one convolution changes and the same batch
    comes again, the norm that it feeds must predict the new mean, which shows that it found this convolution and its
    input."""
    torch.manual_seed(0)
    model = STRUCTURES[name]().double()
    inputs = torch.randn(2, 4, 12, 12, dtype=torch.float64) + 1
    calls = norm_calls(model, inputs)
    assert {norm for _, norm, _ in calls} == {m for m in model.modules() if isinstance(m, CBN)}
    for conv, norm, _ in calls:
        for layer in model.modules():
            if isinstance(layer, CBN):
                layer.forget_window()
        model(inputs)
        with torch.no_grad():
            conv.weight.add_(0.1 * torch.randn_like(conv.weight))
        steps = []
        handle = norm.register_step_hook(lambda layer, step, steps=steps: steps.append(step.past.mean.clone()))
        mean = next(mean for c, _, mean in norm_calls(model, inputs) if c is conv)
        handle.remove()
        assert norm.window_length == 2
        bias = 0 if conv.bias is None else conv.bias
        torch.testing.assert_close(steps[0][0], mean - bias)


def test_no_convolution_is_a_clear_error_naming_layer_and_remedy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), CBN(4))

        def forward(self, x):
            return self.stem(x)

    net = Net()
    with pytest.raises(RuntimeError, match=r"'stem\.2'.*not the output of a convolution.*order=0"):
        net(torch.randn(2, 3, 4, 4))
    net.eval()(torch.randn(2, 3, 4, 4))
    net.stem[2] = CBN(4, order=0)
    for length in (1, 2, 3):
        net.train()(torch.randn(2, 3, 4, 4))
        assert net.stem[2].window_length == length


UNSUPPORTED = {
    'something between': lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
    'another class': lambda: StandardizedConv(4, 4, 3),
    'computed weight': lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    'no convolution': lambda: nn.AvgPool2d(2),
}


@pytest.mark.parametrize('kind', [dict(), dict(order=2), dict(samples=8), dict(gradient='projection')], ids=str)
@pytest.mark.parametrize('name', UNSUPPORTED)
def test_a_layer_without_a_supported_convolution_becomes_naive_if_asked_to(name, kind, told):
    torch.manual_seed(0)
    model = nn.Sequential(UNSUPPORTED[name](), CBN(4, window_size=3, unsupported='naive', **kind)).double()
    gradient = 'projection' if 'gradient' in kind else 'batch'
    naive = nn.Sequential(model[0], CBN(4, window_size=3, order=0, gradient=gradient)).double()
    for x in batches(4):
        results = []
        for trained in (model, naive):
            y = trained(x)
            results += [y.detach(), *torch.autograd.grad(loss_of(y), trained[1].weight)]
        for ours, theirs in zip(results[:2], results[2:], strict=True):
            assert torch.equal(ours, theirs)
        assert model[1].window_length == naive[1].window_length
    assert (model[1].order, model[1].samples, model[1].gradient) == (0, None, gradient)
    assert model[1].finder not in pairing.watch
    assert not any(module._forward_hooks for module in model.modules())
    (message,) = told('takes order=0 (Naive CBN) from now on, because')
    assert message.startswith("CBN layer '1'")


def test_a_layer_that_became_naive_resumes_so_and_copies_are_so():
    def made():
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), CBN(4, window_size=3, unsupported='naive')).double()

    model, *inputs = made(), *batches(4)
    for x in inputs[:3]:
        model(x)
    resumed = made()
    resumed.load_state_dict(model.state_dict())
    resumed[2].load_window_state(model[2].window_state())
    copied = copy.deepcopy(model)
    expected = model(inputs[3])
    assert torch.equal(resumed(inputs[3]), expected) and torch.equal(copied(inputs[3]), expected)
    assert resumed[2].order == copied[2].order == 0
    with pytest.raises(ValueError, match='order or samples are others'):
        CBN(4, window_size=3).load_window_state(model[2].window_state())


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


@pytest.mark.parametrize(
    ('conv', 'because'),
    [
        (lambda: StandardizedConv(4, 4, 3), 'StandardizedConv does not compute what torch.nn.Conv2d does'),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), 'its weight is computed anew'),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), 'its weight is computed anew'),
    ],
)
def test_a_convolution_that_it_cannot_handle_is_an_error_that_says_why(conv, because):
    model = nn.Sequential(conv(), CBN(4))
    with pytest.raises(RuntimeError, match=rf"'1'.*{because}.*order=0"):
        model(torch.randn(2, 4, 5, 5))


def test_an_output_changed_in_place_is_not_mistaken_for_the_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), CBN(4))
    with pytest.raises(RuntimeError, match='not the output of a convolution'):
        model(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(('someone_watches', 'expected'), [(False, [1, 1, 2, 3]), (True, [1, 2, 3, 3])])
def test_a_replaced_convolution_is_found_in_the_next_forward(someone_watches, expected):
    """Or at once, where calls are being watched on behalf of another layer."""
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    replaced = weakref.ref(model[0])
    model[0] = nn.Conv2d(4, 4, 3, padding=1).double()
    for finder in list(pairing.watch.finders):
        pairing.watch.discard(finder)
    other = CBN(4) if someone_watches else None
    lengths = []
    for x in batches(4):
        model(x)
        lengths.append(model[1].window_length)
    assert lengths == expected
    gc.collect()
    assert other is not None or replaced() is None, 'a convolution out of use is given back'


@pytest.mark.parametrize('samples', [None, 8])
def test_unlike_convolutions_in_turn_do_not_mix_their_windows(samples):
    norm = CBN(4, window_size=3, samples=samples).double()
    small, large = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    lengths = []
    for conv, x in zip([small, large, *[small] * 3, *[large] * 3], batches(8), strict=True):
        norm(conv(x))
        lengths.append(norm.window_length)
    assert lengths == [1, 1, 1, 2, 3, 1, 2, 3]


def saved_and_loaded(model):
    with io.BytesIO() as file:
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


CLONES = pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])


@pytest.mark.parametrize('samples', [None, 8])
@CLONES
def test_a_copy_has_a_window_and_convolution_of_its_own(clone, samples):
    model = conv_and_norm(window_size=3, samples=samples)
    for x in batches(3):
        model(x)
    twin = clone(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    expected = clone(twin)(x)
    model(x)
    assert torch.equal(twin(x), expected), 'what happens to the original must not reach the copy'
    assert twin[1].window_length == 3


@CLONES
@pytest.mark.parametrize('use_reentrant', [None, False, True])
@pytest.mark.parametrize('trained', [0, 1, 2])
def test_a_copy_trains_as_its_original(clone, use_reentrant, trained):
    """From the first iteration on, also where the original has not met its convolution yet."""
    model = conv_and_norm(window_size=3)
    for x in batches(trained):
        model(x)
    twin = clone(model)
    for number, x in enumerate(batches(4, seed=2), start=trained + 1):
        results = []
        for net in (model, twin):
            net.zero_grad()
            inputs = x.clone().requires_grad_()
            y = net(inputs) if use_reentrant is None else checkpoint(net, inputs, use_reentrant=use_reentrant)
            loss_of(y).backward()
            results.append([y, inputs.grad, *(p.grad for p in net.parameters()), *net.buffers()])
            assert net[1].window_length == min(number, 3)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    'kind',
    [dict(), dict(order=0), dict(order=2), dict(samples=8), *(dict(gradient=kind) for kind in ALL_GRADIENTS[1:])],
    ids=str,
)
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_checkpointed_block_sees_the_same_window_twice_and_advances_it_once(use_reentrant, kind):
    model, plain = (conv_and_norm(window_size=3, **kind) for _ in range(2))
    for x in batches(5):
        results = []
        for net, call in ((plain, plain), (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))):
            inputs = x.clone().requires_grad_()
            net.zero_grad()
            y = call(inputs)
            loss_of(y).backward()
            results.append([y, inputs.grad, *(p.grad for p in net.parameters()), *net.buffers()])
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(0.01 * p.grad)
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        assert model[1].window_length == plain[1].window_length


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('make', [nn.ConvTranspose2d, ConvWS2d, ConvAWS2d, Conv2dAdaptivePadding])
def test_a_checkpointed_block_with_another_convolution_has_the_same_gradients(make, use_reentrant):
    torch.manual_seed(0)
    plain = nn.Sequential(make(4, 4, 3), CBN(4, window_size=3)).double()
    other = copy.deepcopy(plain)
    for x in batches(4):
        for net in (plain, other):
            net.zero_grad()
            inputs = x.clone().requires_grad_()
            loss_of(net(inputs) if net is plain else checkpoint(net, inputs, use_reentrant=use_reentrant)).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.sub_(0.01 * parameter.grad)
        for actual, expected in zip(other.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)


def test_empty_input_passes_as_in_batchnorm_and_leaves_the_window_alone():
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    empty = torch.zeros(0, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    y = model(empty)
    y.sum().backward()
    assert y.shape == empty.shape and len(model[1].windows.current) == 2
    assert all(torch.isfinite(buffer).all() for buffer in model[1].buffers())
    model(x)
    assert model[1].window_length == 3


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_bad_batch_does_not_poison_the_window(bad):
    model, clean = conv_and_norm(window_size=3), conv_and_norm(window_size=3)
    first, second, third = batches(3)
    poisoned = second.clone()
    poisoned[0, 0, 0, 0] = bad
    for x in (first, poisoned):
        model(x)
    clean(first)
    assert model[1].bad_batches == 1 and clean[1].bad_batches == 0
    assert all(torch.isfinite(buffer).all() for buffer in model[1].buffers())
    # The poisoned iteration is left out: what remains is the window of the clean one.
    torch.testing.assert_close(model(third), clean(third))
    assert torch.isfinite(model(second)).all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('kind', [dict(), dict(order=2), dict(samples=10_000)], ids=str)
@pytest.mark.parametrize('gradient', ['weights', 'window', 0.25])
def test_a_bad_batch_is_left_out_of_the_gradient_too(gradient, kind, bad):
    model, clean = (conv_and_norm(window_size=3, gradient=gradient, **kind) for _ in range(2))
    first, second, third = batches(3)
    second[0, 0, 0, 0] = bad
    model(first)
    model(second)
    clean(first)
    for net in (model, clean):
        with torch.no_grad():
            net[0].weight.mul_(1.01)
        loss_of(net(third)).backward()
    torch.testing.assert_close(model[0].weight.grad, clean[0].weight.grad)


def test_a_quarter_of_the_earlier_iterations_is_the_default_where_there_is_compensation():
    assert CBN(4).gradient == CBN(4, samples=8).gradient == CBN(4, order=2).gradient == 0.25
    assert CBN(4, order=0).gradient == 'batch' and CBN(4, order=0, gradient='projection').gradient == 'projection'
    assert 'gradient=0.25' in repr(CBN(4))


@pytest.mark.parametrize('gradient', ALL_GRADIENTS)
def test_a_frozen_convolution_has_no_gradient_and_the_input_keeps_its_own(gradient):
    frozen, model = (conv_and_norm(window_size=3, gradient=gradient) for _ in range(2))
    frozen[0].requires_grad_(False)
    for x in batches(3):
        gradients = []
        for net in (frozen, model):
            inputs = x.clone().requires_grad_()
            loss_of(net(inputs)).backward()
            gradients.append(inputs.grad)
        torch.testing.assert_close(*gradients)
    assert frozen[0].weight.grad is None


@pytest.mark.parametrize('gradient', ALL_GRADIENTS)
def test_only_the_size_of_the_weights_does_not_matter_to_a_window_that_follows_them(gradient):
    """<theta_j, dL/dtheta_j> is 0, as in BatchNorm, if M and V scale with theta_j."""
    model = conv_and_norm(window_size=3, gradient=gradient, eps=1e-12)
    for x in batches(4):
        model(x)
    loss_of(model(x)).backward()
    along = (model[0].weight * model[0].weight.grad).sum(dim=(1, 2, 3)).abs() / model[0].weight.grad.norm()
    assert (along.max() > 1e-3) == (gradient == 'batch')
    assert gradient == 'batch' or along.max() < 1e-9


@pytest.mark.parametrize('momentum', [0.1, None])
def test_running_statistics_in_half_precision_are_averaged_in_float32(momentum):
    """A variance of a batch above 65504, the largest half, has a place in an average below it."""
    norm, bn = CBN(4).half(), nn.BatchNorm2d(4, momentum=momentum)
    running = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)
    torch.manual_seed(0)
    for deviation in (100, 300, 100):  # of variance 90,000
        x = torch.randn(2, 4, 9, 7).mul(deviation)
        bn(x)
        update_running(running, x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3)), momentum)
    assert running.var.dtype is torch.half
    torch.testing.assert_close(running.var.float(), bn.running_var, rtol=1e-2, atol=0)


def test_running_statistics_leave_out_the_bad_channels_alone():
    norm, clean = (CBN(4, window_size=2, order=0).double() for _ in range(2))
    first, second = batches(2)
    poisoned = second.clone()
    poisoned[1, 2, 3, 3] = float('nan')
    for x, other in ((first, first), (poisoned, second)):
        before = clean.running_mean.clone(), clean.running_var.clone()
        norm(x), clean(other)
    good = [0, 1, 3]
    for actual, expected, old in zip(norm.buffers(), clean.buffers(), before, strict=False):
        torch.testing.assert_close(actual[good], expected[good])
        assert actual[2] == old[2]
    assert norm.num_batches_tracked == 2 and norm.bad_batches == 1
    assert copy.deepcopy(norm).bad_batches == 0


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e200])
@pytest.mark.parametrize('mode', ['burn-in', 'k = 1', 'no convolution'])
def test_without_a_window_too_running_statistics_leave_out_the_bad_channels_alone(mode, bad, monkeypatch):
    """Else one overflow early in training would spoil the evaluation for good."""
    norm = CBN(4, window_size=1 if mode == 'k = 1' else 3).double()
    clean = nn.BatchNorm2d(4).double()
    norm.burn_in = mode == 'burn-in'
    conv = nn.Conv2d(4, 4, 1).double()
    first, second = (conv(x).detach() for x in batches(2))
    poisoned = second.clone()
    poisoned[1, 2, 3, 3] = bad
    for x, other in ((first, first), (poisoned, second)):
        before = clean.running_mean.clone(), clean.running_var.clone()
        monkeypatch.setattr(pairing.ConvFinder, 'find', lambda self, output: None)
        norm(x), clean(other)
    good = [0, 1, 3]
    for actual, expected, old in zip(norm.buffers(), clean.buffers(), before, strict=False):
        assert torch.equal(actual[good], expected[good])
        assert actual[2] == old[2]
    assert norm.num_batches_tracked == 2 and norm.bad_batches == 1 and norm.window_length == 1


def test_a_layer_whose_convolution_was_replaced_says_so_once(told):
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    assert told('current batch alone') == []
    for _ in range(2):
        model[0] = nn.Conv2d(4, 4, 3, padding=1).double()
        for finder in list(pairing.watch.finders):
            pairing.watch.discard(finder)
        for length, x in zip((1, 1, 2), batches(3), strict=True):
            model(x)
            assert model[1].window_length == length
    (warning,) = told('current batch alone')
    assert warning.startswith("CBN layer '1' (CBN(4, ") and 'because another convolution feeds it' in warning


def test_a_layer_whose_convolutions_take_turns_says_once_that_its_window_does_not_fit(told):
    norm = CBN(4, window_size=3).double()
    small, large = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    for conv, x in zip([small, large, small, large], batches(4), strict=True):
        norm(conv(x))
    (warning,) = told('current batch alone')
    assert "CBN layer 'CBN' (" in warning and 'because its window has statistics of another convolution' in warning
    norm = CBN(4, window_size=3).double()
    small.weight = nn.Parameter(torch.randn(4, 4, 3, 3).double())
    for x in batches(3):
        norm(small(x))
        small.weight = nn.Parameter(torch.randn(4, 4, *([1, 1] if len(small.weight[0, 0]) > 1 else [3, 3])).double())
    assert len(told('current batch alone')) == 2, 'the same convolution, with a weight of another shape'


def test_replicas_of_data_parallel_are_refused_by_name():
    model = conv_and_norm(window_size=3)
    with pytest.raises(RuntimeError, match=r'CBN layer .* cannot be trained in torch.nn.DataParallel.*Distributed'):
        model[1]._replicate_for_data_parallel()  # what DataParallel calls on each module in each forward
    replica = model.eval()[1]._replicate_for_data_parallel()
    assert not replica.training


def by_half(model):
    return model.half().float()


def by_the_meta_device(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to('meta').to_empty(device=torch.empty(0).device).load_state_dict(weights)
    return model


@pytest.mark.parametrize('move', [lambda model: model.float(), by_half, by_the_meta_device])
def test_moving_to_another_precision_or_device_starts_the_window_afresh(move):
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    model = move(model)
    lengths = []
    for x in batches(3, dtype=model[0].weight.dtype):
        model(x)
        lengths.append(model[1].window_length)
    assert lengths == [1, 2, 3]


@pytest.mark.parametrize('kind', [dict(), dict(order=2), dict(samples=8)], ids=str)
def test_a_layer_without_any_number_of_its_own_starts_afresh_after_each_move(kind):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, CBN(4, window_size=3, affine=False, track_running_stats=False, **kind))
    lengths = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for x in batches(3, dtype=dtype):
            model(x)
            lengths.append(model[1].window_length)
    assert lengths == [1, 2, 3, 1, 2, 3]


def test_a_move_to_where_the_layer_is_leaves_the_window_alone():
    model = conv_and_norm(window_size=3)
    lengths = []
    for x in batches(4):
        model.to(x.device).double().to(memory_format=torch.channels_last)
        model(x)
        lengths.append(model[1].window_length)
    assert lengths == [1, 2, 3, 3]


def test_channels_last_gives_the_same():
    model = conv_and_norm(window_size=3)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for x in batches(4):
        torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), model(x))
        for net in (model, other):
            with torch.no_grad():
                net[0].weight.mul_(1.01)


@pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(order=2), dict(samples=10_000)], ids=str)
def test_a_convolution_that_is_named_is_the_one_that_would_be_found(kind):
    found = conv_and_norm(window_size=3, **kind)
    conv = copy.deepcopy(found[0])
    named = nn.Sequential(conv, CBN(4, window_size=3, conv=conv, **kind).double())
    named.load_state_dict(found.state_dict())
    copied = copy.deepcopy(named)
    assert list(named.state_dict()) == list(found.state_dict()) and len(list(named.modules())) == 3
    for x in batches(5):
        outputs = [net(x).detach() for net in (found, named, copied)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        with torch.no_grad():
            for net in (found, named, copied):
                net[0].weight.mul_(1.02)
    assert named[1].window_length == copied[1].window_length == 3


def test_an_input_from_another_convolution_than_the_named_one_is_refused():
    conv, other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    norm = CBN(4, conv=conv)
    norm(conv(torch.randn(2, 4, 5, 5)))
    with pytest.raises(RuntimeError, match='not the output of a convolution'):
        norm(other(torch.randn(2, 4, 5, 5)))
    norm(conv(torch.randn(2, 4, 5, 5)))
    assert norm.window_length == 2


def test_of_a_convolution_that_is_named_the_call_may_be_older():
    """Both convolutions are called before both layers; after that, as if each layer followed its own."""
    pairs, plain = ([conv_and_norm(seed, window_size=3) for seed in (0, 1)] for _ in range(2))
    named = [CBN(4, window_size=3, conv=conv).double() for conv, _ in pairs]
    for norm, (_, found) in zip(named, pairs, strict=True):
        norm.load_state_dict(found.state_dict())
    for x in batches(4):
        outputs = [conv(x) for conv, _ in pairs]
        for norm, y, model, (conv, _) in zip(named, outputs, plain, pairs, strict=True):
            torch.testing.assert_close(norm(y), model(x))
            with torch.no_grad():
                conv.weight.mul_(1.02)
                model[0].weight.mul_(1.02)
    assert [norm.window_length for norm in named] == [3, 3]


@pytest.mark.parametrize('burn_in', [False, True])
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_convolutions_that_are_named_run_again_in_a_checkpointed_block(use_reentrant, burn_in):
    """And nothing keeps their inputs afterwards."""
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(2))
    norms = nn.ModuleList(CBN(4, window_size=3, conv=conv).double() for conv in convs)
    plain = copy.deepcopy(nn.ModuleList([convs, norms]))
    seen = []

    def block(x, convs, norms):
        inputs = [x * 1, x * 2]
        seen.extend(weakref.ref(each) for each in inputs)
        outputs = [conv(each) for conv, each in zip(convs, inputs, strict=True)]
        return sum(norm(y) for norm, y in zip(norms, outputs, strict=True))

    for norm in (*norms, *plain[1]):
        norm.burn_in = burn_in
    for x in batches(4):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        loss_of(checkpoint(block, inputs[0], convs, norms, use_reentrant=use_reentrant)).backward()
        loss_of(block(inputs[1], *plain)).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    gc.collect()
    assert not any(each() is not None for each in seen)


def test_a_layer_that_was_replaced_leaves_no_hook_on_its_convolution():
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        model(x)
    assert len(model[0]._forward_hooks) == 1
    model[1] = nn.BatchNorm2d(4).double()
    gc.collect()
    assert len(model[0]._forward_hooks) == 0


def test_one_value_a_channel_is_an_error_as_in_batchnorm():
    model = conv_and_norm(window_size=3, conv=dict(kernel_size=1))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(torch.zeros(1, 4, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(num_features=0), ValueError, 'num_features must be an int >= 1, got 0'),
        (dict(num_features=4.0), TypeError, r'num_features must be an int >= 1, got 4\.0 of type float'),
        (dict(window_size=0), ValueError, "window_size must be an int >= 1 or 'auto', got 0"),
        (dict(window_size=2.5), TypeError, "window_size must be an int >= 1 or 'auto', got 2.5"),
        (dict(window_size=True), TypeError, 'window_size must be'),
        (dict(window_size='automatic'), TypeError, "window_size must be an int >= 1 or 'auto', got 'automatic'"),
        (dict(order=3), ValueError, r'order must be 0 \(Naive CBN\), 1 or 2 \(of the Taylor polynomial\), got 3'),
        (dict(order=-1), ValueError, 'order must be'),
        (dict(order=1.0), TypeError, 'order must be'),
        (dict(samples=1), ValueError, 'samples must be an int >= 2 or None, got 1'),
        (dict(samples=64.0), TypeError, 'samples must be an int >= 2 or None, got 64.0 of type float'),
        (
            dict(gradient='theta'),
            ValueError,
            "gradient must be 'batch', 'weights', .* number from 0 to 1 or None, got 'theta",
        ),
        (dict(gradient=1.5), ValueError, "CBN: gradient must be 'batch', .*, a number from 0 to 1 or None, got 1.5"),
        (dict(gradient=float('nan')), ValueError, 'CBN: gradient must be .*, a number from 0 to 1 or None, got nan'),
        (dict(gradient=True), TypeError, 'CBN: gradient must be .* got True of type bool'),
        (
            dict(gradient=0.5, order=0),
            ValueError,
            "gradient must be 'batch' or 'projection' with order=0, got 0.5",
        ),
        (dict(gradient='weights', order=0), ValueError, "CBN: gradient must be 'batch' or 'projection' with order=0"),
        (dict(running_stats='old'), ValueError, "CBN: running_stats must be 'batch' or 'window', got 'old'"),
        (dict(running_stats=None), TypeError, "CBN: running_stats must be 'batch' or 'window', got None of type"),
        (dict(window_size=2**63), ValueError, 'window_size must be .*, and less than 2'),
        (dict(window_size=np.arange(2)), TypeError, r'window_size must be .*, got array\(\[0, 1\]\)'),
        (
            dict(conv=nn.ReLU()),
            TypeError,
            'conv must be a torch.nn.Conv2d or ConvTranspose2d, or None, got ReLU',
        ),
        (
            dict(conv=StandardizedConv(3, 4, 1)),
            ValueError,
            'conv must be a convolution that .*: StandardizedConv does not compute',
        ),
        (dict(conv=nn.Conv2d(3, 5, 1)), ValueError, 'conv must have out_channels=4, as num_features, got Conv2d'),
        (dict(samples=64, order=0), ValueError, 'samples must be None with order=0, got 64'),
        (dict(samples=64, order=2), ValueError, 'samples must be None with order=2, got 64'),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CBN(**{'num_features': 4, **arguments})


def test_numbers_of_numpy_are_numbers():
    norm = CBN(np.int64(4), window_size=np.int32(3), samples=np.uint8(9))
    kept = (norm.num_features, norm.window_size, norm.samples)
    assert kept == (4, 3, 9) and {type(value) for value in kept} == {int}
    nn.Sequential(nn.Conv2d(4, 4, 1), norm)(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize(('channels', 'num_features'), [(3, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(samples=8)], ids=str)
def test_another_number_of_channels_is_an_error_and_leaves_no_trace(channels, num_features, kind):
    model = nn.Sequential(nn.Conv2d(2, channels, 1), CBN(num_features, affine=False, **kind))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=f"'1'.* expected an input of {num_features} channels, got .*{channels}"):
        model(torch.randn(2, 2, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].window_state()['windows'] == [dict(kind=None)]


def test_wrong_input_shape_is_an_error():
    with pytest.raises(ValueError, match='expected 4D input'):
        CBN(4)(torch.zeros(4, 4))


def test_auto_without_the_hook_says_what_to_do():
    model = conv_and_norm(window_size='auto')
    (x,) = batches(1)
    with pytest.raises(RuntimeError, match=r"'1'.*window_size='auto'.*CBNBurnInHook"):
        model(x)
    model.eval()(x)
    model.train()
    model[1].window_size = 2
    for length in (1, 2):
        model(x)
        assert model[1].window_length == length


def test_memory_held_is_about_one_weight_an_earlier_iteration():
    wide = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), CBN(64, window_size=4))
    sizes = []
    for x in batches(5, shape=(2, 64, 6, 6), dtype=torch.float32):
        wide(x)
        sizes.append(wide[1].windows.current.nbytes)
    assert all(a == b for a, b in pairwise(sizes)), 'the ring is allocated once'
    assert sizes[-1] < 1.1 * 3 * wide[0].weight.nbytes, 'the authors hold three times as much'


@pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(unsupported='naive'), dict(samples=8)], ids=str)
@pytest.mark.parametrize('before', [0, 3])
def test_a_forward_in_inference_mode_leaves_training_possible(kind, before):
    model, reference = conv_and_norm(window_size=3, **kind), conv_and_norm(window_size=3, **kind)
    inputs = batches(before + 3)
    for number, x in enumerate(inputs):
        with torch.inference_mode(number == before), torch.set_grad_enabled(number != before):
            y = model(x)
        with torch.set_grad_enabled(number != before):
            torch.testing.assert_close(y, reference(x))
        if number != before:
            loss_of(y).backward()
    assert model[1].order == kind.get('order', 1) and model[1].window_length == 3


class PartialConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x), torch.ones_like(x)


def test_other_convolutions_of_the_model_may_take_and_return_what_they_like():
    x = torch.randn(2, 4, 9, 9).double()
    for conv in (lambda x: PartialConv(4, 4, 3).double()(x)[0], lambda x: wrappers.Conv2d(4, 4, 3).double()(x=x)):
        model = conv_and_norm(window_size=3)
        for _ in range(3):
            loss_of(model(conv(x))).backward()
        assert model[1].window_length == 3


def test_a_convolution_called_by_the_name_of_its_argument_is_found():
    conv, norm = wrappers.Conv2d(4, 4, 3), CBN(4, window_size=3)
    for step in range(3):
        x = torch.randn(2, 4, 6, 6)
        has_name = step > 0 or not IS_BEFORE_2_6  # which finds the convolution without names alone
        norm(conv(x=x) if has_name else conv(x)).sum().backward()
    assert norm.window_length == 3


@pytest.mark.parametrize('name', ['forward', '_conv_forward', 'hook'])
def test_a_convolution_whose_output_is_changed_is_refused(name):
    conv, norm = conv_and_norm(window_size=3)
    if name == 'hook':
        loss_of(norm(conv(next(iter(batches(1)))))).backward()
        conv.register_forward_hook(lambda module, args, output: output.tanh())
        norm.eval(), norm.train()  # the hook that looks for the convolution comes anew
        expected = 'not the output of a convolution'
    else:
        original = getattr(conv, name)
        setattr(conv, name, lambda *args: original(*args).tanh())
        expected = 'forward of this Conv2d has been replaced'
    with pytest.raises(RuntimeError, match=expected):
        for x in batches(3):
            loss_of(norm(conv(x))).backward()


@pytest.mark.parametrize('bias', [True, False])
def test_a_convolution_that_ran_without_gradients_receives_none(bias):
    conv, norm = conv_and_norm(conv=dict(kernel_size=3, bias=bias), window_size=3)
    for x in batches(3):
        with torch.no_grad():
            y = conv(x)
        loss_of(norm(y)).backward()
    assert norm.weight.grad is not None and conv.weight.grad is None and (not bias or conv.bias.grad is None)


def after_training(window_size):
    """A model whose window has just become full."""
    model = conv_and_norm(window_size=window_size)
    for x in batches(window_size):
        loss_of(model(x)).backward()
    return model


def train_elsewhere(model):
    """As an optimizer does, far."""
    with torch.no_grad():
        model[0].weight.copy_(torch.randn_like(model[0].weight))


def test_weights_that_were_trained_while_the_layer_was_not_empty_the_window():
    model = after_training(window_size=4)
    model[1].eval()
    train_elsewhere(model)
    model[1].train()
    model(*batches(1))
    assert model[1].window_length == 1


def test_update_bn_takes_the_statistics_of_averaged_weights():
    model = AveragedModel(after_training(window_size=4)).module
    train_elsewhere(model)
    update_bn(batches(1), model)
    var, mean = torch.var_mean(model[0](*batches(1)), dim=(0, 2, 3))
    torch.testing.assert_close([model[1].running_mean, model[1].running_var], [mean, var])


def test_evaluation_in_between_and_copies_keep_the_window():
    model = after_training(window_size=4)
    (x,) = batches(1)
    train_elsewhere(model)
    model.eval()
    model(x)
    for net in (model.train(), copy.deepcopy(model.eval()).train()):
        net(x)
        assert net[1].window_length == 4


def test_no_weak_reference_to_a_weight_stays():
    """torch.utils.swap_tensors, with which torch can convert and load a model, does not take such tensors."""
    model = after_training(window_size=3)
    assert not any(weakref.getweakrefs(parameter) for parameter in model.parameters())


@pytest.mark.parametrize('is_linear', [False, True])
def test_a_double_backward_is_an_error(is_linear):
    """Where the loss is linear, the gradient that comes to the layer does not depend on it; its own does."""
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        x.requires_grad_()
        y = model(x)
        loss = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum() if is_linear else y.pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.square().sum().backward()
