"""A RetinaNet of three levels that trains from scratch on two CPU cores."""

_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './narrow.py']

narrow_channels = _base_.narrow_channels
model = dict(
    backbone=_base_.narrow_from_scratch,
    neck=dict(_base_.narrow_neck, num_outs=3),
    bbox_head=dict(
        in_channels=narrow_channels,
        feat_channels=narrow_channels,
        stacked_convs=1,
        anchor_generator=dict(octave_base_scale=2.5, scales_per_octave=2, ratios=[1.0], strides=[8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300),
)
