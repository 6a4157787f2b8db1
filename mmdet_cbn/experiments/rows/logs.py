"""Reads runs from mmengine's logs, and finds the rows of the paper that they belong to."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from ...errors import errors_name_file
from ..configs import dicts_in
from .runs import NOTHING_DETECTED, SETTINGS, evaluations, recipe_of
from .settings import settings_of
from .table import BOX, Table


class Run(NamedTuple):
    """One training, read from its logs."""

    work_dir: Path
    config: str  #: name of its config, or of the config whose small version it is
    name: str | None  #: of the row's run, by tools/reproduce.py; None by train.py alone
    settings: dict[str, Any]  #: what decides on the result, by dotted key; with the number of GPUs
    curve: dict[int, dict[str, float]]  #: metrics by epochs trained, APs in percent
    metrics: dict[str, float]  #: of the last epoch; empty while it has not been evaluated
    epochs: int  #: of the whole training
    nothing_detected: bool = False  #: by the last epoch: then its APs are 0, without mmdet having given any


class Entry(NamedTuple):
    """Our trials of a row with the same settings."""

    runs: list[Run]
    differences: tuple[str, ...]  #: settings that are not the paper's, or not our study's

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.metrics]


def find_runs(places: Iterable[Path]) -> list[Run]:
    """Find all trainings by epochs with logs under the folders, and all that :func:`store_runs` wrote to the files.

    A run that is found twice, as in a file and in its folder, counts once: of the same row with the same settings and
    seed.

    Raises:
        RuntimeError: A file is not what mmengine, tools/reproduce.py or :func:`store_runs` writes.
    """
    stored: list[Run] = []
    work_dirs = set()
    for place in places:
        if Path(place).is_file():
            stored += _stored_runs(place)
        else:
            work_dirs |= {file.parents[2] for file in Path(place).rglob('vis_data/scalars.json')}
    trials: dict[Any, Run] = {}
    in_files = {run.work_dir for run in stored}
    for run in [*stored, *filter(None, map(read_run, sorted(work_dirs)))]:
        trial: Any = run.name, run.work_dir.name, json.dumps(run.settings, sort_keys=True)
        if run.name is None:
            trial = short if (short := _short(run.work_dir)) in in_files else run.work_dir
        if trial not in trials or run.metrics:
            trials[trial] = run
    return list(trials.values())


def _short(work_dir: Path) -> Path:
    """What a file of :func:`store_runs` names of a folder."""
    return Path(work_dir.parent.name, work_dir.name)


def store_runs(runs: Iterable[Run], file: Path) -> None:
    """Write the runs to one small file. Settings that all runs share are written once."""
    runs = list(runs)
    shared = dict(set.intersection(*({(key, json.dumps(v)) for key, v in run.settings.items()} for run in runs)))
    lines = [
        json.dumps(
            {
                **run._asdict(),
                'work_dir': str(_short(run.work_dir)),
                'settings': {key: value for key, value in sorted(run.settings.items()) if key not in shared},
            }
        )
        for run in runs
    ]
    settings = json.dumps({key: json.loads(value) for key, value in sorted(shared.items())})
    run_lines = ',\n'.join(lines)
    file.write_text(f'{{"settings": {settings},\n"runs": [\n{run_lines}\n]}}\n')


def _stored_runs(file: Path) -> list[Run]:
    with errors_name_file(file, 'is not what tools/report.py writes'):
        stored = json.loads(file.read_text())
        return [
            Run(
                **{
                    **run,
                    'work_dir': Path(run['work_dir']),
                    'settings': {**stored['settings'], **run['settings']},
                    'curve': {int(epoch): metrics for epoch, metrics in run['curve'].items()},
                }
            )
            for run in stored['runs']
        ]


def read_run(work_dir: Path) -> Run | None:
    """Read the logs of a work_dir of mmdet's tools/train.py, resumed or not; None of a training that counts iterations.

    Its config is run as Python, as mmengine does it. A training that began anew in the same folder takes the place of
    the one before.

    Raises:
        RuntimeError: A file is not what mmengine or tools/reproduce.py writes.
    """
    with errors_name_file(work_dir, 'has no logs of a training'):
        return _read_run(work_dir)


def _read_run(work_dir: Path) -> Run | None:
    curve: dict[int, dict[str, float]] = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):  # in the order of time
        with errors_name_file(file, 'is no log of mmengine'):
            lines = file.read_text().splitlines(keepends=True)
            log = ''.join(log.read_text() for log in file.parents[1].glob('*.log'))
            if any('"loss"' in line for line in lines):  # a training, and no evaluation
                resumed = max((int(epoch) for epoch in _RESUMED.findall(log)), default=0)
                curve = {epoch: metrics for epoch, metrics in curve.items() if epoch <= resumed}
            for line in lines:
                if '_mAP' not in line and 'accuracy/' not in line:
                    continue
                try:
                    logged = json.loads(line)
                except ValueError:
                    if line.endswith('\n'):
                        raise
                    continue  # killed while it was written
                if metrics := _percent(logged):
                    curve[logged['step']] = metrics
        curve |= {int(epoch): {} for epoch in _VALIDATED_NOTHING.findall(log)}
    # The last run of several, but for one that was killed as it wrote its config.
    for newest in sorted(work_dir.glob('*/vis_data/config.py'), reverse=True):
        with errors_name_file(newest, 'is no config of mmengine'):
            config = Config.fromfile(newest)
        if 'train_cfg' in config:
            break
    else:
        raise ValueError('it has no whole config')
    epochs = config.train_cfg.get('max_epochs')
    if epochs is None:
        return None
    tested = evaluations(work_dir)
    nothing_detected = not tested[-1] if tested else curve.get(epochs) == {}
    zeros = dict.fromkeys(_names_of_aps(config), 0.0)
    curve = {epoch: metrics or zeros for epoch, metrics in curve.items()}
    metrics = zeros if nothing_detected else _percent(tested[-1]) if tested else curve.get(epochs, {})
    gpus = [int(found) for file in newest.parents[1].glob('*.log') for found in _GPUS.findall(file.read_text())]
    name = config.get('row') or next(work_dir.glob('*.py')).stem
    reproduced = work_dir / SETTINGS
    with errors_name_file(reproduced, 'is not what tools/reproduce.py writes'):
        row_run = json.loads(reproduced.read_text())['run'] if reproduced.is_file() else None
    settings = {**settings_of(config), 'GPUs': gpus[-1]}
    return Run(work_dir, name, row_run, settings, curve, metrics, epochs, nothing_detected)


_RESUMED = re.compile(r'resumed epoch: (\d+)')
_GPUS = re.compile(r'GPU number: (\d+)')
# The next line on a whole validation names the epoch. There is none if it was killed before.
_VALIDATED_NOTHING = re.compile(rf'{re.escape(NOTHING_DETECTED)}$.*?Epoch\(val\) +\[(\d+)\]', re.DOTALL | re.MULTILINE)


def _names_of_aps(config: Config) -> list[str]:
    """Names of the APs that the config's validation logs if something is detected."""
    metrics = [evaluator.get('metric', 'bbox') for evaluator in dicts_in(config.get('val_evaluator'))]
    kinds = [kind for metric in metrics for kind in ([metric] if isinstance(metric, str) else metric)]
    return [name.replace('bbox', kind) for kind in kinds for name in BOX]


def _percent(line: Mapping[str, Any]) -> dict[str, float]:
    """The APs and accuracies of a log line, in percent. COCO's -1 (no object of that size) is left out."""
    percent = {'_mAP': 100, 'accuracy/': 1}
    return {
        key.rpartition('/')[2]: factor * value
        for key, value in line.items()
        for part, factor in percent.items()
        if part in key and isinstance(value, int | float) and value >= 0
    }


def collect(table: Table, runs: Iterable[Run], configs: Path) -> dict[str, list[Entry]]:
    """Our trials of each row of a table, by the name of the row. Trials with the paper's settings come first.

    A run of tools/reproduce.py knows its row. Another belongs to the rows of its config; among these, to the one whose
    options it has.

    Args:
        table: A table or figure of the paper.
        runs: What was trained.
        configs: The folder of the configs.
    """
    found: dict[str, dict[tuple[str, ...], list[Run]]] = defaultdict(lambda: defaultdict(list))
    recipes: dict[str, dict[str, Any]] = {}  # settings by row, which all of its trials share
    for run in runs:
        rows = [row for row in table.rows if (row.config if run.name is None else row.run) == (run.name or run.config)]
        for row in rows:
            if row.name not in recipes:
                recipes[row.name] = {**settings_of(recipe_of(row, configs)), 'GPUs': table.gpus}
        candidates = {row.name: _differences(run.settings, recipes[row.name]) for row in rows}
        if not candidates:
            continue
        name, differences = min(candidates.items(), key=lambda item: len(item[1]))
        found[name][differences].append(run)
    return {
        name: [Entry(group, differences) for differences, group in sorted(entries.items(), key=lambda e: len(e[0]))]
        for name, entries in found.items()
    }


def _differences(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f'{key} = {settings.get(key)} ({recipe.get(key)})'
        for key in sorted(recipe.keys() | settings.keys())
        if settings.get(key) != recipe.get(key)
    )
