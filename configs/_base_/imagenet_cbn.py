"""CBN as the paper runs it on ImageNet (section 4.1): k by its rule, burn-in for 25 of 100 epochs."""

_base_ = './cbn.py'

norm_cfg = dict(window_size='auto')
custom_hooks = [dict(_base_.custom_hooks[0], burn_in_epochs=25)]
