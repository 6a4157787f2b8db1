"""What importing this package changes in mmengine, and what the tools change for checkpoints, with the reasons.

tools.py has what train.py and test.py change besides.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader, Runner, runner

from . import checkpoints, configs


class Patch(NamedTuple):
    """One change in mmengine."""

    owner: Any
    name: str
    new: Any
    reason: str


#: What ``import mmdet_cbn`` changes.
ON_IMPORT = (
    Patch(
        CheckpointLoader,
        'load_checkpoint',
        staticmethod(checkpoints.load_checkpoint),
        'mmengine cannot load its own checkpoints with torch >= 2.6, and lets a file run code with an older torch',
    ),
    Patch(
        Config,
        '_get_cfg_path',
        staticmethod(configs.get_cfg_path),
        "a config can inherit from this package's as from mmdet's: _base_ = 'mmdet_cbn::cbn/....py'",
    ),
)

#: What tools/train.py and tools/test.py change besides, while they run.
IN_TOOLS = (
    Patch(Runner, 'load_checkpoint', checkpoints.load_into, 'an error names the file'),
    Patch(Runner, 'resume', checkpoints.resume, 'an error names the file'),
    Patch(runner, 'save_checkpoint', checkpoints.save_checkpoint, 'a kill leaves no half file'),
    Patch(
        runner,
        'find_latest_checkpoint',
        checkpoints.find_latest_checkpoint,
        'a run that was killed as it wrote last_checkpoint, or whose folder was moved, can be resumed',
    ),
)


def install() -> None:
    """Make the changes of :data:`ON_IMPORT`."""
    MODULE2PACKAGE['mmdet_cbn'] = configs.PACKAGE
    for patch in ON_IMPORT:
        setattr(patch.owner, patch.name, patch.new)


@contextmanager
def safe_runner() -> Iterator[None]:
    """Make the changes of :data:`IN_TOOLS` for as long as the context lasts."""
    with ExitStack() as changes:
        for patch in IN_TOOLS:
            changes.enter_context(mock.patch.object(patch.owner, patch.name, patch.new))
        yield
