"""ResNet-101 in the place of ResNet-50."""

r101 = dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101'))
