"""Faster R-CNN with BRN in FPN and box head; BN frozen in the backbone."""

_base_ = ['./faster-rcnn_r50_fpn_4conv1fc_1x_coco.py', '../_base_/brn.py']

norm_cfg = _base_.norm_cfg
model = dict(neck=dict(norm_cfg=norm_cfg), roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
