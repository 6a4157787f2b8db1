"""Batch Normalization over the images of one GPU."""

norm_cfg = dict(type='BN', requires_grad=True)
