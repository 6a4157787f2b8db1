"""The windows of a model in a file beside its checkpoint, for a resumed run to go on with.

They are no part of the checkpoint, which stays that of a BatchNorm.
"""

import io
import zipfile
from collections.abc import Mapping

import torch
from mmengine import fileio

from .cbn import CBN
from .checkpoint import restricted_torch_load, whole_file

_MARK = '.cbn_window_rank'


def path_of(checkpoint: str, rank: int) -> str:
    """Where the windows of process ``rank`` lie that belong to ``checkpoint``, a path or URL of mmengine's."""
    return f'{checkpoint}{_MARK}{rank}'


def save(path: str, layers: Mapping[str, CBN]) -> None:
    """Write the windows of ``layers``, by their names in the model."""
    with io.BytesIO() as buffer:
        torch.save({name: layer.window_state() for name, layer in layers.items()}, buffer)
        # A run may be killed as it saves a checkpoint that is there already.
        with whole_file(path) as at:
            fileio.put(buffer.getvalue(), at)


def remove_orphans(folder: str, rank: int) -> None:
    """Remove the files of process ``rank`` in ``folder`` whose checkpoint mmengine has removed."""
    if not fileio.isdir(folder):
        return
    suffix = path_of('', rank)
    for name in list(fileio.list_dir_or_file(folder, list_dir=False, suffix=suffix)):
        path = fileio.join_path(folder, name)
        if not fileio.exists(path.removesuffix(suffix)):
            fileio.remove(path)


def load(path: str, layers: Mapping[str, CBN], device: torch.device) -> None:
    """Put the windows of a file into ``layers``; no file can run code.

    Raises:
        RuntimeError: The file is damaged, holds something else, or belongs to other layers; then all windows are empty.
    """
    data = io.BytesIO(fileio.get(path))
    try:
        if not zipfile.is_zipfile(data):  # torch would take it for its format of before 1.6, which has no check sums
            raise ValueError('it ends too early, or is no file of torch')
        data.seek(0)
        states = restricted_torch_load(data, map_location=device)
        if not isinstance(states, dict) or set(states) != set(layers):
            raise ValueError('it belongs to other layers')
        for name, layer in layers.items():
            layer.load_window_state(states[name])
    except Exception as error:  # of a file from elsewhere, whatever torch and the layers stumble over
        for layer in layers.values():
            layer.forget_window()
        raise RuntimeError(
            f'{path} was not loaded: it is damaged, holds more than windows, or belongs to another model or '
            f'norm_cfg ({next(iter(str(error).splitlines()), type(error).__name__)}). To go on with empty '
            'windows, which fill within k iterations, remove it.'
        ) from error
