"""Faster R-CNN on one GPU with 2 images. CBN in the backbone, whose first stage stays frozen, and the FPN."""

_base_ = './faster-rcnn_r50_fpn_1xb2-1x_coco.py'

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)
norm_cfg = dict(type='CBN', requires_grad=True, window_size='auto')
model = dict(backbone=dict(norm_cfg=norm_cfg, norm_eval=False), neck=dict(norm_cfg=norm_cfg))
custom_hooks = [dict(type='CBNBurnInHook', burn_in_epochs=3)]  # of 12
