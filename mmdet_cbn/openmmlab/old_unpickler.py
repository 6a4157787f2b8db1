"""A restricted unpickler for torch 2.1 to 2.5, whose own cannot be told of further types: delete it with them.

It is a ``pickle_module`` for ``torch.load``. It obeys the instructions that torch's own obeys, within the limits that
torch >= 2.6 sets: only what is admitted can be named or called, only values of admitted types get a state, and nothing
but a storage is fetched from the rest of the file. A ``find_class`` alone does not do that: it would let a pickle set
the attributes of an admitted class.
"""

import os
import pickle
import sys
import tarfile
from collections import Counter, OrderedDict
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn, serialization

from .allowed import allowed_globals

# Those that need no limit; and Unpickler.dispatch has the others.
_HARMLESS = [
    'BINFLOAT', 'BINGET', 'BININT', 'BININT1', 'BININT2', 'BINPUT', 'BINUNICODE', 'EMPTY_DICT', 'EMPTY_LIST',
    'EMPTY_SET', 'EMPTY_TUPLE', 'GLOBAL', 'LONG1', 'LONG_BINGET', 'LONG_BINPUT', 'MARK', 'NEWFALSE', 'NEWTRUE',
    'NONE', 'PROTO', 'SHORT_BINSTRING', 'STOP', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3',
]  # fmt: skip


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for ``codecs.encode``, by which pickle writes bytes; but that looks for modules by the encoding's name."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise pickle.UnpicklingError(f'codecs.encode of {type(text).__name__} to {encoding!r}')
    return text.encode('latin1')


@cache
def _admitted() -> dict[str, Any]:
    """By name: what this torch admits, what torch >= 2.6 admits besides, and what mmengine writes."""
    ours = (
        item if isinstance(item, tuple) else (item, f'{item.__module__}.{item.__name__}') for item in allowed_globals()
    )
    return {
        **torch._weights_only_unpickler._get_allowed_globals(),
        **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
        'torch.device': torch.device,
        'collections.Counter': Counter,
        **{f'builtins.{kind.__name__}': kind for kind in (set, bytearray, complex)},
        '_codecs.encode': _encode,
        **{name: item for item, name in ours},
    }


@cache
def _ids() -> frozenset[int]:
    return frozenset(map(id, _admitted().values()))


def _check(allowed: bool, what: str) -> None:
    if not allowed:
        raise pickle.UnpicklingError(f'Trying to load {what}')


class _Instructions(dict):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f'Trying to load by the instruction {code}')


_Unpickler: Any = pickle._Unpickler  # the type stubs of Python tell little of it


class Unpickler(_Unpickler):
    """As ``pickle.Unpickler``, restricted."""

    def find_class(self, module: str, name: str) -> Any:
        """What is admitted as ``name`` of ``module``.

        Raises:
            pickle.UnpicklingError: Nothing is.
        """
        # Protocol 2 has the names of Python 2.
        full_name = f'{"builtins" if module == "__builtin__" else module}.{name}'
        _check(full_name in _admitted(), full_name)
        return _admitted()[full_name]

    def _reduce(self) -> None:
        function = self.stack[-2]
        # Storages are admitted to be named.
        may_be_called = id(function) in _ids() and function not in torch._storage_classes
        _check(may_be_called, f'by a call of {function!r}')
        super().load_reduce()

    def _newobj(self) -> None:
        kind = self.stack[-2]
        _check(kind is nn.Parameter or kind is HistoryBuffer, f'by making a {kind!r}')
        super().load_newobj()

    def _build(self) -> None:
        state = self.stack.pop()
        value = self.stack[-1]
        if type(value) is Tensor:
            value.set_(*state)
        elif type(value) is OrderedDict:
            value.__dict__.update(state)
        else:
            # Without __setstate__ pickle sets attributes, of a class or a function, too.
            _check(id(type(value)) in _ids() and hasattr(value, '__setstate__'), f'the state of a {type(value)!r}')
            value.__setstate__(state)

    def _append(self) -> None:
        self._check_container(self.stack[-2], list)
        super().load_append()

    def _appends(self) -> None:
        self._check_container(self.metastack[-1][-1], list)
        super().load_appends()

    def _setitem(self) -> None:
        self._check_container(self.stack[-3], dict, OrderedDict, Counter)
        super().load_setitem()

    def _setitems(self) -> None:
        self._check_container(self.metastack[-1][-1], dict, OrderedDict, Counter)
        super().load_setitems()

    def _check_container(self, container: Any, *kinds: type) -> None:
        _check(type(container) in kinds, f'items of a {type(container)!r}')

    def _binpersid(self) -> None:
        key = self.stack[-1]
        # torch would take a module too, look for the source of its class, and may write a file.
        _check(type(key) is tuple and key[:1] in (('storage',), (b'storage',)), 'what is no storage from the file')
        super().load_binpersid()

    dispatch = _Instructions(
        {
            **{getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _HARMLESS},
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _newobj,
            pickle.BUILD[0]: _build,
            pickle.APPEND[0]: _append,
            pickle.APPENDS[0]: _appends,
            pickle.SETITEM[0]: _setitem,
            pickle.SETITEMS[0]: _setitems,
            pickle.BINPERSID[0]: _binpersid,
        }
    )


def load(file: Any, **kwargs: Any) -> Any:
    """As ``pickle.load``, restricted."""
    return Unpickler(file, **kwargs).load()


_torch_load = torch.load


def torch_load(file: Any, map_location: Any = None) -> Any:
    """``torch.load`` with this unpickler, of a path or of a file open for reading.

    Raises:
        RuntimeError: The file is one that torch would read without it.
        pickle.UnpicklingError: It holds what is not admitted.
    """
    with open(file, 'rb') if isinstance(file, str | os.PathLike) else nullcontext(file) as opened:
        start = opened.tell()
        if serialization._is_zipfile(opened):
            with serialization._open_zipfile_reader(opened) as archive:
                if serialization._is_torchscript_zip(archive):
                    raise RuntimeError('it is a TorchScript archive, which is a program')
        elif tarfile.is_tarfile(opened):
            raise RuntimeError('it is a tar archive, as torch 0.1 wrote it')
        opened.seek(start)
        return _torch_load(opened, map_location, pickle_module=sys.modules[__name__], weights_only=False)
