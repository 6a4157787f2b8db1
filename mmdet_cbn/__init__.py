"""Cross-Iteration Batch Normalization for MMDetection.

Importing this package registers :class:`CBN`, :class:`BRN`, :class:`CBNBurnInHook` and :class:`SwitchNormHook` with
mmengine, and lets mmengine find the configs of this package, and load its checkpoints with a torch that refuses to run
code from them.
"""

from .requirements import check_installed

check_installed()

from . import checkpoint, external_configs  # noqa: E402
from .batch_renorm import BRN  # noqa: E402
from .burn_in_hook import CBNBurnInHook  # noqa: E402
from .cbn import CBN  # noqa: E402
from .switch_norm_hook import SwitchNormHook  # noqa: E402
from .version import __version__  # noqa: E402

checkpoint.install()
external_configs.install()

__all__ = ['BRN', 'CBN', 'CBNBurnInHook', 'SwitchNormHook', '__version__']
