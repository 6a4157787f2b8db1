"""The small version of the config of configs/cbn that $CBN_ROW names, fine-tuned as on COCO: a narrow ResNet-18.

configs/pretrain/r18_imagenette.py pretrains the backbone, with GN where the row has GN in the backbone, and with BN
elsewhere. 4 images a step. r18_facemask.py and r18_coco128.py have the data.
"""

row = '{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}'
_base_ = ['../cbn/{{$CBN_ROW:faster-rcnn_r50_fpn_cbn-all_1x_coco}}.py', '../_base_/narrow.py']
work_dir = f'./work_dirs/small/{row}_pretrained'

has_gn = _base_.model.backbone.norm_cfg.type == 'GN'
weights = f'work_dirs/pretrain/resnet18_{"gn" if has_gn else "bn"}_4xb32_in1k/epoch_60.pth'
backbone = dict(_base_.narrow_backbone, init_cfg=dict(checkpoint=weights, prefix='backbone.'))
detector = _base_.narrow_faster_rcnn
heads = [detector.neck, detector.roi_head.bbox_head]
if 'mask_head' in _base_.model.roi_head:
    detector.roi_head.update(_base_.narrow_mask_branch)
    heads.append(detector.roi_head.mask_head)
if 'norm_cfg' in _base_ and _base_.norm_cfg.type == 'GN':
    for part in heads + [backbone] * has_gn:
        part.update(norm_cfg=dict(num_groups=_base_.narrow_groups))
model = dict(
    detector,
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=backbone,
)

# Images of this size are read faster than they are handed from one process to another.
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.005))  # 0.02 for 16 images, as in the row
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [dict(_base_.param_scheduler[0], end=50), _base_.param_scheduler[1]]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
