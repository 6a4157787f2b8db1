"""Write a COCO-format data set of drawn shapes: train and val images, polygons, some crowd regions."""

import argparse

from mmdet_cbn.experiments.data.shapes import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', nargs='?', default='data/shapes', help='folder to write to (default: %(default)s)')
    parser.add_argument('--train', type=int, default=240, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='validation images (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(256, 160), metavar=('WIDTH', 'HEIGHT'), help='in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    try:
        write_shapes(args.root, {'train': args.train, 'val': args.val}, tuple(args.size), args.seed, print)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
