"""A RetinaNet that trains from scratch on two CPU cores: ResNet-18 of a quarter of its width, three levels."""

_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

narrow_channels = 48
model = dict(
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=narrow_channels, num_outs=3),
    bbox_head=dict(
        in_channels=narrow_channels,
        feat_channels=narrow_channels,
        stacked_convs=1,
        anchor_generator=dict(octave_base_scale=2.5, scales_per_octave=2, ratios=[1.0], strides=[8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300),
)
