"""The windows of a model in a file beside its checkpoint, from which a resumed run goes on.

The checkpoint itself does not contain them: it is what it would be with BatchNorm.
"""

import io
import zipfile
from collections.abc import Mapping, Set
from typing import Any, Protocol

import torch
from mmengine import fileio

from ..openmmlab.checkpoints import restricted_torch_load, whole_file

_MARK = '.cbn_window_rank'


class Layer(Protocol):
    """A layer with windows, as :class:`CBN`."""

    def window_state(self) -> dict[str, Any]: ...
    def load_window_state(self, state: dict[str, Any]) -> None: ...
    def forget_window(self) -> None: ...


def path_of(checkpoint: str, rank: int) -> str:
    """The file for the windows of process ``rank`` that belongs to ``checkpoint``, a path or URL of mmengine's."""
    return f'{checkpoint}{_MARK}{rank}'


def save(path: str, layers: Mapping[str, Layer], iteration: int) -> None:
    """Write the windows of ``layers``, by their names in the model, after ``iteration`` iterations of training."""
    with io.BytesIO() as buffer:
        states = {name: layer.window_state() for name, layer in layers.items()}
        torch.save(dict(iteration=iteration, windows=states), buffer)
        # A run may be killed as it saves a checkpoint that is there already.
        with whole_file(path) as at:
            fileio.put(buffer.getvalue(), at)


def exists(path: str) -> bool:
    """Whether there is such a file. False where mmengine can read a file and not look for it, as over HTTP."""
    try:
        return bool(fileio.exists(path))
    except (AttributeError, NotImplementedError):
        return False


def remove_orphans(folder: str, rank: int, kept: str | None = None) -> None:
    """Remove the files of process ``rank`` in ``folder`` whose checkpoint mmengine has removed.

    Args:
        folder: Of the checkpoints.
        rank: Of the process.
        kept: A file whose checkpoint may be still to come.
    """
    if not fileio.isdir(folder):
        return
    suffix = path_of('', rank)
    for name in list(fileio.list_dir_or_file(folder, list_dir=False, suffix=suffix)):
        path = fileio.join_path(folder, name)
        if path != kept and not fileio.exists(path.removesuffix(suffix)):
            fileio.remove(path)


def load(path: str, layers: Mapping[str, Layer], names: Set[str], iteration: int) -> int | None:
    """Load the windows of a file into ``layers``, by their names. The file cannot run code.

    A layer that has no window in the file gets an empty one: it was not a CBN yet when the file was saved.

    Args:
        path: Of the file.
        layers: The CBN layers of the model in training, by name.
        names: Of all modules of the model. The windows of layers that are not in ``layers`` are left out.
        iteration: How many iterations were trained.

    Returns:
        How many layers have their window from the file. None if the file is of another iteration, as after a kill
        between windows and checkpoint where all checkpoints have one name. Then all windows are empty.

    Raises:
        RuntimeError: The file is damaged, holds something else, belongs to another model, or has a window that does not
            fit its layer. Then all windows are empty.
    """
    data = io.BytesIO(fileio.get(path))
    try:
        if not zipfile.is_zipfile(data):  # torch would take it for its format of before 1.6, which has no check sums
            raise ValueError('it ends too early, or is no file of torch')
        data.seek(0)
        saved = restricted_torch_load(data, map_location='cpu')
        if not isinstance(saved, dict) or set(saved) != {'iteration', 'windows'} or saved['windows'].keys() - names:
            raise ValueError('it belongs to other layers')
        if saved['iteration'] != iteration:
            _forget(layers)
            return None
        kept = {name: state for name, state in saved['windows'].items() if name in layers}
        for name, state in kept.items():
            layers[name].load_window_state(state)
    except Exception as error:  # of a file from elsewhere, whatever torch and the layers stumble over
        _forget(layers)
        raise RuntimeError(
            f'{path} was not loaded: it is damaged, holds more than windows, or belongs to another model or '
            f'norm_cfg ({next(iter(str(error).splitlines()), type(error).__name__)}). To go on with empty '
            'windows, which fill within k iterations, remove it.'
        ) from error
    return len(kept)


def _forget(layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        layer.forget_window()
