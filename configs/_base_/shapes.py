"""The drawn shapes of tools/make_shapes.py, under data/shapes or $SHAPES_ROOT, and a schedule of a few minutes."""

shapes_root = '{{$SHAPES_ROOT:data/shapes}}'
shapes = dict(
    data_root=shapes_root,
    metainfo=dict(
        classes=('circle', 'square', 'triangle', 'star'),
        palette=[(220, 20, 60), (0, 110, 230), (0, 160, 60), (250, 170, 30)],
    ),
)
shapes_num_classes = 4
shapes_val_annotations = shapes_root + '/annotations/instances_val2017.json'

shapes_epochs = 7
shapes_schedule = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, end=shapes_epochs, milestones=[5], gamma=0.1),
]
shapes_hooks = [dict(type='CBNBurnInHook', burn_in_epochs=1)]
shapes_default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
shapes_randomness = dict(seed=0)
