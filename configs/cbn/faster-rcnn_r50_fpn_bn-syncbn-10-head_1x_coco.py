_base_ = './faster-rcnn_r50_fpn_bn-syncbn-8-head_1x_coco.py'

custom_hooks = [dict(_base_.custom_hooks[0], epoch=10)]
