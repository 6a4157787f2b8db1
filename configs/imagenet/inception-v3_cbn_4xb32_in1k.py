"""Inception-v3 with CBN."""

_base_ = ['../_base_/inception_v3.py', '../_base_/imagenet_cbn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
