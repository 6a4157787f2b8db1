"""Set what was trained beside the paper's numbers: Markdown, CSV and plots from the logs of mmengine.

    python tools/report.py work_dirs/paper --out report

WORK_DIRS are searched for runs of tools/reproduce.py or of tools/train.py, finished or not. A run with other settings
than the paper's recipe is shown as such, and no difference from the paper is given. What the logs tell is stored in
runs.json, from which the rest can be made anew: name it instead of WORK_DIRS.
"""

import argparse
import re
from pathlib import Path

from mmengine.logging import MMLogger

from mmdet_cbn.experiments.paper.coco import COCO
from mmdet_cbn.experiments.rows.logs import collect, find_runs
from mmdet_cbn.experiments.rows.report import markdown, overview, write_report
from mmdet_cbn.experiments.tables import NUMBERS, TABLES

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dirs', nargs='*', type=Path, metavar='WORK_DIRS')
    table_help = "tables or figures (default: the paper's on COCO); study for all of our own study"
    parser.add_argument('--table', nargs='+', choices=NUMBERS, help=table_help)
    parser.add_argument('--out', type=Path, default=Path('report'), help='folder to write to (default: %(default)s)')
    parser.add_argument('--trials', type=int, default=5, help='how many a row should have (default: %(default)s)')
    parser.add_argument('--readme', type=Path, help='renew the tables in this file instead, between their marks')
    args = parser.parse_args()
    # It would tell of each environment variable that a config reads.
    MMLogger.get_current_instance().setLevel('WARNING')
    if args.readme and not args.readme.is_file():
        parser.error(f'--readme must be a file, got {args.readme}')
    for folder in args.work_dirs:
        if not folder.exists():
            parser.error(f'WORK_DIRS: {folder} does not exist')
    try:
        runs = find_runs(args.work_dirs)
    except RuntimeError as error:
        parser.error(str(error))
    if args.work_dirs and not runs:
        parser.error(f'no logs of a training under {", ".join(map(str, args.work_dirs))}')
    tables = [table for table in TABLES if table.is_in(args.table)] if args.table else list(COCO)
    if args.readme:
        text = args.readme.read_text(encoding='utf-8')
        # Up to the table's own end: a page that lacks it shall not lose what comes after.
        marks = [re.compile(rf'(<!-- {t.name} -->\n)(?:(?!<!-- ).)*(<!-- end -->)', re.DOTALL) for t in tables]
        marked = [(table, mark) for table, mark in zip(tables, marks, strict=True) if mark.search(text)]
        if not marked:
            names = ', '.join(table.name for table in tables)
            parser.error(f'--readme {args.readme} has no marks, from <!-- NAME --> to <!-- end -->, of {names}')
        for table, mark in marked:
            is_measured = table.number == '8'  # and not trained: runs of its configs are another table's
            trials = 0 if is_measured else args.trials
            entries = {} if is_measured else collect(table, runs, CONFIGS)
            new = overview(table, entries, trials) if table.is_ours else markdown(table, entries, trials, links='')
            text = mark.sub(lambda found, new=new: f'{found[1]}{new}{found[2]}', text)
        args.readme.write_text(text, encoding='utf-8')
        return
    for file in write_report(runs, args.out, CONFIGS, args.trials, tables):
        print(file)


if __name__ == '__main__':
    main()
