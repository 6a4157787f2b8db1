"""r18_facemask.py for rows with BN, which evaluates with statistics that are taken anew.

CBN_ROW=faster-rcnn_r50_fpn_bn-all_1x_coco python tools/train.py configs/small/r18_facemask_population.py
"""

_base_ = './r18_facemask.py'
work_dir = f'{_base_.work_dir}_population'

custom_imports = dict(imports=['mmdet_cbn', 'mmdet_cbn.experiments.study.population'], allow_failed_imports=False)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='PopulationStatisticsHook')]
