"""What makes a detector narrow enough to train on two CPU cores: a quarter of a ResNet-18's width."""

narrow_channels = 48
narrow_backbone = dict(depth=18, base_channels=16)
narrow_from_scratch = dict(narrow_backbone, frozen_stages=-1, norm_eval=False, init_cfg=None)
narrow_groups = 8  # of Group Normalization: the layers have 16 to 128 channels
narrow_neck = dict(in_channels=[16, 32, 64, 128], out_channels=narrow_channels)
narrow_faster_rcnn = dict(
    neck=dict(narrow_neck, num_outs=4),
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
narrow_mask_branch = dict(
    mask_roi_extractor=dict(out_channels=narrow_channels, featmap_strides=[4, 8, 16]),
    mask_head=dict(in_channels=narrow_channels, conv_out_channels=narrow_channels),
)
