"""The versions of torch and of the OpenMMLab packages that this package runs with.

setup.py makes its extras from this table (so nothing but the standard library is imported here), and
``import mmdet_cbn`` holds what is installed against it.
"""

import importlib
import importlib.util

# Import name: (first supported version, first version no longer supported).
SUPPORTED = {
    'torch': ('2.1', '3'),
    'mmengine': ('0.10', '1'),
    'mmcv': ('2.1', '3'),
    'mmdet': ('3.3', '4'),
}

# The layers and CBNBurnInHook do without them.
OPTIONAL = ('mmcv', 'mmdet')

# They go in pairs. This is the one of requirements-openmmlab.txt, with which the tests are run.
TORCH_AND_TORCHVISION = ['torch==2.13.0', 'torchvision==0.28.0']


def wanted(name: str) -> str:
    """The supported versions of package ``name`` as a requirement, e.g. ``'torch>=2.1,<3'``."""
    first, end = SUPPORTED[name]
    return f'{name}>={first},<{end}'


def check_installed() -> None:
    """Import every package of :data:`SUPPORTED` that is installed, and compare its version.

    The layers need torch and mmengine. mmcv and mmdet may be missing.

    Raises:
        ImportError: torch or mmengine is missing, or a package does not load or has an unsupported version. The
            message names all that is wrong, with the versions wanted.
    """
    # setup.py imports this module, and need not have it.
    from packaging.version import Version

    wrong = []
    for name, (first, end) in SUPPORTED.items():
        if name in OPTIONAL and importlib.util.find_spec(name) is None:
            continue
        try:
            version = importlib.import_module(name).__version__
        except (ImportError, AssertionError) as error:  # mmdet asserts the versions of mmcv and mmengine on import
            wrong.append(f'{wanted(name)} (importing {name} failed: {error})')
        else:
            if not Version(first) <= Version(Version(version).base_version) < Version(end):
                wrong.append(f'{wanted(name)} (installed: {version})')
    if wrong:
        raise ImportError(
            'mmdet_cbn needs ' + '; '.join(wrong) + '. mmcv, mmengine and mmdet come with '
            'pip install "mmdet-cbn[openmmlab]", or their maintained forks with pip install "mmdet-cbn[onedl]"; '
            'the README tells how to install an mmcv with its operators.'
        )
