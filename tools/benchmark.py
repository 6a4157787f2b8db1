r"""Memory, FLOPs and speed of mmdet configs side by side, as in Table 8 of the paper:

    python tools/benchmark.py configs/cbn/mask-rcnn_r50_fpn_{bn,gn,cbn}-head_1x_coco.py --out work_dirs/table8

On a CPU the RoIs take most of the time; fewer of them make a step of seconds:
    --cfg-options model.train_cfg.rcnn.sampler.num=64 model.test_cfg.rpn.max_per_img=100 \
        model.test_cfg.rcnn.max_per_img=20
"""

import argparse
import json
import logging
from pathlib import Path

from mmengine.config import Config, DictAction

from mmdet_cbn.experiments.cost.detectors import Settings, benchmark, to_markdown


def load_config(path: str, options: dict | None) -> Config:
    if not Path(path).is_file():
        raise ValueError(f'CONFIG must be a file, got {path}')
    config = Config.fromfile(path)
    config.merge_from_dict(options or {})
    for key in ('model', 'optim_wrapper'):
        if key not in config:
            raise ValueError(f'CONFIG must be of a detector, with model and optim_wrapper, got {path} without {key}')
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='the first is what the others are compared with')
    parser.add_argument('--device', help='cpu, cuda or cuda:<index> (default: cuda where there is one)')
    size_help = 'of the images, in pixels (default: 1333 800 on CUDA, 320 192 on the CPU)'
    parser.add_argument('--size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'), help=size_help)
    parser.add_argument('--batch-size', type=int, help='images of a training step (default: 4 on CUDA, 1 on the CPU)')
    parser.add_argument('--rounds', type=int, default=10, help='timed steps of each config (default: %(default)s)')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before those (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the weights (default: %(default)s)')
    fuse_help = "fold normalizers into convolutions before inference is timed, with mmcv's fuse_conv_bn"
    parser.add_argument('--fuse', action='store_true', help=fuse_help)
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder to write table8.md and table8.json to')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE, merged into each config')
    args = parser.parse_args()
    size = tuple(args.size) if args.size else None
    try:
        settings = Settings(args.device, size, args.batch_size, args.rounds, args.warmup, args.seed, args.fuse)
        configs = [load_config(path, args.cfg_options) for path in args.configs]
    except ValueError as error:
        parser.error(str(error))
    logging.disable(logging.INFO)  # mmengine would list the initialization of every weight
    results = benchmark(configs, settings)
    table = to_markdown(results)
    print(table, end='')
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'table8.md').write_text(table, encoding='utf-8')
        (args.out / 'table8.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
