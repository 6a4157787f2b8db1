"""Loading of mmengine's checkpoints with a torch that loads tensors and plain data only.

torch >= 2.6 loads with ``weights_only=True``. That refuses mmengine's own checkpoints, which hold their training log as
HistoryBuffer objects and NumPy arrays, while mmengine's loader for URLs still asks for ``weights_only=False``, which
lets a checkpoint run code. Here every load of mmengine goes through torch's restricted unpickler, with exactly those
types let in that mmengine writes.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

FORCE_RESTRICTED = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
FORCE_UNRESTRICTED = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


def _history_method(owner: Any, name: Any) -> Callable:
    """Stands for ``getattr`` in a checkpoint, by which a HistoryBuffer names its statistics methods, and only those."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'getattr of {name!r} on {owner!r}')


def _allowed_globals() -> list[Any]:
    array = np.zeros(1)
    reconstruct, scalar = array.__reduce__()[0], array[0].__reduce__()[0]
    return [
        HistoryBuffer,
        (_history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        # Builtin number and text types have dtypes of classes of their own.
        *{type(np.dtype(kind)) for kind in '?bBhHiIlLqQefdU'},
        # By the names of NumPy 1 and 2.
        *((reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    ]


@contextmanager
def restricted_loading() -> Iterator[None]:
    """Within it, ``torch.load`` loads what mmengine writes and refuses all else, whatever its ``weights_only`` says.

    Someone who has set torch's own TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has chosen otherwise, and is left to it.
    """
    before = os.environ.get(FORCE_RESTRICTED)
    if FORCE_UNRESTRICTED not in os.environ:
        os.environ[FORCE_RESTRICTED] = '1'
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            yield
    finally:
        if before is None:
            os.environ.pop(FORCE_RESTRICTED, None)
        else:
            os.environ[FORCE_RESTRICTED] = before


_load_checkpoint = CheckpointLoader.load_checkpoint


def load_checkpoint(filename: str, map_location: Any = None, logger: Any = 'current') -> Any:
    """In place of mmengine's ``CheckpointLoader.load_checkpoint``: the same, but no checkpoint can run code.

    Args:
        filename: A path or a URL of any scheme that mmengine knows.
        map_location: As in ``torch.load``.
        logger: As in mmengine.

    Raises:
        pickle.UnpicklingError: The file holds something that mmengine does not write.
        RuntimeError: The file is damaged, or torch cannot load it for another reason.
    """
    try:
        with restricted_loading():
            return _load_checkpoint(filename, map_location, logger)
    except pickle.UnpicklingError as error:
        # torch's message is long, and advises to load without restriction.
        reason = re.search(r'(?:WeightsUnpickler error:\s*|(?=Trying to load ))(.*)', str(error))
        raise pickle.UnpicklingError(
            f'{filename} was not loaded: it is damaged, or it holds more than weights, plain data and the logs of '
            f'mmengine, and to load that could run code ({reason[1] if reason else error})'
        ) from error
    except (RuntimeError, EOFError) as error:
        raise RuntimeError(f'{filename} could not be loaded: {str(error) or "it ends too early"}') from error


def install() -> None:
    """Make mmengine load its checkpoints through :func:`load_checkpoint`."""
    CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)
