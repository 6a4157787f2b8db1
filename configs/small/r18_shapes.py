"""r18_coco.py on drawn shapes; without $CBN_ROW, the quickstart.

python tools/make_shapes.py
CBN_ROW=mask-rcnn_r50_fpn_gn-head_1x_coco python tools/train.py configs/small/r18_shapes.py
"""

_base_ = ['./r18_coco.py', '../_base_/shapes.py']
work_dir = f'{_base_.work_dir}_shapes'

num_classes = len(_base_.shapes_classes)
heads = dict(bbox_head=dict(num_classes=num_classes))
if _base_.has_masks:
    heads['mask_head'] = dict(num_classes=num_classes)
model = dict(roi_head=heads)

train_dataloader = dict(dataset=_base_.shapes)
val_dataloader = dict(dataset=_base_.shapes)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.shapes_val_annotations)
test_evaluator = val_evaluator

param_scheduler = [dict(_base_.param_scheduler[0], end=50), _base_.param_scheduler[1]]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))  # mmengine deletes the oldest before it writes the next
randomness = dict(seed=0)
