"""The small version of the config of configs/imagenet that $CBN_ROW names: a quarter as wide, on Imagenette.

CBN_ROW=resnet18_cbn_4xb32_in1k python tools/train.py configs/small/r18_imagenette.py

With the paper's learning rate for each image of a step. The schedule has 8 epochs instead of 100.
"""

row = '{{$CBN_ROW:resnet18_bn_4xb32_in1k}}'
_base_ = ['../imagenet/{{$CBN_ROW:resnet18_bn_4xb32_in1k}}.py', '../_base_/imagenette.py']
work_dir = f'./work_dirs/small/{row}_imagenette'

epochs = _base_.imagenette_epochs
norm_cfg = _base_.model.backbone.norm_cfg
if norm_cfg.get('num_groups', 1) > 1:
    norm_cfg = dict(norm_cfg, num_groups=_base_.imagenette_groups)
model = dict(backbone=dict(_base_.imagenette_backbone, norm_cfg=norm_cfg), head=_base_.imagenette_head)
data_preprocessor = dict(num_classes=10)

train_dataloader = dict(
    _base_.imagenette_loading,
    dataset=dict(_base_.imagenette, data_prefix='train', pipeline=_base_.imagenette_train_pipeline),
)
val_dataloader = dict(
    _base_.imagenette_loading,
    dataset=dict(_base_.imagenette, data_prefix='val', pipeline=_base_.imagenette_test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=_base_.imagenette_lr))
param_scheduler = dict(T_max=epochs)
train_cfg = dict(max_epochs=epochs)
custom_hooks = [
    dict(hook, burn_in_epochs=_base_.imagenette_burn_in) if hook['type'] == 'CBNBurnInHook' else hook
    for hook in _base_.get('custom_hooks', [])
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
