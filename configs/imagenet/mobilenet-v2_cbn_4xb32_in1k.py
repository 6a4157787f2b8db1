"""MobileNet-v2 with CBN."""

_base_ = ['mmpretrain::_base_/models/mobilenet_v2_1x.py', '../_base_/imagenet_100e.py', '../_base_/imagenet_cbn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
