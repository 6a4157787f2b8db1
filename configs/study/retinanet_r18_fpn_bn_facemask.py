_base_ = ['../_base_/narrow_retinanet.py', '../_base_/facemask.py', '../_base_/bn.py']

norm_cfg = _base_.norm_cfg
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(num_classes=len(_base_.facemask_classes), anchor_generator=dict(octave_base_scale=2)),
)
