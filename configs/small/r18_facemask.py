"""The small twin of the Faster R-CNN of configs/cbn that $CBN_ROW names: fine-tuned as on COCO, on photographs.

CBN_ROW=faster-rcnn_r50_fpn_gn-head_1x_coco python tools/train.py configs/small/r18_facemask.py

The backbone is a ResNet-18, a quarter as wide. configs/pretrain/r18_imagenette.py pretrains it, with GN where the row
has GN in the backbone, and with BN elsewhere. 4 images a step.
"""

row = '{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}'
_base_ = [
    '../cbn/{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}.py',
    '../_base_/narrow.py',
    '../_base_/facemask_data.py',
]
work_dir = f'./work_dirs/small/{row}_facemask'

has_gn = _base_.model.backbone.norm_cfg.type == 'GN'
weights = f'work_dirs/pretrain/resnet18_{"gn" if has_gn else "bn"}_4xb32_in1k/epoch_60.pth'
backbone = dict(_base_.narrow_backbone, init_cfg=dict(checkpoint=weights, prefix='backbone.'))
detector = _base_.narrow_faster_rcnn
if 'norm_cfg' in _base_ and _base_.norm_cfg.type == 'GN':
    groups = dict(norm_cfg=dict(num_groups=_base_.narrow_groups))
    backbone.update(groups if has_gn else {})
    detector.neck.update(groups)
    detector.roi_head.bbox_head.update(groups)
detector.roi_head.bbox_head.update(num_classes=len(_base_.facemask_classes))
model = dict(
    detector,
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=backbone,
)

train_pipeline = [_base_.facemask_crop if step['type'] == 'Resize' else step for step in _base_.train_pipeline]
test_pipeline = [
    dict(step, scale=_base_.facemask_scale) if step['type'] == 'Resize' else step for step in _base_.test_pipeline
]
# Images of this size are read faster than they are handed from one process to another.
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    loading, dataset=dict(_base_.facemask, pipeline=train_pipeline, filter_cfg=_base_.facemask_filter)
)
val_dataloader = dict(loading, dataset=dict(_base_.facemask, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.facemask_val_annotations)
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.005))  # 0.02 for 16 images, as in the row
param_scheduler = [dict(_base_.param_scheduler[0], end=50), _base_.param_scheduler[1]]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
