"""The drawn shapes of tools/make_shapes.py, under data/shapes or $SHAPES_ROOT."""

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

shapes_warmup = 50
# Two: mmengine deletes the oldest before it writes the next.
shapes_default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
shapes_randomness = dict(seed=0)
