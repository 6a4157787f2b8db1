"""The unpickler for torch < 2.6 loads what mmengine writes, and obeys no instruction that could run or change code."""

import copyreg
import io
import pickle
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmdet_cbn.openmmlab import old_unpickler


def loads(data):
    return old_unpickler.load(io.BytesIO(data), encoding='utf-8')


@pytest.mark.parametrize(
    'value',
    [
        None,
        [True, False, 3, -3, 2**80, 0.5, 'text', b'bytes\xff', ()],
        dict(a=(1, 2, 3, 4), b={1: [2]}),
        {'a'},
        bytearray(b'bytes'),
        1 + 2j,
        OrderedDict(a=1, b=2),
        Counter({3: 1, 5: 2}),
        torch.Size([1, 2]),
        [torch.float32, torch.bool, torch.bfloat16, torch.uint8],
        torch.device('cuda:1'),
        np.float64(0.5),
        np.int64(3),
    ],
    ids=str,
)
def test_plain_data_come_back(value):
    back = loads(pickle.dumps(value, protocol=2))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize('dtype', '?bBhHiIlLqQefd')
def test_arrays_come_back(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = loads(pickle.dumps(array, protocol=2))
    assert back.dtype == array.dtype and back.tolist() == array.tolist()


def test_a_history_comes_back_and_goes_on():
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    back = loads(pickle.dumps(history, protocol=2))
    back.update(6.0)
    assert back.mean() == back.statistics('mean') == 3 and back.max() == 6


def of(module, name):
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def text(value):
    return pickle.BINUNICODE + len(value).to_bytes(4, 'little') + value.encode()


STORAGE = of('torch.storage', 'UntypedStorage')
HISTORY = of('mmengine.logging.history_buffer', 'HistoryBuffer')
ENCODE = of('_codecs', 'encode')
NEW_ATTRIBUTE = pickle.NONE + pickle.EMPTY_DICT + text('evil') + pickle.NEWTRUE + pickle.SETITEM + pickle.TUPLE2
GETATTR = of('__builtin__', 'getattr')
MEAN = GETATTR + HISTORY + text('mean') + pickle.TUPLE2 + pickle.REDUCE

EVIL = {
    'a function': of('builtins', 'eval') + text('1') + pickle.TUPLE1 + pickle.REDUCE,
    'a function by the name of Python 2': of('__builtin__', 'eval') + text('1') + pickle.TUPLE1 + pickle.REDUCE,
    'a module': of('posix', 'system') + text('true') + pickle.TUPLE1 + pickle.REDUCE,
    'an attribute of what is admitted': of('collections', 'OrderedDict.fromkeys') + pickle.EMPTY_TUPLE + pickle.REDUCE,
    'a function of torch': of('torch', 'load') + text('path') + pickle.TUPLE1 + pickle.REDUCE,
    'a function of numpy': of('numpy', 'load') + text('path') + pickle.TUPLE1 + pickle.REDUCE,
    'a function of protocol 4': text('builtins') + text('eval') + pickle.STACK_GLOBAL,
    'a function of protocol 0': pickle.MARK + text('1') + pickle.INST + b'builtins\neval\n',
    'an object of protocol 1': pickle.MARK + HISTORY + pickle.OBJ,
    'an extension': pickle.EXT1 + b'\x01',
    'an object of protocol 4': HISTORY + pickle.EMPTY_TUPLE + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
    'another method': GETATTR + HISTORY + text('update') + pickle.TUPLE2 + pickle.REDUCE,
    'a method of another class': GETATTR + of('numpy', 'dtype') + text('max') + pickle.TUPLE2 + pickle.REDUCE,
    'the call of a method': MEAN + pickle.NONE + pickle.TUPLE1 + pickle.REDUCE,
    'another codec': ENCODE + text('x') + text('rot13') + pickle.TUPLE2 + pickle.REDUCE,
    'a storage by its size': STORAGE + pickle.BININT1 + b'\x09' + pickle.TUPLE1 + pickle.REDUCE,
    'an array without its making': of('numpy', 'ndarray') + pickle.BININT1 + b'\x09' + pickle.TUPLE1 + pickle.NEWOBJ,
    'an attribute of a class': HISTORY + NEW_ATTRIBUTE + pickle.BUILD,
    'an attribute of a function': of('torch._utils', '_rebuild_tensor_v2') + NEW_ATTRIBUTE + pickle.BUILD,
    'an attribute of a method': MEAN + NEW_ATTRIBUTE + pickle.BUILD,
    'an item of a class': HISTORY + text('a') + pickle.NONE + pickle.SETITEM,
    'items of a class': HISTORY + pickle.MARK + text('a') + pickle.NONE + pickle.SETITEMS,
    'appended to a class': HISTORY + pickle.NONE + pickle.APPEND,
    'appended all to a class': HISTORY + pickle.MARK + pickle.NONE + pickle.APPENDS,
    'a persistent module': text('module') + pickle.NONE + text('a.py') + pickle.TUPLE3 + pickle.BINPERSID,
    'a persistent number': pickle.BININT1 + b'\x01' + pickle.BINPERSID,
    'a persistent text': pickle.PERSID + b'storage\n',
    'an object array': of('numpy', 'dtype') + text('O') + pickle.TUPLE1 + pickle.REDUCE + NEW_ATTRIBUTE + pickle.BUILD,
}  # fmt: skip


@pytest.mark.parametrize('instructions', EVIL.values(), ids=EVIL)
def test_it_refuses(instructions, monkeypatch):
    copyreg.add_extension('builtins', 'eval', 1)
    persistent = []
    monkeypatch.setattr(old_unpickler.Unpickler, 'persistent_load', persistent.append)
    try:
        with pytest.raises(pickle.UnpicklingError):
            loads(pickle.PROTO + b'\x02' + instructions + pickle.STOP)
    finally:
        copyreg.remove_extension('builtins', 'eval', 1)
    assert not persistent
    changed = (HistoryBuffer, HistoryBuffer.mean, torch._utils._rebuild_tensor_v2)
    assert not any(hasattr(item, 'evil') for item in changed)
