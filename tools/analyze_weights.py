"""How the weights before normalizers grow in training, and which part of their gradient only makes them longer.

    python tools/analyze_weights.py configs/study/retinanet_r18_fpn_bn_varied.py --name BN --out work_dirs/weights
    python tools/analyze_weights.py configs/study/retinanet_r18_fpn_cbn_varied.py --name CBN --out work_dirs/weights

Each call trains a config, without evaluation and checkpoints, and writes NAME.csv into DIR. Then it draws all such
files there into weights.png. Without CONFIG it only draws.
"""

import argparse
from pathlib import Path

from mmengine.config import DictAction

from mmdet_cbn.experiments.analysis.training import runner_for_training_alone
from mmdet_cbn.experiments.analysis.weights import WeightStateHook, has_states, plot_weights, read_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', type=Path, metavar='CONFIG')
    parser.add_argument('--name', help='in the plot (default: the name of CONFIG)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--every', type=int, default=50, help='iterations between records (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE, merged into the config')
    args = parser.parse_args()
    if args.config:
        train(parser, args)
    files = [file for file in sorted(args.out.glob('*.csv')) if has_states(file)]  # other tools write CSV files, too
    if not files:
        parser.error(f'--out {args.out} has no CSV files of this tool; give a CONFIG to train')
    plot_weights({file.stem: read_states(file) for file in files}).savefig(args.out / 'weights.png', dpi=100)


def train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Train the config and write the states of its weights."""
    if not args.config.is_file():
        parser.error(f'CONFIG must be a file, got {args.config}')
    try:
        hook = WeightStateHook(args.every, args.out / f'{args.name or args.config.stem}.csv')
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    runner_for_training_alone(args.config, args.cfg_options, args.out / 'logs', [hook]).train()


if __name__ == '__main__':
    main()
