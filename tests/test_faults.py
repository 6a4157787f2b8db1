"""A training that is killed again and again ends with the weights of one that is not."""

import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import Net, runner_for
from mmengine.fileio import LocalBackend
from torch.utils._pytree import tree_flatten

from mmdet_cbn import CBN
from mmdet_cbn.openmmlab.checkpoints import find_latest_checkpoint
from mmdet_cbn.openmmlab.monkey_patches import safe_runner

PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['mmdet_cbn.experiments.data.varied'])  # and with it all that takes seconds to import
pytestmark = pytest.mark.usefixtures('trains_on_cpu')


class MortalNet(Net):
    """Kills its process in iteration ``die_at``."""

    def __init__(self, norm, die_at):
        super().__init__(norm)
        self.die_at = die_at

    def forward(self, inputs, mode='tensor'):
        if len(self.lengths) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs, mode)


def die_in_write(number):
    """Kill this process half through the file that it writes as its ``number``-th, windows and checkpoints."""
    put, written = LocalBackend.put, count(1)

    def put_or_die(self, data, path):
        if next(written) == number:
            put(self, data[: len(data) // 2], path)
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, data, path)

    LocalBackend.put = put_or_die


def train(folder, epochs, save_window, die_at, write_to_die_in):
    with open(f'{folder}.log', 'a') as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    warnings.simplefilter('ignore')
    die_in_write(write_to_die_in)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = dict(type='CBNBurnInHook', burn_in_epochs=2, save_window=save_window)
    model = MortalNet(CBN(4, window_size=4), die_at)
    runner = runner_for(folder, model, hook, epochs=epochs, resume=True)
    # Besides mmengine's own: each checkpoint is written again while it is there and named.
    runner.register_hook(dict(type='CheckpointHook', interval=1))
    with safe_runner():  # as in tools/train.py
        runner.train()
    (folder / 'window_lengths').write_text(repr(model.lengths))


def start(folder, epochs, save_window=True, die_at=-1, write_to_die_in=-1):
    process = PROCESSES.Process(target=train, args=(folder, epochs, save_window, die_at, write_to_die_in))
    process.start()
    return process


def exit_code(process):
    process.join()
    return process.exitcode


def end_of_log(folder):
    return Path(f'{folder}.log').read_text()[-3000:]


def assert_they_end_alike(undisturbed, killed, epochs):
    for folder in (undisturbed, killed):
        assert exit_code(start(folder, epochs)) == 0, end_of_log(folder)
    ends = [torch.load(folder / f'epoch_{epochs}.pth', weights_only=False) for folder in (undisturbed, killed)]
    for key in ('state_dict', 'optimizer'):
        leaves = [[leaf for leaf in tree_flatten(end[key])[0] if isinstance(leaf, torch.Tensor)] for end in ends]
        assert leaves[0] and all(torch.equal(*pair) for pair in zip(*leaves, strict=True)), key


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    undisturbed, killed = tmp_path / 'undisturbed', tmp_path / 'killed'
    moments = random.Random(0)
    reached = []
    for _ in range(10):
        process = start(killed, epochs=100_000)  # more than it can do
        before = find_latest_checkpoint(str(killed))
        while find_latest_checkpoint(str(killed)) == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL, end_of_log(killed)
        for file in killed.glob('*.pth'):
            torch.load(file, weights_only=False)  # whole
        reached.append(int(Path(find_latest_checkpoint(str(killed))).stem.removeprefix('epoch_')))
    assert reached == sorted(set(reached)), 'each run has got further'
    epochs = reached[-1] + 2
    assert_they_end_alike(undisturbed, killed, epochs)


def test_kills_in_the_midst_of_a_write_change_nothing(tmp_path):
    killed = tmp_path / 'killed'
    for write, latest in (
        (5, 1),  # after four in the first epoch, the windows of the second
        (2, 1),  # its checkpoint
        (3, 2),  # its windows again, when its checkpoint is there and named
        (4, 3),  # a checkpoint again
    ):
        assert exit_code(start(killed, 5, write_to_die_in=write)) == -signal.SIGKILL, end_of_log(killed)
        assert Path(find_latest_checkpoint(str(killed))).stem == f'epoch_{latest}'
    assert_they_end_alike(tmp_path / 'undisturbed', killed, epochs=5)


@pytest.mark.parametrize(
    ('die_at', 'resumed_lengths'),
    [
        (6, [1, 1, 1, 1, 1, 2, 3, 4]),  # in the second epoch, of burn-in: it is repeated
        (10, [1, 2, 3, 4]),  # in the third epoch: no second burn-in, and the window fills anew
    ],
)
def test_killed_in_mid_epoch_it_resumes_burn_in_where_the_epoch_began(tmp_path, die_at, resumed_lengths):
    folder = tmp_path / 'killed'
    assert exit_code(start(folder, 3, save_window=False, die_at=die_at)) == -signal.SIGKILL, end_of_log(folder)
    assert exit_code(start(folder, 3, save_window=False)) == 0, end_of_log(folder)
    assert (folder / 'window_lengths').read_text() == repr(resumed_lengths)
