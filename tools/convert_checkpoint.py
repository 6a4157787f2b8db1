"""Convert a checkpoint of the paper authors' released code (a mmdetection of 2019) for a config of mmdet 3.

The result loads strictly into the model of CONFIG, and its normalizers compute in evaluation what the authors' do.
What the model gets no value for, and what is left over, is printed. Exit status: 0 if OUT was written, 1 if the
checkpoint does not fill the model, 2 if IN, OUT or CONFIG is not usable; OUT is only written with 0.

What no conversion of weights can change: the code of 2019 gave a box a width of x2 - x1 + 1, centred and rounded
anchors differently, and did not align RoIAlign to pixel centres, so AP differs somewhat from the released one. It comes
closest with mmdet's options for such models, as in its configs/legacy_1.x (by mmdetection's table there, 0.1 to 0.5
points below the old code): in rpn_head anchor_generator=dict(type='LegacyAnchorGenerator', center_offset=0.5), in
rpn_head and bbox_head bbox_coder=dict(type='LegacyDeltaXYWHBBoxCoder'), in each roi_layer aligned=False and
sampling_ratio=2. The authors also tested with 2000 proposals an image, where mmdet 3 takes 1000 (test_cfg.rpn: nms_pre
and max_per_img).
"""

import argparse
import pickle
from pathlib import Path

import torch
from mmengine.config import Config

from mmdet_cbn.errors import errors_name_file
from mmdet_cbn.experiments.paper.released_checkpoint import convert_checkpoint, model_shapes
from mmdet_cbn.openmmlab.checkpoints import load_checkpoint, whole_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', metavar='IN', help='checkpoint of the released code')
    parser.add_argument('out', metavar='OUT', type=Path, help='file to write; must not exist')
    parser.add_argument('--config', metavar='CONFIG', required=True, help='config of the model, e.g. of configs/cbn')
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'{args.out} exists; name a new file')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent} to write to')
    try:
        shapes = model_shapes(Config.fromfile(args.config))
    except Exception as error:  # a config is Python, and builds any model
        parser.error(f'--config {args.config} cannot be used: {error}')
    try:
        released = load_checkpoint(args.checkpoint, map_location='cpu')
        with errors_name_file(args.checkpoint, 'is no checkpoint of the released code'):
            converted, report = convert_checkpoint(released, shapes)
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        parser.error(str(error))
    print(report)
    if not report.complete:
        print(f'{args.checkpoint} does not fill the model of {args.config}; nothing was written')
        return 1
    with whole_file(str(args.out)) as path:
        torch.save(converted, path)
    print(f'wrote {args.out}')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
