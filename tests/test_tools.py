"""The command-line tools, run as commands."""

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from mmdet_cbn.mmdet_tools import find_tool

CONFIG = ROOT / 'configs' / 'small' / 'r18_shapes.py'
SMALL_RUN = [
    '--cfg-options',
    *(f'{loader}_dataloader.num_workers=0' for loader in ('train', 'val', 'test')),
    *(f'{loader}_dataloader.persistent_workers=False' for loader in ('train', 'val', 'test')),
    'default_hooks.logger.interval=1',
    'custom_hooks.0.burn_in_epochs=1',
]


@pytest.fixture
def run(shapes_root, tmp_path):
    """Runs a command on the drawn images, in a folder of its own; returns what it printed."""

    def run_command(*command, **environment):
        env = {
            **os.environ,
            'SHAPES_ROOT': str(shapes_root),
            'OMP_NUM_THREADS': '2',
            'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
            **environment,
        }
        result = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-5000:]
        return result.stdout

    return run_command


def test_train_resume_and_test(run, tmp_path):
    train = ('python', ROOT / 'tools/train.py', CONFIG, '--work-dir', 'run', *SMALL_RUN)
    run(*train, 'train_cfg.max_epochs=1')
    log = run(*train, 'train_cfg.max_epochs=2', '--resume')
    assert 'resumed epoch: 1, iter: 4' in log
    assert re.findall(r'cbn_window: (\d)', log) == ['1', '2', '3', '4']
    log = run(
        'python',
        ROOT / 'tools/test.py',
        CONFIG,
        'run/epoch_2.pth',
        '--show-dir',
        'pictures',
        *SMALL_RUN,
    )
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in log
    assert len(list(tmp_path.glob('work_dirs/**/pictures/**/*.png'))) == 4


def test_mmdets_own_tool_trains_through_custom_imports(run):
    log = run('python', find_tool('train.py'), CONFIG, *SMALL_RUN, 'train_cfg.max_epochs=1')
    assert 'CBN: 32 layers in training, window size 4, order 1; burn-in ends after epoch 1.' in log


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def test_distributed_training_and_testing(run, tmp_path):
    """Two processes on the CPU. mmengine's launcher chooses a GPU for each process, which is all that has to be kept
    from it where there is none."""
    (tmp_path / 'sitecustomize.py').write_text('import torch\ntorch.cuda.set_device = lambda device: None\n')
    on_cpu = (
        'env_cfg.dist_cfg.backend=gloo',
        'model_wrapper_cfg.type=MMDistributedDataParallel',
        'model_wrapper_cfg.device_ids=None',
        'train_cfg.max_epochs=2',
        'custom_hooks.0.save_window=True',
    )
    environment = dict(PORT=str(free_port()), OMP_NUM_THREADS='1', PYTHONPATH=str(tmp_path))
    log = run(ROOT / 'tools/dist_train.sh', CONFIG, 2, '--work-dir', 'run', *SMALL_RUN, *on_cpu, **environment)
    assert re.findall(r'Epoch\(train\) +\[2\]\[2/2\].*cbn_window: (\d)', log) == ['2']
    windows = [(tmp_path / f'run/epoch_2.pth.cbn_window_rank{rank}').read_bytes() for rank in (0, 1)]
    assert windows[0] != windows[1], 'each process has its own'
    log = run(ROOT / 'tools/dist_test.sh', CONFIG, 'run/epoch_2.pth', 2, *SMALL_RUN, *on_cpu, **environment)
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in log


@pytest.mark.parametrize(
    ('script', 'arguments', 'command'),
    [
        ('slurm_train.sh', 'part job my.py dir --amp', 'train.py my.py --work-dir dir --amp --launcher slurm'),
        ('slurm_test.sh', 'part job my.py my.pth --out x', 'test.py my.py my.pth --out x --launcher slurm'),
    ],
)
def test_slurm_scripts_hand_everything_to_srun(run, tmp_path, script, arguments, command):
    srun = tmp_path / 'bin' / 'srun'
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho srun "$@"\n')
    srun.chmod(0o755)
    environment = dict(PATH=f'{srun.parent}:{os.environ["PATH"]}', GPUS='8', GPUS_PER_NODE='4', SRUN_ARGS='--exclusive')
    line = run(ROOT / 'tools' / script, *arguments.split(), **environment)
    assert line.startswith('srun --partition=part --job-name=job --gres=gpu:4 --ntasks=8 --ntasks-per-node=4 ')
    assert '--exclusive python -u ' in line and line.endswith(f'/{command}\n')


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_scripts_without_arguments_say_how_to_use_them(script):
    result = subprocess.run([ROOT / 'tools' / script], capture_output=True, text=True)
    assert result.returncode == 2
    assert f': {script} ' in result.stderr


def test_make_shapes_refuses_by_name(tmp_path):
    command = [sys.executable, ROOT / 'tools/make_shapes.py', tmp_path / 'data', '--train', '2', '--val']
    assert 'val: 1 images' in subprocess.run([*command, '1'], capture_output=True, text=True, check=True).stdout
    result = subprocess.run([*command, '0'], capture_output=True, text=True)
    assert result.returncode == 2 and 'at least 1 in each split, got 0 for val' in result.stderr
