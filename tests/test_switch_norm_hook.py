"""The normalizers change when their epoch begins, and nothing else does: neither weights nor optimizer nor DDP."""

import os

import pytest
import torch
from conftest import Net, runner_for
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch import distributed, multiprocessing, nn
from torch.distributed.nn.functional import all_reduce

from mmdet_cbn import BRN, CBN, SwitchNormHook
from mmdet_cbn.openmmlab.tools import leave_process_group


class Notes(Hook):
    """Notes the type of the norm and the state of training, before and after each epoch."""

    priority = 'LOWEST'

    def __init__(self):
        self.types, self.before, self.after = [], [], []

    def state(self, runner):
        optimizer = runner.optim_wrapper.optimizer
        momenta = [optimizer.state[p].get('momentum_buffer') for p in runner.model.parameters()]
        tensors = [*runner.model.state_dict().values(), *(m for m in momenta if m is not None)]
        return [tensor.clone() for tensor in tensors]

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        norm = getattr(runner.model, 'module', runner.model).norm
        self.types.append(type(norm))
        if batch_idx == 0:
            self.before.append(self.state(runner))

    def after_train_epoch(self, runner):
        self.after.append(self.state(runner))


def bn_net():
    torch.manual_seed(0)
    return Net(nn.BatchNorm2d(4))


def train(tmp_path, hook, epochs=4, **kwargs):
    model, notes = bn_net(), Notes()
    runner = runner_for(tmp_path, model, hook, epochs=epochs, **kwargs)
    runner.register_hook(notes)
    runner.train()
    return runner, notes


def test_where_the_two_compute_the_same_training_goes_on_as_if_nothing_had_happened(tmp_path):
    """SyncBN of a single process is BN."""
    runner, notes = train(tmp_path, dict(type='SwitchNormHook', epoch=2))
    _, untouched = train(tmp_path / 'untouched', None)
    assert notes.types == [nn.BatchNorm2d] * 8 + [MODELS.get('SyncBN')] * 8
    assert len(notes.after[-1]) == 2 + 5 + 4, 'weights, statistics and the momentum of each parameter'
    torch.testing.assert_close(notes.after, untouched.after, rtol=0, atol=0)
    log = next(tmp_path.glob('2*/*.log')).read_text()
    assert log.count('1 layers are BN for the first 2 epochs, then SyncBN.') == 1
    assert log.count('after 2 epochs, 1 layers of BN became SyncBN.') == 1
    assert runner.model.norm.process_group is None


@pytest.mark.parametrize('to', ['BRN', 'CBN', dict(type='CBN', window_size=2, order=0, requires_grad=True)])
def test_weights_momentum_and_statistics_cross_the_switch(tmp_path, to):
    runner, notes = train(tmp_path, dict(type='SwitchNormHook', epoch=2, to=to))
    kind = BRN if to == 'BRN' else CBN
    assert notes.types == [nn.BatchNorm2d] * 8 + [kind] * 8
    torch.testing.assert_close(notes.before[2], notes.after[1], rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(notes.before[2], notes.after[2], strict=True)), 'all go on'
    if kind is CBN:
        window = to['window_size'] if isinstance(to, dict) else 4
        assert runner.model.lengths == [None] * 8 + [min(i, window) for i in range(1, 9)]
    assert (runner.model.norm.momentum, runner.model.norm.eps) == (0.1, 1e-5), "the old layer's"


def test_each_new_layer_draws_samples_of_its_own(tmp_path):
    model = Net(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    hook, runner = SwitchNormHook(epoch=0, to=dict(type='CBN', samples=4)), runner_for(tmp_path, model, None)
    before = torch.get_rng_state()
    hook.before_train_epoch(runner)
    first, _, second = model.norm
    assert first.compensation.state() != second.compensation.state()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_new_layers_have_the_arguments_of_the_old_ones(tmp_path):
    old = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3, affine=False)
    runner = runner_for(tmp_path, Net(old), SwitchNormHook(epoch=1, to='CBN'), epochs=2)
    runner.train()
    new = runner.model.norm
    assert type(new) is CBN and (new.eps, new.momentum, new.affine, new.weight) == (1e-3, 0.3, False, None)


@pytest.mark.parametrize('to', ['SyncBN', 'BRN'])
@pytest.mark.parametrize('stop_after', [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, to, stop_after):
    hook = dict(type='SwitchNormHook', epoch=2, to=to)
    _, whole = train(tmp_path / 'whole', hook)
    train(tmp_path / 'parts', hook, epochs=stop_after)
    _, rest = train(tmp_path / 'parts', hook, resume=True)
    assert rest.types == whole.types[4 * stop_after :]
    torch.testing.assert_close(rest.after[-1], whole.after[-1], rtol=0, atol=0)


def test_only_layers_in_training_of_the_type_and_under_the_prefixes_change(tmp_path):
    model = bn_net()
    model.a = nn.Sequential(nn.BatchNorm2d(2), CBN(2))
    model.b = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    model.b[0].eval()
    runner = runner_for(tmp_path, model, None)
    hook = SwitchNormHook(1, prefixes=['a', 'b'])
    hook.before_train(runner)
    runner.train_loop._epoch = 1
    hook.before_train_epoch(runner)
    types = [type(m) for m in (model.norm, *model.a, *model.b)]
    sync = MODELS.get('SyncBN')
    assert types == [nn.BatchNorm2d, sync, CBN, nn.BatchNorm2d, sync]


BURN_IN = dict(type='CBNBurnInHook', burn_in_epochs=1, save_window=True, diagnostics=True)
TO_CBN = dict(type='SwitchNormHook', epoch=2, to=dict(type='CBN', window_size='auto'))
FROM_CBN = dict(type='SwitchNormHook', epoch=2, source='CBN', to='BN')
DIRECTIONS = {
    'to CBN': (TO_CBN, nn.BatchNorm2d, [None] * 8 + [1, 2, 3, 4, 5, 6, 7, 8]),
    'CBN at once': (dict(TO_CBN, epoch=0), nn.BatchNorm2d, [1] * 5 + [2, 3, 4, 5, 6, 7, 8] + [8] * 4),
    'from CBN': (FROM_CBN, CBN, [1] * 5 + [2, 3, 4] + [None] * 8),
}


def train_with_burn_in(folder, hooks, kind, **kwargs):
    torch.manual_seed(0)
    model = Net(CBN(4, window_size='auto') if kind is CBN else nn.BatchNorm2d(4))
    runner = runner_for(folder, model, hooks, **kwargs)
    notes = Notes()
    runner.register_hook(notes)
    runner.train()
    return runner, notes


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_it_goes_together_with_burn_in(tmp_path, direction, order):
    """In either order of the two hooks, with all that the burn-in hook can do; resumed, as if it had never stopped."""
    switch, kind, lengths = DIRECTIONS[direction]
    hooks = [BURN_IN, switch][::order]
    whole, notes = train_with_burn_in(tmp_path / 'whole', hooks, kind)
    assert [norm.__name__ for norm in notes.types] == ['CBN' if n else 'BatchNorm2d' for n in lengths]
    assert whole.model.lengths == lengths
    scalars = whole.message_hub.log_scalars
    assert scalars['train/cbn_window'].data[0].tolist() == [n or 1 for n in lengths]
    assert scalars['train/cbn_without_window'].data[0].tolist() == [int(n == 1) for n in lengths]
    # They are read after the last iteration.
    assert ('train/cbn/norm/window_length' in scalars) == (direction != 'from CBN')
    for epoch in (1, 2, 3):
        train_with_burn_in(tmp_path / str(epoch), hooks, kind, epochs=epoch)
        resumed, rest = train_with_burn_in(tmp_path / str(epoch), hooks, kind, resume=True)
        assert resumed.model.lengths == lengths[4 * epoch :]
        torch.testing.assert_close(rest.after[-1], notes.after[-1], rtol=0, atol=0)


def test_burn_in_counts_as_the_runner_counts_where_cbn_comes_later(tmp_path):
    hooks = [dict(BURN_IN, burn_in_epochs=3), TO_CBN]
    runner, _ = train_with_burn_in(tmp_path, hooks, nn.BatchNorm2d)
    assert runner.model.lengths == [None] * 8 + [1] * 4 + [1, 2, 3, 4]


@pytest.mark.parametrize('start', [0, 1, 2, 3])
def test_one_switch_can_follow_another(tmp_path, start):
    """BN, then CBN, then SyncBN; which a resumed run has to catch up with."""
    then = dict(type='SwitchNormHook', epoch=3, source='CBN', to='SyncBN')
    hooks = [BURN_IN, TO_CBN, then]
    _, whole = train_with_burn_in(tmp_path / 'whole', hooks, nn.BatchNorm2d)
    assert whole.types == [nn.BatchNorm2d] * 8 + [CBN] * 4 + [MODELS.get('SyncBN')] * 4
    if start:
        train_with_burn_in(tmp_path / 'parts', hooks, nn.BatchNorm2d, epochs=start)
        _, rest = train_with_burn_in(tmp_path / 'parts', hooks, nn.BatchNorm2d, resume=True)
        assert rest.types == whole.types[4 * start :]
        torch.testing.assert_close(rest.after[-1], whole.after[-1], rtol=0, atol=0)
    else:
        with pytest.raises(RuntimeError, match=r"source='CBN' and epoch=3 is listed before .* order of their epochs"):
            train_with_burn_in(tmp_path / 'reverse', [BURN_IN, then, TO_CBN], nn.BatchNorm2d)


def test_a_second_training_goes_on_with_the_new_layers(tmp_path):
    runner, _ = train(tmp_path, dict(type='SwitchNormHook', epoch=1, to='CBN'), epochs=2)
    runner.train_loop._max_epochs = 3
    runner.train()
    assert runner.model.norm.window_length == 4 and runner.epoch == 3


def test_a_hook_serves_a_second_runner(tmp_path):
    hook = SwitchNormHook(epoch=0, to='CBN')
    for number in range(2):
        runner, _ = train(tmp_path / str(number), [hook], epochs=1)
        assert type(runner.model.norm) is CBN


def test_a_switch_that_does_not_come_is_a_warning(tmp_path):
    train(tmp_path, dict(type='SwitchNormHook', epoch=1), epochs=1)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'the switch after 1 epochs will not come in a training of 1' in log


@MODELS.register_module()
class GlooSyncBN(nn.BatchNorm2d):
    """Normalizes over all processes, on the CPU, where torch's own refuses to."""

    def forward(self, input):
        moments = torch.stack([input.mean(dim=(0, 2, 3)), input.square().mean(dim=(0, 2, 3))])
        mean, square = all_reduce(moments) / distributed.get_world_size()
        var = square - mean.square()
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach(), self.momentum)
        self.num_batches_tracked.add_(1)
        mean, var, gamma, beta = (t[:, None, None] for t in (mean, var, self.weight, self.bias))
        return gamma * (input - mean) / (var + self.eps).sqrt() + beta


def train_in_one_of_two_processes(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    runner, notes = train(
        folder / str(rank),
        dict(type='SwitchNormHook', epoch=1, to=dict(type='GlooSyncBN', momentum=1.0)),
        epochs=2,
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)),
    )
    assert type(runner.model).__name__ == 'MMDistributedDataParallel'
    torch.save((notes.before, notes.after, [kind.__name__ for kind in notes.types]), folder / f'{rank}.pt')
    del runner
    leave_process_group()


@pytest.mark.usefixtures('trains_on_cpu')
def test_it_switches_inside_distributed_data_parallel(tmp_path):
    """Two processes; buffers are not broadcast, as in mmengine, so it is the normalizer that joins the statistics."""
    multiprocessing.spawn(train_in_one_of_two_processes, (tmp_path,), nprocs=2)
    (before, after, types), (_, other_after, _) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert types == ['BatchNorm2d'] * 2 + ['GlooSyncBN'] * 2
    torch.testing.assert_close(before[1], after[0], rtol=0, atol=0)
    statistics = slice(4, 6)  # running_mean and running_var
    for epoch, in_step in ((0, False), (1, True)):
        ours, theirs = after[epoch], other_after[epoch]
        for name, a, b in zip(range(len(ours)), ours, theirs, strict=True):
            same = torch.allclose(a, b, rtol=1e-6)
            assert same == (in_step or name not in range(*statistics.indices(99))), (epoch, name)
    assert not any(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(epoch=-1), ValueError, 'SwitchNormHook: epoch must be an int >= 0, got -1'),
        (dict(epoch=1.5), TypeError, 'SwitchNormHook: epoch must be an int >= 0, got 1.5 of type float'),
        (dict(epoch=1, to='NoBN'), ValueError, "to must be a registered normalizer .* 'NoBN'"),
        (dict(epoch=1, to='GN'), ValueError, "to must be a registered normalizer .* 'GN'"),
        (dict(epoch=1, to=dict(type='LN')), ValueError, "to must be a registered normalizer .* 'LN'"),
        (dict(epoch=1, to=dict(type='CBN', window_size=0)), ValueError, 'window_size must be an int >= 1'),
        (dict(epoch=1, to=3), TypeError, 'to must be a name or a norm_cfg, got 3'),
        (dict(epoch=1, to=dict(type='CBN', requires_grad=False)), ValueError, 'requires_grad of to must be True'),
        (dict(epoch=1, to='CBN', source='BN1d'), ValueError, "'BN1d' takes, got 'CBN', .* inputs of other dimensions"),
        (
            dict(epoch=1, to=dict(type='BN', affine=False)),
            ValueError,
            "SwitchNormHook: to must have .* 'affine': False",
        ),
        (dict(epoch=1, to=dict(type='BRN', r_max=0)), ValueError, 'SwitchNormHook: to must be .*BRN: r_max must'),
        (dict(epoch=1, source='ReLU'), ValueError, "source must be a registered normalizer .* 'ReLU'"),
        (dict(epoch=1, prefixes=3), TypeError, 'prefixes must be a name, a list of names or None, got 3'),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SwitchNormHook(**arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(source='CBN'), "source='CBN': the model has no such normalizer in training"),
        (dict(prefixes='neck'), r"prefixes must name modules .* got 'neck'; the model has them in \[''\]"),
    ],
)
def test_nothing_to_switch_is_an_error(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, dict(type='SwitchNormHook', epoch=1, **arguments))


BY_ITERATIONS = dict(by_epoch=False, max_iters=8)


def test_a_later_epoch_is_refused_in_training_by_iterations(tmp_path):
    with pytest.raises(RuntimeError, match=r'epoch=1 would never come.*epoch=0'):
        train(tmp_path, dict(type='SwitchNormHook', epoch=1), train_cfg=BY_ITERATIONS)


def test_in_training_by_iterations_it_switches_before_the_first(tmp_path):
    hooks = [dict(TO_CBN, epoch=0), dict(type='CBNBurnInHook', burn_in_iters=3)]
    runner, notes = train_with_burn_in(tmp_path, hooks, nn.BatchNorm2d, train_cfg=BY_ITERATIONS)
    assert notes.types == [CBN] * 8
    assert runner.model.lengths == [1, 1, 1, 1, 2, 3, 4, 5]


def test_another_eps_is_refused_because_a_test_would_not_know_of_it(tmp_path):
    for eps, expected in ((1e-5, None), (0.5, r'eps of to must be the eps of the old layers, 1e-05.*got 0\.5')):
        hook = SwitchNormHook(epoch=1, source='BN', to=dict(type='CBN', eps=eps))
        runner = runner_for(tmp_path, Net(nn.BatchNorm2d(4)), hook, epochs=2)
        if expected is None:
            runner.train()
        else:
            with pytest.raises(ValueError, match=expected):
                runner.train()
