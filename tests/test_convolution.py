"""The last call of a convolution is handed to the norm that it feeds, and to nobody else."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from mmdet_cbn import CBN
from mmdet_cbn.pairing import ConvCall, claim_call, remember_call, why_unsupported


@pytest.fixture(autouse=True)
def _no_watch_left():
    gc.collect()  # layers of other tests that were never trained
    nn.Conv2d(1, 1, 1)(torch.zeros(1, 1, 1, 1))
    yield


def followed_conv(**kwargs):
    conv = nn.Conv2d(3, 4, 3, **kwargs)
    conv.register_forward_hook(remember_call, with_kwargs=True)
    return conv


def is_followed(conv):
    return list(conv._forward_hooks.values()) == [remember_call]


def test_the_output_is_exchanged_for_convolution_and_input_once():
    conv, inputs = followed_conv(), torch.randn(1, 3, 5, 5)
    output = conv(inputs)
    taken_conv, taken_input = claim_call(output)
    assert taken_conv is conv and taken_input is inputs
    assert claim_call(output) is None


def test_an_input_given_by_name_is_found():
    conv, inputs = followed_conv(), torch.randn(1, 3, 5, 5)
    assert claim_call(conv(input=inputs))[1] is inputs


@pytest.mark.parametrize(
    'change', [torch.relu, torch.relu_, lambda y: y[:, :, 1:], lambda y: y.mT, lambda y: y.add_(1)]
)
def test_anything_but_the_very_output_is_refused(change):
    with torch.no_grad():
        assert claim_call(change(followed_conv()(torch.randn(1, 3, 5, 5)))) is None


@pytest.mark.parametrize('hooked', [0, 1])
def test_a_full_backward_hook_between_the_two_is_no_hindrance(hooked):
    """It makes a view of the whole output."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    model[hooked].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    for _ in range(3):
        model(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert model[1].window_length == 3


def test_a_call_of_another_thread_is_not_taken():
    conv, outputs = followed_conv(), []
    thread = threading.Thread(target=lambda: outputs.append(conv(torch.randn(1, 3, 5, 5))))
    thread.start()
    thread.join()
    assert claim_call(outputs[0]) is None


def test_no_input_outlives_its_norm():
    """Not even where autograd keeps nothing: one input at the most, until the norm is called."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    inputs = torch.randn(1, 3, 5, 5)
    alive = weakref.ref(inputs)
    with torch.no_grad():
        model(inputs)
        del inputs
    gc.collect()
    assert alive() is None


def hooks():
    return len(torch_module._global_forward_hooks)


def test_the_watch_ends_when_every_layer_knows_its_convolution():
    before = hooks()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 4, 1), CBN(4))
    assert hooks() == before + 1
    for _ in range(2):
        model(torch.randn(2, 3, 4, 4))
    assert hooks() == before
    assert is_followed(model[0]) and is_followed(model[2])


def test_there_are_no_hooks_in_evaluation_and_training_goes_on_after_it():
    before = hooks()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, window_size=3))
    for _ in range(3):
        model(torch.randn(2, 3, 4, 4))
    for _ in range(2):
        model.eval()
        assert not model[0]._forward_hooks and hooks() == before
        model.train()
        assert is_followed(model[0]) and hooks() == before
        model(torch.randn(2, 3, 4, 4))
        assert model[1].window_length == 3


@pytest.mark.parametrize('norm', [dict(order=0), dict(window_size=1)])
def test_layers_that_need_no_convolution_watch_none(norm):
    before = hooks()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, **norm))
    assert hooks() == before
    model(torch.randn(2, 3, 4, 4))
    assert not is_followed(model[0])


def test_a_model_in_evaluation_or_deleted_watches_no_longer():
    before = hooks()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
    assert hooks() == before + 1
    model.eval()
    assert hooks() == before
    model.train()
    assert hooks() == before + 1
    del model
    gc.collect()
    nn.Conv2d(3, 4, 1)(torch.zeros(1, 3, 1, 1))
    assert hooks() == before


def test_a_norm_fed_by_two_convolutions_finds_both():
    norm = CBN(4, window_size=3)
    convs = [nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)]
    for _ in range(3):
        for conv in convs:
            norm(conv(torch.randn(2, 3, 4, 4)))
    assert all(map(is_followed, convs))


@pytest.mark.parametrize(
    'arguments',
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=(2, 3), padding='same'),
        dict(kernel_size=3, padding='valid'),
        dict(kernel_size=3, padding=1, padding_mode='reflect'),
        dict(kernel_size=3, padding=(2, 1), padding_mode='circular', stride=2),
    ],
)
def test_a_call_in_plain_terms_gives_the_same_output(arguments):
    assert_same_in_plain_terms(nn.Conv2d(4, 6, groups=2, **arguments), torch.randn(2, 4, 7, 8))


def assert_same_in_plain_terms(conv, inputs, **arguments):
    output = conv(inputs, **arguments)
    _, *plain = ConvCall.of(conv, inputs, output)
    torch.testing.assert_close(F.conv2d(*plain), output)


def test_a_transposed_convolution_of_a_given_size_in_plain_terms_is_the_same():
    conv = nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2)
    assert_same_in_plain_terms(conv, torch.randn(2, 4, 7, 8), output_size=(23, 24))


@pytest.mark.parametrize('size', [(7, 8), (6, 5), (1, 2)])
def test_adaptive_padding_is_a_part_of_the_input(size):
    assert_same_in_plain_terms(Conv2dAdaptivePadding(4, 6, 3, stride=2), torch.randn(2, 4, *size))


def test_to_ask_for_a_call_does_not_run_the_convolution_again():
    """Only what it does before."""
    conv, inputs = ConvWS2d(4, 6, 3), torch.randn(2, 4, 7, 8)
    output = conv(inputs)
    with FlopCounterMode(display=False) as counter:
        ConvCall.of(conv, inputs, output)
    assert counter.get_total_flops() == 0


def test_torchs_and_mmcvs_convolutions_are_supported():
    assert why_unsupported(nn.Conv2d(1, 1, 1)) is None
    assert why_unsupported(MMCVConv2d(1, 1, 1)) is None
    assert why_unsupported(nn.ConvTranspose2d(1, 1, 1)) is None
    assert 'Conv1d' in why_unsupported(nn.Conv1d(1, 1, 1))
