"""ResNet-18 with Instance Normalization."""

_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet_100e.py']

model = dict(backbone=dict(norm_cfg=dict(type='IN', affine=True), zero_init_residual=_base_.zero_init_residual))
