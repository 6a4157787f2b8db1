"""What makes a recipe of configs/imagenet small enough for two CPU cores: a quarter of the width, and Imagenette.

Imagenette has ten classes of ImageNet. It lies under data/imagenette or $IMAGENETTE_ROOT, in the folders train and val.
"""

# mmpretrain's default: in the last normalizer of each residual block gamma is 0 at the start. Our study has it.
imagenette_backbone = dict(stem_channels=16, base_channels=16, zero_init_residual=True)
imagenette_head = dict(num_classes=10, in_channels=128, topk=1)
imagenette_groups = 8  # of Group Normalization: 2 to 16 channels each
imagenette_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=96),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
imagenette_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=112, edge='short'),
    dict(type='CenterCrop', crop_size=96),
    dict(type='PackInputs'),
]
imagenette = dict(_delete_=True, type='CustomDataset', data_root='{{$IMAGENETTE_ROOT:data/imagenette}}')
# Images of this size are read faster than they are handed from one process to another.
imagenette_loading = dict(num_workers=0, persistent_workers=False, pin_memory=False)
imagenette_epochs = 8
imagenette_burn_in = 2  # a quarter, as in the paper
imagenette_lr = 0.025  # for 32 images: for each image as much as 0.1 for 32 on each of 4 GPUs
