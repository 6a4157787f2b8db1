"""What makes a detector narrow enough to train from scratch on two CPU cores: a quarter of a ResNet-18's width."""

narrow_channels = 48
narrow_backbone = dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None)
narrow_neck = dict(in_channels=[16, 32, 64, 128], out_channels=narrow_channels)
