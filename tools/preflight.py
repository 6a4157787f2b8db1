"""Check whether this machine is ready to train the paper's rows: a few minutes, before days of training.

    python tools/preflight.py --row cbn-head --gpus 4

It looks at the software, COCO, the pretrained weights and the disk. It holds the CBN layer on this device against a
slow float64 version of the paper's equations, lets processes train together, and times one training step of a row at
full size. A table at the end tells what is ok, what is not and what to do. The exit status is 1 if anything is not ok.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table
from rich.text import Text

try:
    from mmdet_cbn.experiments.paper.coco import COCO
    from mmdet_cbn.experiments.preflight import CHECKS, Machine, run_check
except ImportError as error:
    sys.exit(f'NOT OK: {error}')

ROOT = Path(__file__).resolve().parents[1]
COLORS = {'ok': 'green', 'NOT OK': 'bold red', 'not applicable here': 'yellow'}


def main() -> None:
    rows = {row.name: row for table in COCO for row in table.rows}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_help = 'the row to train, as tools/reproduce.py --dry-run names it (default: %(default)s)'
    parser.add_argument('--row', default='cbn-head', choices=rows, metavar='ROW', help=row_help)
    parser.add_argument('--gpus', type=int, default=4, help='to train on (default: %(default)s)')
    parser.add_argument('--trials', type=int, default=5, help='how often to train a row (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/paper'), help='default: %(default)s')
    options_help = 'KEY=VALUE, as for tools/reproduce.py'
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help=options_help)
    parser.add_argument('--checks', nargs='+', choices=CHECKS, default=list(CHECKS), help='default: all of them')
    args = parser.parse_args()
    for name in ('gpus', 'trials'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be 1 or more, got {getattr(args, name)}')
    logging.disable(logging.INFO)  # mmengine would list the initialization of every weight
    machine = Machine(rows[args.row], ROOT / 'configs', args.work_dir, args.gpus, args.trials, args.cfg_options)
    results = []
    start = time.monotonic()
    for number, name in enumerate(args.checks, 1):
        print(f'== {number}/{len(args.checks)} {name} ({time.monotonic() - start:.0f} s since the start)', flush=True)
        for result in run_check(name, machine):
            print(f'{result.status}: {result.subject}: {result.found}', flush=True)
            results.append(result)
    # Without a terminal, in a log, rich takes 80 characters for a line, too few for four columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title='Is this machine ready?', show_lines=True)
    for heading, ratio in (('check', 2), ('status', 1), ('found', 4), ('what to do', 3)):
        table.add_column(heading, overflow='fold', ratio=ratio)
    for result in results:
        table.add_row(result.subject, Text(result.status, COLORS[result.status]), result.found, result.advice)
    console.print(table, markup=False)
    sys.exit(any(result.status == 'NOT OK' for result in results))


if __name__ == '__main__':
    main()
