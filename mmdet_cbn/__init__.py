"""Cross-Iteration Batch Normalization for MMDetection.

Importing this package does two things:

- It registers :class:`CBN`, :class:`BRN`, :class:`CBNBurnInHook`, :class:`SwitchNormHook` and :func:`with_norm` with
  mmengine.
- It changes how mmengine loads checkpoints and finds configs: see :data:`mmdet_cbn.openmmlab.monkey_patches.ON_IMPORT`.
"""

from .requirements import check_installed

check_installed()

from .hooks.burn_in import CBNBurnInHook  # noqa: E402
from .hooks.switch_norm import SwitchNormHook  # noqa: E402
from .layers.batch_renorm import BRN  # noqa: E402
from .layers.cbn import CBN  # noqa: E402
from .openmmlab.monkey_patches import install  # noqa: E402
from .openmmlab.with_norm import with_norm  # noqa: E402
from .version import __version__  # noqa: E402

install()

__all__ = ['BRN', 'CBN', 'CBNBurnInHook', 'SwitchNormHook', '__version__', 'with_norm']
