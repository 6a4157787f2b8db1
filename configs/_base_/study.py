"""What all trainings of the study of small batches share, on two CPU cores: AdamW, and images that are small."""

_base_ = ['mmdet::_base_/datasets/coco_detection.py', 'mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)

# Images of this size are read faster than they are handed from one process to another.
loading = dict(num_workers=0, persistent_workers=False)

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.02),
    clip_grad=dict(max_norm=10),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=100))
randomness = dict(seed=0)
