"""BN also in conv3_x to conv5_x of the backbone; conv1 and conv2_x stay frozen."""

_base_ = './faster-rcnn_r50_fpn_bn-head_1x_coco.py'

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False))
