"""Batch Renormalization with the schedule of its own paper."""

norm_cfg = dict(type='BRN', requires_grad=True)
