_base_ = ['../_base_/varied.py', '../_base_/bn.py']

custom_imports = dict(imports=['mmdet_cbn', 'mmdet_cbn.experiments.study.no_drift'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=_base_.norm_cfg), neck=dict(norm_cfg=_base_.norm_cfg))
custom_hooks = [dict(type='RunAgainHook', burn_in_epochs=_base_.burn_in, gradient=True)]
