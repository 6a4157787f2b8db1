_base_ = ['../_base_/facemask_retinanet.py', '../_base_/bn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg), neck=dict(norm_cfg=_base_.norm_cfg))
