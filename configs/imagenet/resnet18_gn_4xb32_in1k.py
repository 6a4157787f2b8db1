"""ResNet-18 with GN."""

_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet_100e.py', '../_base_/gn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, zero_init_residual=_base_.zero_init_residual))
