"""Photographs of faces with and without masks, under data/facemask or $FACEMASK_ROOT."""

# The third class, a mask worn incorrectly, has too few faces to learn from.
facemask_classes = ('with_mask', 'without_mask')
facemask_root = '{{$FACEMASK_ROOT:data/facemask}}'
facemask = dict(data_root=facemask_root, metainfo=dict(classes=facemask_classes))
facemask_val_annotations = facemask_root + '/annotations/instances_val2017.json'
facemask_crop = dict(type='RandomCrop', crop_size=(128, 128))
facemask_filter = dict(min_size=128)
facemask_scale = (400, 400)  # for evaluation, of whole images
