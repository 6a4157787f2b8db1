"""The preflight finds what would stop a training, and says what to do."""

import copy
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.compensation import first_order
from mmdet_cbn.experiments import preflight
from mmdet_cbn.experiments.paper.coco import TABLE5
from mmdet_cbn.experiments.preflight import Machine, has_autocast, run_check

CBN_HEAD = next(row for row in TABLE5.rows if row.name == 'cbn-head')
CBN_HEAD_EPOCHS = 12


@pytest.fixture
def check(tmp_path):
    """Runs a check of a machine that shall train the row cbn-head; returns what it found, by subject."""
    machine = Machine(CBN_HEAD, ROOT / 'configs', tmp_path / 'work_dirs', gpus=1)
    return lambda name: {result.subject: result for result in run_check(name, machine)}


@pytest.mark.slow
def test_the_tool_ends_with_a_table_and_a_status(tmp_path):
    def run(*arguments):
        command = [sys.executable, ROOT / 'tools/preflight.py', '--gpus', '1', '--work-dir', tmp_path, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    good = run('--checks', 'software', 'processes')
    assert good.returncode == 0, good.stdout + good.stderr
    table = good.stdout.partition('Is this machine ready?')[2]
    for subject in ('versions', 'torchvision', 'mmcv operators', r'\d process'):
        assert re.search(rf'│ {subject}[^│]*│ ok ', table), table
    assert '== 2/2 processes' in good.stdout

    bad = run('--checks', 'software', '--gpus', '0')
    assert bad.returncode == 2 and '--gpus must be 1 or more, got 0' in bad.stderr


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A whole COCO of three images a split."""
    monkeypatch.setattr(preflight, 'IMAGES', dict(train=3, val=3))
    monkeypatch.setenv('COCO_ROOT', str(tmp_path))
    (tmp_path / 'annotations').mkdir()
    for split in ('train', 'val'):
        names = [f'{number:012}.jpg' for number in range(3)]
        (tmp_path / f'{split}2017').mkdir()
        for name in names:
            (tmp_path / f'{split}2017' / name).touch()
        file = tmp_path / 'annotations' / f'instances_{split}2017.json'
        file.write_text(json.dumps(dict(images=[dict(file_name=name) for name in names])))
    return tmp_path


@pytest.mark.parametrize(
    ('harm', 'found'),
    [
        (lambda coco: shutil.rmtree(coco / 'val2017'), 'val2017 is missing'),
        (lambda coco: (coco / 'annotations/instances_val2017.json').unlink(), 'instances_val2017.json is missing'),
        (lambda coco: (coco / 'annotations/instances_val2017.json').write_text('{'), 'instances_val2017.json is damag'),
        (lambda coco: (coco / 'annotations/instances_val2017.json').write_text('[]'), 'instances_val2017.json is dam'),
        (lambda coco: (coco / 'val2017/000000000002.jpg').unlink(), '1 of 3 images are missing in .*000000000002.jpg'),
        (
            lambda coco: (coco / 'annotations/instances_val2017.json').write_text('{"images": [{"file_name": "'
                                                                                  '000000000001.jpg"}]}'),
            'has 1 images, COCO 2017 has 3',
        ),
    ],
)  # fmt: skip
def test_coco_that_is_not_whole_is_found(check, coco, harm, found):
    assert {result.status for result in check('data').values()} == {'ok'}
    harm(coco)
    results = check('data')
    assert results['COCO, train'].status == 'ok'
    assert results['COCO, val'].status == 'NOT OK' and re.search(found, results['COCO, val'].found)


def test_gpus_that_are_asked_for_and_not_there_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for gpus, status in ((1, 'not applicable here'), (4, 'NOT OK')):
        machine = Machine(CBN_HEAD, ROOT / 'configs', tmp_path, gpus=gpus)
        (result,) = [found for found in run_check('software', machine) if found.subject == 'GPUs']
        assert result.status == status


def test_options_of_the_training_count(tmp_path):
    machines = [
        Machine(CBN_HEAD, ROOT / 'configs', tmp_path, options=options)
        for options in ({}, {'default_hooks.checkpoint.max_keep_ckpts': 1})
    ]
    needed, with_option = (preflight.checkpoint_bytes(machine.config) for machine in machines)
    assert needed == CBN_HEAD_EPOCHS * with_option
    assert all(config.default_hooks.checkpoint.max_keep_ckpts == 1 for config in machines[1].all_configs)


@pytest.mark.slow
def test_weights_are_whole_or_within_reach(check, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    digest = hashlib.sha256(b'weights').hexdigest()[:8]
    urls = {
        name: f'https://example.org/{name.rpartition("/")[2]}-{digest}.pth'
        for name in ('torchvision://resnet50', 'torchvision://resnet101', 'open-mmlab://detectron/resnet50_gn')
    }

    def url_of(name):
        assert threading.current_thread() is threading.main_thread(), 'it changes mmengine meanwhile'
        return urls[name]

    monkeypatch.setattr(preflight, 'weights_url', url_of)

    def out_of_reach(request, timeout):
        assert request.full_url in urls.values() and request.method == 'HEAD'
        raise OSError('no network')

    monkeypatch.setattr(preflight.urllib.request, 'urlopen', out_of_reach)
    results = check('weights')
    assert results.keys() == urls.keys() and {result.status for result in results.values()} == {'NOT OK'}
    assert str(folder / f'resnet50-{digest}.pth') in results['torchvision://resnet50'].advice

    (folder / f'resnet50-{digest}.pth').write_bytes(b'weights')
    (folder / f'resnet101-{digest}.pth').write_bytes(b'weigh')
    results = check('weights')
    assert results['torchvision://resnet50'].status == 'ok'
    assert 'is not what its name says' in results['torchvision://resnet101'].found

    monkeypatch.setattr(preflight.urllib.request, 'urlopen', lambda *_, **__: nullcontext())
    assert check('weights')['open-mmlab://detectron/resnet50_gn'].status == 'ok'
    from_scratch = Machine(CBN_HEAD, ROOT / 'configs', tmp_path, options={'model.backbone.init_cfg': None})
    assert list(run_check('weights', from_scratch)) == []


def test_names_of_weights_are_found_where_mmengine_looks():
    for name, file in (
        ('torchvision://resnet50', r'resnet50-[0-9a-f]{8}\.pth'),
        ('open-mmlab://detectron/resnet50_gn', r'resnet50_gn.*-[0-9a-f]{8}\.pth'),
    ):
        assert re.fullmatch(file, preflight.weights_file(preflight.weights_url(name)).name)


@pytest.mark.slow
def test_a_full_disk_is_found(check, monkeypatch):
    for free, status, advised in ((10**13, 'ok', False), (50 * 10**9, 'ok', True), (10**9, 'NOT OK', True)):
        monkeypatch.setattr(preflight.shutil, 'disk_usage', lambda _, free=free: SimpleNamespace(free=free))
        (result,) = check('disk').values()
        assert result.status == status and bool(result.advice) == advised


def test_the_disk_space_is_that_of_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv('CBN_ROW', 'mask-rcnn_r50_fpn_cbn-head_1x_coco')
    config = Config.fromfile(ROOT / 'configs' / 'small' / 'r18_coco.py')
    init_default_scope('mmdet')
    model = MODELS.build(copy.deepcopy(config.model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / 'epoch_1.pth')
    size = (tmp_path / 'epoch_1.pth').stat().st_size
    before = config.to_dict()
    assert preflight.checkpoint_bytes(config) == pytest.approx(12 * size, rel=0.01)
    assert config.to_dict() == before, 'others read it, too'
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    assert preflight.checkpoint_bytes(config) == pytest.approx(2 * size, rel=0.01)


def test_the_layer_is_as_near_to_the_oracle_as_batch_norm(check, monkeypatch):
    dtypes = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    right = {
        f'CBN in {name}, {device}': 'ok' if name == 'float32' or has_autocast(device, dtype) else 'not applicable here'
        for name, dtype in dtypes.items()
    }
    assert {name: result.status for name, result in check('layer').items()} == right
    monkeypatch.setattr(preflight, 'MEMORY_FORMATS', dict(contiguous=torch.contiguous_format))
    compensate = first_order.compensate

    def wrong(*args):
        moved = compensate(*args)
        return moved._replace(mean=moved.mean + 0.1)

    monkeypatch.setattr(first_order, 'compensate', wrong)
    found = check('layer').values()
    assert [result.status for result in found] == [status.replace('ok', 'NOT OK') for status in right.values()]
    farthest = re.compile(r"\(order=1(, gradient='batch')?, contiguous is the farthest")
    assert all(farthest.search(result.found) for result in found if result.status == 'NOT OK')


class Waits(CBN):
    """A layer that makes the host wait, as far as the fake device below can tell."""

    def forward(self, input):
        if Device.mode == 'error':
            raise RuntimeError('called a synchronizing CUDA operation')
        return super().forward(input)


class Device:
    mode = 'default'

    @classmethod
    def set_mode(cls, mode):
        cls.mode = mode


@pytest.mark.parametrize('waits', [False, True])
def test_waiting_for_the_device_is_found(check, monkeypatch, waits):
    """With what tells of it on a GPU replaced, since there may be none."""
    monkeypatch.setattr(Machine, 'device', torch.device('cpu'))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', Device.set_mode)
    monkeypatch.setitem(preflight.KINDS, 'order=1', lambda: (Waits if waits else CBN)(preflight.CHANNELS))
    results = check('waiting')
    assert Device.mode == 'default'
    assert [result.status for result in results.values()] == ['NOT OK' if waits else 'ok', 'ok']
    if waits:
        assert results['no waiting for the GPU'].found == 'order=1: called a synchronizing CUDA operation'


def train_apart(*args):
    """In the place of ``train_together``: nothing is exchanged between the processes."""
    preflight.DistributedDataParallel = lambda model, device_ids: model
    together(*args)


together = preflight.train_together


@pytest.mark.slow
def test_processes_that_train_apart_are_found(check, monkeypatch):
    monkeypatch.setattr(preflight, 'train_together', train_apart)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert 'after 3 steps, 0.weight differs between processes' in check('processes')['processes'].found


@pytest.mark.parametrize(
    ('started_at', 'ends_at', 'found'),
    [
        (600, 700, 'the weights are equal after 3 steps of DistributedDataParallel'),
        (600, math.inf, 'no end after 180 s'),
        (math.inf, math.inf, 'not started after 900 s'),
    ],
)
@pytest.mark.slow
def test_processes_may_take_long_to_import_but_not_to_meet(check, monkeypatch, started_at, ends_at, found):
    now = 0

    def start_processes(function, args, nprocs, **_):
        def join(timeout):
            nonlocal now
            now += 50
            if now >= started_at:
                for rank in range(nprocs):
                    preflight.started_file(args[-1], rank).touch()
            return now >= ends_at

        return SimpleNamespace(join=join, processes=[])

    monkeypatch.setattr(preflight.multiprocessing, 'start_processes', start_processes)
    monkeypatch.setattr(preflight, 'time', SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert check('processes')['2 processes, gloo'].found == found


def test_a_step_is_timed(check, monkeypatch):
    monkeypatch.setenv('CBN_ROW', CBN_HEAD.config)
    monkeypatch.setattr(Machine, 'config', Config.fromfile(ROOT / 'configs' / 'small' / 'r18_coco.py'))
    monkeypatch.setattr(preflight, 'SIZE', (96, 64))
    results = check('step')
    assert re.match(r'\d+\.\d+ s, peak memory \d\.\d GB, with 2 images of 96x64', results['a step of cbn-head'].found)
    assert results['a step of cbn-head'].status == 'ok'


def test_a_check_that_breaks_is_a_result(check, monkeypatch):
    def broken(machine):
        yield preflight.Result('first', 'ok', '')
        raise RuntimeError('out of memory\nand more')

    monkeypatch.setitem(preflight.CHECKS, 'step', broken)
    results = check('step')
    assert results['step'].status == 'NOT OK' and results['step'].found == 'RuntimeError: out of memory'
    assert results['first'].status == 'ok'


def test_the_yardstick_is_batch_norms(monkeypatch):
    assert 0 < preflight.deviation(nn.BatchNorm2d(4), 'cpu') < 1e-4
