"""The narrow RetinaNet on the photographs of facemask.py."""

_base_ = ['./narrow_retinanet.py', './facemask.py']

model = dict(bbox_head=dict(num_classes=len(_base_.facemask_classes), anchor_generator=dict(octave_base_scale=2)))
