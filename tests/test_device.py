"""What would fail on a GPU, found without one: fake CUDA tensors raise where the host would wait for the device or
where tensors of two devices meet."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from mmdet_cbn import CBN
from mmdet_cbn.normalization import WindowNorm


def to_cuda(module, mode):
    def fake(t):
        return FakeTensor(mode, torch.empty(t.shape, dtype=t.dtype, device='meta'), torch.device('cuda'))

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

    needs_input_grad = (True,) * 4 + (False,) * 5

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize(('order', 'samples'), [(0, None), (1, None), (2, None), (1, 8)])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_training_never_waits_for_the_device(order, samples, momentum, bias, dtype, monkeypatch):
    contexts = []

    def apply(*args):
        contexts.append(Context())
        return WindowNorm.forward(contexts[-1], *args)

    monkeypatch.setattr(WindowNorm, 'apply', apply)
    with FakeTensorMode() as mode, torch.no_grad():
        conv = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=bias, dtype=dtype)
        running_stats = 'batch' if bias else 'window'
        norm = CBN(4, window_size=3, order=order, samples=samples, momentum=momentum, running_stats=running_stats)
        model, fake = to_cuda(nn.Sequential(conv, norm), mode)
        for step in range(4):
            y = model(fake(torch.empty(2, 3, 8, 8, dtype=dtype)))
            gradients = WindowNorm.backward(contexts[-1], fake(torch.empty(y.shape, dtype=dtype)))
            assert y.dtype == gradients[0].dtype == dtype
            assert [None if g is None else g.shape for g in gradients] == [y.shape, *[(4,)] * 3, *[None] * 5]
            assert norm.window_length == min(step + 1, 3)
            for tensor in (y, *gradients[:4], *norm._windows.current.stacked(), *norm.buffers()):
                assert tensor.device.type == 'cuda'


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('window_size', [1, 3])
def test_burn_in_never_waits_for_the_device(window_size, momentum):
    with FakeTensorMode() as mode, torch.no_grad():
        norm, fake = to_cuda(CBN(4, window_size=window_size, order=0, momentum=momentum), mode)
        norm.burn_in = True
        for _ in range(2):
            y = norm(fake(torch.empty(2, 4, 8, 8)))
            assert {tensor.device.type for tensor in (y, *norm.buffers(), norm._bad_batches)} == {'cuda'}


@pytest.mark.parametrize(
    ('mistake', 'error'),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool(x.sum() > 0), DataDependentOutputException),
        (lambda x: x + torch.ones(2, 3, 8, 8), FakeTensorDeviceMismatchError),
    ],
)
def test_the_check_catches_what_it_is_for(mistake, error):
    with FakeTensorMode() as mode:
        _, fake = to_cuda(nn.Sequential(), mode)
        with pytest.raises(error):
            mistake(fake(torch.empty(2, 3, 8, 8)))
