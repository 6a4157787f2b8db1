"""What would fail on a GPU, found without one: fake CUDA tensors raise where the host would wait for the device or
where tensors of two devices meet."""

from types import SimpleNamespace

import pytest
import torch
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes

from mmdet_cbn import CBN
from mmdet_cbn.layers.gradient import GRADIENTS
from mmdet_cbn.layers.normalization import WindowNorm
from mmdet_cbn.old_torch import IS_BEFORE_2_6

# A torch < 2.6 looks for a driver even for fake CUDA tensors, and copies none of a device that it is not built for. To
# wait for a device is the same for all kinds.
DEVICE = 'cpu' if IS_BEFORE_2_6 else 'cuda'


def to_cuda(module, mode, device=DEVICE):
    def fake(t):
        with _disable_current_modes():  # torch 2.1 makes no fake tensor of a fake tensor
            like = torch.empty(t.shape, dtype=t.dtype, device='meta')
        return FakeTensor(mode, like, torch.device(device, 0))

    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(fake(parameter))
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = fake(buffer)
    return module, fake


class Context(SimpleNamespace):
    """Stands for autograd's: a torch without CUDA can compute with fake CUDA tensors, but not record them."""

    needs_input_grad = (True,) * 5 + (False,) * 10

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize(
    'kind',
    [
        dict(order=0),
        dict(order=0, gradient='projection'),
        *(dict(order=order, gradient=gradient) for order in (1, 2) for gradient in (*GRADIENTS, 0.25)),
        *(dict(samples=8, gradient=gradient) for gradient in GRADIENTS),
    ],
    ids=str,
)
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_training_never_waits_for_the_device(kind, momentum, bias, dtype, monkeypatch):
    contexts = []

    def apply(*args):
        contexts.append(Context())
        return WindowNorm.forward(contexts[-1], *args)

    monkeypatch.setattr(WindowNorm, 'apply', apply)
    with FakeTensorMode() as mode, torch.no_grad():
        conv = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=bias, dtype=dtype)
        running_stats = 'batch' if bias else 'window'
        norm = CBN(4, window_size=3, momentum=momentum, running_stats=running_stats, **kind)
        model, fake = to_cuda(nn.Sequential(conv, norm), mode)
        for step in range(4):
            y = model(fake(torch.empty(2, 3, 8, 8, dtype=dtype)))
            gradients = WindowNorm.backward(contexts[-1], fake(torch.empty(y.shape, dtype=dtype)))
            assert y.dtype == gradients[0].dtype == dtype
            weight = conv.weight.shape if norm.gradient in ('weights', 'window', 0.25) else None
            shapes = [y.shape, *[(4,)] * 3, weight, *[None] * 10]
            assert [None if g is None else g.shape for g in gradients] == shapes
            assert norm.window_length == min(step + 1, 3)
            made = [tensor for tensor in gradients if tensor is not None]
            for tensor in (y, *made, *norm.windows.current.stacked(), *norm.buffers()):
                assert tensor.device.type == DEVICE


@pytest.mark.parametrize('kind', [dict(), dict(samples=8), dict(order=0)], ids=str)
def test_diagnosis_waits_for_the_device_when_it_is_read_alone(kind, monkeypatch):
    monkeypatch.setattr(WindowNorm, 'apply', lambda *args: WindowNorm.forward(Context(), *args))
    hooks = []
    monkeypatch.setattr(torch.Tensor, 'register_post_accumulate_grad_hook', lambda _, hook: hooks.append(hook))
    with FakeTensorMode() as mode, torch.no_grad():
        model, fake = to_cuda(nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window_size=3, **kind)), mode)
        conv, norm = model
        norm.diagnose = True
        for _ in range(4):
            model(fake(torch.empty(2, 3, 8, 8)))
            conv.weight.grad = fake(torch.empty(conv.weight.shape))
            for hook in hooks:
                hook(conv.weight)
        assert len(hooks) == (kind != dict(order=0))
        with pytest.raises(RuntimeError, match=r'tolist|_local_scalar_dense'):  # of an old and a new torch
            norm.diagnosis()


@pytest.mark.parametrize('make', [nn.ConvTranspose2d, ConvWS2d, ConvAWS2d, Conv2dAdaptivePadding])
def test_with_other_convolutions_it_never_waits_either(make, monkeypatch):
    monkeypatch.setattr(WindowNorm, 'apply', lambda *args: WindowNorm.forward(Context(), *args))
    with FakeTensorMode() as mode, torch.no_grad():
        model, fake = to_cuda(nn.Sequential(make(3, 4, 3, stride=2), CBN(4, window_size=3)), mode)
        for _ in range(4):
            assert model(fake(torch.empty(2, 3, 8, 8))).device.type == DEVICE
        assert model[1].window_length == 3


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('window_size', [1, 3])
def test_burn_in_never_waits_for_the_device(window_size, momentum):
    with FakeTensorMode() as mode, torch.no_grad():
        norm, fake = to_cuda(CBN(4, window_size=window_size, order=0, momentum=momentum), mode)
        norm.burn_in = True
        for _ in range(2):
            y = norm(fake(torch.empty(2, 4, 8, 8)))
            assert {tensor.device.type for tensor in (y, *norm.buffers(), norm._bad_batches)} == {DEVICE}


@pytest.mark.parametrize(
    ('mistake', 'error', 'reason'),
    [
        (lambda x: x.sum().item(), DataDependentOutputException, 'aten'),
        (lambda x: bool(x.sum() > 0), DataDependentOutputException, 'aten'),
        (lambda x: x + torch.ones(2, 3, 8, 8), RuntimeError, 'two (different )?devices'),
    ],
)
def test_the_check_catches_what_it_is_for(mistake, error, reason):
    with FakeTensorMode() as mode:
        _, fake = to_cuda(nn.Sequential(), mode, 'xpu' if IS_BEFORE_2_6 else DEVICE)
        with pytest.raises(error, match=reason):
            mistake(fake(torch.empty(2, 3, 8, 8)))
