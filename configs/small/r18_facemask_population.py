"""The same; BN evaluates with statistics that are taken anew."""

_base_ = './r18_facemask.py'
work_dir = f'{_base_.work_dir}_population'

custom_imports = dict(imports=['mmdet_cbn', 'mmdet_cbn.experiments.analysis.population'], allow_failed_imports=False)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='PopulationStatisticsHook')]
