"""ResNet-18 with CBN.

With 32 images a GPU k is 1, so this is BN. The rows of the tables with fewer images have larger windows.
"""

_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet_100e.py', '../_base_/imagenet_cbn.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, zero_init_residual=_base_.zero_init_residual))
