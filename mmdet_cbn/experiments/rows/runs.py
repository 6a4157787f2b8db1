"""Trains and evaluates rows of the paper's tables: makes the commands, and skips what has been run already."""

import copy
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from mmengine.config import Config

from ...openmmlab.checkpoints import find_latest_checkpoint, whole_file
from .settings import decides, settings_of
from .table import Row

SETTINGS = 'settings.json'  # in the folder of a trial
# What mmdet's CocoMetric logs where the model detected nothing at all. It gives no metrics then.
NOTHING_DETECTED = 'The testing results of the whole dataset is empty.'


class SettingsChanged(RuntimeError):
    """A trial was begun with other settings than the current ones."""


class RunsElsewhere(RuntimeError):
    """Another process works on the trial."""


@dataclass(frozen=True)
class Setting:
    """What all trials of one call of tools/reproduce.py share.

    Args:
        root: The folder that holds ``configs`` and ``tools``.
        work_dir: The folder for the runs.
        gpus: Number of GPUs. With 1, train.py runs without a launcher, and on the CPU if there is no GPU.
        options: Further --cfg-options, as on the command line.
    """

    root: Path
    work_dir: Path
    gpus: int = 4
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One training of a row with one seed, and its evaluation. It has its own folder."""

    row: Row
    seed: int
    setting: Setting

    def __str__(self) -> str:
        return f'{self.row.run}, seed {self.seed}'

    @property
    def work_dir(self) -> Path:
        return self.setting.work_dir / self.row.run / f'seed-{self.seed}'

    @property
    def config(self) -> Path:
        return self.setting.root / 'configs' / self.row.file

    @property
    def options(self) -> list[str]:
        """--cfg-options. Those of the setting come last and win."""
        return [
            *(f'{key}={value}' for key, value in self.row.options_for(load(self.row, self.config.parents[1])).items()),
            f'randomness.seed={self.seed}',
            *self.setting.options,
        ]

    def training(self) -> list[str]:
        """The command that trains. It resumes from the last checkpoint if there is one."""
        return self._command('train', self.work_dir, '--resume')

    def evaluation(self) -> list[str]:
        """The command that evaluates the last checkpoint."""
        return self._command('test', self.work_dir / 'test', checkpoint=str(self.last_checkpoint()))

    def _command(self, tool: str, work_dir: Path, *flags: str, checkpoint: str | None = None) -> list[str]:
        tools, config = self.setting.root / 'tools', str(self.config)
        what = [config] if checkpoint is None else [config, checkpoint]
        if self.setting.gpus > 1:
            start = [str(tools / f'dist_{tool}.sh'), *what, str(self.setting.gpus)]
        else:
            start = ['python', str(tools / f'{tool}.py'), *what]
        return [*start, '--work-dir', str(work_dir), *flags, '--cfg-options', *self.options]

    def _recipe(self) -> str:
        """Tells whether the config that is now under this name is the one that the trial began with."""
        settings = settings_of(recipe_of(self.row, self.config.parents[1]))
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def last_checkpoint(self) -> Path:
        """Path of the last epoch's checkpoint, which may not exist yet."""
        config = load(self.row, self.config.parents[1]).copy()
        config.merge_from_dict(dict(option.split('=', 1) for option in self.options))
        return self.work_dir / f'epoch_{config.train_cfg.max_epochs}.pth'

    def mend_pointer(self) -> None:
        """Let ``last_checkpoint`` name a file of this folder, after it was moved or a run killed just then."""
        pointer = self.work_dir / 'last_checkpoint'
        if not pointer.is_file():
            return
        latest = find_latest_checkpoint(str(self.work_dir))
        if latest is None:
            pointer.unlink()
        else:
            pointer.write_text(latest)

    def is_trained(self) -> bool:
        # mmengine names a checkpoint there only when it has been written whole.
        pointer = self.work_dir / 'last_checkpoint'
        return pointer.is_file() and Path(pointer.read_text().strip()).name == self.last_checkpoint().name

    def is_evaluated(self) -> bool:
        return self.is_trained() and bool(evaluations(self.work_dir))

    @contextmanager
    def hold(self) -> Iterator[int]:
        """Lock the trial's folder against other processes, and yield the descriptor of the lock.

        Raises:
            RunsElsewhere: Another process holds it.
            SettingsChanged: The trial was begun with other settings.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        with open(self.work_dir / 'lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunsElsewhere('another process is at work on it') from None
            self._keep_settings()
            yield lock.fileno()

    def _keep_settings(self) -> None:
        file = self.work_dir / SETTINGS
        settings: dict[str, Any] = {
            'run': self.row.run,
            'config': self.config.name,
            'gpus': self.setting.gpus,
            'options': self.options,
            'recipe': self._recipe(),
        }
        if not file.exists():
            with whole_file(str(file)) as path:
                Path(path).write_text(json.dumps(settings, indent=2))
            return
        try:
            begun = _comparable(json.loads(file.read_text()))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise SettingsChanged(f'{file}, which has its settings, is damaged ({error})') from error
        settings = _comparable(settings)
        if {**settings, **begun} != settings:  # an older file has no recipe
            raise SettingsChanged(
                f'it was begun with other settings ({file} has them); go on with those, or give another --work-dir'
            )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial without the options that do not decide on the result."""
    return {**settings, 'options': [each for each in settings['options'] if decides(each.partition('=')[0])]}


def recipe_of(row: Row, configs: Path) -> Config:
    """The config of a row, or of its small version, with the row's options."""
    config = load(row, configs)
    recipe = copy.deepcopy(config)
    recipe.merge_from_dict(row.options_for(config))
    return recipe


def load(row: Row, configs: Path) -> Config:
    """The config of a row, or of its small version, in the folder ``configs``. It is cached: do not change it."""
    roots = {key: value for key, value in os.environ.items() if key.endswith('_ROOT')}  # configs use these
    return _load(configs / row.file, tuple({**roots, **row.environment}.items()))


@cache
def _load(config: Path, environment: tuple[tuple[str, str], ...]) -> Config:
    with mock.patch.dict(os.environ, environment):
        return Config.fromfile(config)


def evaluations(work_dir: Path) -> list[dict[str, Any]]:
    """The metrics that tools/test.py wrote under ``work_dir``/test, oldest first; none where it detected nothing.

    mmengine writes the file when the evaluation is complete: one that failed or was killed before has none.
    """
    found = []
    for file in sorted(work_dir.glob('test/*/*.json')):
        try:
            metrics = json.loads(file.read_text())
        except ValueError:  # killed while it was written
            continue
        if not isinstance(metrics, dict):
            continue
        if any(key.endswith('_mAP') or key.startswith('accuracy/') for key in metrics):
            found.append(metrics)
        elif (log := file.with_suffix('.log')).is_file() and NOTHING_DETECTED in log.read_text():
            found.append({})
    return found


def trials_of(rows: Iterable[Row], trials: int, setting: Setting) -> list[Trial]:
    """All trials of the rows, seed by seed. A run that several rows share comes once."""
    runs = {row.run: row for row in rows}
    return [Trial(row, seed, setting) for seed in range(trials) for row in runs.values()]


def describe(trial: Trial) -> list[str]:
    """The commands of a trial, as lines of a shell script."""
    lines = [f'# {trial}']
    if trial.is_evaluated():
        return [f'{lines[0]}: finished']
    variables = [f'{name}={shlex.quote(value)}' for name, value in trial.row.environment.items()]
    commands = [trial.evaluation()] if trial.is_trained() else [trial.training(), trial.evaluation()]
    return lines + [' '.join([*variables, shlex.join(command)]) for command in commands]


def run(trial: Trial, environment: dict[str, str], announce: Callable[[str], None]) -> str:
    """Train and evaluate a trial, as far as that is not done yet.

    Args:
        trial: The trial.
        environment: Of the commands, as ``os.environ``.
        announce: Called with a line of text before each step.

    Returns:
        What became of it: ``'finished'`` or ``'was finished'``, where it detected nothing with a word on that; or what
        went wrong, which begins with ``'FAILED'`` or ``'NOT RUN'``.
    """
    try:
        with trial.hold() as lock:
            if trial.is_evaluated():
                return f'was finished{_word_on_nothing(trial)}'
            trial.mend_pointer()
            steps: list[tuple[str, Callable[[], list[str]], Callable[[], bool]]] = [
                ('training', trial.training, trial.is_trained),
                ('evaluation', trial.evaluation, trial.is_evaluated),
            ]
            for name, command, is_done in steps:
                if is_done():
                    continue
                announce(f'{trial}: {name}')
                status = _call(command(), {**environment, **trial.row.environment}, lock)
                if status or not is_done():
                    reason = f'exit status {status}' if status else 'the command ended well, but left no result'
                    return f'FAILED: {name} ({reason}); logs in {trial.work_dir}'
            return f'finished{_word_on_nothing(trial)}'
    except (RunsElsewhere, SettingsChanged) as error:
        return f'NOT RUN: {error}'


def _word_on_nothing(trial: Trial) -> str:
    return '' if evaluations(trial.work_dir)[-1] else ' (nothing was detected: AP 0)'


def _call(command: list[str], environment: dict[str, str], lock: int) -> int:
    """Run a command, and end it when this process is told to end.

    It inherits the lock: should this process be killed outright, the command goes on, and the trial stays held.
    """
    with subprocess.Popen(command, env=environment, pass_fds=[lock]) as process:
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
            if process.poll() is None:
                process.terminate()
