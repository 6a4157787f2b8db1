"""The types in mmengine's checkpoints that torch's restricted unpickler does not know."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler


def _one_cycle(*_: Any, **__: Any) -> None:
    """Stands for mmengine's OneCycleParamScheduler, which a checkpoint may name, and not make."""
    raise pickle.UnpicklingError('a OneCycleParamScheduler')


def _method(owner: Any, name: Any) -> Callable:
    """Replaces ``getattr`` in a checkpoint. These methods are named by it; nothing else may be."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    if owner is _one_cycle and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f'getattr of {name!r} on {owner!r}')


def allowed_globals() -> list[Any]:
    """Objects that mmengine saves and torch does not load, or pairs of an object and its name in a checkpoint."""
    array = np.zeros(1)
    reconstruct, scalar = array.__reduce__()[0], array[0].__reduce__()[0]
    return [
        HistoryBuffer,
        (_method, 'builtins.getattr'),
        (_one_cycle, f'{OneCycleParamScheduler.__module__}.{OneCycleParamScheduler.__name__}'),
        (dict, 'mmengine.config.config.ConfigDict'),  # in the meta information of a data set
        bytes,  # of an empty array
        np.ndarray,
        np.dtype,
        # Builtin number and text types have dtypes of classes of their own.
        *{type(np.dtype(kind)) for kind in '?bBhHiIlLqQefdU'},
        # By the names of NumPy 1 and 2.
        *((reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    ]
