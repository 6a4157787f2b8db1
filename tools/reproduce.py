"""Train and evaluate the rows of the paper's tables or our study's, each several times, or print the commands that do.

    python tools/reproduce.py --table 5 --dry-run
    python tools/reproduce.py --table 5 6 --rows cbn-head gn-head --gpus 4 --trials 5

What is finished is skipped, what is half done goes on, and a row that fails does not stop the others. It can be stopped
and started again at any time. tools/report.py makes the tables of what it has trained.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.logging import MMLogger

from mmdet_cbn.experiments.rows.runs import Setting, describe, run, trials_of
from mmdet_cbn.experiments.rows.table import Table
from mmdet_cbn.experiments.tables import NUMBERS, TABLES

# The small versions in configs/small, and how the configs begin that they are versions of.
SMALL = {'shapes': 'cbn/', 'facemask': 'cbn/faster-rcnn', 'coco128': 'cbn/', 'imagenette': 'imagenet/resnet18'}
ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> tuple[argparse.Namespace, list[Table]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table_help = 'of the paper, or of our own study; study for all of it'
    parser.add_argument('--table', nargs='+', required=True, choices=NUMBERS, help=table_help)
    parser.add_argument('--rows', nargs='+', help='names of rows, as the dry run gives them (default: all)')
    gpus_help = 'default: 4, for our study 1; with 1, the CPU if there is no GPU'
    parser.add_argument('--gpus', type=int, help=gpus_help)
    parser.add_argument('--trials', type=int, default=5, help='seeds 0, 1, ... (default: %(default)s)')
    work_dir_help = 'default: work_dirs/paper, work_dirs/study, or work_dirs/small_NAME for small versions'
    parser.add_argument('--work-dir', type=Path, help=work_dir_help)
    small_help = 'train the small versions configs/small/r18_NAME.py of the rows (default: %(const)s)'
    parser.add_argument('--small', nargs='?', const='shapes', choices=list(SMALL), help=small_help)
    parser.add_argument('--dry-run', action='store_true', help='print the commands only')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help="as for mmdet's tools")
    args = parser.parse_args()
    tables = [table for table in TABLES if table.is_in(args.table)]
    if len({table.is_ours for table in tables}) > 1:
        parser.error('--table must name tables of the paper or of our study, not of both: folder and GPUs differ')
    if args.gpus is None:
        args.gpus = tables[0].gpus
    for name in ('gpus', 'trials'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be 1 or more, got {getattr(args, name)}')
    if wrong := [option for option in args.cfg_options if '=' not in option]:
        parser.error(f'--cfg-options must be KEY=VALUE, got {wrong[0]}')
    if args.small and tables[0].is_ours:
        parser.error('--small: the tables of our study have no small versions; they are small')
    names = [row.name for table in tables for row in table.rows]
    if unknown := set(args.rows or []) - set(names):
        parser.error(f'--rows: {", ".join(sorted(unknown))} not in the table; it has {", ".join(names)}')
    if args.rows:
        tables = [table._replace(rows=tuple(row for row in table.rows if row.name in args.rows)) for table in tables]
    if args.small:
        if any(table.number == '8' for table in tables):
            parser.error('--small must not be given for Table 8, which measures the cost of the rows as they are')
        for row in (row for table in tables for row in table.rows):
            fitting = [name for name, begin in SMALL.items() if row.file.startswith(begin)]
            if args.small not in fitting:
                allowed = f'must be {" or ".join(fitting)}' if fitting else 'must not be given'
                parser.error(f'--small {allowed} for row {row.name}, got {args.small}')
        tables = [table._replace(rows=tuple(row._replace(small=args.small) for row in table.rows)) for table in tables]
    found = torch.cuda.device_count()
    trains_full_size = not (args.small or args.dry_run) and any(table.number != '8' for table in tables)
    if found < args.gpus > 1 and trains_full_size:
        parser.error(
            f'--gpus: torch finds {found} GPUs here, got {args.gpus}; with 1, the CPU trains where there is no GPU'
        )
    return args, tables


def benchmark(table: Table, setting: Setting, dry_run: bool) -> str:
    """Table 8, which tools/benchmark.py makes of all its rows at once."""
    out = setting.work_dir / 'table8'
    configs = [str(setting.root / 'configs' / 'cbn' / f'{row.config}.py') for row in table.rows]
    command = ['python', str(setting.root / 'tools' / 'benchmark.py'), *configs, '--out', str(out)]
    if setting.options:
        command += ['--cfg-options', *setting.options]
    done, as_it_is = out / 'command.txt', shlex.join(command)
    is_done = done.exists() and done.read_text() == as_it_is
    if dry_run:
        print('# finished' if is_done else as_it_is)
        return ''
    if is_done:
        return 'was finished'
    print(f'== {table.title}', flush=True)
    status = subprocess.run(command, env=environment()).returncode
    if status:
        return f'FAILED: exit status {status}'
    done.write_text(as_it_is)
    return 'finished'


def environment() -> dict[str, str]:
    """Of the commands: ``python`` is the one that runs this."""
    return {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'}


def main() -> None:
    args, tables = parse_args()
    # It tells on stdout of each environment variable that a config reads, between the commands of a dry run.
    MMLogger.get_current_instance().setLevel('WARNING')
    kind = f'small_{args.small}' if args.small else 'study' if tables[0].is_ours else 'paper'
    work_dir = args.work_dir or Path('work_dirs') / kind
    root = Path(os.path.relpath(ROOT)) if Path.cwd().is_relative_to(ROOT) else ROOT
    setting = Setting(root, work_dir, args.gpus, tuple(args.cfg_options))
    results = {}
    for table in tables:
        if args.dry_run:
            print(f'# {table.title}: {", ".join(row.name for row in table.rows)}')
        if table.number == '8' and table.rows:
            results[table.title] = benchmark(table, setting, args.dry_run)
    for trial in trials_of(
        [row for table in tables if table.number != '8' for row in table.rows], args.trials, setting
    ):
        if args.dry_run:
            print(*describe(trial), sep='\n')
        else:
            results[str(trial)] = run(trial, environment(), lambda step: print(f'== {step}', flush=True))
    if not args.dry_run:
        print('== Summary', *(f'{name}: {result}' for name, result in results.items()), sep='\n')
        sys.exit(any(result.startswith(('FAILED', 'NOT RUN')) for result in results.values()))


if __name__ == '__main__':
    main()
