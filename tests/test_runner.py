"""What mmengine's Runner and mmdet's backbones do around a layer."""

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
import torch.utils.checkpoint
from conftest import Net, runner_for
from mmdet.models.backbones import ResNet
from mmengine.evaluator import BaseMetric
from torch.func import functional_call

from mmdet_cbn import CBN
from mmdet_cbn.old_torch import IS_BEFORE_2_13

KINDS = pytest.mark.parametrize(
    'kind', [dict(), dict(order=0), dict(order=2), dict(samples=8), dict(gradient='window')], ids=str
)


@KINDS
@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('depth', [18, 50])
def test_a_checkpointed_backbone_trains_as_without(depth, use_reentrant, kind, monkeypatch):
    """mmdet's ``with_cp=True`` leaves the kind of checkpoint to torch."""
    as_wanted = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', as_wanted)
    torch.manual_seed(0)
    norm_cfg = dict(type='CBN', window_size=3, **kind)
    small = dict(base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    plain = ResNet(depth, **small, norm_cfg=norm_cfg, norm_eval=False).double()
    plain.init_weights()
    checkpointed = copy.deepcopy(plain)
    for module in checkpointed.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True
    layers = [m for m in checkpointed.modules() if isinstance(m, CBN)]
    nets = plain, checkpointed
    for net in nets:
        net.train()
    for number, x in enumerate(torch.randn(4, 2, 3, 32, 40, dtype=torch.float64)):
        losses = [sum(y.square().mean() for y in net(x)) for net in nets]
        torch.testing.assert_close(*losses)
        for net, loss in zip(nets, losses, strict=True):
            net.zero_grad()
            loss.backward()
        for (name, actual), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, msg=lambda text, name=name: f'{name}: {text}')
            with torch.no_grad():
                for parameter in (actual, expected):
                    parameter.sub_(0.001 * parameter.grad)
        assert {layer.window_length for layer in layers} == {min(number + 1, 3)}
    for actual, expected in zip(checkpointed.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


class NoteCorrections(Net):
    """Notes how much compensation moved the statistics of the last iteration but one, in each iteration."""

    def __init__(self, norm):
        super().__init__(norm)
        self.moved = []
        norm.register_step_hook(self.note)

    def note(self, layer, step):
        if step.past is not None:
            pairs = zip(step.past[:2], (step.old.mean, step.old.var), strict=True)
            self.moved.append(max((a - b).abs().max().item() for a, b in pairs))


@pytest.mark.parametrize(('kind', 'rounding'), [(dict(), 0), (dict(samples=8), 1e-6)], ids=str)
def test_accumulated_micro_batches_fill_the_window_and_are_not_corrected(tmp_path, kind, rounding):
    model = NoteCorrections(CBN(4, window_size=2, **kind))
    runner = runner_for(tmp_path, model, dict(type='CBNBurnInHook', burn_in_epochs=0), epochs=2)
    runner.optim_wrapper['accumulative_counts'] = 4
    runner.train()
    assert model.lengths == [1] + [2] * 7
    within, across = model.moved[:3] + model.moved[4:], model.moved[3]
    assert max(within) <= rounding, 'the weights have not changed'
    assert across > 1e-3


class WithPredictions(Net):
    def forward(self, inputs, mode='tensor'):
        if mode == 'predict':
            return self.norm(self.conv(torch.stack(inputs)))
        return super().forward(inputs, mode)


class Mean(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(y.mean().item() for y in data_samples)

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


@KINDS
def test_evaluation_and_averaging_of_weights_in_the_midst_of_training_leave_no_trace(tmp_path, kind):
    """EMAHook copies the model, and exchanges the weights for the averaged ones around each evaluation."""
    evaluation = dict(
        val_cfg=dict(),
        val_evaluator=dict(type=Mean),
        val_dataloader=dict(
            dataset=[dict(inputs=torch.ones(3, 6, 6))],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
    )
    found = {}
    for name, arguments, hooks in (
        ('alone', {}, []),
        ('evaluated', evaluation, []),
        ('averaged', evaluation, [dict(type='EMAHook', momentum=0.3)]),
    ):
        torch.manual_seed(0)
        model = WithPredictions(CBN(4, window_size=6, **kind))
        hook = dict(type='CBNBurnInHook', burn_in_epochs=1, diagnostics=name == 'averaged')
        runner = runner_for(tmp_path / name, model, hook, **arguments)
        for other in hooks:
            runner.register_hook(other)
        runner.train()
        scalars = runner.message_hub.log_scalars
        found[name] = [list(scalars['train/loss'].data[0]), list(scalars['train/cbn_window'].data[0]),
                       model.norm.windows.current.stacked(), list(model.state_dict().values())]  # fmt: skip
        assert ('val/mean' in scalars) == bool(arguments)
        for averaging in (hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook'):
            assert averaging.ema_model.module.norm.window_length == 0, 'it has not trained'
    assert found['alone'][1] == [1] * 5 + [2, 3, 4, 5] + [6] * 7
    for name in ('evaluated', 'averaged'):
        torch.testing.assert_close(found[name], found['alone'], rtol=0, atol=0)


@pytest.mark.parametrize('optimizer', [
    dict(type='AdamW', lr=1e-4, weight_decay=0.1),
    dict(type='SGD', lr=1e-4, momentum=0.9, weight_decay=0.01),
], ids=lambda optimizer: optimizer['type'])  # fmt: skip
def test_a_jump_of_the_learning_rate_leaves_it_finite_and_the_log_tells_where_eq_10_stepped_in(tmp_path, optimizer):
    torch.manual_seed(0)
    # With this gradient the weights go astray the most.
    model = Net(CBN(4, window_size=4, gradient='batch'))
    hook = dict(type='CBNBurnInHook', burn_in_epochs=1, diagnostics=True)
    jump = dict(type='MultiStepLR', by_epoch=False, milestones=[100], gamma=1e4)
    runner = runner_for(tmp_path, model, hook, epochs=50, param_scheduler=jump)
    runner.optim_wrapper = dict(optimizer=optimizer, clip_grad=dict(max_norm=10.0))
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert all(math.isfinite(loss) for loss in scalars['train/loss'].data[0])
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    correction, invalid, length = (
        scalars[f'train/cbn/norm/{key}'].data[0] for key in ('correction', 'invalid', 'window_length')
    )
    # Readings of 50 iterations each, the jump after two.
    assert len(correction) == len(invalid) == 4 and list(length) == [4] * 4
    assert max(correction[:2]) < 0.005 < 0.05 < min(correction[2:])
    assert max(invalid[:2]) == 0 and 0.05 < min(invalid[2:]) < 1
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count(f'cbn/norm/invalid: {invalid[2]:.4f}') >= 1


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_the_size_of_the_radial_part_of_the_gradient_is_that_of_the_convolutions_whole_gradient(compiled):
    torch.manual_seed(0)
    conv, norm = model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), CBN(4, window_size=3))
    norm.diagnose = True
    call = torch.compile(model, backend='aot_eager') if compiled and not IS_BEFORE_2_13 else model
    found, weight = [], conv.weight
    for step in range(8):
        if step == 4:
            assert norm.diagnosis().radial == pytest.approx(torch.stack(found).mean().item(), rel=1e-5)
            found.clear()
        weight.grad = None
        call(torch.randn(2, 3, 6, 6)).pow(3).mean().backward()
        found.append(torch.cosine_similarity(weight.flatten(1), weight.grad.flatten(1)).abs().mean())
    assert copy.deepcopy(norm).diagnosis() is None, 'a copy begins to count'
    norm.diagnose = False
    weight.grad = torch.full_like(weight, torch.nan)
    call(torch.randn(2, 3, 6, 6)).pow(3).mean().backward()
    assert norm.diagnosis().radial == pytest.approx(torch.stack(found).mean().item(), rel=1e-5)


def test_a_diagnosis_does_without_the_gradient_of_a_weight_that_is_no_leaf():
    """As in FullyShardedDataParallel; and it lets go of the weights that it watched before."""
    conv, norm = model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), CBN(4, window_size=3))
    norm.diagnose = True
    for _ in range(2):
        model(torch.randn(2, 3, 6, 6)).pow(3).mean().backward()
    assert norm.diagnosis().radial is not None
    watched = []
    for is_leaf in (False, False, True, True):
        leaf = conv.weight.detach().clone().requires_grad_()
        weight = leaf if is_leaf else leaf * 1
        watched.append(weakref.ref(weight))
        functional_call(model, {'0.weight': weight}, (torch.randn(2, 3, 6, 6),)).pow(3).mean().backward()
        assert (norm.diagnosis().radial is not None) == is_leaf
    of_conv = weakref.ref(conv)
    del leaf, weight
    gc.collect()
    assert [found() is None for found in watched] == [True, True, True, False], 'the last one alone is kept'
    del model, conv, norm
    gc.collect()
    assert of_conv() is None and watched[-1]() is None


def test_a_frozen_convolution_has_no_radial_part(tmp_path):
    model = Net(CBN(4, window_size=3))
    model.conv.weight.requires_grad_(False)
    runner = runner_for(tmp_path, model, dict(type='CBNBurnInHook', burn_in_epochs=0, diagnostics=True))
    runner.train()
    names = [name for name in runner.message_hub.log_scalars if name.startswith('train/cbn/norm/')]
    assert sorted(name.rpartition('/')[2] for name in names) == ['correction', 'invalid', 'window_length']
