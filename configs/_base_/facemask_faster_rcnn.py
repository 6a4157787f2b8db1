"""The narrow Faster R-CNN on the photographs of facemask.py."""

_base_ = ['./narrow_faster_rcnn.py', './facemask.py']

model = dict(roi_head=dict(bbox_head=dict(num_classes=len(_base_.facemask_classes))))
