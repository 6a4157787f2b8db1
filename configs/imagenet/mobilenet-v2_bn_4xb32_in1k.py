"""MobileNet-v2 with BN. The rows of Table 4 with GN and BRN change its norm_cfg."""

_base_ = ['mmpretrain::_base_/models/mobilenet_v2_1x.py', '../_base_/imagenet_100e.py', '../_base_/bn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
