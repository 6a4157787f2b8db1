"""BatchNorm evaluated with the statistics of many training images under the final weights (precise BatchNorm).

The running average of BatchNorm mixes the statistics of weights that have changed since. Here they are taken anew
before each evaluation.
"""

from itertools import islice

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...arguments import check_int
from ...hooks.model import model_of
from ...layers.conversion import active_norms


@HOOKS.register_module()
class PopulationStatisticsHook(Hook):
    """Takes the running statistics of BatchNorm anew after each epoch that is evaluated, before its checkpoint.

    They become the average over ``batches`` batches of the training's own size, as the train dataloader gives them.

    Args:
        batches: Over how many batches.

    Raises:
        TypeError: ``batches`` is not an int.
        ValueError: ``batches`` is less than 1.
        RuntimeError: When training begins: an active batch normalizer is neither BatchNorm nor SyncBatchNorm. The extra
            batches would change what it remembers.
    """

    def __init__(self, batches: int = 200) -> None:
        self.batches = check_int('PopulationStatisticsHook', 'batches', batches, at_least=1)

    def before_train(self, runner: Runner) -> None:
        """Refuse other normalizers."""
        for name, norm in active_norms(model_of(runner)).items():
            if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
                raise RuntimeError(f'PopulationStatisticsHook is for BatchNorm alone, but {name!r} is {norm}')

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.every_n_epochs(runner, runner.train_loop.val_interval) and not self.is_last_train_epoch(runner):
            return
        model = model_of(runner)
        norms = list(active_norms(model).values())
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average
        with torch.no_grad():
            for data in islice(runner.train_dataloader, self.batches):
                model(**model.data_preprocessor(data, training=True), mode='loss')
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
