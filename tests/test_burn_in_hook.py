"""Burn-in follows the runner's count, across resumes, and never passes over a model without CBN in silence."""

import math

import pytest
import torch
from conftest import Net, runner_for
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm
from torch import nn

from mmdet_cbn import CBN, CBNBurnInHook
from mmdet_cbn.pairing import watch


class FrozenNet(Net):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


EPOCHS = dict(type='CBNBurnInHook', burn_in_epochs=2)
ITERS = dict(type='CBNBurnInHook', burn_in_iters=6)


@pytest.mark.parametrize(
    ('hook', 'lengths'),
    [
        (EPOCHS, [1] * 8 + [1, 2, 3, 3, 3, 3, 3, 3]),
        (ITERS, [1] * 6 + [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        (dict(type='CBNBurnInHook', burn_in_epochs=0), [1, 2, 3] + [3] * 13),
    ],
)
def test_the_window_is_one_until_burn_in_is_over_and_then_fills(tmp_path, hook, lengths):
    model = Net()
    runner_for(tmp_path, model, hook).train()
    assert model.lengths == lengths


@pytest.mark.parametrize(('hook', 'burn_in_iters'), [(EPOCHS, 8), (ITERS, 6)])
@pytest.mark.parametrize('stop_after', [1, 2, 3])
def test_a_resumed_run_ends_burn_in_where_the_uninterrupted_one_does(tmp_path, hook, burn_in_iters, stop_after):
    runner_for(tmp_path, Net(), hook, epochs=stop_after).train()
    model = Net()
    runner = runner_for(tmp_path, model, hook, resume=True)
    runner.train()
    done = 4 * stop_after
    burning = max(burn_in_iters - done, 0)
    after = 16 - done - burning
    assert model.lengths == [1] * burning + [min(i, 3) for i in range(1, after + 1)]


def test_the_training_log_has_the_window_length(tmp_path):
    runner = runner_for(tmp_path, Net(), EPOCHS)
    runner.train()
    log = runner.message_hub.get_scalar('train/cbn_window').data[0]
    assert log.tolist() == [1] * 9 + [2] + [3] * 6
    assert 'cbn_window: 3' in next(tmp_path.glob('*/*.log')).read_text()


def test_it_says_once_what_it_found(tmp_path):
    runner = runner_for(tmp_path, Net(), EPOCHS)
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count('CBN: 1 layers in training, window size 3, order 1; burn-in ends after epoch 2.') == 1


def test_burn_in_as_long_as_training_is_a_warning(tmp_path):
    runner = runner_for(tmp_path, Net(), EPOCHS, epochs=2)
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'WARNING - CBN: the burn-in of 2 epochs is as long as the training of 2' in log


def test_a_batch_of_nan_is_logged_and_harms_its_own_iteration_alone(tmp_path):
    model = Net()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))  # as a GradScaler leaves out its step
    runner = runner_for(tmp_path, model, dict(type='CBNBurnInHook', burn_in_epochs=0), epochs=2)
    runner.train_dataloader.dataset[1]['inputs'][0] = float('nan')
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count("inf or NaN came into 1 of 1 layers, into 'norm' in 2 iterations") == 1
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True] * 2


def test_a_batch_of_nan_during_burn_in_is_logged_and_evaluation_stays_usable(tmp_path):
    model = Net()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
    runner = runner_for(tmp_path, model, dict(type='CBNBurnInHook', burn_in_epochs=1), epochs=1)
    runner.train_dataloader.dataset[1]['inputs'][0] = float('nan')
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count("inf or NaN came into 1 of 1 layers, into 'norm' in 1 iterations") == 1
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_log_tells_how_many_layers_have_no_window(tmp_path):
    """The longest window alone would not tell that one of two layers lost its own."""

    class TwoLayers(Net):
        def __init__(self):
            super().__init__(CBN(4, window_size=2))
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)])
            self.other = CBN(4, window_size=2)
            self.turn = 0

        def forward(self, inputs, mode='tensor'):
            self.turn += 1
            self.other(self.convs[self.turn % 2](torch.stack(inputs)))
            return super().forward(inputs, mode)

    runner = runner_for(tmp_path, TwoLayers(), dict(type='CBNBurnInHook', burn_in_iters=2), epochs=2)
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert scalars['train/cbn_window'].data[0].tolist() == [1] * 3 + [2] * 5
    assert scalars['train/cbn_without_window'].data[0].tolist() == [2] * 3 + [1] * 5
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count("CBN layer 'other' (") == log.count('statistics of another convolution') == 1
    assert 'cbn_without_window: 1' in log


@pytest.mark.parametrize(('batch_size', 'window_size'), [(1, 8), (2, 8), (3, 6), (4, 4)])
def test_auto_is_the_papers_rule(tmp_path, batch_size, window_size):
    model = Net(CBN(4, window_size='auto'))
    runner_for(tmp_path, model, EPOCHS, epochs=1, batch_size=batch_size).train()
    assert model.norm.window_size == window_size


@pytest.mark.parametrize('hook', [EPOCHS, ITERS])
def test_epochs_are_refused_where_none_are_counted(tmp_path, hook):
    model = Net()
    runner = runner_for(tmp_path, model, hook, train_cfg=dict(by_epoch=False, max_iters=8))
    if hook is ITERS:
        runner.train()
        assert model.lengths == [1] * 6 + [1, 2]
    else:
        with pytest.raises(RuntimeError, match=r'burn_in_epochs=2 would never end.*burn_in_iters; .* 4 iterations'):
            runner.train()


def test_no_burn_in_needs_no_count(tmp_path):
    model = Net()
    hook = dict(type='CBNBurnInHook', burn_in_epochs=0)
    runner_for(tmp_path, model, hook, train_cfg=dict(by_epoch=False, max_iters=4)).train()
    assert model.lengths == [1, 2, 3, 3]


class WithTeacher(Net):
    """As mmdet's SemiBaseDetector: a part is put into evaluation in each forward."""

    def __init__(self):
        super().__init__()
        self.teacher = Net()

    def forward(self, inputs, mode='tensor'):
        self.teacher.eval()
        with torch.no_grad():
            self.teacher(inputs)
        return super().forward(inputs, mode)


@pytest.mark.parametrize('train_cfg', [None, dict(by_epoch=False, max_iters=16)])
def test_a_teacher_does_not_count_as_a_layer_without_window(tmp_path, train_cfg):
    runner = runner_for(tmp_path, WithTeacher(), ITERS, train_cfg=train_cfg)
    runner.train()
    assert runner.message_hub.get_scalar('train/cbn_without_window').data[0].tolist() == [1] * 7 + [0] * 9
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert log.count('layers in training') <= 2


def test_auto_without_a_batch_size_is_an_error(tmp_path):
    model = Net(CBN(4, window_size='auto'))
    runner = runner_for(tmp_path, model, EPOCHS)
    dataset = [torch.randn(3, 6, 6)]
    runner._train_dataloader = torch.utils.data.DataLoader(dataset, batch_size=None)
    with pytest.raises(RuntimeError, match="window_size='auto' needs the number of images per GPU"):
        runner.train()


@pytest.mark.parametrize(
    ('model', 'config', 'message'),
    [
        (lambda: Net(nn.BatchNorm2d(4)), {}, 'the model has no CBN layers. Give its backbone, neck or heads norm_cfg'),
        (lambda: FrozenNet(), {}, 'all 1 CBN layers of the model are frozen'),
        (
            lambda: convert_sync_batchnorm(Net(), 'torch'),
            dict(sync_bn='torch'),
            "sync_bn='torch' turned every kind of BatchNorm, CBN too, into SyncBN",
        ),
    ],
)
def test_a_model_without_active_cbn_layers_is_an_error(tmp_path, model, config, message, monkeypatch):
    net = model()
    # Outside of a multi-process run mmengine would turn the SyncBN back into BN.
    monkeypatch.setattr('mmengine.runner.runner.revert_sync_batchnorm', lambda model: model)
    runner = runner_for(tmp_path, net, EPOCHS, cfg=config)
    with pytest.raises(RuntimeError, match=message):
        runner.train()


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({}, ValueError, 'one of burn_in_epochs and burn_in_iters must be given'),
        (dict(burn_in_epochs=1, burn_in_iters=1), ValueError, 'burn_in_epochs=1 and burn_in_iters=1'),
        (dict(burn_in_epochs=-1), ValueError, 'burn_in_epochs must be an int >= 0, got -1'),
        (dict(burn_in_iters=1.5), TypeError, 'burn_in_iters must be an int >= 0, got 1.5 of type float'),
        (dict(burn_in_epochs='3'), TypeError, "burn_in_epochs must be an int >= 0, got '3' of type str"),
        (dict(burn_in_iters=True), TypeError, 'burn_in_iters must be an int >= 0, got True'),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CBNBurnInHook(**arguments)


class Unfreeze(Hook):
    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.norm.train(runner.iter >= 3)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_layers_that_another_hook_unfreezes_are_burnt_in(tmp_path, by_epoch):
    model = Net()
    train_cfg = None if by_epoch else dict(type='IterBasedTrainLoop', max_iters=16)
    runner_for(tmp_path, model, [Unfreeze(), ITERS], train_cfg=train_cfg).train()
    assert model.lengths == [0] * 3 + [1] * 3 + [1, 2] + [3] * 8


def test_the_copy_of_ema_does_not_keep_all_convolutions_watched(tmp_path):
    model = Net()
    runner_for(tmp_path, model, [dict(type='EMAHook'), dict(type='CBNBurnInHook', burn_in_iters=0)]).train()
    model.eval()
    assert model.lengths[-1] == 3 and not any(finder is not model.norm.finder for finder in watch.finders)
