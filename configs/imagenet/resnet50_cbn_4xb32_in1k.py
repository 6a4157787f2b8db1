"""ResNet-50 with CBN and a burn-in of 25 epochs."""

_base_ = ['mmpretrain::_base_/models/resnet50.py', '../_base_/imagenet_100e.py', '../_base_/cbn.py']

model = dict(backbone=dict(norm_cfg=dict(_base_.norm_cfg, window_size='auto')))
custom_hooks = [dict(_base_.custom_hooks[0], burn_in_epochs=25)]
