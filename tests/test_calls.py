"""A layer that is called several times an iteration keeps a window for each call."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, runner_for
from test_cbn import batches, conv_and_norm, loss_of
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from mmdet_cbn import CBN, pairing

pytestmark = pytest.mark.usefixtures('device')

LEVELS = [(2, 4, 9, 7), (2, 4, 5, 4), (2, 4, 5, 4), (2, 4, 3, 2)]
KINDS = pytest.mark.parametrize(
    'kind', [dict(), dict(order=0), dict(order=2), dict(samples=10_000), dict(gradient='window')], ids=str
)


def levels(iterations):
    return zip(*(batches(iterations, seed, shape) for seed, shape in enumerate(LEVELS)), strict=True)


def step(parameters, losses):
    gradients = torch.autograd.grad(sum(losses), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(0.01 * gradient)


@KINDS
def test_a_head_shared_by_levels_is_as_many_layers_with_one_weight(kind):
    """Without any hook, and with the old losses still alive when the next iteration begins."""
    head = conv_and_norm(window_size=3, **kind)
    conv, norm = copy.deepcopy(head)
    layers = [copy.deepcopy(norm).train() for _ in LEVELS]
    for layer in layers:
        layer.weight, layer.bias = norm.weight, norm.bias
    for number, xs in enumerate(levels(5)):
        outputs, expected = [head(x) for x in xs], [layer(conv(x)) for x, layer in zip(xs, layers, strict=True)]
        torch.testing.assert_close(outputs, expected)
        assert head[1].window_length == min(number + 1, 3)
        losses, expected_losses = ([loss_of(y) for y in ys] for ys in (outputs, expected))
        step(list(head.parameters()), losses)
        step([*conv.parameters(), *norm.parameters()], expected_losses)
    assert len(head[1].windows) == len(LEVELS)


def test_a_norm_behind_two_convolutions_keeps_them_apart():
    norm = CBN(4, window_size=3).double()
    first, second = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    lengths = []
    for x in batches(4):
        ys = norm(first(x)), norm(second(x))
        lengths.append(norm.window_length)
        step(list(first.parameters()) + list(second.parameters()), [loss_of(y) for y in ys])
    assert lengths == [1, 2, 3, 3]
    assert [window.stacked().var_grad.shape[2:] for window in norm.windows] == [(4, 1, 1), (4, 3, 3)]


@pytest.mark.parametrize('order', ['AAB', 'AABC', 'ABBCA'])
def test_convolutions_that_come_in_any_order_are_all_found(order):
    norm = CBN(4, window_size=3).double()
    convs = {name: nn.Conv2d(4, 4, 1).double() for name in order}
    for x in batches(7):
        lengths = []
        for name in order:
            y = norm(convs[name](x))
            lengths.append(norm.window_length)
        loss_of(y).backward()
    assert lengths == [3] * len(order)
    assert norm.finder not in pairing.watch, 'it need not watch all convolutions any more'


def test_a_call_without_a_window_does_not_shift_those_that_follow():
    """As in the iteration in which the convolution of a shared head was replaced."""
    first, norm = conv_and_norm(window_size=3)
    levels = (1, 10, 100)
    for conv in (first, nn.Conv2d(4, 4, 3, bias=False).double()):
        means = []
        for x in batches(2):
            means.append(conv(x).mean(dim=(0, 2, 3)))
            sum(loss_of(norm(conv(level * x))) for level in levels).backward()
    for window, level in zip(norm.windows, levels, strict=True):
        for kept in window.stacked().mean:
            assert any(torch.allclose(kept, level * mean) for mean in means)
    assert [len(window) for window in norm.windows] == [1, 2, 2]


def test_another_convolution_of_the_same_shape_begins_afresh():
    norm = CBN(4, window_size=4).double()
    first, second = (nn.Conv2d(4, 4, 1).double() for _ in range(2))
    lengths = []
    for conv, x in zip([first, second, second], batches(3), strict=True):
        norm(conv(x))
        lengths.append(norm.window_length)
    assert lengths == [1, 1, 2]


@KINDS
def test_micro_batches_count_as_iterations(kind):
    model, reference = conv_and_norm(window_size=4, **kind), conv_and_norm(window_size=4, **kind)
    for number, x in enumerate(batches(6)):
        y = model(x)
        loss_of(y).backward()  # accumulates; the weights stay, and so does the loss
        torch.testing.assert_close(y.detach(), reference(x).detach())  # whose graph is gone at once
        assert model[1].window_length == min(number + 1, 4)
    assert len(model[1].windows) == 1


def test_a_change_of_the_weights_ends_an_iteration_without_a_backward_pass():
    model = conv_and_norm(window_size=3)
    kept = []
    for number, x in enumerate(batches(4)):
        kept.append(model(x))
        assert model[1].window_length == min(number + 1, 3)
        with torch.no_grad():
            model[0].weight.mul_(1.01)


def test_forwards_without_gradients_count_as_iterations():
    model = conv_and_norm(window_size=3)
    with torch.no_grad():
        kept = [model(x) for x in batches(4)]
    assert model[1].window_length == 3 and len(model[1].windows) == 1 and len(kept) == 4


def test_forwards_without_gradients_go_round_the_windows_of_a_shared_head():
    """As those of pseudo labels, or of update_bn."""
    head, reference = conv_and_norm(window_size=3), conv_and_norm(window_size=3)
    for number, xs in enumerate(levels(6)):
        with torch.set_grad_enabled(number < 2):
            actual = [head(x) for x in xs]
        if number < 2:
            sum(map(loss_of, actual)).backward()
        expected = [reference(x) for x in xs]
        reference[1].begin_iteration()
        for y, with_graph in zip(actual, expected, strict=True):
            torch.testing.assert_close(y.detach(), with_graph.detach())
    assert [len(window) for window in head[1].windows] == [2] * len(LEVELS)


def test_a_shorter_forward_without_gradients_is_an_iteration_of_its_own():
    """As one call of a discriminator, to look at its accuracy, before it trains on real and fake images."""
    head = conv_and_norm(window_size=3)
    conv = copy.deepcopy(head[0])
    for number, (x, other) in enumerate(zip(batches(5, seed=1), batches(5, seed=2), strict=True)):
        if number == 3:
            with torch.no_grad():
                head(x)
        outputs = head(x), head(other + 10)
        assert head[1].window_length == min(number + 1, 3)
        sum(map(loss_of, outputs)).backward()
    of_real, of_fake = (window.stacked().mean for window in head[1].windows)
    assert (of_fake - of_real.mean(dim=0)).abs().amax(dim=1).min() > 2 * of_real.std(dim=0).max()
    torch.testing.assert_close(of_fake[0], conv(other + 10).mean(dim=(0, 2, 3)))


def test_a_copy_begins_an_iteration_of_its_own():
    head = conv_and_norm(window_size=3)
    for xs in levels(3):
        sum(loss_of(head(x)) for x in xs).backward()
    first, second, *_ = next(levels(1))
    y = head(first)  # noqa: F841  # its graph is alive
    copied, other = copy.deepcopy(head), copy.deepcopy(head)
    other[1].begin_iteration()
    torch.testing.assert_close(copied(first), other(first))
    assert copied[1].window_length == 3 and [len(window) for window in copied[1].windows] == [2] * len(LEVELS)
    assert head(second).shape == second.shape and len(head[1].windows) == len(LEVELS)


def test_a_level_whose_output_is_dropped_does_not_end_the_iteration():
    """As one without a target, whose graph is gone before the next level is called."""
    head, reference = conv_and_norm(window_size=3), conv_and_norm(window_size=3)
    for number, xs in enumerate(levels(5)):
        losses, everything = [], [reference(x) for x in xs]
        for place, x in enumerate(xs):
            y = head(x)
            torch.testing.assert_close(y.detach(), everything[place].detach())
            if number < 2 or place not in (number - 2, 3):
                losses.append(loss_of(y))
            del y
        sum(losses).backward()
        reference[1].begin_iteration()
    assert [len(window) for window in head[1].windows] == [2] * len(LEVELS)


def test_calls_that_come_in_every_other_iteration_have_a_window():
    """As of a discriminator, which has a step of its own on real and fake images, and then one in the generator's."""
    discriminator = conv_and_norm(window_size=4)
    lengths = []
    for real, fake in zip(batches(5, seed=1), batches(5, seed=2), strict=True):
        outputs = []
        for x in (real, fake):
            outputs.append(discriminator(x))
            lengths.append(discriminator[1].window_length)
        sum(map(loss_of, outputs)).backward()
        loss_of(discriminator(fake)).backward()
        lengths.append(discriminator[1].window_length)
    assert lengths == [1, 1, 2, 3, 2, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4]


def test_the_hook_ends_an_iteration_that_nothing_else_does(tmp_path):
    kept = []

    class OfAnotherLoss(Net):
        def forward(self, inputs, mode='tensor'):
            kept.append(super().forward(inputs)['loss'])
            return dict(loss=torch.zeros(()).requires_grad_())

    model = OfAnotherLoss()
    runner_for(tmp_path, model, dict(type='CBNBurnInHook', burn_in_epochs=0), epochs=1).train()
    assert model.lengths == [1, 2, 3, 3] and len(model.norm.windows) == 1


def test_windows_of_calls_that_come_no_more_are_given_back():
    model = conv_and_norm(window_size=3)
    for calls, windows in ((3, 3), (1, 3), (1, 3), (1, 1)):
        losses = [loss_of(model(x)) for x in batches(calls)]
        assert len(model[1].windows) == windows
        step(list(model.parameters()), losses)


def test_no_graph_is_kept_alive():
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        y = model(x)
    graph = model[1].windows.iteration.last_call
    assert graph is not None
    del graph, y
    gc.collect()
    assert model[1].windows.iteration.last_call is None


def test_a_call_without_any_position_is_a_call():
    """As where a level of the FPN has no RoIs."""
    head, reference = conv_and_norm(window_size=3), conv_and_norm(window_size=3)
    empty = torch.zeros(0, 4, 7, 7, dtype=torch.float64)
    for number, xs in enumerate(levels(4)):
        without_first, with_all = [x if place else empty for place, x in enumerate(xs)], xs
        outputs = [head(x) for x in (without_first if number % 2 else with_all)]
        expected = [reference(x) for x in xs]
        for actual, y in zip(outputs[1:], expected[1:], strict=True):
            torch.testing.assert_close(actual, y)
        gradients = torch.autograd.grad(sum(map(loss_of, expected)), list(reference.parameters()))
        sum(map(loss_of, outputs[number % 2 :])).backward()
        with torch.no_grad():
            for parameter, twin, gradient in zip(head.parameters(), reference.parameters(), gradients, strict=True):
                twin.sub_(0.01 * gradient)
                parameter.copy_(twin)
    assert [len(window) for window in head[1].windows] == [2, 2, 2, 2]


def descend(model, losses):
    """A step of SGD by backward passes of their own, which re-entrant checkpoints need."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)


@KINDS
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpointed_calls_run_again_with_the_window_that_each_had(use_reentrant, kind):
    head, plain = conv_and_norm(window_size=3, **kind), conv_and_norm(window_size=3, **kind)
    for xs in levels(4):
        if not use_reentrant:
            xs = [xs[0], xs[1], xs[3]]  # all of other shapes
        for x in xs:
            x.requires_grad_()
        descend(head, [loss_of(checkpoint(head, x, use_reentrant=use_reentrant)) for x in xs])
        descend(plain, [loss_of(plain(x)) for x in xs])
        for actual, expected in zip(head.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual, expected)


def two_in_a_block(head):
    return lambda x: checkpoint(lambda x: head(x) + head(2 * x), x, use_reentrant=True)


def two_blocks(head):
    return lambda x: checkpoint(head, x, use_reentrant=False) + checkpoint(head, 2 * x, use_reentrant=False)


@pytest.mark.parametrize('kind', [two_in_a_block, two_blocks])
def test_a_checkpointed_call_that_cannot_be_told_from_another_is_an_error(kind):
    head = conv_and_norm(window_size=3)
    (x,) = batches(1)
    with pytest.raises(RuntimeError, match='runs again in a checkpointed block'):
        loss_of(kind(head)(x.requires_grad_())).backward()


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('kind', [dict(), dict(order=0)], ids=str)
def test_another_forward_before_the_backward_pass_does_not_disturb_a_checkpointed_block(kind, use_reentrant):
    """As for pseudo labels; and, where blocks can be told from each other, with a second loss."""
    models = [conv_and_norm(window_size=3, **kind) for _ in range(2)]
    for number, x in enumerate(batches(8)):
        for model in models:
            run = model if model is models[0] else partial(checkpoint, model, use_reentrant=use_reentrant)
            x.requires_grad_()
            losses = [loss_of(run(x))]
            with torch.no_grad():
                model(2 * x)
            if number % 2 and use_reentrant:
                losses.append(loss_of(run(3 * x)))
            descend(model, losses)
        for actual, expected in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(actual, expected)


def selective(*saved):
    """Of torch's selective activation checkpointing, which an old torch lacks: there, checkpoint everything."""
    make = getattr(checkpointing, 'create_selective_checkpoint_contexts', None)
    return {} if make is None else dict(context_fn=partial(make, list(saved)))


@KINDS
def test_operators_that_a_checkpoint_saves_are_those_around_the_layer(kind):
    """The layer runs the same ones in its statistics, in the first run of a block alone."""
    aten, models = torch.ops.aten, [conv_and_norm(window_size=3, **kind) for _ in range(2)]
    context = selective(aten.mean.dim, aten.sub.Tensor, aten.mul.Tensor, aten.bmm.default)

    def block(x, model):
        y = model(x).tanh()
        maps = (y - y.mean((2, 3), keepdim=True)).flatten(0, 1)
        return loss_of(torch.bmm(maps, maps.mul(0.1)).view_as(y))

    for x in batches(5, shape=(2, 4, 6, 6)):
        for model in models:
            is_first = model is models[0]
            descend(
                model, [block(x, model) if is_first else checkpoint(block, x, model, use_reentrant=False, **context)]
            )
        for actual, expected in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(actual, expected)


class OtherCheckpoint(torch.autograd.Function):
    """Re-entrant checkpointing as other libraries have it."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(dy)
        return None, x.grad


def test_calls_of_one_shape_in_checkpoints_of_another_library_are_refused():
    """The first runs record no graph, so the layer takes them for iterations and runs the first again as the last."""
    head = conv_and_norm(window_size=3)
    for number in range(3):
        x, other = (x.requires_grad_() for x in batches(2, seed=number))
        if number < 2:
            loss_of(OtherCheckpoint.apply(head, x)).backward()  # one call: right
            continue
        losses = [loss_of(OtherCheckpoint.apply(head, each)) for each in (x, other)]
        with pytest.raises(RuntimeError, match=r"'1' .* runs again .*several of its calls .* inputs of \[2, 4, 9, 7\]"):
            sum(losses).backward()


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_block_in_a_checkpointed_block_runs_again_twice(use_reentrant):
    nested, plain = conv_and_norm(window_size=3), conv_and_norm(window_size=3)
    for x in batches(4):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        inner = partial(checkpoint, nested, use_reentrant=use_reentrant)
        step(list(plain.parameters()), [loss_of(plain(inputs[0]))])
        loss_of(checkpoint(inner, inputs[1], use_reentrant=use_reentrant)).backward()
        with torch.no_grad():
            for parameter, expected in zip(nested.parameters(), plain.parameters(), strict=True):
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
                torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_second_backward_pass_through_a_checkpointed_block_is_the_first(use_reentrant):
    model = conv_and_norm(window_size=3)
    for x in batches(3):
        x.requires_grad_()
        loss = loss_of(checkpoint(model, x, use_reentrant=use_reentrant))
        gradients = []
        for retain_graph in (True, False):
            x.grad = None
            loss.backward(retain_graph=retain_graph)
            gradients.append(x.grad)
        assert torch.equal(*gradients)


@KINDS
def test_an_iteration_without_the_layer_leaves_its_window_as_it_is(kind):
    model, other = conv_and_norm(window_size=3, **kind), conv_and_norm(window_size=3, **kind)
    for number, x in enumerate(batches(8)):
        if number % 3 < 2:  # a branch of the model that is taken now and then; its weights decay meanwhile
            torch.testing.assert_close(model(x), other(x))
            assert model[1].window_length == min(number - number // 3 + 1, 3)
        model[1].begin_iteration()
        with torch.no_grad():
            for net in (model, other):
                net[0].weight.mul_(0.99)


@KINDS
def test_behind_a_frozen_convolution_the_window_averages_what_it_saw(kind):
    conv, norm = conv_and_norm(window_size=3, **kind).requires_grad_(False)
    norm.requires_grad_(True)
    seen = []
    for x in batches(5):
        y = norm(conv(x))
        seen = [*seen, conv(x)][-3:]
        mean, var = torch.cat(seen).mean(dim=(0, 2, 3)), torch.cat(seen).var(dim=(0, 2, 3), correction=0)
        expected = F.batch_norm(seen[-1], mean, var, norm.weight, norm.bias, eps=norm.eps)
        torch.testing.assert_close(y, expected)
        step([norm.weight, norm.bias], [loss_of(y)])
    assert len(norm.windows) == 1


def test_a_convolution_used_twice_compensates_each_norm_for_its_own_input():
    conv, first = conv_and_norm(window_size=3)
    second = copy.deepcopy(first)
    twins = [conv_and_norm(window_size=3) for _ in range(2)]
    for x, other in zip(batches(5, seed=1), batches(5, seed=2), strict=True):
        torch.testing.assert_close(first(conv(x)), twins[0](x))
        torch.testing.assert_close(second(conv(other)), twins[1](other))
        with torch.no_grad():
            for changed in (conv, twins[0][0], twins[1][0]):
                changed.weight.mul_(1.02)


@KINDS
@pytest.mark.parametrize('shape', [(2, 4, 1, 1), (1, 4, 1, 2), (1, 4, 9, 7)], ids=str)
def test_the_smallest_batches_and_maps_pass(kind, shape):
    model = conv_and_norm(window_size=3, conv=dict(kernel_size=1), **kind)
    for number, x in enumerate(batches(4, shape=shape)):
        y = model(x)
        assert torch.isfinite(y).all() and model[1].window_length == min(number + 1, 3)
        step(list(model.parameters()), [loss_of(y)])


@pytest.mark.parametrize('kind', [dict(), dict(order=0)], ids=str)
def test_outputs_that_are_not_in_the_loss_make_no_calls_of_the_next_iteration(kind):
    """As of an auxiliary head whose loss is switched off, while its outputs are still alive."""
    trunk, aux = conv_and_norm(window_size=3, **kind), conv_and_norm(window_size=3, **kind)
    for number, x in enumerate(batches(6)):
        features = trunk(x)
        outputs = aux(features), trunk(features)  # noqa: F841
        loss_of(features).backward()
        assert [len(model[1].windows) for model in (trunk, aux)] == [2, 1]
        assert aux[1].window_length == min(number + 1, 3)


@pytest.mark.parametrize('burn_in', [False, True])
def test_a_checkpointed_block_begins_before_the_convolution(burn_in):
    conv, norm = conv_and_norm(window_size=3, unsupported='naive')
    norm.burn_in = burn_in
    for number, x in enumerate(batches(3)):
        if number == 2 and not burn_in:
            with pytest.raises(RuntimeError, match='begin the block before the convolution'):
                loss_of(checkpoint(norm, conv(x), use_reentrant=False)).backward()
        else:
            block = norm if burn_in else lambda x: norm(conv(x))
            loss_of(checkpoint(block, conv(x) if burn_in else x, use_reentrant=False)).backward()
    assert norm.order == 1, 'it does not become naive for that'


def test_burn_in_begins_with_an_empty_window():
    """As where a plain loop burns in again, for another stage of the training."""
    model = conv_and_norm(window_size=3)
    for burn_in, length in [(False, 1), (False, 2), (True, 1), (True, 1), (False, 1), (False, 2)]:
        model[1].burn_in = burn_in
        model(*batches(1))
        assert model[1].window_length == length


def test_a_model_may_live_in_inference_mode():
    with torch.inference_mode():
        model = conv_and_norm(window_size=3)
        for x in batches(3):
            model(x)
    assert model[1].window_length == 3
