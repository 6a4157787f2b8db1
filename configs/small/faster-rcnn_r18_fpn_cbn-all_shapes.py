"""Small Faster R-CNN with CBN on drawn shapes: the quickstart."""

_base_ = ['./faster-rcnn_r18_fpn_cbn-all_coco.py', '../_base_/shapes.py']

model = dict(roi_head=dict(bbox_head=dict(num_classes=_base_.shapes_num_classes)))

train_dataloader = dict(dataset=_base_.shapes)
val_dataloader = dict(dataset=_base_.shapes)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.shapes_val_annotations)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=_base_.shapes_epochs)
param_scheduler = _base_.shapes_schedule
custom_hooks = _base_.shapes_hooks
default_hooks = _base_.shapes_default_hooks
randomness = _base_.shapes_randomness
