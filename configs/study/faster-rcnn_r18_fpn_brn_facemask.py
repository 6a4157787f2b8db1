_base_ = ['../_base_/narrow_faster_rcnn.py', '../_base_/facemask.py', '../_base_/brn.py']

norm_cfg = _base_.norm_cfg
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg, num_classes=len(_base_.facemask_classes))),
)
