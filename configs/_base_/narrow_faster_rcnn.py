"""A Faster R-CNN with a 4conv1fc head that trains from scratch on two CPU cores."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', './narrow.py']

model = dict(_base_.narrow_faster_rcnn, backbone=_base_.narrow_from_scratch)
