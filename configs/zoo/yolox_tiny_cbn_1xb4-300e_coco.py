"""YOLOX-tiny on one GPU with 4 images, CBN everywhere. mmdet's config has BN on 8 GPUs with 8 images each."""

_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)
norm_cfg = dict(type='CBN', window_size='auto')  # momentum and eps are those of the BN that it replaces
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg), bbox_head=dict(norm_cfg=norm_cfg))
custom_hooks = [*_base_.custom_hooks, dict(type='CBNBurnInHook', burn_in_epochs=_base_.max_epochs // 4)]

# The learning rate is proportional to the images of a step.
base_lr = _base_.base_lr * 4 / 64
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], eta_min=base_lr * 0.05),
    _base_.param_scheduler[2],
]
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=4)
