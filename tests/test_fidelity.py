"""What tools/analyze_statistics.py finds is what it says: errors of compensation, and of nothing else."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Net, runner_for

from mmdet_cbn.experiments.fidelity import NOISE, Error, StatisticsFidelityHook, to_markdown

CONFIG = 'small/r18_shapes.py'
OPTIONS = {
    'custom_hooks.0.burn_in_epochs': 0,
    'train_cfg.max_epochs': 2,  # of 4 iterations
    'param_scheduler': [],
    'default_hooks.checkpoint': None,
    'optim_wrapper.optimizer': dict(type='SGD', lr=0.01, _delete_=True),
}
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
        hook = StatisticsFidelityHook(every=4, max_tau=3, samples=(8, ALL))
        train(build_runner, hook, **options)
        return hook.errors

    return of


def worst(errors, compensation, layer=''):
    found = [error for error in errors if error.compensation.startswith(compensation) and layer in error.layer]
    assert found
    return max(max(error.mean_error, error.var_error) for error in found)


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


def test_nothing_is_left_where_the_layer_itself_changed_and_all_positions_are_samples(errors):
    found = errors()
    first = 'backbone.bn1'  # before it no layer changes
    assert worst(found, f'{ALL} samples', first) < 1e-4
    assert 1e-4 < worst(found, 'first', first) < worst(found, 'none', first)
    assert worst(found, f'{ALL} samples', 'backbone.layer4') > 1e-3, 'the layers before have changed'


def test_the_training_goes_on_as_without_it(build_runner):
    plain = train(build_runner)
    watched = train(build_runner, StatisticsFidelityHook(every=4, max_tau=2))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


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


def test_the_table_has_the_means_over_layers_and_iterations():
    errors = [
        Error(10, 'a', 1, 'none', 0.1, 0.5),
        Error(10, 'b', 1, 'none', 0.3, 0.7),
        Error(10, 'a', 2, 'none', 0.5, 0.0),
        Error(10, 'a', 1, '64 samples', 0.0, 0.25),
        Error(10, 'a', 2, '64 samples', 1.0, 2.0),
    ]
    assert to_markdown(errors, [1, 2]).splitlines()[2:] == [
        '| none | 0.2000 | 0.5000 | 0.6000 | 0.0000 |',
        '| 64 samples | 0.0000 | 1.0000 | 0.2500 | 2.0000 |',
    ]


@pytest.fixture
def run_tool(shapes_root, tmp_path):
    """Runs the tool in a process of its own, for it leaves mmengine's logger behind."""

    def run(*arguments):
        tool = ROOT / 'tools/analyze_statistics.py'
        command = [sys.executable, *map(str, [tool, *arguments, '--out', tmp_path])]
        environment = {**os.environ, 'SHAPES_ROOT': str(shapes_root), 'OMP_NUM_THREADS': '2'}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_the_tool_writes_a_table_and_every_number(run_tool, tmp_path):
    options = ['--cfg-options', 'custom_hooks.0.burn_in_epochs=0']
    numbers = ['--every', 4, '--max-tau', 3, '--samples', 8, '--iters', 4]
    result = run_tool(ROOT / 'configs' / CONFIG, *numbers, *options)
    table = (tmp_path / 'statistics.md').read_text()
    assert result.returncode == 0 and table in result.stdout
    assert '| mean, in sigma, tau = 1 | mean, in sigma, tau = 3 |' in table and '| 8 samples |' in table
    with open(tmp_path / 'statistics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == Error._fields and {row['iteration'] for row in rows} == {'4'}
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no_such.py'], 'CONFIG must be a file, got no_such.py'),
        ([ROOT / 'configs' / CONFIG, '--every', 5, '--max-tau', 5], 'every must be an int >= 6, got 5'),
        (
            [ROOT / 'configs' / CONFIG, '--iters', 2],
            '--every 10 and --max-tau 7 allow no comparison after burn-in in a training of 2',
        ),
    ],
)
def test_the_tool_refuses_by_name(run_tool, arguments, message):
    result = run_tool(*arguments)
    assert result.returncode == 2 and message in result.stderr
