"""Rows are trained and evaluated once each, whatever happens in between, and their logs become tables and plots."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from string import Template

import pytest
import torch
from conftest import ROOT

from mmdet_cbn.experiments.paper.coco import COCO, FIGURE3, FIGURE5, TABLE5, TABLE6_MASK, TABLE8
from mmdet_cbn.experiments.rows import logs, runs
from mmdet_cbn.experiments.rows.logs import Run, collect, find_runs, store_runs
from mmdet_cbn.experiments.rows.report import markdown, plot_curves, plot_figure, write_report
from mmdet_cbn.experiments.rows.runs import NOTHING_DETECTED, Setting, Trial, recipe_of, trials_of
from mmdet_cbn.experiments.rows.settings import settings_of
from mmdet_cbn.experiments.rows.table import BOX, Row

CONFIGS = ROOT / 'configs'
TOOL = ROOT / 'tools' / 'reproduce.py'
ROWS = ('bn-all', 'cbn-all')
TINY = [
    *(
        '--table',
        '5',
        '--rows',
        *ROWS,
        '--small',
        '--gpus',
        '1',
        '--trials',
        '1',
        '--work-dir',
        'runs',
        '--cfg-options',
    ),
    *(
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in ('num_workers=0', 'dataset.indices=2')
    ),
    *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
    *('train_cfg.max_epochs=2', 'default_hooks.logger.interval=1'),
]


def run_tool(tool, monkeypatch, capsys, *arguments):
    """Runs one of the tools in this process; returns its exit status and what it printed, as ``out`` and ``err``."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


@pytest.fixture(scope='module')
def killed_and_restarted(tmp_path_factory, shapes_root):
    """Two rows that were in training when everything was killed, after the first checkpoint, and then were begun anew:
    the folder, and what the second and a third call printed."""
    folder = tmp_path_factory.mktemp('reproduce')
    call = dict(
        args=[sys.executable, TOOL, *TINY],
        cwd=folder,
        env={**os.environ, 'SHAPES_ROOT': str(shapes_root), 'OMP_NUM_THREADS': '2'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = subprocess.Popen(**call, start_new_session=True)
    pointer = folder / 'runs' / 'faster-rcnn_r50_fpn_bn-all_1x_coco' / 'seed-0' / 'last_checkpoint'
    while not (pointer.is_file() and pointer.read_text()):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    outputs = []
    for _ in range(2):
        result = subprocess.run(**call)
        assert result.returncode == 0, result.stdout[-5000:]
        outputs.append(result.stdout)
    return folder / 'runs', outputs


def runs_of(folder):
    return {run.config: run for run in find_runs([folder])}


@pytest.mark.slow
def test_after_a_kill_training_goes_on_and_nothing_is_lost_or_run_twice(killed_and_restarted):
    folder, (second, third) = killed_and_restarted
    names = [f'faster-rcnn_r50_fpn_{row}_1x_coco, seed 0' for row in ROWS]
    assert second.endswith('== Summary\n' + ''.join(f'{name}: finished\n' for name in names))
    assert re.findall(r'resumed epoch: (\d)', second) == ['1'], 'the first went on where it was, the second began'
    epochs = re.findall(r'Epoch\(train\) +\[(\d)\]\[1/1\]', second)
    assert epochs == ['2', '1', '2']
    assert [second.count(f'== {name}: {step}\n') for name in names for step in ('training', 'evaluation')] == [1] * 4

    assert third.endswith('== Summary\n' + ''.join(f'{name}: was finished\n' for name in names))
    assert 'Epoch(' not in third

    first, other = (runs_of(folder)[name.partition(',')[0]] for name in names)
    assert sorted(other.curve) == [1, 2]
    assert sorted(first.curve) in ([2], [1, 2]), 'it was killed before or after the first evaluation'


def test_the_report_has_the_numbers_of_the_logs(killed_and_restarted, tmp_path):
    folder, _ = killed_and_restarted
    runs = runs_of(folder)
    assert set(runs) == {f'faster-rcnn_r50_fpn_{row}_1x_coco' for row in ROWS}
    for run in runs.values():
        (file,) = run.work_dir.glob('test/*/*.json')
        written = json.loads(file.read_text())
        assert run.metrics['bbox_mAP'] == pytest.approx(100 * written['coco/bbox_mAP'])
        assert written['coco/bbox_mAP_l'] == -1 and 'bbox_mAP_l' not in run.metrics, 'there is no large object'
        assert run.metrics == pytest.approx(run.curve[2]), 'the last epoch was evaluated twice'
        assert run.settings['GPUs'] == 1 and run.settings['model.backbone.depth'] == 18 and run.epochs == 2

    written = write_report(list(runs.values()), tmp_path, CONFIGS, 5, COCO)
    assert all(file.stat().st_size > 0 for file in written)
    names = {file.name for file in written}
    tables = {table.name for table in COCO if table.number != '8'}
    assert names == {
        *(f'{name}.{kind}' for name in tables for kind in ('md', 'csv')),
        'table5-epochs.png',
        'runs.json',
    }
    text = (tmp_path / 'table5.md').read_text()
    for row in ROWS:
        ap = runs[f'faster-rcnn_r50_fpn_{row}_1x_coco'].metrics['bbox_mAP']
        assert f'| ours, 1 trial, not as in the paper (1) | {ap:.1f} |' in text
    assert text.count('GPUs = 1 (4)') == 1, 'the two have the same note'
    assert 'difference' not in text, 'a small version is not compared with the paper'
    assert 'none (0 of 5), bn-head (0 of 5)' in text

    with open(tmp_path / 'table5.csv', newline='') as stream:
        lines = [line for line in csv.DictReader(stream) if line['row'] == 'cbn-all' and line['metric'] == 'bbox_mAP']
    run = runs['faster-rcnn_r50_fpn_cbn-all_1x_coco']
    (line,) = lines
    assert (line['paper'], line['trials'], line['difference'], line['as in the paper']) == ('37.7', '1', '', 'False')
    assert float(line['ours']) == pytest.approx(run.metrics['bbox_mAP'], abs=1e-3)


def test_a_run_of_train_py_alone_is_known_by_its_config(killed_and_restarted, tmp_path):
    folder, _ = killed_and_restarted
    name = 'faster-rcnn_r50_fpn_cbn-all_1x_coco'
    shutil.copytree(folder / name / 'seed-0', tmp_path / 'own')
    (tmp_path / 'own' / 'settings.json').unlink()
    shutil.rmtree(tmp_path / 'own' / 'test')
    (run,) = find_runs([tmp_path])
    assert (run.config, run.name) == (name, None) and run.metrics == run.curve[2], (
        'the evaluation after the last epoch of training'
    )

    (file,) = (tmp_path / 'own').glob('*/vis_data/scalars.json')
    lines = file.read_text().splitlines()
    resumed = tmp_path / 'own' / '99990101_000000' / 'vis_data'
    shutil.copytree(file.parents[1], resumed.parent)
    next(resumed.parent.glob('*.log')).write_text('GPU number: 1\nresumed epoch: 1, iter: 4\n')
    old = file.parent / 'config.py'
    old.write_text(old.read_text().replace('max_epochs=2', 'max_epochs=9'))
    file.write_text('\n'.join(line for line in lines if json.loads(line)['step'] == 1))
    (resumed / 'scalars.json').write_text('\n'.join(line for line in lines if json.loads(line)['step'] == 2))
    assert find_runs([tmp_path]) == [run], 'the logs of a resumed run are one'
    shutil.rmtree(resumed.parent)
    (unfinished,) = find_runs([tmp_path])
    assert unfinished.metrics == {} and list(unfinished.curve) == [1]


@pytest.mark.parametrize(
    ('file', 'content', 'named'),
    [
        ('now/vis_data/scalars.json', '{"coco/bbox_mAP": 0.1, "step"\n', True),
        ('now/vis_data/scalars.json', '["coco/bbox_mAP"]\n', True),
        ('now/vis_data/scalars.json', '{"coco/bbox_mAP": 0.1}\n', True),
        ('now/vis_data/scalars.json', '{"coco/bbox_mAP": 0.1, "step"', False),
        ('settings.json', '{"run"', True),
        ('settings.json', '[]', True),
        ('now/vis_data/config.py', 'train_cfg = (', True),
        ('now/vis_data/config.py', 'x = 1', False),
        ('test/now/now.json', '["coco/bbox_mAP"]', False),
    ],
)
def test_damaged_logs_are_named(file, content, named, tmp_path, monkeypatch, capsys):
    """But what a kill may leave is passed over."""
    logs = {
        'now/vis_data/scalars.json': '{"coco/bbox_mAP": 0.5, "step": 1}\n',
        'now/vis_data/config.py': "train_cfg = dict(max_epochs=1)\nrow = 'name'",
        'now/now.log': 'GPU number: 1\n',
        'settings.json': '{"run": "name"}',
    }
    for name, text in {**logs, file: content}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if content == 'x = 1':
        with pytest.raises(RuntimeError, match=f'{tmp_path} has no logs of a training'):
            find_runs([tmp_path])
    elif named:
        code, printed = run_tool('report.py', monkeypatch, capsys, tmp_path)
        assert code == 2 and str(tmp_path / file) in printed.err
    else:
        (run,) = find_runs([tmp_path])
        assert run.metrics == ({'bbox_mAP': 50} if 'test' in file else {})


def test_a_config_that_a_full_disk_left_empty_is_passed_over(tmp_path):
    for time_of_run, config in (('1', "train_cfg = dict(max_epochs=1)\nrow = 'name'"), ('2', '')):
        folder = tmp_path / time_of_run / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('{"coco/bbox_mAP": 0.5, "step": 1}\n' if config else '')
        (folder / 'config.py').write_text(config)
        (folder.parent / f'{time_of_run}.log').write_text('GPU number: 1\n')
    (run,) = find_runs([tmp_path])
    assert run.metrics == {'bbox_mAP': 50} and run.epochs == 1


# -- runs that detect nothing: mmdet gives no metrics of them, mmengine writes the rest

EMPTY = f'{NOTHING_DETECTED}\n11/25 07:15:04 - mmengine - INFO - Epoch(val) [{{}}][1/1]    time: 9.6507\n'
ZEROS = {name.replace('bbox', kind): 0 for kind in ('bbox', 'segm') for name in BOX}


@pytest.mark.slow
def test_a_model_that_detects_nothing_has_an_ap_of_zero(shapes_root, tmp_path):
    """From tools/reproduce.py to the report."""
    arguments = ['--table', '6', '--rows', 'mask-r50-gn', *TINY[TINY.index('--small') :]]
    options = ['train_cfg.max_epochs=1', 'model.test_cfg.rcnn.score_thr=1.0']
    call = dict(
        args=[sys.executable, TOOL, *arguments, *options],
        cwd=tmp_path,
        env={**os.environ, 'SHAPES_ROOT': str(shapes_root), 'OMP_NUM_THREADS': '2'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for result in ('finished', 'was finished'):
        ended = subprocess.run(**call)
        assert ended.returncode == 0, ended.stdout[-5000:]
        name = 'mask-rcnn_r50_fpn_gn-head_1x_coco, seed 0'
        assert ended.stdout.endswith(f'== Summary\n{name}: {result} (nothing was detected: AP 0)\n')
    (run,) = find_runs([tmp_path / 'runs'])
    assert run.nothing_detected and run.metrics == run.curve[1] == ZEROS
    shutil.rmtree(run.work_dir / 'test')
    assert find_runs([tmp_path / 'runs']) == [run], 'the last validation says the same'
    write_report([run], tmp_path / 'report', CONFIGS, 1, COCO)
    assert find_runs([tmp_path / 'report' / 'runs.json'])[0].nothing_detected


CONFIG = "train_cfg = dict(max_epochs=2)\nval_evaluator = [dict(metric='bbox')]\n"


@pytest.fixture
def session(tmp_path):
    """Writes what one start of tools/train.py, of a config name.py, leaves in its folder."""
    (tmp_path / 'name.py').touch()

    def write(name, log='', scalars='', config=CONFIG):
        (tmp_path / name / 'vis_data').mkdir(parents=True)
        (tmp_path / name / f'{name}.log').write_text(f'GPU number: 1\n{log}')
        (tmp_path / name / 'vis_data' / 'scalars.json').write_text(scalars)
        (tmp_path / name / 'vis_data' / 'config.py').write_text(config)

    return write


def trained(**aps):
    """The log of one training step, and of the evaluations after the epochs."""
    lines = [dict(loss=1.0, step=1), *({'coco/bbox_mAP': ap, 'step': int(epoch[1:])} for epoch, ap in aps.items())]
    return ''.join(f'{json.dumps(line)}\n' for line in lines)


def test_a_training_begun_anew_takes_the_place_of_the_one_before(session, tmp_path):
    session('1', scalars=trained(e1=0.1, e2=0.3))
    session('2')  # tools/test.py
    (run,) = find_runs([tmp_path])
    assert run.metrics == {'bbox_mAP': 30}
    session('3', scalars=trained(e1=0.2), config=f'{CONFIG}model = dict(depth=7)\n')
    (run,) = find_runs([tmp_path])
    assert run.curve == {1: {'bbox_mAP': 20}} and run.metrics == {} and run.settings['model.depth'] == 7
    session('4', 'resumed epoch: 1, iter: 4\n', trained(e2=0.4))
    (run,) = find_runs([tmp_path])
    assert run.curve == {1: {'bbox_mAP': 20}, 2: {'bbox_mAP': 40}} and run.metrics == run.curve[2]


def test_a_training_by_iterations_is_no_row(session, tmp_path):
    session('1', scalars=trained(e1=0.1), config="train_cfg = dict(type='IterBasedTrainLoop', max_iters=9)\n")
    assert find_runs([tmp_path]) == []


def test_nothing_detected_in_validation_is_a_point_of_the_curve(session, tmp_path):
    """In the first epoch. In the second the run was killed before the end of the validation, and did it again."""
    session('1', EMPTY.format(1) + NOTHING_DETECTED)
    zeros = dict.fromkeys(BOX, 0)
    (run,) = find_runs([tmp_path])
    assert run.curve == {1: zeros} and run.metrics == {} and not run.nothing_detected
    session('2', EMPTY.format(2))
    (run,) = find_runs([tmp_path])
    assert run.curve == {1: zeros, 2: zeros} and run.metrics == zeros and run.nothing_detected
    session('3', '', '{"coco/bbox_mAP": 0.5, "step": 2}\n')
    (run,) = find_runs([tmp_path])
    assert run.curve == {1: zeros, 2: {'bbox_mAP': 50}} and run.metrics == run.curve[2] and not run.nothing_detected


def test_the_report_says_that_nothing_was_detected(tmp_path):
    row = TABLE5.rows[0]
    runs = as_in_the_paper(row, [36.0, 0.0, 0.0])
    runs[2] = runs[2]._replace(nothing_detected=True)
    write_report(runs, tmp_path, CONFIGS, 3, COCO)
    text = (tmp_path / 'table5.md').read_text()
    assert '| ours, 3 trials | 12.0 ± 20.8 |' in text
    assert 'Nothing was detected, which counts as AP 0: none (1 of 3 trials).' in text
    with open(tmp_path / 'table5.csv', newline='') as stream:
        counts = {line['row']: line['nothing detected'] for line in csv.DictReader(stream)}
    assert counts['none'] == '1' and set(counts.values()) == {'0', '1'}
    assert 'Nothing' not in markdown(TABLE5, collect(TABLE5, runs[:2], CONFIGS)), 'an AP of 0 alone says no such thing'


# -- the report, on runs with the paper's settings


def as_in_the_paper(row, aps, **settings) -> list[Run]:
    """Runs of train.py with the row's own settings, but for ``settings``, which ended with these APs."""
    decisive = {**settings_of(recipe_of(row, CONFIGS)), 'GPUs': 4, **settings}
    curves = [{epoch: {'bbox_mAP': ap + epoch - 12} for epoch in (11, 12)} for ap in aps]
    return [Run(Path('somewhere'), row.config, None, decisive, curve, curve[12], 12) for curve in curves]


def test_trials_become_mean_deviation_and_difference():
    row = next(row for row in TABLE5.rows if row.name == 'cbn-head')
    runs = as_in_the_paper(row, [37.0, 38.0, 39.2])
    text = markdown(TABLE5, collect(TABLE5, runs, CONFIGS), trials=3)
    assert '| paper | 37.7 | 59.0 | 40.7 | 22.1 | 40.9 | 48.8 | faster-rcnn_r50_fpn_cbn-head_1x_coco |' in text
    assert '|  |  | ours, 3 trials | 38.1 ± 1.1 | - | - | - | - | - |  |' in text
    assert '|  |  | difference | +0.4 |  |  |  |  |  |  |' in text
    assert ' cbn-head (' not in text and 'cbn-all (0 of 3)' in text
    assert 'cbn-head (3 of 5)' in markdown(TABLE5, collect(TABLE5, runs, CONFIGS), trials=5)


def test_runs_with_other_settings_stand_apart():
    row = TABLE5.rows[0]
    runs = as_in_the_paper(row, [36.0]) + as_in_the_paper(row, [20.0, 21.0], **{'optim_wrapper.optimizer.lr': 0.01})
    text = markdown(TABLE5, collect(TABLE5, runs, CONFIGS))
    assert '| ours, 1 trial | 36.0 |' in text and '| difference | -0.9 |' in text
    assert '| ours, 2 trials, not as in the paper (1) | 20.5 ± 0.7 |' in text
    assert "(1) Other settings, the paper's in brackets: optim_wrapper.optimizer.lr = 0.01 (0.02)." in text


@pytest.mark.parametrize(
    'options',
    [
        {'sync_bn': 'torch'},
        {'load_from': 'epoch_12.pth'},
        {'default_hooks.ema.type': 'EMAHook'},
        {'default_hooks.sync_buffers': None},
        {'test_evaluator.metric': 'proposal'},
        {'test_dataloader.dataset.test_mode': False},
    ],
    ids=str,
)
def test_whatever_decides_on_the_result_is_compared(options):
    row = TABLE5.rows[0]
    config = recipe_of(row, CONFIGS)
    config.merge_from_dict(options)
    (run,) = as_in_the_paper(row, [36.0])
    (entry,) = collect(TABLE5, [run._replace(settings={**settings_of(config), 'GPUs': 4})], CONFIGS)[row.name]
    assert any(next(iter(options)) in difference for difference in entry.differences)


def test_table_8_has_no_trials_of_other_tables(tmp_path, monkeypatch, capsys):
    """One of its configs is a row of Table 6, too."""
    row = next(row for row in TABLE8.rows if any(row.config == other.config for other in TABLE6_MASK.rows))
    store_runs(as_in_the_paper(row, [36.0]), tmp_path / 'runs.json')
    page = tmp_path / 'page.md'
    page.write_text((CONFIGS / 'cbn' / 'README.md').read_text())
    assert run_tool('report.py', monkeypatch, capsys, tmp_path / 'runs.json', '--readme', page)[0] == 0
    before, table = page.read_text().split('<!-- table8 -->')
    assert 'ours' in before and 'ours' not in table


def test_a_page_without_the_marks_of_a_table_is_an_error(tmp_path, monkeypatch, capsys):
    """And one that lacks an end keeps what comes after."""
    page = tmp_path / 'page.md'

    def renew(text):
        page.write_text(text)
        _, printed = run_tool('report.py', monkeypatch, capsys, '--readme', page, '--table', '5', '6')
        return page.read_text(), printed.err

    text, error = renew('No table here.')
    assert text == 'No table here.' and 'page.md has no marks' in error
    text, error = renew('<!-- table5 -->\nkept\n<!-- table6-mask -->\nold\n<!-- end -->\n')
    assert 'kept' in text and 'old' not in text and not error
    code, printed = run_tool('report.py', monkeypatch, capsys, '--readme', tmp_path / 'none.md')
    assert code == 2 and '--readme must be a file' in printed.err


def test_a_half_done_run_is_missing_with_its_progress():
    row = TABLE5.rows[0]
    runs = [run._replace(metrics={}, curve={5: {'bbox_mAP': 30.0}}) for run in as_in_the_paper(row, [36.0])]
    text = markdown(TABLE5, collect(TABLE5, runs, CONFIGS), trials=2)
    assert 'none (0 of 2; epoch 5 of 12)' in text and 'ours' not in text


@pytest.mark.parametrize('table', [FIGURE3, FIGURE5], ids=lambda table: table.name)
def test_each_point_of_a_figure_is_known_by_its_options(table):
    for row in table.rows:
        (name,) = collect(table, as_in_the_paper(row, [30.0]), CONFIGS)
        assert name == row.name


def test_a_run_of_reproduce_py_knows_its_row_whatever_its_settings():
    rows = {row.name: row for row in FIGURE3.rows}
    runs = [run._replace(name=rows['bn-k4'].run) for run in as_in_the_paper(rows['bn-k1'], [30.0])]
    assert list(collect(FIGURE3, runs, CONFIGS)) == ['bn-k4']


def test_curves_are_means_over_trials():
    row = TABLE5.rows[0]
    axes = plot_curves(TABLE5, collect(TABLE5, as_in_the_paper(row, [36.0, 37.0]), CONFIGS)).axes[0]
    line, paper = axes.lines
    assert [*line.get_xdata()] == [11, 12] and [*line.get_ydata()] == [35.5, 36.5]
    assert set(paper.get_ydata()) == {36.9}
    assert plot_curves(TABLE5, {}) is None and plot_figure(FIGURE3, {}) is None


def test_a_figure_has_our_points_and_the_papers():
    rows = {row.name: row for row in FIGURE3.rows}
    runs = as_in_the_paper(rows['cbn-k2'], [37.0, 38.0]) + as_in_the_paper(rows['cbn-k8'], [38.5])
    axes = plot_figure(FIGURE3, collect(FIGURE3, runs, CONFIGS)).axes[0]
    ours = axes.containers[0]
    assert ours.get_label() == 'CBN'
    assert [*ours.lines[0].get_xdata()] == [2, 8] and [*ours.lines[0].get_ydata()] == [37.5, 38.5]
    stars = {(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == '*'} - {()}
    assert stars == {(1, 36.3), (4, 37.7)}


def test_points_with_other_settings_have_a_line_of_their_own():
    rows = {row.name: row for row in FIGURE3.rows}
    runs = as_in_the_paper(rows['cbn-k2'], [37.0])
    runs += as_in_the_paper(rows['cbn-k8'], [38.5], **{'optim_wrapper.optimizer.lr': 0.01})
    lines = plot_figure(FIGURE3, collect(FIGURE3, runs, CONFIGS)).axes[0].containers
    points = {line.get_label(): [*line.lines[0].get_xdata()] for line in lines}
    assert points == {'CBN': [2], 'CBN, not as in the paper': [8]}


def test_a_trial_that_has_not_ended_hides_none_that_has():
    row = next(row for row in FIGURE3.rows if row.name == 'bn-k1')
    (ended,) = as_in_the_paper(row, [30.0], **{'optim_wrapper.optimizer.lr': 0.01})
    (begun,) = as_in_the_paper(row, [36.0])
    entries = collect(FIGURE3, [begun._replace(metrics={}), ended], CONFIGS)
    (line,) = plot_figure(FIGURE3, entries).axes[0].containers
    assert [*line.lines[0].get_ydata()] == [30.0] and line.get_label() == 'BN, not as in the paper'


def test_the_tables_in_the_readme_are_the_papers(tmp_path, monkeypatch, capsys):
    copy = tmp_path / 'README.md'
    text = (CONFIGS / 'cbn' / 'README.md').read_text()
    copy.write_text(re.sub(r'(<!-- (?:table|figure)\S+ -->\n).*?(<!-- end)', r'\1\2', text, flags=re.DOTALL))
    assert len(copy.read_text()) < len(text) / 2
    assert run_tool('report.py', monkeypatch, capsys, '--readme', copy)[0] == 0
    assert copy.read_text() == text


@pytest.mark.parametrize('folder', ['missing', 'empty'])
def test_a_report_of_nothing_is_an_error(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / 'empty').mkdir()
    code, printed = run_tool('report.py', monkeypatch, capsys, tmp_path / folder)
    assert code == 2
    expected = 'no logs of a training under' if folder == 'empty' else 'missing does not exist'
    assert expected in printed.err


# -- which commands it takes


def reproduce(monkeypatch, capsys, *arguments):
    """Runs tools/reproduce.py; returns its exit status and all that it printed."""
    monkeypatch.setenv('COCO_ROOT', 'elsewhere/')  # mmengine would log each use of it
    code, printed = run_tool('reproduce.py', monkeypatch, capsys, *arguments)
    return code, printed.out + printed.err


def test_table_8_is_measured_anew_for_other_rows_or_options(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    done = tmp_path / 'table8' / 'command.txt'
    done.parent.mkdir()
    asked = '--table', '8', '--dry-run', '--work-dir', str(tmp_path)
    done.write_text(reproduce(monkeypatch, capsys, *asked)[1].splitlines()[-1])
    for more, is_finished in (((), True), (('--rows', 'bn'), False), (('--cfg-options', 'a=1'), False)):
        text = reproduce(monkeypatch, capsys, *asked, *more)[1]
        assert ('tools/benchmark.py' not in text) == is_finished
    assert text.endswith('--cfg-options a=1\n')
    code, text = reproduce(monkeypatch, capsys, *asked, '--small')
    assert code and '--small must not be given for Table 8' in text


@pytest.mark.parametrize(
    ('number', 'small'),
    [
        *((number, []) for number in ('5', '6', '7', '8', 'figure3', 'figure5')),
        *((number, ['--small', '--gpus', '1']) for number in ('5', '6', '7', 'figure3', 'figure5')),
    ],
)
def test_a_dry_run_prints_commands_for_every_row_and_runs_nothing(number, small, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    work_dir = str(tmp_path / 'runs')
    code, text = reproduce(
        monkeypatch, capsys, '--table', number, '--trials', '2', '--dry-run', '--work-dir', work_dir, *small
    )
    assert code == 0 and not (tmp_path / 'runs').exists()
    commands = [line.split() for line in text.splitlines() if line[0] != '#']
    rows = [row for table in COCO if table.number == number for row in table.rows]
    if number == '8':
        ((program, tool, *arguments),) = commands
        assert (program, tool) == ('python', 'tools/benchmark.py')
        assert arguments == [*(f'configs/cbn/{row.config}.py' for row in rows), '--out', f'{work_dir}/table8']
        return
    assert len(commands) == len(rows) * 2 * 2
    for row in rows:
        for seed in (0, 1):
            mine = [line for line in commands if f'{work_dir}/{row.run}/seed-{seed}' in line]
            (training,) = mine
            (evaluation,) = [line for line in commands if f'{work_dir}/{row.run}/seed-{seed}/epoch_12.pth' in line]
            for command, tool in ((training, 'train'), (evaluation, 'test')):
                if small:
                    assert command[:4] == [
                        f'CBN_ROW={row.config}',
                        'python',
                        f'tools/{tool}.py',
                        'configs/small/r18_shapes.py',
                    ]
                else:
                    assert command[:2] == [f'tools/dist_{tool}.sh', f'configs/cbn/{row.config}.py']
                    assert command[2 + (tool == 'test')] == '4'
                assert command[-1] == f'randomness.seed={seed}'
                assert all(f'{key}={value}' in command for key, value in row.options.items())
            assert '--resume' in training and '--resume' not in evaluation


DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ('README.md', 'docs/*.md', 'configs/*/README.md')
    for path in ROOT.glob(pattern)
}
COMMAND = re.compile(r'^ *(?:\w+=\S+ )?python (tools/\w+\.py)((?:\\\n|[^#\n])*)', re.MULTILINE)


def commands_of_the_documents():
    """Tool and arguments of each command. Variables of the shell have the values that the same page gives them."""
    found = set()
    for text in DOCUMENTS.values():
        variables = dict(re.findall(r"^(\w+)='(.*)'$", text, re.MULTILINE))
        for tool, arguments in COMMAND.findall(text):
            found.add((tool, Template(arguments.replace('\\\n', ' ')).safe_substitute(variables).strip()))
    return sorted(found)


@pytest.mark.parametrize(
    'arguments', [arguments for tool, arguments in commands_of_the_documents() if tool == 'tools/reproduce.py']
)
def test_the_commands_of_the_documents_can_be_run(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, text = reproduce(monkeypatch, capsys, *arguments.split(), '--dry-run')
    assert code == 0 and ('tools/train.py ' if '--gpus 1' in arguments else '/tools/dist_train.sh ') in text


@pytest.mark.parametrize('tool', sorted({tool for tool, _ in commands_of_the_documents()}))
def test_the_tools_have_the_options_that_the_documents_use(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [tool, '--help'])
    with pytest.raises(SystemExit, match='0'):
        runpy.run_path(str(ROOT / tool), run_name='__main__')
    used = {o for other, a in commands_of_the_documents() if other == tool for o in re.findall(r'(?<!\S)--[a-z-]+', a)}
    assert used <= set(re.findall(r'--[a-z-]+', capsys.readouterr().out))


@pytest.mark.parametrize('name', DOCUMENTS)
def test_nothing_stands_beside_a_fence(name):
    fences = re.findall(r'^ *```(.*)$', DOCUMENTS[name], re.MULTILINE)
    assert fences[1::2] == [''] * (len(fences) // 2) and set(fences[::2]) <= {'shell', 'python', 'text', 'bibtex'}


@pytest.mark.parametrize(('table', 'folder'), [('5', 'paper'), ('study-rate', 'study')])
def test_the_paper_and_the_study_have_folders_of_their_own(table, folder, monkeypatch, capsys):
    code, text = reproduce(monkeypatch, capsys, '--table', table, '--gpus', '1', '--trials', '1', '--dry-run')
    work_dirs = re.findall(r'train\.py \S+ --work-dir (\S+?)/[^/]+/seed-0', text)
    assert code == 0 and set(work_dirs) == {f'work_dirs/{folder}'}


@pytest.mark.parametrize(('table', 'tool'), [('5', 'dist_train.sh'), ('study-rate', 'train.py')])
def test_the_paper_is_for_4_gpus_and_our_study_for_1(table, tool, monkeypatch, capsys):
    code, text = reproduce(monkeypatch, capsys, '--table', table, '--trials', '1', '--dry-run')
    assert code == 0 and set(re.findall(r'tools/(\w+\.\w+) \S+ (?:4 )?--work-dir \S+/seed-0 --resume', text)) == {tool}


def test_a_run_that_two_rows_share_is_made_once(tmp_path):
    setting = Setting(ROOT, tmp_path)
    trials = trials_of([row for table in COCO if table.number in '56' for row in table.rows], 1, setting)
    assert len(trials) == len({trial.work_dir for trial in trials}) == 10 + 12 - 3


def test_a_small_version_multiplies_its_own_images():
    row = next(row for row in FIGURE3.rows if row.name == 'bn-k4')
    setting = Setting(ROOT, Path('runs'))
    paper, small = (Trial(row._replace(small=name), 0, setting).options for name in (None, 'shapes'))
    assert paper[:2] == ['train_dataloader.batch_size=16', 'optim_wrapper.optimizer.lr=0.08']
    assert small[:2] == ['train_dataloader.batch_size=8', 'optim_wrapper.optimizer.lr=0.0016']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--table', '1'], "argument --table: invalid choice: '1'"),
        (['--table', '3', '--small'], '--small must be imagenette for row bn-32, got shapes'),
        (['--table', '4', '--small', 'imagenette'], '--small must not be given for row resnet50-bn-32, got imagenette'),
        (['--table', '6', '--small', 'facemask'], '--small must be shapes or coco128 for row mask-r50-gn, got'),
        (['--table', '5', '--rows', 'bn', 'cbn-head'], '--rows: bn not in the table; it has none, bn-head, '),
        (['--table', '5', '--gpus', '0'], '--gpus must be 1 or more, got 0'),
        (['--table', '5', '--trials', '-1'], '--trials must be 1 or more, got -1'),
        (['--table', '5', 'study-rate'], '--table must name tables of the paper or of our study, not of both'),
        (['--table', 'study-rate', '--small'], '--small: the tables of our study have no small versions'),
        (['--table', '5', '--cfg-options', 'a.b'], '--cfg-options must be KEY=VALUE, got a.b'),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    code, text = reproduce(monkeypatch, capsys, *arguments)
    assert code == 2 and message in text


def test_full_size_rows_are_not_trained_on_a_cpu_unasked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    code, text = reproduce(monkeypatch, capsys, '--table', '5')
    assert code == 2 and '--gpus: torch finds 0 GPUs here, got 4' in text


@pytest.mark.slow
def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    """Without any data each fails; both are tried, and the end says so."""
    environment = {**os.environ, 'SHAPES_ROOT': str(tmp_path / 'nowhere')}
    result = subprocess.run(
        [sys.executable, TOOL, *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    summary = result.stdout.partition('== Summary\n')[2].splitlines()
    assert len(summary) == 2
    for line, row in zip(summary, ROWS, strict=True):
        assert line.startswith(
            f'faster-rcnn_r50_fpn_{row}_1x_coco, seed 0: FAILED: training (exit status 1); logs in runs/'
        )


# -- one trial and what can happen to it


class Fake(Trial):
    """Commands that take no time: training leaves the pointer to a checkpoint, evaluation its metrics."""

    train = "import sys; open('epoch_12.pth', 'w'); open('last_checkpoint', 'w').write('/old/epoch_12.pth')"
    test = """import os; os.makedirs('test/now'); open('test/now/now.json', 'w').write('{"coco/bbox_mAP": 0.3}')"""

    def training(self):
        return [sys.executable, '-c', f'import os; os.chdir({str(self.work_dir)!r}); {self.train}']

    def evaluation(self):
        return [sys.executable, '-c', f'import os; os.chdir({str(self.work_dir)!r}); {self.test}']


@pytest.fixture
def fake(tmp_path):
    def make(kind=Fake, gpus=4, options=()):
        row = Row('name', ('label',), 'faster-rcnn_r50_fpn_bn-head_1x_coco', {})
        return kind(row, 0, Setting(ROOT, tmp_path, gpus, options))

    return make


def run(trial):
    steps = []
    return runs.run(trial, dict(os.environ), steps.append), [step.rpartition(' ')[2] for step in steps]


def test_each_step_is_made_once(fake):
    assert run(fake()) == ('finished', ['training', 'evaluation'])
    assert run(fake()) == ('was finished', [])


def test_a_failed_evaluation_does_not_train_again(fake):
    class Broken(Fake):
        test = 'raise SystemExit(3)'

    trial = fake(Broken)
    result, steps = run(trial)
    assert result == f'FAILED: evaluation (exit status 3); logs in {trial.work_dir}'
    assert steps == ['training', 'evaluation']
    assert run(fake()) == ('finished', ['evaluation'])


def test_a_command_that_leaves_nothing_is_a_failure(fake):
    class Idle(Fake):
        train = 'pass'

    assert run(fake(Idle))[0].startswith('FAILED: training (the command ended well, but left no result)')


@pytest.mark.parametrize(
    ('log', 'metrics', 'detected_nothing'),
    [(NOTHING_DETECTED, True, True), ('', True, False), (NOTHING_DETECTED, False, False)],
    ids=['complete', 'without any word on it', 'killed before its end'],
)
def test_an_evaluation_that_detects_nothing_is_one(fake, log, metrics, detected_nothing):
    class Blind(Fake):
        test = f"import os; os.makedirs('test/now'); open('test/now/now.log', 'w').write({log!r})"
        test += """; open('test/now/now.json', 'w').write('{"time": 0.3}')""" * metrics

    trial = fake(Blind)
    result, steps = run(trial)
    assert steps == ['training', 'evaluation']
    if detected_nothing:
        assert result == 'finished (nothing was detected: AP 0)'
        assert run(trial) == ('was finished (nothing was detected: AP 0)', [])
    else:
        assert result.startswith('FAILED: evaluation (the command ended well, but left no result)')


def test_an_evaluation_of_an_earlier_epoch_is_not_the_last(fake):
    trial = fake()
    run(trial)
    (trial.work_dir / 'epoch_9.pth').touch()
    (trial.work_dir / 'last_checkpoint').write_text('epoch_9.pth')
    shutil.move(trial.work_dir / 'test' / 'now', trial.work_dir / 'test' / 'earlier')
    assert run(fake())[1][0] == 'training'


def test_a_half_written_evaluation_is_made_again(fake):
    trial = fake()
    run(trial)
    (trial.work_dir / 'test' / 'now' / 'now.json').write_text('{"coco/bbox_mAP"')
    shutil.move(trial.work_dir / 'test' / 'now', trial.work_dir / 'test' / 'killed')
    assert run(fake()) == ('finished', ['evaluation'])


def test_training_meets_a_mended_pointer(fake):
    class Resuming(Fake):
        train = f"assert open('last_checkpoint').read().endswith('epoch_9.pth'); {Fake.train}"

    trial = fake(Resuming)
    trial.work_dir.mkdir(parents=True)
    (trial.work_dir / 'epoch_9.pth').touch()
    (trial.work_dir / 'last_checkpoint').touch()
    assert run(trial)[0] == 'finished'


@pytest.mark.parametrize('pointer', ['', '/moved/from/epoch_9.pth', 'epoch_11.pth'])
def test_a_pointer_to_nowhere_is_mended(fake, pointer):
    trial = fake()
    trial.work_dir.mkdir(parents=True)
    (trial.work_dir / 'last_checkpoint').write_text(pointer)
    trial.mend_pointer()
    assert not (trial.work_dir / 'last_checkpoint').exists(), 'there is nothing to resume from'

    for epoch in (9, 10):
        (trial.work_dir / f'epoch_{epoch}.pth').touch()
    (trial.work_dir / 'last_checkpoint').write_text(pointer)
    trial.mend_pointer()
    expected = 'epoch_9.pth' if 'epoch_9' in pointer else 'epoch_10.pth'
    assert (trial.work_dir / 'last_checkpoint').read_text() == str(trial.work_dir / expected)


@pytest.mark.parametrize('content', ['{"run"', '[]', '{}', '{"options": null}', '{"options": [1]}'])
def test_damaged_settings_are_named_and_stop_no_other_trial(fake, content):
    trial = fake()
    run(trial)
    (trial.work_dir / 'settings.json').write_text(content)
    result, steps = run(fake())
    assert steps == [] and re.match(r'NOT RUN: .*settings\.json, which has its settings, is damaged', result)


REFUSED = r'NOT RUN: it was begun with other settings \(.*settings.json has them\)'


def test_other_settings_are_refused(fake):
    run(fake())
    for others in (dict(gpus=2), dict(options=('optim_wrapper.optimizer.lr=0.01',))):
        result, steps = run(fake(**others))
        assert steps == [] and re.match(REFUSED, result)


def test_settings_that_do_not_decide_may_change(fake):
    """As what preflight.py advises where the disk is too small."""
    run(fake())
    of_hook = [f'custom_hooks.0.{name}=True' for name in ('save_window', 'diagnostics')]
    of_loader = 'train_dataloader.num_workers=8'
    harmless = ('default_hooks.checkpoint.max_keep_ckpts=2', of_loader, 'log_level=DEBUG', *of_hook)
    assert run(fake(options=harmless)) == ('was finished', [])


def test_a_trial_does_not_go_on_with_a_config_that_has_changed_meanwhile(fake):
    run(fake())
    file = fake().work_dir / 'settings.json'
    begun = json.loads(file.read_text())
    file.write_text(json.dumps({**begun, 'recipe': 'of then'}))
    assert re.match(REFUSED, run(fake())[0])
    del begun['recipe']  # as an older version wrote it
    file.write_text(json.dumps(begun))
    assert run(fake()) == ('was finished', [])


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_trial_is_held_as_long_as_its_command_runs(fake, tmp_path, number):
    """Told to end, it takes its command along. Killed outright it cannot, and the trial stays held."""
    trial = fake()
    script = tmp_path / 'script.py'
    script.write_text(
        'import os, sys\n'
        f'sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
        'from test_reproduce import *\n'
        'class Long(Fake):\n'
        '    train = \'import time; open("begun", "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "row = Row('name', ('label',), 'faster-rcnn_r50_fpn_bn-head_1x_coco', {})\n"
        f'run(Long(row, 0, Setting(Path({str(ROOT)!r}), Path({str(tmp_path)!r}))))\n'
    )
    process = subprocess.Popen([sys.executable, script])
    begun = trial.work_dir / 'begun'
    while not (begun.is_file() and begun.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    command = int(begun.read_text())
    assert run(trial) == ('NOT RUN: another process is at work on it', [])
    process.send_signal(number)
    process.wait(timeout=30)  # the command would take longer
    if number == signal.SIGKILL:
        assert run(trial) == ('NOT RUN: another process is at work on it', [])
        os.kill(command, signal.SIGKILL)
    else:
        assert not Path(f'/proc/{command}').exists()
    deadline = time.monotonic() + 30
    while not (result := run(trial))[1] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert result == ('finished', ['training', 'evaluation'])


def test_logs_of_what_is_no_row_are_left_out():
    runs = [run._replace(config='yolo') for run in as_in_the_paper(TABLE5.rows[0], [36.0])]
    assert logs.collect(TABLE5, runs, CONFIGS) == {}
