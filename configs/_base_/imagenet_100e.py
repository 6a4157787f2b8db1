"""What every row of the paper's ImageNet tables shares (section 4.1): 4 GPUs, 32 images each, 100 epochs.

ImageNet lies under data/imagenet or $IMAGENET_ROOT, as mmpretrain wants it. It needs mmpretrain.
"""

_base_ = ['mmpretrain::_base_/datasets/imagenet_bs32.py', 'mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)

data_root = '{{$IMAGENET_ROOT:data/imagenet}}'
# The latter two as mmpretrain's own tools set them.
train_dataloader = dict(dataset=dict(data_root=data_root), pin_memory=True, persistent_workers=True)
val_dataloader = dict(dataset=dict(data_root=data_root), pin_memory=True, persistent_workers=True)
test_dataloader = val_dataloader

# Of ResNets. In all layers gamma is 1 at the start (section 3.1).
zero_init_residual = False

# 0.1 for 32 images a GPU. The weight decay is for all weights, those of the normalizers too.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001))
param_scheduler = dict(type='CosineAnnealingLR', T_max=100, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Each GPU has running statistics of its own: one validates and saves what they are on average.
# All 100 checkpoints of a run would take 9 GB with ResNet-18, and 110 GB with VGG-16.
default_hooks = dict(sync_buffers=dict(type='SyncBuffersHook'), checkpoint=dict(max_keep_ckpts=2))
