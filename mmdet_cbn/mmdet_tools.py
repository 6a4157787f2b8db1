"""Where the installed mmdet keeps its command-line tools."""

from pathlib import Path

import mmdet


def tool(name: str) -> str:
    """The path of the tool ``name`` (e.g. ``'train.py'``) that came with the installed mmdet.

    Raises:
        FileNotFoundError: The installed mmdet has no such tool.
    """
    package = Path(mmdet.__file__).parent
    # In a wheel the tools lie inside the package, in a source checkout beside it.
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f'mmdet {mmdet.__version__} in {package} came without its tools/{name}; reinstall mmdet')
