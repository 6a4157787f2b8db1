_base_ = './retinanet_r18_fpn_bn_facemask.py'

custom_imports = dict(imports=['mmdet_cbn', 'mmdet_cbn.experiments.study.population'], allow_failed_imports=False)
custom_hooks = [dict(type='PopulationStatisticsHook')]
