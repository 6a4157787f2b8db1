"""GN also in the backbone, from a ResNet-50 pretrained with GN and its own image normalization (BGR, not scaled)."""

_base_ = './faster-rcnn_r50_fpn_gn-head_1x_coco.py'

model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(norm_cfg=_base_.norm_cfg, init_cfg=dict(checkpoint='open-mmlab://detectron/resnet50_gn')),
)
