"""Pretrains the backbone of configs/small/r18_pretrained.py: configs/small/r18_imagenette.py, for longer.

CBN_ROW=resnet18_gn_4xb32_in1k python tools/train.py configs/pretrain/r18_imagenette.py   # without CBN_ROW: BN
"""

_base_ = '../small/r18_imagenette.py'
work_dir = f'./work_dirs/pretrain/{_base_.row}'

epochs = 60
param_scheduler = dict(T_max=epochs)
train_cfg = dict(max_epochs=epochs, val_interval=5)
