"""Memory by counting: the bytes that tensors hold, on any device."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all tensor storages that operations under this mode have met and that are alive, each once.

    Attributes:
        alive (int): Bytes now.
        peak (int): The most bytes since the mode began, or since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Arguments too: what numpy or the extensions of mmcv have made comes out of no operation that is seen here.
        for tensor in (leaf for leaf in tree_flatten((args, kwargs, out))[0] if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                weakref.finalize(storage, self._forget, storage._cdata).atexit = False
            self.alive += storage.nbytes() - self._sizes.get(storage._cdata, 0)  # it may have been resized
            self._sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.alive)
        return out

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)
