"""The same on drawn shapes; without $CBN_ROW, the quickstart."""

_base_ = ['./r18_coco.py', '../_base_/shapes.py']
work_dir = f'{_base_.work_dir}_shapes'

heads = dict(bbox_head=dict(num_classes=_base_.shapes_num_classes))
if _base_.has_masks:
    heads['mask_head'] = dict(num_classes=_base_.shapes_num_classes)
model = dict(roi_head=heads)

train_dataloader = dict(dataset=_base_.shapes)
val_dataloader = dict(dataset=_base_.shapes)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.shapes_val_annotations)
test_evaluator = val_evaluator

param_scheduler = [dict(_base_.param_scheduler[0], end=_base_.shapes_warmup), _base_.param_scheduler[1]]
default_hooks = _base_.shapes_default_hooks
randomness = _base_.shapes_randomness
