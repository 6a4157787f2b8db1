"""What every row of the paper's tables shares (section 4.2): COCO, 4 images per GPU, the 1x schedule.

COCO lies under data/coco or $COCO_ROOT.
"""

_base_ = [
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmdet_cbn'], allow_failed_imports=False)

data_root = '{{$COCO_ROOT:data/coco}}'

train_dataloader = dict(batch_size=4, num_workers=4, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator

# Each GPU has running statistics of its own: one validates and saves what they are on average.
default_hooks = dict(sync_buffers=dict(type='SyncBuffersHook'))
