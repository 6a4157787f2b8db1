"""r18_pretrained.py on photographs of faces, for the rows of Faster R-CNN.

python tools/train.py configs/pretrain/r18_imagenette.py
CBN_ROW=faster-rcnn_r50_fpn_gn-head_1x_coco python tools/train.py configs/small/r18_facemask.py
"""

_base_ = ['./r18_pretrained.py', '../_base_/facemask_data.py']
work_dir = f'./work_dirs/small/{_base_.row}_facemask'

model = dict(roi_head=dict(bbox_head=dict(num_classes=len(_base_.facemask_classes))))
train_pipeline = [_base_.facemask_crop if step['type'] == 'Resize' else step for step in _base_.train_pipeline]
test_pipeline = [
    dict(step, scale=_base_.facemask_scale) if step['type'] == 'Resize' else step for step in _base_.test_pipeline
]
train_dataloader = dict(
    dataset=dict(_base_.facemask, pipeline=train_pipeline, filter_cfg=_base_.facemask_filter),
)
val_dataloader = dict(dataset=dict(_base_.facemask, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.facemask_val_annotations)
test_evaluator = val_evaluator
