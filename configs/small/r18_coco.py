"""The small version of the config of configs/cbn that $CBN_ROW names: ResNet-18, narrow, from scratch, 2 images a step.

CBN_ROW=mask-rcnn_r50_fpn_gn-head_1x_coco python tools/train.py configs/small/r18_coco.py
"""

row = '{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}'
_base_ = ['../cbn/{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}.py', '../_base_/small.py']
work_dir = f'./work_dirs/small/{row}'

has_masks = 'mask_head' in _base_.model.roi_head
model = dict(
    _base_.small_model,
    roi_head=dict(_base_.small_box_branch, **(_base_.small_mask_branch if has_masks else {})),
)

train_pipeline, test_pipeline = (
    [dict(step, scale=_base_.small_scale) if step['type'] == 'Resize' else step for step in pipeline]
    for pipeline in (_base_.train_pipeline, _base_.test_pipeline)
)
train_dataloader = dict(batch_size=_base_.small_batch_size, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=_base_.small_optimizer)
auto_scale_lr = dict(base_batch_size=_base_.small_batch_size)
