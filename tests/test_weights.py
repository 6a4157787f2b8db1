"""The record of weights is right; BatchNorm's gradient makes no weight longer, and CBN's with 'batch' does."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, runner_for
from test_gradients import Chain
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.analysis.weights import WeightState, WeightStateHook, plot_weights, read_states


def states_of(tmp_path, norm):
    hook = WeightStateHook(every=2)
    model = Chain(norm)
    runner_for(tmp_path, model, hook, epochs=3, batch_size=2).train()
    rows = read_states(tmp_path / 'weights.csv')
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
        'batch': lambda channels: CBN(channels, window_size=3, gradient='batch'),
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


def test_the_plot_shows_means_over_the_layers_and_growth():
    states = [
        WeightState(i, layer, i * scale, 0.1 * i, 0.2, scale)
        for i in (1, 2)
        for layer, scale in dict(a=1.0, b=3.0).items()
    ]
    panels = plot_weights({'BN': states}).axes
    drawn = [[list(values) for values in axes.lines[0].get_data()] for axes in panels]
    assert drawn == [[[1, 2], [1, 2]], [[1, 2], [0.1, 0.2]], [[1, 2], [0.2, 0.2]], [[1, 2], [2, 2]]]
    assert panels[0].lines[0].get_label() == 'BN'


def run_tool(varied_root, out, *arguments):
    command = [sys.executable, *map(str, [ROOT / 'tools/analyze_weights.py', *arguments, '--out', out])]
    environment = {**os.environ, 'VARIED_ROOT': str(varied_root), 'OMP_NUM_THREADS': '2'}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_tool_draws_all_trainings_in_one_plot(varied_root, tmp_path):
    config = ROOT / 'configs/study/retinanet_r18_fpn_bn_varied.py'
    short = ['--every', 2, '--cfg-options', 'train_cfg.max_epochs=1', 'param_scheduler=[]']
    for name in ('BN', 'again'):
        result = run_tool(varied_root, tmp_path, config, '--name', name, *short)
        assert result.returncode == 0, result.stderr
    assert read_states(tmp_path / 'BN.csv')[0].iteration == 2
    (tmp_path / 'weights.png').unlink()
    assert run_tool(varied_root, tmp_path).returncode == 0
    assert (tmp_path / 'weights.png').is_file() and not list(tmp_path.rglob('*.pth'))


def test_the_tool_refuses_by_name(varied_root, tmp_path):
    (tmp_path / 'layers.csv').write_text('layer,tau\n')  # of another tool
    for arguments, message in (([], 'has no CSV files of this tool'), (['no.py'], 'CONFIG must be a file, got no.py')):
        result = run_tool(varied_root, tmp_path, *arguments)
        assert result.returncode == 2 and message in result.stderr
