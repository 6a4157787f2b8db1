"""Inception-v3 with BN. The rows of Table 4 with GN and BRN change its norm_cfg."""

_base_ = ['../_base_/inception_v3.py', '../_base_/bn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
