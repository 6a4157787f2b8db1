"""A training that is killed again and again ends with the weights of one that is not."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from mmdet_cbn.checkpoint import find_latest_checkpoint

SCRIPT = """
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import Net, runner_for
from mmdet_cbn import CBN

folder, epochs, save_window, die_at = Path(sys.argv[1]), *map(int, sys.argv[2:])


class MortalNet(Net):
    def forward(self, inputs, mode='tensor'):
        if runner.iter == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs, mode)


torch.set_num_threads(1)
torch.manual_seed(0)
hook = dict(type='CBNBurnInHook', burn_in_epochs=2, save_window=bool(save_window))
model = MortalNet(CBN(4, window_size=4))
runner = runner_for(folder, model, hook, epochs=epochs, resume=True)
runner.register_hook(dict(type='CheckpointHook', interval=1))
runner.train()
(folder / 'window_lengths').write_text(repr(model.lengths))
"""


def start(folder, epochs, save_window=True, die_at=-1):
    command = [sys.executable, '-W', 'ignore', '-c', SCRIPT, folder, epochs, int(save_window), die_at]
    command = [str(word) for word in command]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_ten_kills_change_nothing(tmp_path):
    undisturbed, killed = tmp_path / 'undisturbed', tmp_path / 'killed'
    moments = random.Random(0)
    reached = []
    for _ in range(10):
        process = start(killed, epochs=100_000)  # more than it can do
        before = find_latest_checkpoint(str(killed))
        while find_latest_checkpoint(str(killed)) == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for file in killed.glob('*.pth'):
            torch.load(file, weights_only=False)  # whole
        reached.append(int(Path(find_latest_checkpoint(str(killed))).stem.removeprefix('epoch_')))
    assert reached == sorted(set(reached)), 'each run has got further'
    epochs = reached[-1] + 2
    assert [start(folder, epochs).wait() for folder in (undisturbed, killed)] == [0, 0]
    ends = [torch.load(folder / f'epoch_{epochs}.pth', weights_only=False) for folder in (undisturbed, killed)]
    for key in ('state_dict', 'optimizer'):
        leaves = [[leaf for leaf in tree_leaves(end[key]) if isinstance(leaf, torch.Tensor)] for end in ends]
        assert leaves[0] and all(torch.equal(*pair) for pair in zip(*leaves, strict=True)), key


@pytest.mark.parametrize(
    ('die_at', 'resumed_lengths'),
    [
        (6, [1, 1, 1, 1, 1, 2, 3, 4]),  # in the second epoch, of burn-in: it is repeated
        (10, [1, 2, 3, 4]),  # in the third epoch: no second burn-in, and the window fills anew
    ],
)
def test_killed_in_mid_epoch_it_resumes_burn_in_where_the_epoch_began(tmp_path, die_at, resumed_lengths):
    assert start(tmp_path, 3, save_window=False, die_at=die_at).wait() == -signal.SIGKILL
    assert start(tmp_path, 3, save_window=False).wait() == 0
    assert (tmp_path / 'window_lengths').read_text() == repr(resumed_lengths)
