"""A plain ResNet of full width for tools/analyze_statistics.py; with --cfg-options model.backbone.depth=50
model.in_channels=2048 it is a ResNet-50."""

_base_ = ['../_base_/varied.py', '../_base_/cbn.py']

custom_imports = dict(imports=['mmdet_cbn', 'mmdet_cbn.experiments.analysis.classifier'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='MultiLabelClassifier',
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(type='ResNet', depth=18, norm_cfg=_base_.norm_cfg, norm_eval=False),
    in_channels=512,
    num_classes=len(_base_.varied_classes),
)
train_dataloader = dict(batch_size=4)
# It predicts nothing.
val_cfg = None
val_dataloader = None
val_evaluator = None
test_cfg = None
test_dataloader = None
test_evaluator = None
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001), clip_grad=None
)
