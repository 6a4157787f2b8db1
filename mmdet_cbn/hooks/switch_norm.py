"""Training with one normalizer at first and another one later (Table 7: BN, then SyncBN)."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from ..arguments import check_int, check_names, shown
from ..layers.conversion import active_norms, convert_all, convert_in_place, select
from ..requirements import wanted
from .model import model_of

_OF_DIMENSIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@HOOKS.register_module()
class SwitchNormHook(Hook):
    """Turns the active normalizers of one type into another when an epoch begins (Table 7, section 4.3).

    The layers change in place. So weights, running statistics, hooks and the state of the optimizer stay. A checkpoint
    has the same keys before and after, and a resumed run has the normalizer of its epoch. Layers that are not in
    training (``norm_eval``, ``frozen_stages``) do not change. The copy of an EMAHook does not change either, because it
    is only evaluated. Several of these hooks can follow each other, e.g. BN, then CBN, then SyncBN: list them in the
    order of their epochs. :class:`CBNBurnInHook` can be used with them, in any order.

    The hook needs mmcv.

    Args:
        epoch: How many epochs are trained before the switch, as in mmengine's ``milestones`` and mmdet's
            ``PipelineSwitchHook``. With 8, the switch comes when the ninth epoch begins; with 0, before the first
            iteration. mmengine's IterBasedTrainLoop counts no epochs, so there 0 alone is allowed.
        to: Type of the new normalizer in mmengine's registry, or a ``norm_cfg`` with more arguments. If it does not
            give eps, momentum, affine or track_running_stats, the old layer's are used.
        source: Type of the normalizers to switch. Subclasses of it do not count.
        prefixes: Names of the modules to switch in, e.g. ``'roi_head'``; None for all.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The epoch is negative; a type is not registered, or is not a kind of BatchNorm. When training
            begins: the model, or a module named in ``prefixes``, has no active layer of type ``source``, or one of
            another eps than ``to`` gives.
        RuntimeError: When training begins: ``epoch`` is not 0 and the training loop counts no epochs, or this hook is
            listed before one that makes layers of type ``source``.
    """

    def __init__(
        self,
        epoch: int,
        to: str | dict[str, Any] = 'SyncBN',
        source: str = 'BN',
        prefixes: str | Sequence[str] | None = None,
    ) -> None:
        self.epoch = check_int('SwitchNormHook', 'epoch', epoch, at_least=0)
        check_names('SwitchNormHook', 'prefixes', prefixes)
        if not isinstance(to, str | dict):
            raise TypeError(f'SwitchNormHook: to must be a name or a norm_cfg, got {shown(to)}')
        self.to: dict[str, Any] = to if isinstance(to, dict) else dict(type=to)
        if not self.to.get('requires_grad', True):
            raise ValueError('SwitchNormHook: requires_grad of to must be True, got False: parameters stay as they are')
        # That they can be built is seen now, not in the middle of training.
        old, new = _build('source', dict(type=source), nn.BatchNorm2d(1)), _build('to', self.to, nn.BatchNorm2d(1))
        self._kinds = type(old), type(new)
        if any(isinstance(new, kind) and not isinstance(old, kind | SyncBatchNorm) for kind in _OF_DIMENSIONS):
            raise ValueError(
                f'SwitchNormHook: to must take the inputs that source={source!r} takes, got {to!r}, '
                'which is for inputs of other dimensions'
            )
        try:
            convert_in_place(old, new)
        except ValueError as error:
            raise ValueError(
                f'SwitchNormHook: to must have the parameters and buffers of source={source!r}, got {to!r} ({error})'
            ) from error
        self.source = source
        self.prefixes = prefixes
        self._switched: weakref.ref[nn.Module] | None = None  # the model

    def makes(self, kind: type[nn.Module]) -> bool:
        """Whether layers become ``kind``, or a subclass of it."""
        return issubclass(self._kinds[1], kind)

    def before_train(self, runner: Runner) -> None:
        """Say what will happen, or why nothing can."""
        if self.epoch > 0 and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise RuntimeError(
                f'SwitchNormHook: epoch={self.epoch} would never come, because IterBasedTrainLoop counts no epochs. '
                'Train by epochs, or switch before the first iteration with epoch=0.'
            )
        if self._has_switched(runner):  # in an earlier call of runner.train()
            return
        others = [hook for hook in runner.hooks if isinstance(hook, SwitchNormHook) and hook is not self]
        makers = [hook for hook in others if hook.makes(self._kinds[0]) and hook.epoch <= self.epoch]
        if any(runner.hooks.index(hook) > runner.hooks.index(self) for hook in makers):
            raise RuntimeError(
                f'SwitchNormHook: the hook with source={self.source!r} and epoch={self.epoch} is listed before the one '
                f'that makes layers of {self.source}. List the hooks in the order of their epochs.'
            )
        if makers:
            plan = f'after {self.epoch} epochs, layers of {self.source} become {self.to["type"]}.'
        else:
            layers = self._find(runner)
            self._check_eps(layers)
            plan = f'{len(layers)} layers are {self.source} for the first {self.epoch} epochs, then {self.to["type"]}.'
        runner.logger.info(f'SwitchNormHook: {plan}')
        if self.epoch >= runner.max_epochs:
            runner.logger.warning(
                f'SwitchNormHook: the switch after {self.epoch} epochs will not come in a training of '
                f'{runner.max_epochs}.'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch, if it is time and has not been done."""
        if runner.epoch < self.epoch or self._has_switched(runner):
            return
        layers = self._find(runner)
        convert_all(layers.values(), lambda layer: _build('to', self.to, layer))
        runner.logger.info(
            f'SwitchNormHook: after {runner.epoch} epochs, {len(layers)} layers of {self.source} became '
            f'{self.to["type"]}.'
        )
        self._switched = weakref.ref(model_of(runner))

    def _has_switched(self, runner: Runner) -> bool:
        return self._switched is not None and self._switched() is model_of(runner)

    def _check_eps(self, layers: Mapping[str, _BatchNorm]) -> None:
        """Where there is no hook, as in tools/test.py, the layers have the eps that they began with."""
        eps = self.to.get('eps')
        others = {layer.eps for layer in layers.values()} - {eps}
        if eps is not None and others:
            raise ValueError(
                f'SwitchNormHook: eps of to must be the eps of the old layers, {min(others)}, because a test knows no '
                f'hook; got {eps}. Give it in the norm_cfg of the model.'
            )

    def _find(self, runner: Runner) -> Mapping[str, _BatchNorm]:
        model = model_of(runner)
        of_type = {name: norm for name, norm in active_norms(model).items() if type(norm) is self._kinds[0]}
        return select(of_type, self.prefixes, f'SwitchNormHook: source={self.source!r}')


def _build(argument: str, norm_cfg: Any, like: _BatchNorm) -> _BatchNorm:
    """A normalizer with what ``norm_cfg`` gives, the rest as in ``like``."""
    try:  # here and not above, because the layers and the burn-in do without mmcv
        from mmcv.cnn import build_norm_layer
    except ImportError as error:
        raise ImportError(f'SwitchNormHook needs {wanted("mmcv")} ({error})') from error

    shared = {name: getattr(like, name) for name in ('eps', 'momentum', 'affine', 'track_running_stats')}
    if like.affine and like.bias is None:
        shared['bias'] = False
    try:
        layer = build_norm_layer({**shared, **norm_cfg}, like.num_features)[1]
    except Exception as error:  # whatever mmcv, or a normalizer of anyone's, has against it
        raise ValueError(
            f'SwitchNormHook: {argument} must be a registered normalizer with the arguments of BatchNorm, '
            f'got {shown(norm_cfg)} ({str(error) or type(error).__name__})'
        ) from error
    return layer
