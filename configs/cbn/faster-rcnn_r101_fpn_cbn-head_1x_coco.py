_base_ = ['./faster-rcnn_r50_fpn_cbn-head_1x_coco.py', '../_base_/r101.py']

model = dict(backbone=_base_.r101)
