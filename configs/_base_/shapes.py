"""The drawn shapes of tools/make_shapes.py, under data/shapes or $SHAPES_ROOT."""

shapes_classes = ('circle', 'square', 'triangle', 'star')
shapes_root = '{{$SHAPES_ROOT:data/shapes}}'
shapes = dict(
    data_root=shapes_root,
    metainfo=dict(classes=shapes_classes, palette=[(220, 20, 60), (0, 110, 230), (0, 160, 60), (250, 170, 30)]),
)
shapes_val_annotations = shapes_root + '/annotations/instances_val2017.json'
