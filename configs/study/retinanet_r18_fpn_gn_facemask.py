_base_ = ['../_base_/facemask_retinanet.py', '../_base_/gn.py']

norm_cfg = dict(_base_.norm_cfg, num_groups=_base_.narrow_groups)
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg))
