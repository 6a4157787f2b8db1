_base_ = ['../_base_/facemask_retinanet.py', '../_base_/cbn.py']

norm_cfg = dict(_base_.norm_cfg, window_size='auto')
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg))
custom_hooks = [dict(_base_.custom_hooks[0], burn_in_epochs=_base_.burn_in)]
