"""What tools/analyze_statistics.py finds is what it says: errors of compensation, and of nothing else."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Net, runner_for

from mmdet_cbn.experiments.analysis.fidelity import NOISE, TWO_LAYERS, Error, StatisticsFidelityHook
from mmdet_cbn.experiments.analysis.gradients import Ratio
from mmdet_cbn.experiments.analysis.plots import draw, plot_errors, to_markdown, write_results

CONFIG = 'small/r18_shapes.py'
OPTIONS = {
    'custom_hooks.0.burn_in_epochs': 0,
    'train_cfg.max_epochs': 2,  # of 4 iterations
    'param_scheduler': [],
    'default_hooks.checkpoint': None,
    'optim_wrapper.optimizer': dict(type='SGD', lr=0.01, _delete_=True),
}
STUDY = ROOT / 'configs/study/retinanet_r18_fpn_cbn_varied.py'
ALL = 100_000  # more than there are positions


def train(build_runner, hook=None, **options):
    runner = build_runner(CONFIG, 'mask-rcnn_r50_fpn_cbn-all_1x_coco', evaluate=False, **{**OPTIONS, **options})
    if hook:
        runner.register_hook(hook)
    runner.train()
    return runner


@pytest.fixture
def errors(build_runner):
    def of(**options):
        hook = StatisticsFidelityHook(every=4, max_tau=3, samples=(8, ALL), two_layers=False)
        train(build_runner, hook, **options)
        return hook.errors

    return of


def worst(errors, compensation, layer=''):
    found = [error for error in errors if error.compensation.startswith(compensation) and layer in error.layer]
    assert found
    return max(max(error.mean_error, error.var_error) for error in found)


@pytest.mark.slow
def test_unchanged_weights_leave_no_error(errors):
    found = errors(**{'optim_wrapper.optimizer.lr': 0.0})
    assert {(error.iteration, error.tau) for error in found} == {(i, tau) for i in (4, 8) for tau in (1, 2, 3)}
    layers = {error.layer for error in found}
    parts = {
        'backbone.bn1',
        'neck.fpn_convs.3.bn',
        'roi_head.bbox_head.shared_convs.3.bn',
        'roi_head.mask_head.convs.3.bn',
    }
    assert parts <= layers and len(layers) == 36
    for compensation in ('none', 'first', '8 samples', f'{ALL} samples'):
        assert worst(found, compensation) < 1e-4
    assert min(error.mean_error for error in found if error.compensation == NOISE) > 1e-3, 'batches differ'


@pytest.mark.slow
def test_nothing_is_left_where_the_layer_itself_changed_and_all_positions_are_samples(errors):
    found = errors()
    first = 'backbone.bn1'  # before it no layer changes
    assert worst(found, f'{ALL} samples', first) < 1e-4
    assert 1e-4 < worst(found, 'first', first) < worst(found, 'none', first)
    assert worst(found, f'{ALL} samples', 'backbone.layer4') > 1e-3, 'the layers before have changed'


@pytest.mark.slow
def test_the_training_goes_on_as_without_it(build_runner):
    plain = train(build_runner)
    watched = train(build_runner, StatisticsFidelityHook(every=4, max_tau=2, two_layers=False))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


@pytest.mark.slow
def test_burn_in_is_not_compared(errors):
    iterations = {error.iteration for error in errors(**{'custom_hooks.0.burn_in_epochs': 1})}
    assert iterations == {8}


def test_a_model_without_such_layers_is_refused(tmp_path):
    runner = runner_for(tmp_path, Net(), None)
    runner.register_hook(StatisticsFidelityHook())
    with pytest.raises(RuntimeError, match='backbone, neck and RoI head have no CBN of order 1'):
        runner.train()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(every=3, max_tau=3), 'every must be an int >= 4, got 3'),
        (dict(max_tau=0), 'max_tau must be an int >= 1, got 0'),
        (dict(samples=[64, 1]), 'each of samples must be an int >= 2, got 1'),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        StatisticsFidelityHook(**arguments)


ERRORS = [
    Error(10, 'a', 1, 'none', 0.1, 0.5),
    Error(10, 'b', 1, 'none', 0.3, 0.7),
    Error(20, 'a', 1, 'none', 0.2, 0.6),
    Error(10, 'a', 2, 'none', 0.5, 0.0),
    Error(10, 'a', 1, '64 samples', 0.0, 0.25),
    Error(10, 'a', 2, '64 samples', 1.0, 2.0),
]
RATIOS = [Ratio(10, 'a', 1, 0.5, 0.25), Ratio(10, 'b', 1, 0.7, 0.75), Ratio(20, 'a', 2, 0.125, 0.5)]


def read(file):
    with open(file, newline='') as stream:
        return list(csv.DictReader(stream))


def test_tables_and_plots_have_the_means_over_layers_or_iterations(tmp_path):
    write_results(ERRORS, RATIOS, tmp_path)
    assert read(tmp_path / 'statistics.csv')[:2] == [
        dict(iteration='10', tau='1', compensation='none', mean_error='0.2', var_error='0.6'),
        dict(iteration='20', tau='1', compensation='none', mean_error='0.2', var_error='0.6'),
    ]
    assert read(tmp_path / 'layers.csv')[0] == dict(
        layer='a', tau='1', compensation='none', mean_error='0.15', var_error='0.55'
    )
    assert read(tmp_path / 'gradients.csv') == [
        dict(iteration='10', before='1', mean='0.6', second_moment='0.5'),
        dict(iteration='20', before='2', mean='0.125', second_moment='0.5'),
    ]
    table = draw(tmp_path)
    assert table.splitlines()[2:] == [
        '| none | 0.2000 | 0.5000 | 0.6000 | 0.0000 |',
        '| 64 samples | 0.0000 | 1.0000 | 0.2500 | 2.0000 |',
    ]
    assert (tmp_path / 'statistics.md').read_text() == table
    assert all((tmp_path / f'{name}.png').stat().st_size > 0 for name in ('statistics', 'gradients'))


def test_plots_show_errors_over_tau_and_over_the_training():
    rows = [
        dict(iteration=iteration, tau=tau, compensation=kind, mean_error=iteration * tau * 1.0, var_error=1.0)
        for kind in ('none', NOISE)
        for iteration in (10, 20)
        for tau in (1, 2, 3, 4)
    ]
    over_tau, over_training = plot_errors(rows).axes[:2]
    line, noise = over_tau.lines
    assert [*line.get_xdata()] == [1, 2, 3, 4] and [*line.get_ydata()] == [15, 30, 45, 60]
    assert (noise.get_label(), noise.get_linestyle()) == (NOISE, '--')
    line = over_training.lines[0]
    assert [*line.get_xdata()] == [10, 20] and [*line.get_ydata()] == [20, 40], 'at tau = 2'
    assert '| none | 15.0000 | 30.0000 | 60.0000 | 1.0000 |' in to_markdown(rows)


@pytest.fixture
def run_tool(varied_root, tmp_path):
    """Runs the tool in a process of its own, for it leaves mmengine's logger behind."""

    def run(*arguments):
        tool = ROOT / 'tools/analyze_statistics.py'
        command = [sys.executable, *map(str, [tool, *arguments, '--out', tmp_path])]
        environment = {**os.environ, 'VARIED_ROOT': str(varied_root), 'OMP_NUM_THREADS': '2'}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_the_tool_writes_tables_and_plots_and_draws_them_anew(run_tool, tmp_path):
    options = ['--cfg-options', 'custom_hooks.0.burn_in_epochs=0']
    numbers = ['--every', 4, '--max-tau', 2, '--samples', 8, '--iters', 4]
    result = run_tool(STUDY, *numbers, *options)
    table = (tmp_path / 'statistics.md').read_text()
    assert result.returncode == 0 and table in result.stdout
    assert '| mean, in sigma, tau = 1 | mean, in sigma, tau = 2 |' in table and '| 8 samples |' in table
    assert TWO_LAYERS in table
    assert {row['iteration'] for row in read(tmp_path / 'statistics.csv')} == {'4'}
    layers = {row['layer'] for row in read(tmp_path / 'layers.csv')}
    assert {'backbone.bn1', 'neck.fpn_convs.1.bn'} < layers
    assert {row['before'] for row in read(tmp_path / 'gradients.csv')} == {'1', '2'}
    assert not list(tmp_path.glob('*.pth'))

    for name in ('statistics.md', 'statistics.png', 'gradients.png'):
        (tmp_path / name).unlink()
    assert run_tool().stdout == table == (tmp_path / 'statistics.md').read_text()
    assert (tmp_path / 'statistics.png').is_file() and (tmp_path / 'gradients.png').is_file()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--out has nothing to draw'),
        (['no_such.py'], 'CONFIG must be a file, got no_such.py'),
        ([STUDY, '--every', 5, '--max-tau', 5], 'every must be an int >= 6, got 5'),
        ([STUDY, '--iters', 0], 'iters must be an int >= 1, got 0'),
        (
            [STUDY, '--iters', 2],
            '--every 10 and --max-tau 7 allow no comparison after burn-in in a training of 2',
        ),
    ],
)
def test_the_tool_refuses_by_name(run_tool, arguments, message):
    result = run_tool(*arguments)
    assert result.returncode == 2 and message in result.stderr
