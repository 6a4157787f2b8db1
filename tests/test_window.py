"""The ring keeps the last iterations, in memory allocated once, and starts afresh where something does not fit."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmdet_cbn.window.ring import Window
from mmdet_cbn.window.size import suggested_window_size


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def pair(value, **kwargs):
    return Pair(torch.full((2,), float(value), **kwargs), torch.full((2, 3), float(value), **kwargs))


def values(window):
    return sorted(window.stacked().a[:, 0].tolist())


def test_it_keeps_the_most_recent():
    window = Window(3)
    assert len(window) == 0 and window.stacked() is None and window.nbytes == 0
    kept = []
    for value in range(5):
        window.push(pair(value))
        kept.append(values(window))
    assert kept == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert window.stacked().b.shape == (3, 2, 3)


def test_it_allocates_once():
    window = Window(2)
    window.push(pair(0))
    address = window.stacked().b.data_ptr()
    assert window.nbytes == 2 * (2 + 6) * 4
    for value in range(5):
        window.push(pair(value))
    assert window.stacked().b.data_ptr() == address


def test_it_copies_what_it_keeps():
    window, statistics = Window(2), pair(1)
    window.push(statistics)
    statistics.a.zero_()
    assert values(window) == [1]


@pytest.mark.parametrize('other', [pair(9, dtype=torch.float64), Pair(torch.full((4,), 9.0), torch.zeros(4, 3))])
def test_it_starts_afresh_for_another_precision_or_shape(other):
    window = Window(3)
    window.push(pair(1))
    window.push(other)
    assert len(window) == 1 and values(window) == [9]


def test_clear_gives_the_memory_back():
    window = Window(3)
    window.push(pair(1))
    window.clear()
    assert len(window) == 0 and window.nbytes == 0 and window.stacked() is None


@pytest.mark.parametrize(('images', 'size'), [(1, 8), (2, 8), (3, 6), (4, 4), (5, 4), (8, 2), (16, 1), (32, 1)])
def test_the_papers_rule_for_the_window_size(images, size):
    assert suggested_window_size(images) == size
