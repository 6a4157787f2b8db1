"""Make a config and a checkpoint of a trained model for machines without mmdet_cbn: the same model, with BatchNorm.

    python tools/publish.py my_config.py work_dirs/my_config/epoch_12.pth published

It writes DIR/config.py and DIR/model.pth, and checks that the checkpoint fills the model.
"""

import argparse
import copy
import pickle
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmdet_cbn  # noqa: F401  its classes are what the config names
from mmdet_cbn.openmmlab.checkpoints import load_checkpoint, whole_file
from mmdet_cbn.openmmlab.publish import plain_checkpoint, plain_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('out', metavar='DIR', type=Path, help='folder to write to; must not exist')
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'DIR must not exist, got {args.out}')
    try:
        config = Config.fromfile(args.config)
        if 'model' not in config:
            raise ValueError(f'{args.config} has no model')
        init_default_scope(config.get('default_scope', 'mmdet'))
        config = plain_config(config)
        published = plain_checkpoint(load_checkpoint(args.checkpoint, map_location='cpu'), config)
        model = MODELS.build(copy.deepcopy(config.model))  # mmdet writes into what it builds from
        model.load_state_dict(published['state_dict'])
    except (OSError, ValueError, RuntimeError, KeyError, SyntaxError, pickle.UnpicklingError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True)
    config.dump(args.out / 'config.py')
    with whole_file(str(args.out / 'model.pth')) as path:
        torch.save(published, path)
    print(f'wrote {args.out / "config.py"} and {args.out / "model.pth"}')


if __name__ == '__main__':
    main()
