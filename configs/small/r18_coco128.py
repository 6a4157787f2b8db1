"""r18_pretrained.py on 128 images of COCO's train split, data/coco128 or $COCO128_ROOT: 96 to train, 32 to evaluate.

python tools/train.py configs/pretrain/r18_imagenette.py
CBN_ROW=mask-rcnn_r50_fpn_gn-head_1x_coco python tools/train.py configs/small/r18_coco128.py
"""

_base_ = './r18_pretrained.py'
work_dir = f'./work_dirs/small/{_base_.row}_coco128'

coco128 = dict(
    data_root='{{$COCO128_ROOT:data/coco128}}',
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
)
scale = (320, 240)
train_pipeline, test_pipeline = (
    [dict(step, scale=scale) if step['type'] == 'Resize' else step for step in pipeline]
    for pipeline in (_base_.train_pipeline, _base_.test_pipeline)
)
# The annotation file has all images, so the evaluation takes the truth from the images that it sees.
test_pipeline[-1].update(meta_keys=(*test_pipeline[-1].meta_keys, 'instances'))
train_dataloader = dict(dataset=dict(coco128, indices=96, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(coco128, indices=-32, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator
