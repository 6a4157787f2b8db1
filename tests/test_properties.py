"""Whatever comes, of arguments, shapes, precisions and files: it works, or an error says what is wrong.

What it is for the layer to work, mmdet_cbn/experiments/oracle.py says. Other examples in each run, and more of them:
``HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py``.
"""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_cbn import BRN, CBN, CBNBurnInHook, SwitchNormHook
from mmdet_cbn.experiments.oracle import OracleCBN
from mmdet_cbn.layers.gradient import GRADIENTS
from mmdet_cbn.window import file as window_file

pytestmark = pytest.mark.slow

_shared = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile('reproducible', max_examples=100, derandomize=True, **_shared)
settings.register_profile('thorough', max_examples=3000, print_blob=True, **_shared)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'reproducible'))


@pytest.fixture(autouse=True, scope='module')
def _plain_convolutions():
    """Those of oneDNN are wrong in channels_last, if grouped or dilated, on some CPUs (torch 2.13). And on one thread:
    all is so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.set_num_threads(threads)


@st.composite
def convolutions(draw):
    """Arguments of ``nn.Conv2d``."""
    groups = draw(st.integers(1, 3))
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(['same', 'valid'])))
    strides = st.just(1) if padding == 'same' else st.integers(1, 3)
    return dict(
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        stride=(draw(strides), draw(strides)),
        padding=padding,
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular'])),
    )


def padding_of(conv):
    """How much is added before and after the rows, and before and after the columns."""
    kernel = [dilation * (size - 1) for size, dilation in zip(conv['kernel_size'], conv['dilation'], strict=True)]
    if conv['padding'] == 'same':
        return [(extent // 2, extent - extent // 2) for extent in kernel]
    return [(0, 0)] * 2 if conv['padding'] == 'valid' else [(size, size) for size in conv['padding']]


@st.composite
def shapes(draw, conv):
    """Of an input that ``conv`` takes, often such that the output has few positions."""
    sizes = []
    for kernel, dilation, padding in zip(conv['kernel_size'], conv['dilation'], padding_of(conv), strict=True):
        # torch reflects less than there is, and goes round in a circle once.
        least = {'reflect': max(padding) + 1, 'circular': max(padding)}.get(conv['padding_mode'], 1)
        sizes.append(max(least, dilation * (kernel - 1) + 1 - sum(padding), 1) + draw(st.integers(0, 5)))
    return (draw(st.integers(0, 3)), conv['in_channels'], *sizes)


ALL = 10**4  # samples: more than there are positions


@st.composite
def trainings(draw):
    """A convolution, a layer behind it, and the inputs of some iterations."""
    conv = draw(convolutions())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    order = draw(st.integers(0, 2))
    samples = draw(st.sampled_from([None, None, 2, 7, ALL])) if order == 1 else None
    # The oracle has the gradients of the statistics themselves, not of those of a few samples.
    gradients = [*GRADIENTS, 0.3] if order and samples in (None, ALL) else ['batch', 'projection']
    norm = dict(
        window_size=draw(st.integers(1, 5)),
        order=order,
        samples=samples,
        gradient=draw(st.sampled_from(gradients)),
        eps=draw(st.sampled_from([1e-5, 1e-12, 0.1, 1e4])),
        momentum=draw(st.sampled_from([0.1, None, 0, 0.9, 1])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
    )
    return SimpleNamespace(
        conv=conv,
        norm=norm,
        dtype=dtype,
        memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])),
        shapes=draw(st.lists(shapes(conv), min_size=1, max_size=6)),
        input_has_gradient=draw(st.booleans()),
        weight_has_gradient=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


class Float64:
    """A convolution and the layer behind it, by the oracle."""

    def __init__(self, conv, norm):
        self.conv, self.norm = conv, norm
        self.order = norm.order if norm.samples is None else 2
        # Without compensation the layer averages outputs, bias and all: to the oracle, those of a convolution with 1.
        arguments = (
            dict(stride=conv.stride, dilation=conv.dilation, groups=conv.groups)
            if self.order
            else dict(groups=conv.out_channels)
        )
        self.oracle = OracleCBN(norm.window_size, self.order, norm.eps, norm.gradient, **arguments)

    def __call__(self, x, padding, dy):
        """The output; the gradients of input, weight, bias, gamma and beta; and how large the terms of a sum are in
        the output of the convolution, by channel."""
        conv, norm = self.conv, self.norm
        leaves = [
            None if tensor is None else tensor.detach().double().requires_grad_()
            for tensor in (x, conv.weight, conv.bias, norm.weight, norm.bias)
        ]
        x, weight, bias, gamma, beta = leaves
        ones = torch.ones(norm.num_features).double()
        gamma, beta = ones if gamma is None else gamma, 0 * ones if beta is None else beta
        (top, bottom), (left, right) = padding
        mode = 'constant' if conv.padding_mode == 'zeros' else conv.padding_mode
        x = F.pad(x, (left, right, top, bottom), mode=mode)

        def convolve(x, weight, bias):
            return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)

        if self.order:
            y = self.oracle(x, weight, gamma, beta)
        else:
            y = self.oracle(convolve(x, weight, bias), ones.view(-1, 1, 1, 1), gamma, beta)
        given = [tensor for tensor in leaves if tensor is not None]
        gradients = iter(torch.autograd.grad(y, given, dy, allow_unused=True, materialize_grads=True))
        terms = convolve(*(None if tensor is None else tensor.detach().abs() for tensor in (x, weight, bias)))
        return y.detach(), [None if leaf is None else next(gradients) for leaf in leaves], terms.amax((0, 2, 3))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}


def assert_near(actual, expected, scale):
    """That no difference is larger than what rounding makes of numbers as large as ``scale``."""
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    assert ((actual - expected).abs() <= TOLERANCE[actual.dtype] * scale).all()


@settings(max_examples=3 * settings().max_examples)
@given(trainings())
def test_the_layer_is_the_oracle_or_says_that_there_is_one_value_a_channel(training):
    """Outputs, gradients and running statistics, through changes of the weights, whatever the shapes in between."""
    torch.manual_seed(training.seed)
    norm = CBN(training.conv['out_channels'], running_stats='batch', **training.norm)
    model = nn.Sequential(nn.Conv2d(**training.conv), norm)
    model.to(dtype=training.dtype, memory_format=training.memory_format)
    conv = model[0]
    conv.weight.requires_grad_(training.weight_has_gradient)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    bn = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    bn.to(training.dtype)
    oracle = Float64(conv, norm)
    length = largest = 0
    for shape in training.shapes:
        x = (torch.randn(shape) * (0.5 + 2 * torch.rand(1)) + torch.randn(1)).to(training.dtype)
        x = x.contiguous(memory_format=training.memory_format).requires_grad_(training.input_has_gradient)
        output = conv(x).detach()
        positions = output.numel() // norm.num_features
        if positions == 1:
            for refusing in (model, bn) if norm.window_size == 1 else (model,):
                with pytest.raises(ValueError, match='ore than 1 value per channel'):
                    refusing(x if refusing is model else output)
            continue

        y = model(x)
        bn(output)
        assert y.dtype == training.dtype and y.shape == output.shape
        for ours, theirs in zip(norm.buffers(), bn.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[y.dtype], atol=TOLERANCE[y.dtype])
        if positions == 0:
            del y  # lest the next be another call in the same iteration
            continue

        dy = torch.randn(y.shape).to(y.dtype)
        expected, gradients, terms = oracle(x, padding_of(training.conv), dy.double())
        length = min(length + 1, norm.window_size)
        assert norm.window_length == length

        # In deviations: the mean cancels, and in the variance the squares do.
        largest = torch.maximum(terms, torch.as_tensor(largest))
        spread = (1 + largest / oracle.oracle.deviation) ** 2
        assert_near(y, expected, spread.view(-1, 1, 1))
        if y.requires_grad:
            model.zero_grad()
            y.backward(dy)
        dx = (spread / oracle.oracle.deviation).max() * dy.abs().max().double()
        scales = [
            dx * conv.weight.abs().sum().double(),
            dx * positions * x.abs().max().double(),
            dx * positions,
            spread * positions,
            positions,
        ]
        leaves = (x, conv.weight, conv.bias, norm.weight, norm.bias)
        for leaf, gradient, scale in zip(leaves, gradients, scales, strict=True):
            if leaf is not None and leaf.requires_grad:
                assert_near(leaf.grad, gradient, scale)
        if norm.samples in (None, ALL):  # else the oracle does not know what was drawn
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


@given(
    kind=st.sampled_from(
        [
            Standardized,
            lambda *args, **kwargs: nn.utils.parametrizations.weight_norm(nn.Conv2d(*args, **kwargs)),
            lambda *args, **kwargs: nn.Sequential(nn.Conv2d(*args, **kwargs), nn.ReLU()),
            lambda *args, **kwargs: nn.Sequential(nn.Conv2d(*args, **kwargs), nn.Dropout(0.5)),
        ]
    ),
    conv=st.fixed_dictionaries(
        dict(kernel_size=st.integers(1, 3), stride=st.integers(1, 2), padding=st.just(0), bias=st.booleans())
    ),
    norm=st.fixed_dictionaries(
        dict(window_size=st.integers(1, 3), order=st.integers(0, 2), affine=st.booleans(), momentum=st.just(None))
    ),
)
def test_what_it_cannot_compensate_for_is_refused_with_a_remedy_which_works(kind, conv, norm):
    x = torch.randn(2, 2, 6, 5)
    model = nn.Sequential(kind(2, 3, **conv), CBN(3, **norm))
    if norm['order'] > 0 and norm['window_size'] > 1:
        with pytest.raises(RuntimeError, match=r"CBN layer '1' .* Use order=0"):
            model(x)
        model[1] = CBN(3, **{**norm, 'order': 0})
    for length in (1, min(norm['window_size'], 2)):
        assert torch.isfinite(model(x)).all() and model[1].window_length == length


WORDS = ['auto', '', 'BN', 'CBN', 'SyncBN', 'GN', 'ReLU', 'None', '3', 'nonsense']
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.sampled_from([2**63 - 1, 2**63, -(2**70), 10**400, -(10**400)]),
    st.floats(),
    st.floats(0, 4),
    st.sampled_from(WORDS),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.sampled_from([np.int64, np.uint8, np.float64, np.float32, np.float16, np.bool_]).flatmap(
        lambda kind: st.sampled_from([0, 1, 2, 9]).map(kind)
    ),
    st.sampled_from([np.float32('nan'), np.float64('inf'), np.array(2), np.arange(2), np.array('x')]),
    st.sampled_from([torch.tensor(2), torch.ones(2), torch.float16, torch.float64, torch.int32, torch.complex64]),
    st.sampled_from([torch.device('cpu'), 'cpu', 'cpu:0', int, object(), nn.BatchNorm2d, Ellipsis]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(['type', 'eps', 'affine', 'num_features', 'x', 3]), inner, max_size=2),
    ),
    max_leaves=4,
)


def built_or_refused(kind, argument, value, **others):
    """What ``kind`` makes of the argument, or None if it refuses, by name."""
    try:
        return kind(**{**others, argument: value})
    except (TypeError, ValueError) as error:
        message = str(error)
    assert message.startswith(f'{kind.__name__}: ') and argument in message.partition(', got')[0], message
    items = value if isinstance(value, list | tuple) else []
    plain = [item.item() if isinstance(item, np.generic) else item for item in (value, *items)]
    assert any(repr(shown) in message for shown in [value, dict(type=value), *items, *plain, tuple(plain[1:])]), message


LAYERS = [(CBN, argument) for argument in ('num_features', 'window_size', 'order', 'samples', 'running_stats')]
LAYERS += [(BRN, argument) for argument in ('num_features', 'r_max', 'd_max', 'r_steps', 'd_steps')]


@pytest.mark.parametrize(('kind', 'argument'), LAYERS)
@given(value=ANYTHING)
def test_a_layer_works_or_names_the_argument(kind, argument, value):
    if argument in ('num_features', 'window_size'):
        assume(not isinstance(value, int) or value != 2**63 - 1)  # it would work with the memory for it
    norm = built_or_refused(kind, argument, value, **({} if argument == 'num_features' else dict(num_features=4)))
    if norm is None:
        return
    kept = getattr(norm, argument)
    assert kept == (pytest.approx(float(value)) if isinstance(kept, float) else value)
    assert type(kept) in (bool, int, float, str, tuple, type(None))
    like = norm.weight if norm.affine else torch.empty(0)
    conv = nn.Conv2d(3, norm.num_features, 2).to(like)
    if argument == 'window_size' and value == 'auto':
        norm.window_size = 3
    for _ in range(3):
        y = norm(conv(torch.randn(2, 3, 5, 4).to(like)))
        assert y.shape == (2, norm.num_features, 4, 3) and y.dtype == like.dtype and torch.isfinite(y).all()
        assert all(torch.isfinite(buffer).all() for buffer in norm.buffers())
        y.sum().backward()
    assert torch.isfinite(norm.eval()(y)).all()


@pytest.mark.parametrize('argument', ['burn_in_epochs', 'burn_in_iters', 'save_window', 'diagnostics'])
@given(value=ANYTHING)
def test_the_burn_in_hook_counts_or_names_the_argument(argument, value):
    counts = argument.startswith('burn_in')
    hook = built_or_refused(CBNBurnInHook, argument, value, **({} if counts else dict(burn_in_iters=1)))
    if hook is not None and counts:
        assert hook.length == value and type(hook.length) is int
        hook._layers, hook._begins = {'norm': CBN(1)}, False
        for done, burn_in in ((hook.length - 1, True), (hook.length, False)):
            hook.before_train_iter(SimpleNamespace(epoch=done, iter=done), 1)
            assert hook._layers['norm'].burn_in == burn_in
    elif hook is not None:
        assert getattr(hook, argument) is bool(value)


@pytest.mark.parametrize('argument', ['epoch', 'to', 'source', 'prefixes'])
@given(value=ANYTHING)
def test_the_switch_hook_switches_or_names_the_argument(argument, value):
    hook = built_or_refused(SwitchNormHook, argument, value, **({} if argument == 'epoch' else dict(epoch=1)))
    if hook is not None and argument == 'epoch':
        assert hook.epoch == value and type(hook.epoch) is int


@given(
    shape=st.one_of(st.tuples(*[st.integers(0, 4)] * 4), st.lists(st.integers(0, 4), max_size=6)),
    num_features=st.integers(1, 4),
    kind=st.sampled_from([CBN, BRN]),
    arguments=st.fixed_dictionaries(dict(affine=st.booleans(), eps=st.sampled_from([1e-5, 1]))),
    training=st.booleans(),
)
def test_inputs_that_batchnorm_refuses_are_refused_as_there_and_leave_no_trace(
    shape, num_features, kind, arguments, training
):
    ours = dict(order=0) if kind is CBN else {}
    norm, bn = (
        kind(num_features, **arguments, **ours).train(training),
        nn.BatchNorm2d(num_features, **arguments).train(training),
    )
    x = torch.randn(shape)
    try:
        expected = bn(x)
    except (ValueError, RuntimeError) as error:
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        # Where two things are wrong, it is either.
        either = x.dim() == 4 and x.numel() == x.size(1) != num_features
        with pytest.raises((ValueError, RuntimeError) if either else type(error)):
            norm(x)
        # What is empty is BatchNorm's own affair, which counts it.
        assert not x.numel() or all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
        norm(torch.randn(2, num_features, 2, 2))
        assert kind is BRN or norm.window_length <= 1
    else:
        torch.testing.assert_close(norm(x), expected)


@st.composite
def damages(draw):
    """A change of a file: cut off, some bytes changed, some bytes taken out or put in."""
    kind = draw(st.sampled_from(['cut', 'change', 'change', 'shift']))
    at = draw(st.floats(0, 1, exclude_max=True))
    if kind == 'cut':
        return lambda data: data[: int(at * len(data))]
    new = draw(st.binary(min_size=1, max_size=8))
    count = len(new) if kind == 'change' else draw(st.integers(0, 8))
    return lambda data: data[: int(at * len(data))] + new + data[int(at * len(data)) + count :]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('damaged')


def same(ours, theirs):
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(order=2), dict(samples=8)], ids=str)
@given(damage=damages())
def test_a_damaged_window_file_is_refused_by_name_and_the_layer_starts_anew(folder, kind, damage):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 2), CBN(3, window_size=3, **kind)
    for _ in range(3):
        norm(conv(torch.randn(2, 2, 5, 5))).sum().backward()
    path, saved = str(folder / 'epoch_1.pth.cbn_window_rank0'), norm.window_state()
    window_file.save(path, {'norm': norm}, iteration=3)
    with open(path, 'rb+') as file:
        data = damage(file.read())
        file.seek(0)
        file.truncate()
        file.write(data)
    loaded = CBN(3, window_size=3, **kind)
    try:
        window_file.load(path, {'norm': loaded}, {'norm'}, 3)
    except RuntimeError as error:
        assert str(error).startswith(f'{path} was not loaded')
        assert not loaded.windows.current and loaded.window_state()['windows'] == [dict(kind=None)]
    else:
        assert same(loaded.window_state(), saved)
    length = len(loaded.windows.current)
    loaded(conv(torch.randn(2, 2, 5, 5)))
    assert loaded.window_length == length + 1


@given(damage=damages())
def test_a_damaged_checkpoint_is_refused_by_name(folder, damage):
    path, made = str(folder / 'epoch_1.pth'), dict(meta=dict(epoch=1), state_dict=nn.Conv2d(2, 3, 1).state_dict())
    torch.save(made, path)
    with open(path, 'rb+') as file:
        data = damage(file.read())
        file.seek(0)
        file.truncate()
        file.write(data)
    try:
        loaded = CheckpointLoader.load_checkpoint(path, 'cpu')
    except (RuntimeError, pickle.UnpicklingError) as error:
        assert str(error).startswith(path)
    else:
        assert same(loaded, made)
