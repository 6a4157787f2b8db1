"""A training that is killed again and again ends with the weights of one that is not."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves
from conftest import Net, runner_for
from mmdet_cbn import CBN

torch.set_num_threads(1)
torch.manual_seed(0)
hook = dict(type='CBNBurnInHook', burn_in_epochs=2, save_window=True)
runner = runner_for(Path(sys.argv[1]), Net(CBN(4, window_size=4)), hook, epochs=int(sys.argv[2]), resume=True)
runner.register_hook(dict(type='CheckpointHook', interval=1))
runner.train()
"""


def start(folder, epochs):
    command = [sys.executable, '-W', 'ignore', '-c', SCRIPT, str(folder), str(epochs)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def last_checkpoint(folder):
    pointer = folder / 'last_checkpoint'
    return Path(pointer.read_text()) if pointer.exists() else None


def test_ten_kills_change_nothing(tmp_path):
    undisturbed, killed = tmp_path / 'undisturbed', tmp_path / 'killed'
    moments = random.Random(0)
    reached = []
    for _ in range(10):
        process = start(killed, epochs=100_000)  # more than it can do
        before = last_checkpoint(killed)
        while last_checkpoint(killed) == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for file in killed.glob('*.pth'):
            torch.load(file, weights_only=False)  # whole
        reached.append(int(last_checkpoint(killed).stem.removeprefix('epoch_')))
    assert reached == sorted(set(reached)), 'each run has got further'
    epochs = reached[-1] + 2
    assert [start(folder, epochs).wait() for folder in (undisturbed, killed)] == [0, 0]
    ends = [torch.load(folder / f'epoch_{epochs}.pth', weights_only=False) for folder in (undisturbed, killed)]
    for key in ('state_dict', 'optimizer'):
        leaves = [[leaf for leaf in tree_leaves(end[key]) if isinstance(leaf, torch.Tensor)] for end in ends]
        assert leaves[0] and all(torch.equal(*pair) for pair in zip(*leaves, strict=True)), key
