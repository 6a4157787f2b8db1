"""DenseNet-121 with CBN. Naive CBN where several convolutions, or none, come before."""

_base_ = [
    'mmpretrain::_base_/models/densenet/densenet121.py',
    '../_base_/imagenet_100e.py',
    '../_base_/imagenet_cbn.py',
]

model = dict(backbone=dict(norm_cfg=dict(_base_.norm_cfg, unsupported='naive')))
