"""Training with a window that cannot be wrong: the images of earlier iterations run again under today's weights.

It costs k times as much, and shows what any correction of old statistics, and any gradient through it, can reach.
"""

from collections import deque
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...window.size import suggested_window_size


@HOOKS.register_module()
class RunAgainHook(Hook):
    """BatchNorm over the images of the last k iterations, with the loss of the current ones.

    The backbone and the neck run all images. Only the current ones go on to the head. The images of all iterations
    must have one size. There is no window during burn-in.

    Args:
        burn_in_epochs: Length of the burn-in.
        gradient: Whether the loss sends its gradient through the earlier images, too: the whole gradient of the
            window. Otherwise they only give their statistics, as in the paper: a share of 1 / k of the window depends
            on the current images.
        window_size: k. ``'auto'`` is :func:`suggested_window_size` of the images per step.
    """

    def __init__(self, burn_in_epochs: int, gradient: bool, window_size: int | str = 'auto') -> None:
        self.burn_in_epochs, self.gradient, self.window_size = burn_in_epochs, gradient, window_size
        self._inputs: deque[Tensor] = deque()
        self._has_window = False
        self._current = 0  # images of this iteration; 0 without a window

    def before_train(self, runner: Runner) -> None:
        size = self.window_size
        if size == 'auto':
            size = suggested_window_size(runner.train_dataloader.batch_sampler.batch_size)
        self._inputs = deque(maxlen=int(size) - 1)
        model = runner.model
        model.backbone.register_forward_pre_hook(self._with_old_images)
        model.neck.register_forward_hook(self._without_old_images)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and not self.gradient:
                module.register_forward_pre_hook(self._cut_gradient)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._has_window = runner.epoch >= self.burn_in_epochs

    def _with_old_images(self, backbone: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (images,) = args
        if not backbone.training or not self._has_window:
            self._current = 0
            return args
        self._current = len(images)
        together = torch.cat([images, *self._inputs])
        self._inputs.append(images)
        return (together,)

    def _without_old_images(self, neck: nn.Module, args: tuple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(level[: self._current] for level in outputs) if self._current else outputs

    def _cut_gradient(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        if not self._current:
            return args
        return (torch.cat([x[: self._current], x[self._current :].detach()]),)
