"""Memory by counting: the bytes that tensors hold, on any device."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all tensor storages that operations under this mode have met and that are alive, each once.

    Attributes:
        peak (int): The most bytes since the mode began, or since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._counted = 0  # some of these may have died
        # By address, which no other storage gets while there is a reference, weak or not.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def alive(self) -> int:
        """Bytes now."""
        for address, (storage, size) in list(self._storages.items()):
            if storage.expired():
                self._counted -= size
                del self._storages[address]
        return self._counted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Arguments too: what numpy or the extensions of mmcv have made comes out of no operation that is seen here.
        for tensor in (leaf for leaf in tree_flatten((args, kwargs, out))[0] if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            reference, size = self._storages.get(storage._cdata) or (StorageWeakRef(storage), 0)
            self._storages[storage._cdata] = reference, storage.nbytes()
            self._counted += storage.nbytes() - size  # it may have been resized
        if self._counted > self.peak:
            self.peak = max(self.peak, self.alive)
        return out
