"""Cross-Iteration Batch Normalization for MMDetection.

Importing this package registers :class:`CBN` and :class:`CBNBurnInHook` with mmengine, and lets mmengine load its
checkpoints with a torch that refuses to run code from them.
"""

from .requirements import check_installed

check_installed()

from . import checkpoint  # noqa: E402
from .burn_in_hook import CBNBurnInHook  # noqa: E402
from .cbn import CBN  # noqa: E402
from .version import __version__  # noqa: E402

checkpoint.install()

__all__ = ['CBN', 'CBNBurnInHook', '__version__']
