"""Running the command-line tools of the installed mmdet."""

import gc
import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import torch
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import runner
from torch import distributed

from ..errors import errors_name_file
from .monkey_patches import safe_runner


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


@contextmanager
def named_annotations() -> Iterator[None]:
    """Let errors about a COCO annotation file name it, which pycocotools and mmdet do not.

    A file that lacks some of the classes becomes an error, too. mmdet would number the others anew, and go on until it
    finds nothing to train on.
    """
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO

    read, load, prepare = COCO.__init__, CocoDataset.load_data_list, CocoDataset.full_init

    def named_read(self: COCO, annotation_file: Any = None) -> None:
        with errors_name_file(annotation_file, 'is not a file of COCO annotations'):
            read(self, annotation_file)

    def checked_load(self: CocoDataset) -> list[dict]:
        found = load(self)
        classes = self.metainfo['classes']
        if isinstance(classes, list | tuple) and len(self.cat_ids) < len(classes):
            raise ValueError(
                f'{self.ann_file} has categories of {len(self.cat_ids)} of the {len(classes)} classes that the config '
                f'names: {", ".join(map(str, classes))}'
            )
        return found

    def named_prepare(self: CocoDataset) -> None:
        with errors_name_file(self.ann_file, 'has no usable COCO annotations'):
            prepare(self)

    with (
        mock.patch.object(COCO, '__init__', named_read),
        mock.patch.object(CocoDataset, 'load_data_list', checked_load),
        mock.patch.object(CocoDataset, 'full_init', named_prepare),
    ):
        yield


@contextmanager
def distributed_on_cpu() -> Iterator[None]:
    """Let mmengine's Runner train in several processes on a machine without a GPU.

    mmengine would choose a GPU for each process, NCCL as the backend and a GPU for DistributedDataParallel.
    """
    init_dist, wrap = runner.init_dist, MMDistributedDataParallel.__init__

    def init_with_gloo(launcher: str, backend: str = 'nccl', **kwargs: Any) -> None:
        init_dist(launcher, backend='gloo' if backend == 'nccl' else backend, **kwargs)

    def wrap_on_cpu(self: MMDistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **{**kwargs, 'device_ids': None})

    with (
        mock.patch.object(torch.cuda, 'set_device'),
        mock.patch.object(runner, 'init_dist', init_with_gloo),
        mock.patch.object(MMDistributedDataParallel, '__init__', wrap_on_cpu),
    ):
        yield


def run_tool(name: str) -> None:
    """Run the tool ``name`` of mmdet with the arguments of this process, its own help included.

    The tool runs with the changes of :data:`monkey_patches.IN_TOOLS` and :func:`named_annotations`. On a machine
    without a GPU, several processes can train.

    Raises:
        FileNotFoundError: As :func:`find_tool`; and whatever the tool raises.
    """
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')  # mmengine's, for each config that it reads
    with safe_runner(), named_annotations(), distributed_on_cpu() if get_device() == 'cpu' else nullcontext():
        runpy.run_path(str(find_tool(name)), run_name='__main__')
    if distributed.is_initialized():
        leave_process_group()


def leave_process_group() -> None:
    """End the process group that mmengine leaves open: the first process to end could make the others abort.

    Nobody may hold the runner any more.
    """
    distributed.barrier()
    # The runner's model shares the group, and cycles of references hold the runner. If it went last, the group would
    # end under the interpreter's lock, and gloo's thread, which may wait for that lock, would never end.
    gc.collect()
    distributed.destroy_process_group()
