r"""How far CBN's compensated statistics are from those that old images really have under the current weights, and how
fast the statistics' gradients diminish in the weights of earlier layers (the paper's Figure 6):

    python tools/analyze_statistics.py configs/cbn/faster-rcnn_r50_fpn_cbn-all_1x_coco.py --out work_dirs/statistics

The tool trains the config, without evaluation and checkpoints. It measures the layers of backbone, neck and RoI heads.
The heads get the RoIs of the old iteration. DIR gets tables, as Markdown and CSV, and plots; without CONFIG they are
made anew from the CSV files there.
Nothing is compared before burn-in is over; --cfg-options custom_hooks.0.burn_in_epochs=0 leaves it out.
"""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import DictAction
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_cbn.arguments import check_int
from mmdet_cbn.experiments.analysis.fidelity import StatisticsFidelityHook
from mmdet_cbn.experiments.analysis.gradients import GradientRatioHook
from mmdet_cbn.experiments.analysis.plots import draw, write_results
from mmdet_cbn.experiments.analysis.training import runner_for_training_alone


class Enough(Exception):
    """Ends a training from within, which mmengine has no other way for."""


class StopHook(Hook):
    priority = 'LOWEST'

    def __init__(self, iters: int) -> None:
        self.iters = check_int('StopHook', 'iters', iters, at_least=1)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 >= self.iters:
            raise Enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', type=Path, metavar='CONFIG')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--every', type=int, default=10, help='iterations between comparisons (default: %(default)s)')
    parser.add_argument('--max-tau', type=int, default=7, help='iterations to look back (default: %(default)s)')
    samples_help = 'numbers of samples to try (default: 64 256)'
    parser.add_argument('--samples', type=int, nargs='+', default=[64, 256], help=samples_help)
    parser.add_argument('--iters', type=int, help='stop after so many iterations (default: the whole training)')
    skip_help = 'what not to look at: the compensation of two layers, which takes longest, or the gradients'
    parser.add_argument('--skip', nargs='+', default=[], choices=['two-layers', 'gradients'], help=skip_help)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE, merged into the config')
    args = parser.parse_args()
    if args.config:
        train(parser, args)
    try:
        print(draw(args.out), end='')
    except FileNotFoundError as error:
        parser.error(f'--out has nothing to draw ({error}); give a CONFIG to train')


def train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Train the config, looking at it, and write what was found."""
    if not args.config.is_file():
        parser.error(f'CONFIG must be a file, got {args.config}')
    try:
        fidelity = StatisticsFidelityHook(args.every, args.max_tau, args.samples, 'two-layers' not in args.skip)
        gradients = GradientRatioHook(args.every)
        hooks: list[Hook] = [fidelity]
        if 'gradients' not in args.skip:
            hooks.append(gradients)
        if args.iters is not None:
            hooks.append(StopHook(args.iters))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    runner = runner_for_training_alone(args.config, args.cfg_options, args.out, hooks)
    with suppress(Enough):
        runner.train()
    if not fidelity.errors:
        parser.error(
            f'--every {args.every} and --max-tau {args.max_tau} allow no comparison after burn-in in a training of '
            f'{min(args.iters or runner.max_iters, runner.max_iters)} iterations'
        )
    write_results(fidelity.errors, gradients.ratios, args.out)


if __name__ == '__main__':
    main()
