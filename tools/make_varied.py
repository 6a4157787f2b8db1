"""Write small views of the images of a COCO tree, each in a light of its own: the data of the study of small batches.

python tools/make_varied.py data/bccd
"""

import argparse

from mmdet_cbn.experiments.data.varied import write_varied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='folder with train2017, val2017 and annotations')
    parser.add_argument('root', nargs='?', default='data/varied', help='folder to write to (default: %(default)s)')
    parser.add_argument('--variants', type=int, default=4, help='views of each image (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(128, 96), metavar=('WIDTH', 'HEIGHT'), help='in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    try:
        write_varied(args.source, args.root, args.variants, tuple(args.size), args.seed, print)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
