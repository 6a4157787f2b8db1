"""mmengine's checkpoints load under torch's restricted unpickler, and no checkpoint runs code."""

import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Net, runner_for, served
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader, load_checkpoint, runner
from torch import nn

from mmdet_cbn.old_torch import IS_BEFORE_2_6
from mmdet_cbn.openmmlab.monkey_patches import safe_runner


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


class EvilGetattr(Evil):
    """Through the only way to a function that checkpoints of mmengine need."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, 'register_statistics')


class EvilScheduler(Evil):
    """Made, a scheduler would change the optimizer that it is given."""

    def __reduce__(self):
        return OneCycleParamScheduler, (self.path, 'lr')


@pytest.fixture(autouse=True)
def _as_in_our_tools():
    with safe_runner():
        yield


@pytest.fixture
def checkpoint():
    """What CheckpointHook saves, and what mmdet's published checkpoints hold."""
    hub = MessageHub.get_instance('test_checkpoint')
    for value in (0.5, 0.25):
        hub.update_scalar('train/loss', value)
        hub.update_scalar('train/count', int(value * 4))
    hub.update_info('array', np.arange(4, dtype=np.float32))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return dict(
        meta=dict(
            epoch=1,
            iter=2,
            cfg='text',
            seed=np.random.default_rng(0).integers(9),
            CLASSES=('a', 'b'),
            dataset_meta=dict(classes=('a', 'b'), palette=[(1, 2, 3)]),
            scores=np.array([np.float64(0.1), np.float64(0.2)]),
            names=np.array(['x', 'y']),
            none=np.zeros(0),
            info=ConfigDict(a=[dict(name='x')]),
        ),
        param_schedulers=dict(lr=[dict(anneal_func=OneCycleParamScheduler._annealing_cos)]),
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        message_hub=hub.state_dict(),
    )


def test_mmengines_checkpoints_load(tmp_path, checkpoint):
    path = tmp_path / 'epoch_1.pth'
    torch.save(checkpoint, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)

    loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert history.mean() == 0.375 and history.statistics('min') == 0.25
    assert loaded['message_hub']['runtime_info']['array'].tolist() == [0, 1, 2, 3]
    assert loaded['meta']['seed'] == checkpoint['meta']['seed']
    assert loaded['meta']['names'].tolist() == ['x', 'y'] and loaded['meta']['scores'].tolist() == [0.1, 0.2]
    assert loaded['meta']['none'].shape == (0,) and loaded['meta']['info'] == dict(a=[dict(name='x')])
    assert loaded['param_schedulers'] == checkpoint['param_schedulers']
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    load_checkpoint(model, str(path), strict=True)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # outside of mmengine nothing has changed


@pytest.mark.parametrize('core', ['core', '_core'])
def test_checkpoints_written_under_numpy_1_and_2_load(tmp_path, core):
    """NumPy 1 called its core ``numpy.core``, NumPy 2 calls it ``numpy._core``: rename the module in the pickle."""
    path = tmp_path / 'old.pth'
    data = pickle.dumps(dict(array=np.arange(3.0), scalar=np.float64(2)), protocol=2)
    here = b'numpy._core.multiarray' if b'numpy._core.multiarray' in data else b'numpy.core.multiarray'
    assert here in data
    old = data.replace(here, f'numpy.{core}.multiarray'.encode())
    with open(path, 'wb') as file:
        # The format of torch before 1.6: pickles of a magic number, a protocol, the system, the object, its storages.
        for header in (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True, protocol_version=1001)):
            pickle.dump(header, file, protocol=2)
        file.write(old)
        pickle.dump([], file, protocol=2)
    loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert loaded['array'].tolist() == [0, 1, 2] and loaded['scalar'] == 2


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('evil', [Evil, EvilGetattr, EvilScheduler])
def test_no_checkpoint_runs_code(tmp_path, checkpoint, evil, is_zip, monkeypatch):
    """Whatever the process has declared safe for loads of its own."""
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    torch.save(dict(checkpoint, evil=evil(made)), path, _use_new_zipfile_serialization=is_zip)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with nullcontext() if IS_BEFORE_2_6 else torch.serialization.safe_globals([open, getattr]):
        with pytest.raises(pickle.UnpicklingError, match=r'evil\.pth was not loaded.*(open|getattr|OneCycle)'):
            CheckpointLoader.load_checkpoint(str(path), 'cpu')
        if not IS_BEFORE_2_6:
            assert open in torch.serialization.get_safe_globals(), 'what the process has declared holds again'
    assert not made.exists()
    if evil is Evil:
        torch.load(path, weights_only=False)
        assert made.exists(), 'the checkpoint was meant to be dangerous'


@pytest.mark.parametrize('place', range(5))
def test_no_part_of_a_checkpoint_of_before_torch_1_6_runs_code(tmp_path, place):
    """It is pickles of a magic number, a protocol, the system, the object and the names of its storages."""
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    parts = [0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True, protocol_version=1001), {}, []]
    parts[place] = Evil(made)
    path.write_bytes(b''.join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(pickle.UnpicklingError, match=r'evil\.pth was not loaded'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not made.exists()


def test_no_module_is_loaded_with_its_source(tmp_path):
    """torch looks where the source of a module is, and may write a patch there."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ('module', None, 'file.py', 'source') if value == 'here' else None

    path = tmp_path / 'module.pth'
    with open(path, 'wb') as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}):
            pickle.dump(part, file, protocol=2)
        Pickler(file, protocol=2).dump(dict(state_dict='here'))
        pickle.dump([], file, protocol=2)
    with pytest.raises(pickle.UnpicklingError, match=r'module\.pth was not loaded'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_a_program_is_not_loaded(tmp_path):
    path = tmp_path / 'program.pth'
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(RuntimeError, match=r'program\.pth could not be loaded: .*TorchScript'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_a_tar_archive_is_not_loaded(tmp_path):
    """torch 0.1 wrote one, and torch takes it apart on the disk."""
    path = tmp_path / 'tar.pth'
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            (tmp_path / name).write_bytes(pickle.dumps({} if name == 'pickle' else 0, protocol=2) + pickle.dumps([]))
            archive.add(tmp_path / name, name)
    with pytest.raises(RuntimeError, match=r'tar\.pth could not be loaded: .*tar'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_no_checkpoint_from_a_url_runs_code(tmp_path, checkpoint, monkeypatch):
    made = tmp_path / 'made'
    torch.save(checkpoint, tmp_path / 'good.pth')
    torch.save(dict(checkpoint, evil=Evil(made)), tmp_path / 'evil.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    with served(tmp_path) as url:
        assert CheckpointLoader.load_checkpoint(f'{url}/good.pth', 'cpu')['meta']['epoch'] == 1
        with pytest.raises(pickle.UnpicklingError, match=r'evil\.pth was not loaded'):
            CheckpointLoader.load_checkpoint(f'{url}/evil.pth', 'cpu')
    assert not made.exists()


@pytest.mark.parametrize('keep', [0, 10, 1000])
def test_a_truncated_checkpoint_is_an_error_that_names_the_file(tmp_path, checkpoint, keep):
    path = tmp_path / 'half.pth'
    torch.save(checkpoint, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=r'half\.pth could not be loaded: .+'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_a_changed_bit_is_an_error_that_names_the_file(tmp_path, checkpoint):
    """torch does not look at the check sums, and loads other weights."""
    path = tmp_path / 'changed.pth'
    torch.save(checkpoint, path)
    data = bytearray(path.read_bytes())
    at = data.index(checkpoint['state_dict']['0.weight'].numpy().tobytes())
    data[at + 3] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=False)
    with pytest.raises(RuntimeError, match=r'changed\.pth could not be loaded: .*data/0 is wrong'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_weights_marked_as_a_folder_are_refused(tmp_path, checkpoint):
    """torch would not read them, and return whatever is in memory."""
    path = tmp_path / 'folder.pth'
    torch.save(checkpoint, path)
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
    data = bytearray(path.read_bytes())
    data[place + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r'folder\.pth could not be loaded: .*a folder'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_checkpoints_without_check_sums_load(tmp_path, checkpoint):
    """As torch >= 2.6 writes them if told so, and any torch reads them."""
    path = tmp_path / 'fast.pth'
    torch.save(checkpoint, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        sums = {entry.CRC.to_bytes(4, 'little') for entry in archive.infolist()}
        place = archive.start_dir
    for entry in sums:
        # In the directory at the end, which is what is read.
        at = place
        while (at := data.find(entry, at)) >= 0:
            data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert not any(entry.CRC for entry in archive.infolist())
    loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert torch.equal(loaded['state_dict']['0.weight'], checkpoint['state_dict']['0.weight'])


@pytest.mark.parametrize('content', [[1, 2], torch.zeros(3), 'text', None], ids=str)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r'other\.pth is no checkpoint: it holds a \w+, not a dict'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def trained(folder, **kwargs):
    runner = runner_for(folder, Net(), None, epochs=2, **kwargs)
    runner.train()
    return runner


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize(
    ('change', 'when'),
    [
        (lambda c: c.update(state_dict=[1]), 'both'),
        (lambda c: c.update(state_dict=torch.zeros(2)), 'both'),
        (lambda c: c.update(state_dict={3: torch.zeros(1)}), 'both'),
        (lambda c: c.pop('meta'), 'resumed'),
        (lambda c: c.update(meta=5), 'resumed'),
        (lambda c: c.update(message_hub={}), 'resumed'),
        (lambda c: c['optimizer']['param_groups'][0].update(params=[0]), 'resumed'),
        (lambda c: c.update(optimizer=None), 'resumed'),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_file(tmp_path, change, when, resume):
    trained(tmp_path / 'run')
    path = tmp_path / 'run' / 'epoch_2.pth'
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / 'changed.pth')
    load = partial(trained, tmp_path / 'new', load_from=str(tmp_path / 'changed.pth'), resume=resume)
    if when == 'both' or resume:
        with pytest.raises(RuntimeError, match=r'changed\.pth does not fit this model'):
            load()
    else:
        load()


def test_weights_of_another_model_are_mmengines_warning(tmp_path, capsys):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)).state_dict(), tmp_path / 'another.pth')
    trained(tmp_path / 'run', load_from=str(tmp_path / 'another.pth'))
    assert 'unexpected key in source state_dict: 0.weight, 0.bias' in capsys.readouterr().out


def test_to_resume_does_not_run_the_config_in_a_checkpoint(tmp_path):
    """mmdet 2 kept its text there, and mmengine runs it to see on how many GPUs it was."""
    trained(tmp_path / 'run')
    path, made = tmp_path / 'run' / 'epoch_2.pth', tmp_path / 'made'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['config'] = f"open({str(made)!r}, 'w')"
    torch.save(checkpoint, path)
    runner = runner_for(tmp_path / 'run', Net(), None, epochs=3, resume=True)
    runner.train()
    assert runner.epoch == 3 and not made.exists()


@pytest.mark.parametrize('pointer', ['', '/gone/epoch_11.pth', '/moved/from/epoch_9.pth'])
def test_training_goes_on_from_the_newest_checkpoint_where_its_name_was_lost(tmp_path, pointer):
    (tmp_path / 'last_checkpoint').write_text(pointer)
    assert runner.find_latest_checkpoint(str(tmp_path)) is None
    others = ('best_coco_bbox_mAP_epoch_11.pth', 'epoch_12-1a2b3c4d.pth', 'epoch_last.pth')
    for name in ('epoch_9.pth', 'epoch_10.pth', *others):
        (tmp_path / name).touch()
    expected = 'epoch_9.pth' if 'epoch_9' in pointer else 'epoch_10.pth'
    assert runner.find_latest_checkpoint(str(tmp_path)) == str(tmp_path / expected)


def test_a_checkpoint_in_another_folder_is_found_by_its_name(tmp_path):
    elsewhere = tmp_path / 'elsewhere' / 'epoch_2.pth'
    elsewhere.parent.mkdir()
    elsewhere.touch()
    (tmp_path / 'epoch_1.pth').touch()
    (tmp_path / 'last_checkpoint').write_text(str(elsewhere))
    assert runner.find_latest_checkpoint(str(tmp_path)) == str(elsewhere)


def test_a_file_of_the_same_name_does_not_stand_in_for_the_one_that_is_named(tmp_path):
    """An earlier training wrote it, before CheckpointHook had an ``out_dir``."""
    for folder in (tmp_path, tmp_path / 'ssd'):
        folder.mkdir(exist_ok=True)
        (folder / 'epoch_3.pth').touch()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'ssd' / 'epoch_3.pth'))
    assert runner.find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'ssd' / 'epoch_3.pth')


def safe_globals():
    """What torch takes for safe. An older torch has no such list."""
    return set() if IS_BEFORE_2_6 else set(torch.serialization.get_safe_globals())


def test_threads_load_beside_each_other(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / 'good.pth')
    torch.save(dict(other=EvilGetattr(tmp_path)), tmp_path / 'own.pth')
    before, safe = torch.load, safe_globals()

    def load(number):
        if number % 2:  # a user's own, which is none of our business
            return torch.load(tmp_path / 'own.pth', weights_only=False)['other']
        return CheckpointLoader.load_checkpoint(str(tmp_path / 'good.pth'), 'cpu')['meta']['epoch']

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, range(200))) == [1, HistoryBuffer.register_statistics] * 100
    assert torch.load is before and safe_globals() == safe
