"""Mask R-CNN with a 4conv1fc box head; no normalizer but the frozen BN of the backbone."""

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/instance_1x.py']

model = dict(roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead')))
