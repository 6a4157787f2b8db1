"""ResNet-18 with Layer Normalization over channels and positions: Group Normalization with one group."""

_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet_100e.py', '../_base_/gn.py']

model = dict(backbone=dict(norm_cfg=dict(_base_.norm_cfg, num_groups=1), zero_init_residual=_base_.zero_init_residual))
