"""A narrow RetinaNet from scratch on the views of tools/make_varied.py, under data/varied or $VARIED_ROOT.

For the study of small batches, on two CPU cores. 1 image a step; norm_cfg stands in the configs.
"""

_base_ = ['./narrow_retinanet.py', './study.py']

varied_classes = ('RBC', 'WBC', 'Platelets')
model = dict(bbox_head=dict(num_classes=len(varied_classes)))

varied_root = '{{$VARIED_ROOT:data/varied}}'
varied = dict(data_root=varied_root, metainfo=dict(classes=varied_classes))
train_pipeline = [step for step in _base_.train_pipeline if step['type'] != 'Resize']
test_pipeline = [dict(step, scale=(128, 96)) if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
train_dataloader = dict(_base_.loading, batch_size=1, dataset=dict(varied, pipeline=train_pipeline))
val_dataloader = dict(_base_.loading, batch_size=16, dataset=dict(varied, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=varied_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator

epochs = 8
burn_in = epochs // 4  # of CBN, as in the paper
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, end=epochs, T_max=epochs - 1, convert_to_iter_based=True),
]
