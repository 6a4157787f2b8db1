"""The photographs of facemask_data.py: crops of one size for training, whole images for evaluation. The model and
norm_cfg stand in the configs.

For the study of small batches, on two CPU cores. 1 image a step.
"""

_base_ = ['./study.py', './facemask_data.py']

train_pipeline = [_base_.facemask_crop if step['type'] == 'Resize' else step for step in _base_.train_pipeline]
test_pipeline = [
    dict(step, scale=_base_.facemask_scale) if step['type'] == 'Resize' else step for step in _base_.test_pipeline
]
train_dataloader = dict(
    _base_.loading,
    batch_size=1,
    dataset=dict(_base_.facemask, pipeline=train_pipeline, filter_cfg=_base_.facemask_filter),
)
val_dataloader = dict(_base_.loading, batch_size=1, dataset=dict(_base_.facemask, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.facemask_val_annotations)
test_evaluator = val_evaluator

epochs = 32
burn_in = epochs // 4  # of CBN, as in the paper
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=2, end=epochs, T_max=epochs - 2, convert_to_iter_based=True),
]
