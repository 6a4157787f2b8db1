"""Errors that name what they are about: a file that was read, or a layer of a model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn


@contextmanager
def errors_name_file(file: str | Path, problem: str) -> Iterator[None]:
    """Add the name of ``file`` to an error that does not have it.

    Args:
        file: The file or folder that is being read.
        problem: What an error means. It follows the name, e.g. "is not a checkpoint".

    Raises:
        RuntimeError: In place of an error that does not name the file.
    """
    try:
        yield
    except Exception as error:
        if str(file) in str(error):
            raise
        raise RuntimeError(f'{file} {problem} ({type(error).__name__}: {error})') from error


def title_of(layer: nn.Module) -> str:
    """What a message calls ``layer``: its type, its name in the model, and its arguments."""
    return f"{type(layer).__name__} layer '{qualified_name(layer)}' ({layer})"


def qualified_name(layer: nn.Module) -> str:
    """The name of ``layer`` in the outermost module that is being called, which the call stack shows.

    A module does not know its own name. Outside any call, its type takes the place of the name.
    """
    name = type(layer).__name__
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get('self')
        if isinstance(caller, nn.Module) and caller is not layer:
            name = next((key for key, module in caller.named_modules() if module is layer), name)
    return name


def refuse_data_parallel(layer: nn.Module) -> None:
    """Raise a RuntimeError if ``torch.nn.DataParallel`` replicates ``layer`` in training.

    Replicas live for one forward only. They would share the layer's memory of earlier calls between threads.
    """
    if layer.training:
        raise RuntimeError(
            f'{title_of(layer)} cannot be trained in torch.nn.DataParallel: the threads of all GPUs would share its '
            'memory of earlier calls. Use torch.nn.parallel.DistributedDataParallel (in mmdet: tools/dist_train.sh), '
            'or one GPU.'
        )
