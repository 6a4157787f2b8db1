_base_ = ['../_base_/facemask_faster_rcnn.py', '../_base_/bn.py']

norm_cfg = _base_.norm_cfg
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
