"""Group Normalization."""

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
