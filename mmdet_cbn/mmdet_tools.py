"""Running the command-line tools of the installed mmdet."""

import runpy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import torch
from torch import distributed


def find_tool(name: str) -> Path:
    """The path of the tool ``name`` (e.g. ``'train.py'``) that came with the installed mmdet.

    Raises:
        FileNotFoundError: The installed mmdet has no such tool.
    """
    package = Path(mmdet.__file__).parent
    # In a wheel the tools lie inside the package, in a source checkout beside it.
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f'mmdet {mmdet.__version__} in {package} came without its tools/{name}; reinstall mmdet')


def run_tool(name: str) -> None:
    """Run the tool ``name`` of mmdet with the arguments of this process, its own help included.

    Raises:
        FileNotFoundError: As :func:`find_tool`; and whatever the tool raises.
    """
    # mmengine's launcher chooses a GPU for each process, also where there is none to choose and gloo is the backend.
    ignored: AbstractContextManager[Any] = (
        nullcontext() if torch.cuda.is_available() else mock.patch.object(torch.cuda, 'set_device')
    )
    with ignored:
        runpy.run_path(str(find_tool(name)), run_name='__main__')
    if distributed.is_initialized():
        # mmengine leaves the process group open, and then the first process to end can make the others abort.
        distributed.barrier()
        distributed.destroy_process_group()
