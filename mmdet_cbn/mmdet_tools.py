"""Running the command-line tools of the installed mmdet."""

import runpy
from pathlib import Path

import mmdet
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
    runpy.run_path(str(find_tool(name)), run_name='__main__')
    if distributed.is_initialized():
        # mmengine leaves the process group open, and then the first process to end can make the others abort.
        distributed.barrier()
        distributed.destroy_process_group()
