"""Faster R-CNN with a 4conv1fc box head; no normalizer but the frozen BN of the backbone."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/detection_1x.py']

model = dict(roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead')))
