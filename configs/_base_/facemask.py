"""Photographs of faces with and without masks, under data/facemask or $FACEMASK_ROOT: crops of one size for training,
whole images for evaluation. The model and norm_cfg stand in the configs.

For the study of small batches, on two CPU cores. 1 image a step.
"""

_base_ = './study.py'

# The third class, a mask worn incorrectly, has too few faces to learn from.
facemask_classes = ('with_mask', 'without_mask')
facemask_root = '{{$FACEMASK_ROOT:data/facemask}}'
facemask = dict(data_root=facemask_root, metainfo=dict(classes=facemask_classes))
train_pipeline = [
    dict(type='RandomCrop', crop_size=(128, 128)) if step['type'] == 'Resize' else step
    for step in _base_.train_pipeline
]
test_pipeline = [dict(step, scale=(400, 400)) if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
train_dataloader = dict(
    _base_.loading,
    batch_size=1,
    dataset=dict(facemask, pipeline=train_pipeline, filter_cfg=dict(min_size=128)),
)
val_dataloader = dict(_base_.loading, batch_size=1, dataset=dict(facemask, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=facemask_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator

epochs = 32
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=2, end=epochs, T_max=epochs - 2, convert_to_iter_based=True),
]
