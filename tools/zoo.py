"""Which families of a model zoo train with CBN: a few steps of one model of each, on random images.

    python tools/zoo.py mmdet --out docs/results/zoo
    python tools/zoo.py mmdet yolox rtmdet --out work_dirs/zoo

It writes DIR/PACKAGE.json after each family, and DIR/PACKAGE.md at the end. Families that are in the JSON file are not
tried again.
"""

import argparse
import logging
import warnings
from pathlib import Path

from mmengine.logging import MMLogger

from mmdet_cbn.experiments.zoo import ZOOS, survey, to_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('package', choices=ZOOS)
    parser.add_argument('families', nargs='*', help='folders of configs of the package (default: all)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--images', type=int, default=2, help='of a step (default: %(default)s)')
    parser.add_argument(
        '--size',
        type=int,
        default=128,
        help='of the images in pixels, if the model needs no other (default: %(default)s)',
    )
    args = parser.parse_args()
    warnings.simplefilter('ignore')  # of other packages
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    try:
        rows = survey(args.package, args.out / f'{args.package}.json', args.families, args.images, args.size)
    except ValueError as error:
        parser.error(str(error))
    (args.out / f'{args.package}.md').write_text(to_markdown(args.package, rows), encoding='utf-8')


if __name__ == '__main__':
    main()
