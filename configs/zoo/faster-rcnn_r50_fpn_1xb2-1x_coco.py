"""Faster R-CNN on one GPU with 2 images: mmdet's config, at the learning rate for 2 images. BN is frozen."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=2)
