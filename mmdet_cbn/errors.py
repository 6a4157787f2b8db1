"""Errors that name what they are about: a file that was read, or a layer of a model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn


@contextmanager
def naming(file: str | Path, is_what: str) -> Iterator[None]:
    """Let an error that does not name ``file`` do so.

    Args:
        file: What is being read, or a folder.
        is_what: What an error means, to follow the name, as "is no checkpoint".

    Raises:
        RuntimeError: In place of an error that does not name the file.
    """
    try:
        yield
    except Exception as error:
        if str(file) in str(error):
            raise
        raise RuntimeError(f'{file} {is_what} ({type(error).__name__}: {error})') from error


def title_of(layer: nn.Module) -> str:
    """What a message calls ``layer``: its type, its name in the model, and its arguments."""
    return f"{type(layer).__name__} layer '{qualified_name(layer)}' ({layer})"


def qualified_name(layer: nn.Module) -> str:
    """The name of ``layer`` in the outermost module that is being called, found on the call stack.

    A module does not know its own name. Where no module is being called, the name of its type.
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
    """Refuse to be replicated by ``torch.nn.DataParallel`` in training.

    Its replicas live for one forward and share what is no tensor, from several threads.

    Raises:
        RuntimeError: The layer is in training.
    """
    if layer.training:
        raise RuntimeError(
            f'{title_of(layer)} cannot be trained in torch.nn.DataParallel, because what it remembers of earlier calls '
            'would be shared by the threads of all GPUs. Use torch.nn.parallel.DistributedDataParallel (in mmdet: '
            'tools/dist_train.sh), or one GPU.'
        )
