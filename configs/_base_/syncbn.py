"""Batch Normalization over the images of all GPUs."""

norm_cfg = dict(type='SyncBN', requires_grad=True)
