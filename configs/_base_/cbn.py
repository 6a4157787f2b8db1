"""CBN as the paper runs it on COCO with 4 images per GPU (section 4.2): k = 4, burn-in for 3 epochs.

The gradient is that of the authors' code, not our default (docs/method.md#gradient-of-the-window).
"""

norm_cfg = dict(type='CBN', requires_grad=True, window_size=4, gradient='batch')
custom_hooks = [dict(type='CBNBurnInHook', burn_in_epochs=3)]
