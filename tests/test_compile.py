"""Under torch.compile a layer trains as without it, in one graph with the rest of the model.

With torch < 2.13 graphs end before the layer. An old torch shows it no convolution that is in a graph. It says so then,
unless one step without torch.compile came before.
"""

import copy
import gc
import re

import pytest
import torch
from conftest import Net, runner_for
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmdet.models.backbones import ResNet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmdet_cbn import CBN
from mmdet_cbn.layers.batch_renorm import BRN
from mmdet_cbn.old_torch import IS_BEFORE_2_6, IS_BEFORE_2_13
from mmdet_cbn.pairing import watch

BREAKS_NO_GRAPH = not IS_BEFORE_2_13
COMPENSATED = [
    dict(),
    dict(order=2),
    dict(samples=20),
    dict(gradient='window'),
    dict(gradient=0.25),
    dict(gradient='projection'),
]
KINDS = pytest.mark.parametrize('kind', [dict(order=0), *COMPENSATED], ids=str)
BACKENDS = pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    # A graph is of a model with a certain number of hooks: those that models of other tests have left go now.
    gc.collect()
    watch.end_if_idle()


class Level(nn.Module):
    """One convolution, in one graph with what comes after it."""

    def __init__(self, **kind):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = CBN(4, window_size=3, **kind)

    def forward(self, x):
        return self.norm(self.conv(x)).square().mean()


class Head(nn.Module):
    """Shared by the levels of an FPN, as RetinaNet's."""

    def __init__(self, **kind):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = CBN(4, window_size=3, **kind)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, xs):
        return sum(self.last(self.norm(self.conv(x)).relu()).square().mean() for x in xs)


def train_side_by_side(model, compiled, twin, inputs, accumulate=1, loss_of=lambda y: y):
    """Losses of each iteration must agree, and all parameters and buffers in the end."""
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9) for net in (model, twin)]
    for number, x in enumerate(inputs):
        losses = [loss_of(net(x)) for net in (compiled, twin)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
    for (name, actual), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f'{name}: {text}'
        )


def images(count, *sizes):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(2, 4, size, size + 1, generator=generator) for size in sizes] for _ in range(count)]


@BACKENDS
@KINDS
def test_training_is_as_without_it_and_breaks_no_graph(kind, backend):
    """Across the end of burn-in, of a shared head, with accumulated gradients."""
    torch.manual_seed(0)
    model = Head(**kind)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=BREAKS_NO_GRAPH, backend=counter)
    model.norm.burn_in = twin.norm.burn_in = True
    train_side_by_side(model, compiled, twin, images(2, 8, 4, 2))
    model.norm.burn_in = twin.norm.burn_in = False
    train_side_by_side(model, compiled, twin, images(6, 8, 4, 2), accumulate=2)
    if BREAKS_NO_GRAPH:
        assert counter.frame_count == 2, 'one graph for burn-in and one for all windows after it'
    for norm in (model.norm, twin.norm):
        assert norm.window_length == 3 and [len(window) for window in norm.windows] == [2, 2, 2]


@pytest.mark.parametrize('kind', COMPENSATED, ids=str)
def test_a_layer_sees_its_convolution_in_a_graph_or_says_that_it_cannot(kind):
    """torch 2.1 shows it none; 2.11 does."""
    compiled = torch.compile(Level(**kind), backend='aot_eager')
    ((x,),) = images(1, 8)
    try:
        compiled(x).backward()
    except RuntimeError as error:
        says_so = re.search(r"CBN layer '.*norm' .*Under torch\.compile .* torch >= 2\.13", str(error))
        assert IS_BEFORE_2_13 and says_so, error
    else:
        assert not IS_BEFORE_2_6 and compiled._orig_mod.norm.window_length == 1


class TwoBranches(nn.Module):
    """Each convolution is named, because the other one is called in between."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(2))
        self.norms = nn.ModuleList(CBN(4, window_size=3, conv=conv) for conv in self.convs)

    def forward(self, x):
        outputs = [conv(x) for conv in self.convs]
        return sum(norm(output) for norm, output in zip(self.norms, outputs, strict=True)).square().mean()


class CalledAgain(TwoBranches):
    """No norm follows the last call of a named convolution."""

    def forward(self, x):
        return super().forward(x) + self.convs[0](x + 1).square().mean()


def test_a_graph_leaves_nothing_in_the_model():
    model = CalledAgain()
    before = set(vars(model.convs[0]))
    compiled = torch.compile(model, backend='aot_eager')
    for (x,) in images(3, 8):
        compiled(x).backward()
    assert set(vars(model.convs[0])) == before
    copy.deepcopy(model)


@pytest.mark.parametrize('order', [0, 1])
def test_a_shared_head_compiles_with_dynamic_shapes(order):
    torch.manual_seed(0)
    model = Head(order=order)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend='aot_eager', dynamic=True)
    for size in (8, 9, 12):
        train_side_by_side(model, compiled, twin, images(2, size, size // 2))


def test_convolutions_that_are_named_are_found_in_a_graph():
    torch.manual_seed(0)
    model = TwoBranches()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=BREAKS_NO_GRAPH, backend='aot_eager')
    train_side_by_side(model, compiled, twin, [x for (x,) in images(5, 6)])
    assert [norm.window_length for net in (model, twin) for norm in net.norms] == [3] * 4


@BACKENDS
@pytest.mark.parametrize('make', [nn.ConvTranspose2d, ConvWS2d, ConvAWS2d, Conv2dAdaptivePadding])
def test_other_convolutions_train_as_without_it(make, backend):
    torch.manual_seed(0)
    model = Level()
    model.conv = make(4, 4, 3, stride=2)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=BREAKS_NO_GRAPH, backend=backend)
    for net in (model, twin):  # torch 2.1 needs a step before
        net(images(1, 6)[0][0]).backward()
        net.zero_grad()
    train_side_by_side(model, compiled, twin, [x for (x,) in images(5, 6)])
    assert model.norm.window_length == twin.norm.window_length == 3


@BACKENDS
@pytest.mark.parametrize('kind', [dict(), dict(samples=20)], ids=str)
def test_a_layer_that_becomes_naive_trains_as_without_it(kind, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), CBN(4, window_size=3, unsupported='naive', **kind))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    inputs = [x for (x,) in images(5, 8)]
    train_side_by_side(model, compiled, twin, inputs, loss_of=lambda y: y.square().mean())
    assert model[2].window_length == twin[2].window_length == 3 and model[2].order == 0


def test_brn_trains_as_without_it():
    model = Head()
    model.norm = BRN(4, r_steps=(0, 3), d_steps=(0, 3))
    twin = copy.deepcopy(model)
    train_side_by_side(model, torch.compile(model, backend='aot_eager'), twin, images(5, 8))


@KINDS
def test_training_goes_on_after_evaluation(kind):
    model = Level(**kind)
    twin = copy.deepcopy(model)
    inputs = [x for (x,) in images(4, 8)]
    # By this step layers learn of their convolutions: torch 2.1 needs it.
    for net in (model, twin):
        net(inputs[0]).backward()
        net.zero_grad()
    compiled = torch.compile(model, backend='aot_eager')
    for _ in range(3):
        train_side_by_side(model, compiled, twin, inputs)
        model.eval()
        twin.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs[0]), twin(inputs[0]))
        model.train()
        twin.train()


def test_forwards_without_gradients_count_as_iterations():
    model = Head(order=0)
    compiled = torch.compile(model, fullgraph=BREAKS_NO_GRAPH, backend='aot_eager')
    with torch.no_grad():
        for xs in images(4, 8):
            compiled(xs)
    assert len(model.norm.windows) == 1 and model.norm.window_length == 3


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.slow
def test_mmdets_resnet_trains_as_without_it(with_cp):
    """Where a block is checkpointed, graphs may break, but the numbers stay."""
    torch.manual_seed(0)
    norm_cfg = dict(type='CBN', window_size=3, order=0 if IS_BEFORE_2_13 else 1)
    model = ResNet(18, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1),
                   norm_cfg=norm_cfg, norm_eval=False, with_cp=with_cp)  # fmt: skip
    model.init_weights()
    twin = copy.deepcopy(model)
    model.train()
    twin.train()

    compiled = torch.compile(model, fullgraph=BREAKS_NO_GRAPH and not with_cp, backend='aot_eager')
    xs = torch.randn(5, 2, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    train_side_by_side(model, compiled, twin, xs, loss_of=lambda ys: sum(y.square().mean() for y in ys))
    assert {m.window_length for m in model.modules() if isinstance(m, CBN)} == {3}


@BACKENDS
def test_evaluation_compiles_whole_and_is_as_without_it(backend):
    model = Head()
    for xs in images(3, 8):
        model(xs).backward()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for xs in images(2, 8, 4):
            torch.testing.assert_close(compiled(xs), model(xs))


@pytest.mark.slow
def test_mmengine_compiles_it(tmp_path):
    """``compile=True`` of its config. mmengine compiles the optimizer, too, and torch 2.1 fails at SGD's momentum."""
    losses = []
    for compile in (True, False):
        torch.manual_seed(0)
        hook = dict(type='CBNBurnInHook', burn_in_epochs=1)
        model = Net(CBN(4, window_size=3, order=0 if IS_BEFORE_2_13 else 1))
        runner = runner_for(tmp_path / str(compile), model, hook, epochs=3, momentum=0, cfg=dict(compile=compile))
        runner.train()
        scalars = runner.message_hub.log_scalars
        assert scalars['train/cbn_window'].data[0].tolist() == [1] * 5 + [2] + [3] * 6
        losses.append(scalars['train/loss'].data[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-3)
