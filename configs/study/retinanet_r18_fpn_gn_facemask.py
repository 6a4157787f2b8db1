_base_ = ['../_base_/narrow_retinanet.py', '../_base_/facemask.py', '../_base_/gn.py']

norm_cfg = dict(_base_.norm_cfg, num_groups=8)  # the layers have 16 to 128 channels
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(num_classes=len(_base_.facemask_classes), anchor_generator=dict(octave_base_scale=2)),
)
