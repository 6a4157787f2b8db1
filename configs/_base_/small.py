"""What makes a recipe of configs/cbn small enough for two CPU cores; the configs of configs/small put it in."""

small_channels = 64
small_model = dict(
    backbone=dict(depth=18, base_channels=32, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=small_channels),
    rpn_head=dict(in_channels=small_channels, feat_channels=small_channels),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
small_box_branch = dict(
    bbox_roi_extractor=dict(out_channels=small_channels),
    bbox_head=dict(in_channels=small_channels, conv_out_channels=small_channels, fc_out_channels=256),
)
small_mask_branch = dict(
    mask_roi_extractor=dict(out_channels=small_channels),
    mask_head=dict(in_channels=small_channels, conv_out_channels=small_channels),
)
small_scale = (256, 160)
small_batch_size = 2
# Within a few minutes from scratch AdamW gets further than SGD.
small_optimizer = dict(_delete_=True, type='AdamW', lr=0.0004, weight_decay=0.05)
