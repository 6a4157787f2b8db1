"""Our study compares normalizers and nothing else, its rows train, and its results can be stored and drawn anew."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from mmdet_cbn import CBN
from mmdet_cbn.experiments.analysis.gradients import GradientRatioHook
from mmdet_cbn.experiments.rows import logs
from mmdet_cbn.experiments.rows.logs import Run, collect, find_runs, store_runs
from mmdet_cbn.experiments.rows.report import markdown, overview, plot_figure, write_report
from mmdet_cbn.experiments.rows.runs import Setting, Trial, recipe_of, trials_of
from mmdet_cbn.experiments.rows.settings import settings_of
from mmdet_cbn.experiments.study import STUDY
from mmdet_cbn.experiments.study.fine_tuning import FINE_TUNING, FINE_TUNING_RATES
from mmdet_cbn.experiments.study.small_batches import (
    BURN_IN,
    GRADIENT,
    IMAGES,
    ORDER,
    PHOTOGRAPHS,
    PHOTOGRAPHS_FASTER,
    RATE,
    RUNNING,
    SGD,
    WINDOW,
)
from mmdet_cbn.window.size import suggested_window_size

CONFIGS = ROOT / 'configs'
METHODS = ['BN', 'GN', 'BRN', 'Naive CBN', 'CBN, gradient batch', 'CBN, 64 samples, gradient batch']
ROWS = {row.run: row for table in STUDY for row in table.rows}


def config_of(row):
    return recipe_of(row, CONFIGS)


def images_of(row):
    return config_of(row).train_dataloader.batch_size


def row_of(table, method, x):
    (row,) = (row for row in table.rows if row.labels == (method, x))
    return row


@pytest.mark.parametrize('images', [1, 2, 4])
def test_methods_differ_in_their_normalizers_only(images):
    methods = [row.labels[0] for row in IMAGES.rows if row.labels[1] == images]
    assert methods == METHODS + ['CBN, order 2, gradient batch'] * (images == 1) + ['CBN, gradient 0.25']
    settings = [settings_of(config_of(row_of(IMAGES, method, images))) for method in methods]
    of_norm = ('norm_cfg', 'custom_hooks')
    rest = [{k: v for k, v in each.items() if not any(word in k for word in of_norm)} for each in settings]
    assert all(each == rest[0] for each in rest) and rest[0]['train_dataloader.batch_size'] == images
    norms = [{k: v for k, v in each.items() if 'norm_cfg' in k} for each in settings]
    assert len({json.dumps(norm, sort_keys=True) for norm in norms}) == len(norms)
    assert all(norm['model.backbone.norm_cfg.type'] == norm['model.neck.norm_cfg.type'] for norm in norms)


def test_the_learning_rate_grows_with_the_root_of_the_images():
    rates = {images_of(row): config_of(row).optim_wrapper.optimizer.lr for row in IMAGES.rows}
    assert rates == pytest.approx({1: 0.001, 2: 0.001414, 4: 0.002, 8: 0.002828, 16: 0.004}, abs=1e-6)
    for images, values in ((1, (0.5, 1, 2, 4)), (4, (0.5, 1, 2))):
        for method in (f'BN, {of(images)}', f'CBN, gradient batch, {of(images)}'):
            factors = [config_of(row_of(RATE, method, x)).optim_wrapper.optimizer.lr / rates[images] for x in values]
            assert factors == pytest.approx(values)


def of(images):
    return {1: '1 image', 4: '4 images'}[images]


def test_each_table_varies_what_it_says():
    assert all(row.labels[0].endswith(of(images_of(row))) for row in (*BURN_IN.rows, *RATE.rows))
    for row in WINDOW.rows:
        method, k = row.labels
        if method == 'BN':
            assert images_of(row) == k
        else:
            norm = config_of(row).model.neck.norm_cfg
            assert method.endswith(of(images_of(row))) and norm.get('order', 1) == ('Naive' not in method)
            assert (suggested_window_size(images_of(row)) if norm.window_size == 'auto' else norm.window_size) == k
    for row in BURN_IN.rows:
        config = config_of(row)
        if row.labels[0].startswith('BN'):
            assert row.labels[1] == config.train_cfg.max_epochs
        else:
            assert row.labels[1] == config.custom_hooks[0].burn_in_epochs
    for row in RUNNING.rows:
        norm = config_of(row).model.backbone.norm_cfg
        assert (norm.get('running_stats') == 'batch') == ('of the batch' in row.labels[0])
        assert norm.get('momentum', 0.1) == (0.01 if 'momentum 0.01' in row.labels[0] else 0.1)


@pytest.mark.parametrize('table', [GRADIENT, ORDER, PHOTOGRAPHS, PHOTOGRAPHS_FASTER], ids=lambda table: table.name)
def test_gradients_are_compared_with_all_else_equal(table):
    batch = next(row for row in table.rows if 'gradient batch' in row.labels[0] and row.labels[1] == 4)
    reference = settings_of(config_of(batch))
    for row in table.rows:
        method, images = row.labels
        config = config_of(row)
        if 'burn-in' in method:
            assert config.custom_hooks[0].burn_in_epochs == int(method.rpartition(' ')[2])
        if 'gradient' in method and 'CBN' in method:
            assert f'gradient {config.model.neck.norm_cfg.get("gradient", "batch")}' in method
        if method.startswith('no drift'):
            assert config.custom_hooks[0].gradient == ('whole gradient' in method)
        norms = {json.dumps(norm, sort_keys=True) for norm in norms_of(config)}
        assert len(norms) == 1
        if images == 4:
            changed = {key for key, value in settings_of(config).items() if reference.get(key) != value}
            changed -= {key for key in changed if 'norm_cfg' in key or key.startswith('custom_')}
            if 'as many updates' in method:
                short = config_of(next(row for row in table.rows if row.labels == ('BN', 4)))
                iters = [each.train_cfg.max_epochs / images_of(row) for each, row in ((config, row), (short, batch))]
                assert iters[0] == iters[1] and images_of(row) == 16
                ends = [
                    [schedule.end / c.train_cfg.max_epochs for schedule in c.param_scheduler] for c in (config, short)
                ]
                assert ends[0] == ends[1]
            else:
                assert not changed


def test_fine_tuning_differs_in_normalizers_and_images_only():
    reference = settings_of(config_of(row_of(FINE_TUNING, 'BN, everywhere', 4)))
    for row in FINE_TUNING.rows:
        method, images = row.labels
        config = config_of(row)
        optimizer = dict(type='SGD', lr=0.005 * images, momentum=0.9, weight_decay=0.0001)
        assert config.optim_wrapper.optimizer == optimizer and images_of(row) == images
        allowed = ('norm', 'custom_hooks', 'batch_size', 'optimizer.lr', 'init_cfg.checkpoint')
        changed = {key for key, value in settings_of(config).items() if reference.get(key) != value}
        assert all(any(word in key for word in allowed) for key in changed), method
        assert ('init_cfg.checkpoint' in ' '.join(changed)) == method.startswith('GN, everywhere')
        hooks = [hook.type for hook in config.get('custom_hooks', [])]
        assert hooks == ['CBNBurnInHook'] * ('CBN' in method) + ['PopulationStatisticsHook'] * ('population' in method)
        norm = config.model.neck.get('norm_cfg')
        if 'CBN' in method:
            assert norm.window_size == suggested_window_size(images)
            assert 'gradient' not in method or f'gradient {norm.gradient}' in method
            assert ('Naive' in method, '64' in method) == (norm.get('order') == 0, norm.get('samples') == 64)


def test_fine_tuning_at_other_rates_differs_in_these_only():
    for row in FINE_TUNING_RATES.rows:
        method, rate = row.labels
        same = row_of(FINE_TUNING, method, 2)
        assert (row.run == same.run) == (rate == 4)
        config, reference = settings_of(config_of(row)), settings_of(config_of(same))
        assert config.pop('optim_wrapper.optimizer.lr') == pytest.approx(0.0025 * rate)
        reference.pop('optim_wrapper.optimizer.lr')
        assert config == reference


def test_sgd_is_as_in_the_paper_and_the_window_alone_varies():
    reference = settings_of(config_of(row_of(SGD, 'CBN, gradient batch', 4)))
    for row in SGD.rows:
        method, k = row.labels
        config = config_of(row)
        optimizer = dict(type='SGD', lr=0.0025 * images_of(row), momentum=0.9, weight_decay=0.0001)
        assert config.optim_wrapper.optimizer == optimizer
        if method == 'BN':
            assert images_of(row) == k
            continue
        changed = {key for key, value in settings_of(config).items() if reference.get(key) != value}
        assert images_of(row) == 4 and config.model.neck.norm_cfg.window_size == k
        assert all('norm_cfg' in key for key in changed)


def norms_of(config):
    parts = [config.model.backbone, config.model.neck]
    parts += [config.model.roi_head.bbox_head] if 'roi_head' in config.model else []
    return [part.norm_cfg for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize('whole', [False, True])
def test_earlier_images_run_again(whole, build_runner, varied_root, monkeypatch):
    monkeypatch.setenv('VARIED_ROOT', str(varied_root))
    row = row_of(GRADIENT, f'no drift, {"whole gradient, " * whole}burn-in 0', 4)
    options = {'train_dataloader.batch_size': 1, 'train_cfg.max_epochs': 1, 'param_scheduler': []}
    runner = build_runner(row.file, **{**row.options, **options})
    images = []
    runner.model.backbone.register_forward_hook(lambda backbone, args, outputs: images.append(len(outputs[0])))
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert images[: runner.iter] == [min(iteration + 1, 8) for iteration in range(runner.iter)]
    assert images[runner.iter :] and max(images[runner.iter :]) <= 16, 'those of evaluation alone'


def test_a_run_that_tables_share_is_made_once(tmp_path):
    rows = [row for table in STUDY for row in table.rows]
    assert len(rows) > len(ROWS) == len(trials_of(rows, 1, Setting(ROOT, tmp_path)))
    for row in rows:
        assert settings_of(config_of(row)) == settings_of(config_of(ROWS[row.run])), row.run


def test_commands_name_the_studys_configs(tmp_path):
    trial = Trial(row_of(IMAGES, 'CBN, gradient batch', 2), 1, Setting(ROOT, tmp_path, gpus=1))
    assert trial.training()[:2] == ['python', str(ROOT / 'tools/train.py')]
    assert trial.training()[2] == str(CONFIGS / 'study/retinanet_r18_fpn_cbn_varied.py')
    assert trial.options[-1] == 'randomness.seed=1' and 'train_dataloader.batch_size=2' in trial.options


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.slow
def test_each_method_trains(method, build_runner, varied_root, monkeypatch):
    monkeypatch.setenv('VARIED_ROOT', str(varied_root))
    row = row_of(IMAGES, method, 2)
    options = {**row.options, 'train_cfg.max_epochs': 1, 'param_scheduler': []}
    if 'CBN' in method:
        options['custom_hooks.0.burn_in_epochs'] = 0
    runner = build_runner(row.file, evaluate=False, **options)
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current()) and runner.epoch == 1
    if 'CBN' in method:
        layers = [module for module in runner.model.modules() if isinstance(module, CBN)]
        order, samples = (0 if 'Naive' in method else 1), (64 if '64' in method else None)
        assert len(layers) == 26
        assert {(layer.order, layer.samples, layer.window_size) for layer in layers} == {(order, samples, 8)}


@pytest.mark.slow
def test_a_plain_resnet_trains_and_is_looked_at(build_runner, varied_root, monkeypatch):
    monkeypatch.setenv('VARIED_ROOT', str(varied_root))
    options = {'train_cfg.max_epochs': 1, 'param_scheduler': [], 'custom_hooks.0.burn_in_epochs': 0}
    runner = build_runner('study/resnet18_cbn_varied.py', evaluate=False, **options)
    hook = GradientRatioHook(every=2, draws=1)
    runner.register_hook(hook)
    runner.train()
    assert 0 < runner.message_hub.get_scalar('train/loss').current() < 2
    assert len({ratio.layer for ratio in hook.ratios}) == 20 - 1, 'all but the first have one before them'
    with pytest.raises(NotImplementedError, match="mode must be 'loss', got 'predict'"):
        runner.model(torch.zeros(1, 3, 32, 32), [], mode='predict')


# -- the report


def runs_of(row, aps):
    settings = {**settings_of(config_of(row)), 'GPUs': 1}
    return [
        Run(Path(f'runs/{row.run}/seed-{n}'), row.config, row.run, settings, {8: {'bbox_mAP': ap}}, {'bbox_mAP': ap}, 8)
        for n, ap in enumerate(aps)
    ]


@pytest.fixture
def runs():
    return runs_of(row_of(IMAGES, 'BN', 1), [5.0, 7.0]) + runs_of(row_of(IMAGES, 'CBN, gradient batch', 1), [20.0])


def test_the_table_has_our_numbers_and_what_is_missing(runs):
    text = markdown(IMAGES, collect(IMAGES, runs, CONFIGS), trials=2)
    assert '| method | images per step | box AP | box AP50 | box AP75 | box APs | box APm | trials |' in text
    assert (
        '| BN | 1 | 6.0 ± 1.4 | - | - | - | - | 2 |' in text
        and '| CBN, gradient batch | 1 | 20.0 | - | - | - | - | 1 |' in text
    )
    missing = text[text.index('Planned, but not trained yet: ') :]
    assert missing.count(';') == len(IMAGES.rows) - 2 - 1
    assert '; GN (images per step: 2); ' in missing and '; BN (images per step: 1)' not in missing


def test_the_overview_has_a_column_for_each_number_of_images(runs):
    text = overview(IMAGES, collect(IMAGES, runs, CONFIGS), trials=2)
    assert '| method | 1 | 2 | 4 | 8 | 16 |' in text
    assert '| BN | 6.0 ± 1.4 |  |  |  |  |' in text and '| CBN, gradient batch | 20.0 (1 trial) |  |  |  |  |' in text
    assert 'mean ± deviation of 2 trials. Columns: images per step. An empty cell was not trained.' in text
    everything = [run for row in PHOTOGRAPHS.rows for run in runs_of(row, [1.0])]
    text = overview(PHOTOGRAPHS, collect(PHOTOGRAPHS, everything, CONFIGS), trials=1)
    assert 'not trained' not in text


def test_runs_with_other_settings_are_not_the_studys(runs):
    changed = [run._replace(settings={**run.settings, 'model.neck.norm_cfg.type': 'LN'}) for run in runs]
    text = markdown(IMAGES, collect(IMAGES, changed, CONFIGS))
    missing = text[text.index('Planned, but not trained yet: ') :]
    assert '| BN | 1 |' not in text and missing.count(';') == len(IMAGES.rows) - 1


def test_the_plot_has_a_line_a_method(runs):
    axes = plot_figure(IMAGES, collect(IMAGES, runs, CONFIGS)).axes[0]
    assert [line.get_label() for line in axes.containers] == ['BN', 'CBN, gradient batch']
    assert axes.get_xscale() == 'log' and [*axes.containers[0].lines[0].get_ydata()] == [6.0]
    assert not any('paper' in text.get_text() for text in axes.get_legend().get_texts())


def test_in_a_plot_of_many_methods_a_single_point_is_left_out():
    everything = [run for row in IMAGES.rows for run in runs_of(row, [1.0])]
    axes = plot_figure(IMAGES, collect(IMAGES, everything, CONFIGS)).axes[0]
    methods = dict.fromkeys(row.labels[0] for row in IMAGES.rows)
    assert [line.get_label() for line in axes.containers] == [
        method for method in methods if method != 'CBN, order 2, gradient batch'
    ]
    everything = [run for row in PHOTOGRAPHS_FASTER.rows for run in runs_of(row, [1.0])]
    axes = plot_figure(PHOTOGRAPHS_FASTER, collect(PHOTOGRAPHS_FASTER, everything, CONFIGS)).axes[0]
    assert len(axes.containers) == len(PHOTOGRAPHS_FASTER.rows) == 6, 'few'


def test_what_is_stored_is_what_the_logs_told(runs, tmp_path):
    store_runs(runs, tmp_path / 'runs.json')
    again = find_runs([tmp_path / 'runs.json'])
    assert again == [run._replace(work_dir=run.work_dir.relative_to('runs')) for run in runs]
    assert len((tmp_path / 'runs.json').read_text()) < 2 * len(json.dumps(runs[0].settings)), 'once, not three times'


def test_a_trial_that_is_stored_twice_counts_once(runs, tmp_path):
    for name, some in (('a', runs), ('b', runs[1:])):
        store_runs(some, tmp_path / f'{name}.json')
    both = find_runs([tmp_path / 'a.json', tmp_path / 'b.json'])
    assert both == find_runs([tmp_path / 'a.json'])
    unfinished = [run._replace(metrics={}) for run in runs]
    store_runs(unfinished, tmp_path / 'b.json')
    assert find_runs([tmp_path / 'a.json', tmp_path / 'b.json']) == both, 'the finished one'


def test_trainings_of_a_row_with_other_settings_are_told_apart(runs, tmp_path):
    """As a row's own training and that of its small version, which have the same name."""
    for name, lr in (('paper', 0.1), ('small', 0.2)):
        store_runs([run._replace(settings={**run.settings, 'lr': lr}) for run in runs], tmp_path / f'{name}.json')
    assert len(find_runs([tmp_path / 'paper.json', tmp_path / 'small.json'])) == 2 * len(runs)


def test_a_run_in_a_file_and_in_its_folder_counts_once(runs, tmp_path, monkeypatch):
    """Also one of tools/train.py alone, which has no name. Others may be in folders of the same name."""
    paths = [tmp_path / name / 'bn' / 'seed-0' for name in ('here', 'there')]
    for path in paths:
        (path / 'time' / 'vis_data').mkdir(parents=True)
        (path / 'time' / 'vis_data' / 'scalars.json').touch()
    monkeypatch.setattr(logs, 'read_run', lambda work_dir: runs[0]._replace(name=None, work_dir=work_dir))
    store_runs(find_runs(paths[:1]), tmp_path / 'runs.json')
    assert len(find_runs([tmp_path / 'runs.json', paths[0]])) == 1
    assert len(find_runs(paths)) == 2


def test_a_report_can_be_made_of_a_stored_one(runs, tmp_path, monkeypatch, capsys):
    first = write_report(runs, tmp_path / 'first', CONFIGS, 2, [IMAGES])
    arguments = [str(tmp_path / 'first/runs.json'), '--table', 'study-images', '--trials', '2']
    monkeypatch.setattr(sys, 'argv', ['report.py', *arguments, '--out', str(tmp_path / 'again')])
    runpy.run_path(str(ROOT / 'tools' / 'report.py'), run_name='__main__')
    assert capsys.readouterr().out.splitlines()[-4:] == [str(tmp_path / 'again' / file.name) for file in first]
    for file in first:
        assert (tmp_path / 'again' / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize('content', ['{"settings"', '{"runs": []}', '{"settings": {}, "runs": [{}]}', '[]'])
def test_a_damaged_store_is_named(content, tmp_path):
    (tmp_path / 'runs.json').write_text(content)
    if content == '{"runs": []}':
        assert find_runs([tmp_path / 'runs.json']) == []
        return
    with pytest.raises(RuntimeError, match=r'runs\.json is not what tools/report\.py writes'):
        find_runs([tmp_path / 'runs.json'])


@pytest.mark.parametrize('page', ['docs/results.md', 'docs/fine-tuning.md', 'docs/classification.md'])
def test_the_tables_of_the_pages_are_those_of_the_stored_runs(page, tmp_path, monkeypatch):
    docs = ROOT / 'docs'
    copy = tmp_path / 'page.md'
    text = (ROOT / page).read_text()
    copy.write_text(re.sub(r'(<!-- study\S+ -->\n).*?(<!-- end)', r'\1\2', text, flags=re.DOTALL))
    assert len(copy.read_text()) < len(text) - 500
    tables = [table.number for table in STUDY]
    arguments = [str(docs / 'results/study/runs.json'), '--table', *tables, '--trials', '3', '--readme', str(copy)]
    monkeypatch.setattr(sys, 'argv', ['report.py', *arguments])
    runpy.run_path(str(ROOT / 'tools' / 'report.py'), run_name='__main__')
    assert copy.read_text() == text
