r"""Measure what CBN costs beside BatchNorm: times, FLOPs and memory of single layers and of whole detectors.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python tools/cost.py --out docs/results/cost

The two variables stop glibc from giving memory back to the system after each step. To get it again, page by page, takes
longer and varies more than some of what is measured here, for BN and CBN alike. With images of 1333x800 the measurement
takes about an hour on two cores and 16 GB of memory. On a GPU it takes minutes, and the variables do nothing.
"""

import argparse
import json
import logging
from pathlib import Path

from mmdet_cbn.arguments import check_int
from mmdet_cbn.experiments.cost.detectors import Settings
from mmdet_cbn.experiments.cost.measure import measure_cost, page_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', help='cpu, cuda or cuda:<index> (default: cuda where there is one)')
    parser.add_argument('--rounds', type=int, default=8, help='timed steps of each detector (default: %(default)s)')
    parser.add_argument('--layer-rounds', type=int, default=40, help='of each single layer (default: %(default)s)')
    size_help = 'of the images of the detectors, in pixels (default: 1333 800)'
    parser.add_argument('--size', type=int, nargs=2, default=(1333, 800), metavar=('WIDTH', 'HEIGHT'), help=size_help)
    batch_help = 'images of a timed step (default: 4 on CUDA, 1 on the CPU)'
    parser.add_argument('--batch-size', type=int, help=batch_help)
    parser.add_argument('--out', type=Path, help='folder to write cost.md and cost.json to')
    args = parser.parse_args()
    try:
        settings = Settings(args.device, tuple(args.size), args.batch_size, args.rounds, warmup=1)
        check_int('cost', 'layer_rounds', args.layer_rounds, at_least=1)
    except ValueError as error:
        parser.error(str(error))
    logging.disable(logging.INFO)  # mmengine would list the initialization of every weight
    raw = measure_cost(settings, args.layer_rounds)
    page = page_of(raw)
    print(f'\n{page}', end='')
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'cost.md').write_text(page, encoding='utf-8')
        (args.out / 'cost.json').write_text(json.dumps(raw, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
