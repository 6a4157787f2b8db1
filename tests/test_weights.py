"""The record of weights is right; BatchNorm's gradient makes no weight longer, and CBN's with 'batch' does."""

import csv

import pytest
from conftest import runner_for
from test_gradients import Chain
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.analysis.weights import WeightState, WeightStateHook


def states_of(tmp_path, norm):
    hook = WeightStateHook(every=2)
    model = Chain(norm)
    runner_for(tmp_path, model, hook, epochs=3, batch_size=2).train()
    with open(tmp_path / 'weights.csv', newline='') as stream:
        rows = [WeightState(int(row[0]), row[1], *map(float, row[2:])) for row in list(csv.reader(stream))[1:]]
    assert rows == hook.states
    return model, rows


def test_each_norm_is_recorded_in_its_iterations(tmp_path):
    model, states = states_of(tmp_path, nn.BatchNorm2d)
    assert sorted({state.layer for state in states}) == [f'backbone.norm{n}' for n in (1, 2, 3, 4)]
    assert [state.iteration for state in states if state.layer == 'backbone.norm1'] == [2, 4, 6]
    norms = [0.5 < state.norm < 3 for state in states]
    assert all(norms) and all(state.offset > 0 for state in states)
    assert not model.backbone.conv1._forward_hooks and not model.backbone.norm1._forward_pre_hooks


def test_only_the_gradient_of_the_batch_alone_has_a_large_part_along_the_weight(tmp_path):
    norms = {
        'BN': nn.BatchNorm2d,
        'batch': lambda channels: CBN(channels, window_size=3),
        'weights': lambda channels: CBN(channels, window_size=3, gradient='weights'),
    }
    radial = {}
    for name, norm in norms.items():
        _, states = states_of(tmp_path, norm)
        radial[name] = {state.layer: state.size_of_radial for state in states if state.iteration == 4}
    for layer in radial['BN']:
        assert radial['BN'][layer] < 0.001 < radial['weights'][layer] < 0.5 * radial['batch'][layer]


def test_every_is_checked():
    with pytest.raises(ValueError, match='WeightStateHook: every must be an int >= 1, got 0'):
        WeightStateHook(every=0)
