"""Inception-v3, which hard-codes its BN, on images of 299x299 as mmpretrain has it."""

_base_ = ['mmpretrain::_base_/models/inception_v3.py', './imagenet_100e.py']

model = dict(backbone=dict(_delete_=True, type='WithNorm', model=dict(type='mmpretrain.InceptionV3', num_classes=1000)))

of_its_size = dict(RandomResizedCrop=dict(scale=299), ResizeEdge=dict(scale=342), CenterCrop=dict(crop_size=299))
train_pipeline = [dict(step, **of_its_size.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **of_its_size.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
