"""Loading, saving and finding mmengine's checkpoints, safe against code in a file and against a kill.

torch >= 2.6 loads with ``weights_only=True``. This refuses mmengine's own checkpoints, because their training log is
made of HistoryBuffer objects and NumPy arrays. mmengine's loader for URLs asks for ``weights_only=False``, which lets a
checkpoint run code, and so does any load of an older torch. Here every load of mmengine goes through torch's restricted
unpickler, which accepts exactly the types that mmengine saves (:mod:`.allowed`). An older torch has no such unpickler
that accepts more types: there it is :mod:`.old_unpickler`.

mmengine writes a checkpoint under its final name. If a run is killed just then, half a file is left. Here a file gets
its name when it is whole.
"""

import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine import fileio
from mmengine.runner import CheckpointLoader, Runner, runner

from ..errors import errors_name_file
from ..old_torch import IS_BEFORE_2_6
from . import old_unpickler
from .allowed import allowed_globals

_torch_load = torch.load
_lock = threading.RLock()  # torch.load, and what torch takes for safe, belong to all threads


def restricted_torch_load(file: Any, map_location: Any = None, **ignored: Any) -> Any:
    """``torch.load`` of plain data and of what mmengine writes, whatever the caller asks for or has declared safe.

    Raises:
        RuntimeError: The file is damaged; and whatever ``torch.load`` raises.
    """
    _check_archive(file)
    if IS_BEFORE_2_6:
        return old_unpickler.torch_load(file, map_location)
    with _lock:
        declared = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(allowed_globals()):
                return _torch_load(file, map_location=map_location, weights_only=True)
        finally:
            torch.serialization.add_safe_globals(declared)


def _check_archive(file: Any) -> None:
    """Raise if ``file`` is a zip archive, as torch >= 1.6 writes it, with a bit wrong: torch does not look."""
    at = None if isinstance(file, str | os.PathLike) else file.tell()
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if any(entry.external_attr & 0x10 for entry in entries):
                    raise RuntimeError('it has a folder')  # torch would not read it, and return what is in memory
                # torch.serialization.set_crc32_options(False) leaves all sums 0.
                if any(entry.CRC for entry in entries) and (damaged := archive.testzip()):
                    raise RuntimeError(f'the sum of {damaged} is wrong')
    except Exception as error:  # whatever the reader stumbles over
        raise RuntimeError(f'the archive is damaged ({error})') from error
    finally:
        if at is not None:
            file.seek(at)


_load_checkpoint = CheckpointLoader.load_checkpoint


def load_checkpoint(filename: str, map_location: Any = None, logger: Any = 'current') -> Any:
    """In place of mmengine's ``CheckpointLoader.load_checkpoint``: the same, but no checkpoint can run code.

    What mmdet 2 kept as ``config`` under ``meta`` is left out: it is the text of a config, and to resume, mmengine
    would run it.

    Args:
        filename: A path or a URL of any scheme that mmengine knows.
        map_location: As in ``torch.load``.
        logger: As in mmengine.

    Raises:
        pickle.UnpicklingError: The file holds something that mmengine does not write.
        RuntimeError: The file is damaged, holds no dict, or torch cannot load it for another reason.
    """
    thread = threading.get_ident()

    def load(*args: Any, **kwargs: Any) -> Any:
        own = threading.get_ident() == thread  # another thread may load something of its own meanwhile
        return (restricted_torch_load if own else _torch_load)(*args, **kwargs)

    try:
        # All loaders of mmengine, those for URLs included, come to torch.load in the end. One of the forks lets getattr
        # through there, or anything at all where torch refuses.
        with _lock, mock.patch.object(torch, 'load', load):
            checkpoint = _load_checkpoint(filename, map_location, logger)
    except pickle.UnpicklingError as error:
        # torch's message is long, and advises to load without restriction.
        reason = re.search(r'(?:WeightsUnpickler error:\s*|(?=Trying to load ))(.*)', str(error))
        raise pickle.UnpicklingError(
            f'{filename} was not loaded: it is damaged, or it holds more than weights, plain data and the logs of '
            f'mmengine, and to load that could run code ({reason[1] if reason else error})'
        ) from error
    except OSError:
        raise
    except Exception as error:  # of a damaged file, whatever torch stumbles over
        raise RuntimeError(f'{filename} could not be loaded: {str(error) or "it ends too early"}') from error
    if not isinstance(checkpoint, dict):
        raise RuntimeError(f'{filename} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict')
    if isinstance(meta := checkpoint.get('meta'), dict):
        meta.pop('config', None)
    return checkpoint


_load_into, _resume = Runner.load_checkpoint, Runner.resume


def load_into(self: Runner, filename: str, *args: Any, **kwargs: Any) -> Any:
    """In place of mmengine's ``Runner.load_checkpoint``: the same, but an error names the file."""
    with errors_name_file(filename, 'does not fit this model'):
        return _load_into(self, filename, *args, **kwargs)


def resume(self: Runner, filename: str, *args: Any, **kwargs: Any) -> None:
    """In place of mmengine's ``Runner.resume``: the same, but an error names the file."""
    with errors_name_file(filename, 'does not fit this model or training'):
        _resume(self, filename, *args, **kwargs)


_save_checkpoint = runner.save_checkpoint


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Where to write what shall lie at ``path``, which gets its name when it is whole. For a URL, itself."""
    if '://' in path:
        yield path
    else:
        part = f'{path}.part'
        yield part
        os.replace(part, path)


def save_checkpoint(checkpoint: dict, filename: str, *args: Any, **kwargs: Any) -> None:
    """In place of mmengine's, for its Runner: the same, but a file gets its name when it is whole."""
    with whole_file(filename) as path:
        _save_checkpoint(checkpoint, path, *args, **kwargs)


def find_latest_checkpoint(path: str) -> str | None:
    """In place of mmengine's, for its Runner: the checkpoint that a training in folder ``path`` wrote last.

    If ``last_checkpoint`` names a file that does not exist, because the folder has been moved, it is the file of that
    name in ``path``. If it names none, because a run was killed as it wrote the name, it is the newest one there.

    Returns:
        None if there is none.
    """
    folder = Path(path)
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        return None
    named = pointer.read_text().strip()
    if named and fileio.exists(named):
        return named
    if named and (folder / Path(named).name).is_file():
        return str(folder / Path(named).name)
    # The name is written after the checkpoint, so the newest one is whole. Published ones (epoch_12-1a2b3c4d.pth) are
    # left out, since they have no optimizer to resume with.
    saved = {file: re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', file.name) for file in folder.glob('*.pth')}
    numbers = {file: int(found[1]) for file, found in saved.items() if found}
    return str(max(numbers, key=numbers.__getitem__)) if numbers else None
