"""Inception-v3, which hard-codes its BN, on images of 299x299 as mmpretrain has it."""

_base_ = ['mmpretrain::_base_/models/inception_v3.py', './imagenet_100e.py']

model = dict(backbone=dict(_delete_=True, type='WithNorm', model=dict(type='mmpretrain.InceptionV3', num_classes=1000)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=299),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=342, edge='short'),
    dict(type='CenterCrop', crop_size=299),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
