"""The command-line tools, run as commands."""

import json
import os
import re
import socket
import subprocess
import sys
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch
from conftest import ROOT
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import distributed, nn

from mmdet_cbn.openmmlab.tools import find_tool, leave_process_group, named_annotations

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


@pytest.mark.slow
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


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda text: text[: len(text) // 2],
        lambda text: '',
        lambda text: '[]',
        lambda text: '{}',
        lambda text: text.replace('image_id', 'picture'),
        lambda text: text.replace('file_name', 'name'),
        lambda text: text.replace('bbox', 'frame'),
        lambda text: text.replace('"circle"', '"disc"'),
        lambda text: text.replace('"id": 1', '"id": "1"'),
    ],
)
def test_annotations_that_do_not_fit_are_an_error_that_names_the_file(
    split, damage, shapes_root, tmp_path, monkeypatch
):
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    for name in ('train', 'val'):
        text = (shapes_root / 'annotations' / f'instances_{name}2017.json').read_text()
        file = tmp_path / 'annotations' / f'instances_{name}2017.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(damage(text) if name == split else text)
    dataset = Config.fromfile(CONFIG)[f'{split}_dataloader'].dataset
    error = pytest.raises((RuntimeError, ValueError), match=rf'instances_{split}2017\.json (is|has) ')
    with named_annotations(), error:
        DATASETS.build(dataset)


def test_the_tool_names_annotations_that_are_cut_off(run, shapes_root, tmp_path):
    (tmp_path / 'annotations').mkdir()
    for name in ('train', 'val'):
        text = (shapes_root / 'annotations' / f'instances_{name}2017.json').read_text()
        (tmp_path / 'annotations' / f'instances_{name}2017.json').write_text(text[:99])
    with pytest.raises(
        AssertionError, match=r'RuntimeError: .*instances_train2017\.json is not a file of COCO annotations'
    ):
        run('python', ROOT / 'tools/train.py', CONFIG, *SMALL_RUN, SHAPES_ROOT=str(tmp_path))


@pytest.mark.slow
def test_mmdets_own_tool_trains_through_custom_imports(run):
    log = run('python', find_tool('train.py'), CONFIG, *SMALL_RUN, 'train_cfg.max_epochs=1')
    assert 'CBN: 32 layers in training, window size 4, order 1; burn-in ends after epoch 1.' in log


@contextmanager
def taken(port):
    """Listens at a port, 0 for a free one, and gives its number. Another process may listen there already."""
    with socket.socket() as listener:
        with suppress(OSError):
            listener.bind(('127.0.0.1', port))
            listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with taken(0) as port:
        return port


WEIGHTS_OF_EACH_PROCESS = """
import atexit
import os
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WeightsOfEachProcess(Hook):
    def before_train(self, runner):
        self.rois = []
        runner.model.module.roi_head.mask_head.register_forward_pre_hook(self.note)

    def note(self, head, args):
        if head.training:
            self.rois.append(len(args[0]))

    def after_train(self, runner):
        file = f'{runner.work_dir}/weights_{get_rank()}.pth'
        torch.save(dict(rois=self.rois, model=runner.model.module.state_dict()), file)


@atexit.register
def note_threads():
    names = [file.read_text() for file in Path('/proc/self/task').glob('*/comm')]
    Path(f'threads_{os.getpid()}').write_text(''.join(names))
"""


@pytest.mark.parametrize(('processes', 'broadcast'), [(2, False), (4, True)])
@pytest.mark.slow
def test_distributed_training_and_testing(run, tmp_path, shapes_root, processes, broadcast):
    """As the script stands, and with a port and a wrapper of the user's. The last process finds nothing on its images,
    so it has no RoI for its mask head."""
    annotations = json.loads((shapes_root / 'annotations/instances_train2017.json').read_text())
    bare = {image['id'] for image in annotations['images'][processes - 1 :: processes]}
    annotations['annotations'] = [a for a in annotations['annotations'] if a['image_id'] not in bare]
    (tmp_path / 'train.json').write_text(json.dumps(annotations))
    (tmp_path / 'weights_of_each_process.py').write_text(WEIGHTS_OF_EACH_PROCESS)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{CONFIG}'\n"
        "custom_imports = dict(imports=['mmdet_cbn', 'weights_of_each_process'])\n"
        "default_hooks = dict(weights=dict(type='WeightsOfEachProcess'))\n"
    )
    wrapper = (
        'model_wrapper_cfg.type=MMDistributedDataParallel',
        'model_wrapper_cfg.broadcast_buffers=True',
        'model_wrapper_cfg.find_unused_parameters=True',
    )
    options = (
        *(wrapper if broadcast else ()),
        'train_cfg.max_epochs=2',
        'train_dataloader.batch_size=1',
        'train_dataloader.sampler.shuffle=False',
        'train_dataloader.batch_sampler=None',
        f'train_dataloader.dataset.ann_file={tmp_path}/train.json',
        'train_dataloader.dataset.filter_cfg=None',
        'custom_hooks.0.save_window=True',
    )
    environment = dict(
        CBN_ROW='mask-rcnn_r50_fpn_cbn-all_1x_coco',
        OMP_NUM_THREADS='1',
        PYTHONPATH=f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}',
        **({'PORT': str(free_port())} if broadcast else {}),
    )
    train = (ROOT / 'tools/dist_train.sh', config, processes, '--work-dir', 'run', *SMALL_RUN, *options)
    with taken(29500):  # by another training
        log = run(*train, **environment)
    last = 8 // processes
    assert re.findall(rf'Epoch\(train\) +\[2\]\[{last}/{last}\].*cbn_window: (\d)', log) == [str(min(last, 4))]

    ranks = range(processes)
    windows = [(tmp_path / f'run/epoch_2.pth.cbn_window_rank{rank}').read_bytes() for rank in ranks]
    assert len(set(windows)) == processes, 'each process has its own'
    ends = [torch.load(tmp_path / f'run/weights_{rank}.pth') for rank in ranks]
    assert all(min(end['rois']) > 0 for end in ends[:-1]) and set(ends[-1]['rois']) == {0}
    saved = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=False)['state_dict']
    assert any('running_var' in name for name in saved)
    for end in ends:
        for name, value in end['model'].items():
            assert torch.equal(value, saved[name]), f'{name}: all processes validate what one saves'
    log = run(ROOT / 'tools/dist_test.sh', config, 'run/epoch_2.pth', processes, *SMALL_RUN, *options, **environment)
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in log

    threads = [file.read_text() for file in tmp_path.glob('threads_*')]
    assert len(threads) == 2 * processes and not any('gloo' in names for names in threads), threads


def test_the_process_group_ends_after_the_model_that_shares_it(tmp_path, monkeypatch):
    distributed.init_process_group('gloo', f'file://{tmp_path}/store', world_size=1, rank=0)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
        model.runner = [model]  # a cycle of references
        model, alive = None, weakref.ref(model)
        end = distributed.destroy_process_group
        monkeypatch.setattr(distributed, 'destroy_process_group', lambda: end() if alive() is None else None)
        leave_process_group()
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            end()


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
