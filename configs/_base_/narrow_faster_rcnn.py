"""A Faster R-CNN with a 4conv1fc head that trains from scratch on two CPU cores."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', './narrow.py']

narrow_channels = _base_.narrow_channels
model = dict(
    backbone=_base_.narrow_backbone,
    neck=dict(_base_.narrow_neck, num_outs=4),
    rpn_head=dict(
        in_channels=narrow_channels,
        feat_channels=narrow_channels,
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=narrow_channels, featmap_strides=[4, 8, 16]),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=narrow_channels,
            conv_out_channels=narrow_channels,
            fc_out_channels=128,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
