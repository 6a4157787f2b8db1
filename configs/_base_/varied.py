"""A narrow RetinaNet from scratch on the views of tools/make_varied.py, under data/varied or $VARIED_ROOT.

For the study of small batches, on two CPU cores. 1 image a step; norm_cfg stands in the configs.
"""

_base_ = [
    './narrow_retinanet.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)

varied_classes = ('RBC', 'WBC', 'Platelets')
model = dict(bbox_head=dict(num_classes=len(varied_classes)))

varied_root = '{{$VARIED_ROOT:data/varied}}'
varied = dict(data_root=varied_root, metainfo=dict(classes=varied_classes))
train_pipeline = [step for step in _base_.train_pipeline if step['type'] != 'Resize']
test_pipeline = [dict(step, scale=(128, 96)) if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
# Images of this size are read faster than they are handed from one process to another.
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(loading, batch_size=1, dataset=dict(varied, pipeline=train_pipeline))
val_dataloader = dict(loading, batch_size=16, dataset=dict(varied, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=varied_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator

epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.02),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, end=epochs, T_max=epochs - 1, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=100))
randomness = dict(seed=0)
