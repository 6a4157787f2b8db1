"""ResNet-50 with CBN."""

_base_ = ['mmpretrain::_base_/models/resnet50.py', '../_base_/imagenet_100e.py', '../_base_/imagenet_cbn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, zero_init_residual=_base_.zero_init_residual))
