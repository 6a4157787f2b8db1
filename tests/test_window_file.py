"""With ``save_window`` a resumed run goes on bit for bit; its files are no part of the checkpoint, and run no code."""

import io
import os
import pickle
import random
import shutil
import time
from datetime import timedelta

import pytest
import torch
from conftest import Net, runner_for, served
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from test_device import to_cuda
from torch import distributed, multiprocessing, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_cbn import CBN, CBNBurnInHook
from mmdet_cbn.openmmlab.tools import leave_process_group

HOOK = dict(type='CBNBurnInHook', burn_in_epochs=1, save_window=True)
BY_ITERATION = dict(by_epoch=False, max_iters=14)
#: In the files of version 0.1.0.
FIELDS = {
    'NaiveStatistics': ('mean', 'var'),
    'CompensatedStatistics': ('mean', 'var', 'mean_grad', 'var_grad', 'mean_product', 'var_product'),
    'SecondOrderStatistics': ('mean', 'var', 'mean_grad', 'covariance', 'mean_product', 'var_product'),
    'SampledStatistics': ('mean', 'var', 'patches', 'share', 'sample_mean', 'sample_var'),
}
KINDS = pytest.mark.parametrize('kind', [dict(), dict(order=0), dict(samples=8)], ids=str)


def train(folder, kind=None, hook=HOOK, norm=None, resume=False, **kwargs):
    torch.manual_seed(0)
    model = Net(norm or CBN(4, window_size=4, **(kind or {})))
    checkpoints = dict(type='CheckpointHook', **kwargs.pop('checkpoints', dict(interval=1)))
    runner = runner_for(folder, model, hook, resume=resume, **kwargs)
    runner.register_hook(checkpoints)
    runner.train()
    return model


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def cut(source, target, last):
    """A run that died after checkpoint ``last``."""
    shutil.copytree(source, target)
    step = int(last.rpartition('_')[2])
    for file in target.glob('*.pth*'):
        if int(file.name.split('.')[0].rpartition('_')[2]) > step:
            file.unlink()
    (target / 'last_checkpoint').write_text(str(target / f'{last}.pth'))


@KINDS
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, kind):
    whole = train(tmp_path / 'whole', kind, epochs=5)
    cut(tmp_path / 'whole', tmp_path / 'cut', 'epoch_3')
    resumed = train(tmp_path / 'cut', kind, epochs=5, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed.lengths == whole.lengths[12:], 'from the fourth epoch on'
    without = train(tmp_path / 'cut', kind, hook=dict(HOOK, save_window=False), epochs=5, resume=True)
    assert without.lengths == []  # it is trained to the end
    cut(tmp_path / 'whole', tmp_path / 'anew', 'epoch_3')
    anew = train(tmp_path / 'anew', kind, hook=dict(HOOK, save_window=False), epochs=5, resume=True)
    assert anew.lengths[:3] == [1, 2, 3] and not torch.equal(weights(whole), weights(anew))


def test_it_does_so_in_the_middle_of_an_epoch_too(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # as mmengine does for workers from epoch to epoch
    arguments = dict(
        hook=dict(type='CBNBurnInHook', burn_in_iters=3, save_window=True),
        train_cfg=BY_ITERATION,
        checkpoints=dict(interval=1, by_epoch=False),
    )
    whole = train(tmp_path / 'whole', **arguments)
    for last in ('iter_2', 'iter_5', 'iter_11'):  # in burn-in, with a window half full, with a full one
        cut(tmp_path / 'whole', tmp_path / last, last)
        resumed = train(tmp_path / last, resume=True, **arguments)
        assert torch.equal(weights(whole), weights(resumed)), last


def test_the_checkpoint_is_a_batchnorms_and_files_go_with_their_checkpoint(tmp_path):
    train(tmp_path, checkpoints=dict(interval=1, max_keep_ckpts=2), epochs=5)
    assert sorted(file.name for file in tmp_path.glob('*.pth*')) == [
        'epoch_4.pth',
        'epoch_4.pth.cbn_window_rank0',
        'epoch_5.pth',
        'epoch_5.pth.cbn_window_rank0',
    ]
    checkpoint = torch.load(tmp_path / 'epoch_5.pth', weights_only=False)
    assert list(checkpoint['state_dict']) == list(Net(nn.BatchNorm2d(4)).state_dict())
    assert 'window' not in ''.join(checkpoint)


def test_checkpoints_may_lie_in_another_folder(tmp_path):
    arguments = dict(checkpoints=dict(interval=1, out_dir=str(tmp_path / 'new')))
    train(tmp_path / 'run', epochs=2, **arguments)
    assert (tmp_path / 'new/run/epoch_2.pth.cbn_window_rank0').exists()
    assert train(tmp_path / 'run', epochs=3, resume=True, **arguments).lengths == [4] * 4


class Uploads(Hook):
    """Wraps the saving of checkpoints, as a hook does that copies them elsewhere."""

    def before_run(self, runner):
        save = runner.save_checkpoint
        runner.save_checkpoint = lambda *args, **kwargs: save(*args, **kwargs)


def test_another_hook_may_wrap_the_saving_of_checkpoints(tmp_path):
    arguments = dict(
        hook=[Uploads(), dict(type='CBNBurnInHook', burn_in_iters=0, save_window=True)],
        checkpoints=dict(interval=3, by_epoch=False),
    )
    train(tmp_path, train_cfg=dict(by_epoch=False, max_iters=6), **arguments)
    assert train(tmp_path, train_cfg=dict(by_epoch=False, max_iters=8), resume=True, **arguments).lengths == [4, 4]


def test_a_second_training_of_a_resumed_runner_keeps_its_windows(tmp_path):
    train(tmp_path, epochs=2)
    model = Net(CBN(4, window_size=4))
    runner = runner_for(tmp_path, model, HOOK, epochs=3, resume=True)
    runner.train()
    runner.train_loop._max_epochs = 4
    runner.train()
    assert model.lengths == [4] * 8


class Flexible(Net):
    def train_step(self, data, optim_wrapper):
        losses = self(data['inputs'])
        optim_wrapper.update_params(losses['loss'])
        return losses


def test_a_flexible_runner_has_its_windows_again(tmp_path):
    """It resumes before it calls hooks."""

    def train(epochs, **resume):
        model = Flexible(CBN(4, window_size=4))
        FlexibleRunner(
            model,
            work_dir=str(tmp_path),
            strategy=dict(type='SingleDeviceStrategy'),
            train_dataloader=dict(
                dataset=[dict(inputs=torch.randn(3, 6, 6)) for _ in range(4)],
                batch_size=1,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=[HOOK],
            **resume,
        ).train()
        return model.lengths

    train(2)
    assert train(3, resume=True) == [4] * 4
    assert train(4, resume=True, load_from=str(tmp_path / 'epoch_3.pth')) == [4] * 4
    assert train(4, resume=str(tmp_path / 'epoch_3.pth')) == [4] * 4


class MasterSaves(Hook):
    """Saves a checkpoint in one process alone, as mmengine's ``Runner.save_checkpoint`` allows."""

    def after_train_epoch(self, runner):
        if get_rank() == 0:
            runner.save_checkpoint(runner.work_dir, 'extra.pth')


def train_in_one_of_two_processes(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    runner = runner_for(folder, Net(), HOOK, epochs=2, launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    runner.register_hook(MasterSaves())
    runner.register_hook(dict(type='CheckpointHook', interval=1, filename_tmpl='snapshot_{}.pth'))
    runner.train()
    del runner
    leave_process_group()


@pytest.mark.slow
def test_a_checkpoint_may_be_saved_in_one_process_alone(tmp_path):
    """Other processes are not waited for, which would never come."""
    multiprocessing.spawn(train_in_one_of_two_processes, (tmp_path,), nprocs=2)
    files = {file.name for file in tmp_path.glob('*.cbn_window*')}
    names = [f'{name}_{epoch}.pth' for name in ('epoch', 'snapshot') for epoch in (1, 2)]
    of_all = {f'{name}.cbn_window_rank{rank}' for name in names for rank in (0, 1)}
    assert files == {*of_all, 'extra.pth.cbn_window_rank0'}


def test_windows_are_copied_to_the_cpu():
    """And nothing on the device, where memory is short."""
    with FakeTensorMode() as mode, torch.no_grad():
        model, fake = to_cuda(nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window_size=3)), mode)
        for _ in range(2):
            model(fake(torch.empty(2, 3, 8, 8)))
        copied = []

        class Copies(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                copied.extend([out] if isinstance(out, torch.Tensor) else [])
                return out

        with Copies():
            (state,) = model[1].window_state()['windows']
    assert len(copied) == len(state['tensors']) == 6
    assert {tensor.device.type for tensor in [*copied, *state['tensors'].values()]} == {'cpu'}


@pytest.mark.parametrize('affine', [False, True])
def test_windows_return_to_the_device_of_the_layer(affine):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window_size=3, affine=affine))
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8))
    layer = CBN(4, window_size=3, affine=affine, device='meta')
    layer.load_window_state(model[1].window_state())
    assert len(layer.windows.current) == 2
    assert {tensor.device.type for tensor in layer.windows.current.stacked()} == {'meta'}


def test_without_the_option_no_file_is_written(tmp_path):
    train(tmp_path, hook=dict(HOOK, save_window=False), epochs=2)
    assert not list(tmp_path.glob('*window*'))


class Saves(Hook):
    """Saves a checkpoint in the middle of an epoch."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 5:
            runner.save_checkpoint(runner.work_dir, 'mine.pth', by_epoch=False)


@pytest.mark.parametrize('order', [1, -1])
def test_a_hook_may_save_before_ours_or_after(tmp_path, order):
    whole = train(tmp_path, hook=[Saves(), HOOK][::order], epochs=3)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'mine.pth'))
    assert whole.lengths == [1] * 4 + [1, 2, 3, 4] + [4] * 4
    assert train(tmp_path, epochs=3, resume=True).lengths[0] == 3, 'after 6 of 12 iterations, 2 with a window'


class Accuracy(BaseMetric):
    """The same in each epoch, so that the first is the best."""

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(accuracy=1.0)


def test_the_best_checkpoint_has_its_windows(tmp_path):
    """mmengine counts its iterations otherwise than those of other checkpoints."""

    class Evaluated(Net):
        def forward(self, inputs, mode='tensor'):
            return super().forward(inputs) if mode == 'loss' else inputs

    def train_and_evaluate(**kwargs):
        torch.manual_seed(0)
        model = Evaluated(CBN(4, window_size=4))
        images = dict(dataset=[dict(inputs=torch.zeros(3, 6, 6))], sampler=dict(type='DefaultSampler', shuffle=False))
        evaluation = dict(
            val_dataloader=dict(images, batch_size=1, collate_fn=dict(type='pseudo_collate')),
            val_cfg=dict(),
            val_evaluator=[Accuracy()],
        )
        hook = dict(HOOK, burn_in_epochs=0)
        runner = runner_for(tmp_path, model, hook, epochs=2, **evaluation, **kwargs)
        runner.register_hook(dict(type='CheckpointHook', interval=-1, save_best='accuracy'))
        runner.train()
        return model.lengths

    assert train_and_evaluate() == [1, 2, 3, 4, 4, 4, 4, 4]
    assert train_and_evaluate(resume=True, load_from=str(tmp_path / 'best_accuracy_epoch_1.pth')) == [4] * 4


@pytest.mark.parametrize(('burn_in_epochs', 'lengths'), [(0, [1, 2, 3, 4, 4, 4, 4, 4]), (2, [1] * 8)])
def test_to_train_on_with_the_same_runner_is_no_resume(tmp_path, burn_in_epochs, lengths):
    model = Net(CBN(4, window_size=4))
    runner = runner_for(tmp_path, model, dict(HOOK, burn_in_epochs=burn_in_epochs), epochs=1)
    runner.train()
    save_checkpoint = runner.save_checkpoint
    runner.train_loop._max_epochs = 2
    runner.train()
    assert model.lengths == lengths and runner.save_checkpoint is save_checkpoint
    assert 'the run was resumed before' not in ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))


def test_a_resume_before_the_hooks_is_a_warning(tmp_path):
    train(tmp_path, epochs=2)
    model = Net(CBN(4, window_size=4))
    runner = runner_for(tmp_path, model, HOOK, epochs=3)
    runner.resume(str(tmp_path / 'epoch_2.pth'))
    runner.train()
    assert model.lengths == [1, 2, 3, 4]
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert log.count('the run was resumed before its hooks could tell from which checkpoint') == 1


def test_a_missing_file_is_a_warning(tmp_path):
    train(tmp_path, epochs=2)
    (file,) = tmp_path.glob('epoch_2.pth.cbn*')
    file.unlink()
    model = train(tmp_path, epochs=3, resume=True)
    assert model.lengths == [1, 2, 3, 4]
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert f'{file} is missing, so the windows fill anew' in log


def test_windows_of_another_iteration_are_a_warning(tmp_path):
    """All checkpoints have one name, and the run was killed between the windows and the checkpoint."""
    train(tmp_path, epochs=2)
    (file,) = tmp_path.glob('epoch_2.pth.cbn*')
    file.write_bytes(resaved(file.read_bytes(), lambda states: states, iteration=12))
    assert train(tmp_path, epochs=3, resume=True).lengths == [1, 2, 3, 4]
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert f'{file} was not written after 8 iterations, as the checkpoint was, so the windows fill anew' in log


def test_a_resume_from_a_url_fills_the_windows_anew(tmp_path, monkeypatch):
    """mmengine can read from HTTP, and not tell whether a file exists there."""
    train(tmp_path, epochs=2)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    with served(tmp_path) as url:
        resumed = train(tmp_path / 'resumed', epochs=3, resume=True, load_from=f'{url}/epoch_2.pth')
    assert resumed.lengths == [1, 2, 3, 4]


def test_a_resume_from_the_home_directory_has_its_windows(tmp_path, monkeypatch):
    train(tmp_path, epochs=2)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert train(tmp_path / 'resumed', epochs=3, resume=True, load_from='~/epoch_2.pth').lengths == [4] * 4


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ['EVIL'],)


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (lambda data: data[: len(data) // 2], ''),
        (lambda data: b'', ''),
        (lambda data: pickle.dumps(Evil()), ''),
        (lambda data: resaved(data, lambda states: states, iteration=Evil()), ''),
        (lambda data: resaved(data, lambda states: {'other': states['norm']}), 'it belongs to other layers'),
        (lambda data: resaved(data, lambda states: [states]), ''),
        (lambda data: resaved(data, lambda states: states, other=1), 'it belongs to other layers'),
        (lambda data: resaved(data, lambda states: {'norm': {}}), "'windows'"),
        (lambda data: edited(data, kind='Evil'), "'Evil'"),
        (lambda data: edited(data, length=9), 'it has 9 iterations'),
        (lambda data: edited(data, next=3), 'writes to place 3'),
        (lambda data: edited(data, tensors=dict(mean=torch.zeros(3, 4))), 'missing'),
        (lambda data: edited(data, kind='NaiveStatistics', tensors=naive(2, 4)), 'another window_size than 4'),
        (lambda data: edited(data, kind='NaiveStatistics', tensors=naive(3, 5)), 'other than 4 features'),
        (lambda data: resaved(data, lambda s: {'norm': dict(s['norm'], compensation=dict(draws='x'))}), 'draws'),
        (lambda data: resaved(data, lambda s: {'norm': dict(s['norm'], windows=[])}), 'list index'),
        (lambda data: edited(data, length=1.5), 'it has 1.5 iterations'),
        (
            lambda data: edited(data, kind='NaiveStatistics', tensors=naive(3, 4, var=torch.ones(3, 5))),
            'than 4 features',
        ),
        (lambda data: edited(data, kind='NaiveStatistics', tensors=naive(3, 4, var=torch.ones(3))), 'than 4 features'),
        (
            lambda data: edited(data, kind='NaiveStatistics', tensors=naive(3, 4, mean=torch.ones(3, 4).long())),
            'precision',
        ),
        (
            lambda data: edited(data, kind='NaiveStatistics', tensors=naive(3, 4, var=torch.ones(3, 4).half())),
            'precision',
        ),
        (lambda data: data.replace(b'iteration', b'iteratioo', 1), 'archive is damaged'),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_runs_no_code(tmp_path, monkeypatch, damage, reason):
    monkeypatch.setenv('EVIL', str(tmp_path / 'evil'))
    naive_cbn = dict(order=0)
    train(tmp_path, naive_cbn, epochs=2)
    (file,) = tmp_path.glob('epoch_2.pth.cbn*')
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RuntimeError, match=r'epoch_2\.pth\.cbn_window_rank0 was not loaded.*remove it') as error:
        train(tmp_path, naive_cbn, epochs=3, resume=True)
    assert reason in str(error.value)
    assert not (tmp_path / 'evil').exists()
    file.unlink()
    train(tmp_path, naive_cbn, epochs=3, resume=True)


def test_a_file_of_another_order_is_refused_by_name(tmp_path):
    train(tmp_path, dict(order=1), epochs=2)
    with pytest.raises(RuntimeError, match=r"was not loaded.*'CompensatedStatistics', not NaiveStatistics: order or"):
        train(tmp_path, dict(order=0), epochs=3, resume=True)


def test_a_file_of_version_0_1_0_loads():
    """It has the state of a generator of random numbers for each layer, whether it draws or not."""
    for kind in (dict(), dict(order=0), dict(order=2), dict(samples=8)):
        conv, norm = nn.Conv2d(3, 4, 3), CBN(4, window_size=3, **kind)
        for _ in range(3):
            norm(conv(torch.randn(2, 3, 8, 8)))
        state = norm.window_state()
        old = dict(windows=state['windows'], random=list(random.Random(0).getstate()[1]))
        loaded = CBN(4, window_size=3, **kind)
        loaded.load_window_state(old)
        assert tuple(old['windows'][0]['tensors']) == FIELDS[norm.compensation.Statistics.__name__]
        loaded(conv(torch.randn(2, 3, 8, 8)))
        assert loaded.window_length == 3


def resaved(data, change, **others):
    saved = torch.load(io.BytesIO(data), weights_only=True)
    with io.BytesIO() as buffer:
        torch.save({**saved, 'windows': change(saved['windows']), **others}, buffer)
        return buffer.getvalue()


def edited(data, **changes):
    def change(states):
        states['norm']['windows'][0].update(changes)
        return states

    return resaved(data, change)


def naive(capacity, channels, **tensors):
    return {**dict(mean=torch.zeros(capacity, channels), var=torch.ones(capacity, channels)), **tensors}


def test_the_option_must_be_a_bool():
    with pytest.raises(TypeError, match="save_window must be True or False, got 'yes'"):
        CBNBurnInHook(burn_in_iters=1, save_window='yes')
