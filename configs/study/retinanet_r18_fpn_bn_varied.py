_base_ = ['../_base_/varied.py', '../_base_/bn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg), neck=dict(norm_cfg=_base_.norm_cfg))
