"""VGG-16 with CBN."""

_base_ = ['mmpretrain::_base_/models/vgg16bn.py', '../_base_/imagenet_100e.py', '../_base_/imagenet_cbn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
