"""Faster R-CNN on one GPU with 2 images. BN is trained in the backbone, whose first stage stays frozen, and the FPN."""

_base_ = './faster-rcnn_r50_fpn_1xb2-1x_coco.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg, norm_eval=False), neck=dict(norm_cfg=norm_cfg))
