"""BN in FPN and box head, which becomes SyncBN after 8 of the 12 epochs."""

_base_ = './faster-rcnn_r50_fpn_bn-head_1x_coco.py'

custom_hooks = [dict(type='SwitchNormHook', epoch=8, source='BN', to='SyncBN')]
