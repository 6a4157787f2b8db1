"""The burn-in of Cross-Iteration Batch Normalization, counted by mmengine's Runner."""

import os
import weakref
from collections.abc import Set
from inspect import signature
from typing import Any

from mmengine import fileio
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm

from ..arguments import check_bool, check_int, shown
from ..layers.cbn import CBN
from ..layers.conversion import active_norms
from ..pairing import watch
from ..window import file as window_file
from ..window.size import suggested_window_size
from .model import model_of
from .switch_norm import SwitchNormHook

_ITERS_BETWEEN_READINGS = 50  # of what the layers count: that makes the host wait for the device


@HOOKS.register_module()
class CBNBurnInHook(Hook):
    """Trains CBN layers as BatchNorm (k = 1) until burn-in is over (section 3.3: 3 epochs on COCO).

    Early in training the weights change fast, and old statistics are wrong even after compensation. Burn-in ends by
    the epoch or iteration that the runner counts. So a run that is resumed after the burn-in does not burn in again,
    and a run that is resumed within it ends it at the same point as an uninterrupted run.

    The hook does four more things. It replaces ``window_size='auto'`` by a number. It logs once which layers it found.
    It warns every 50 iterations if inf or NaN came into a layer. It adds two numbers to the training log:
    ``cbn_window``, the longest window of all layers, and ``cbn_without_window``, the number of layers whose window is 1
    (BatchNorm).

    :class:`SwitchNormHook` can be used with it, and can turn layers into CBN, or CBN into others, during training.
    Burn-in still counts from the beginning of the training.

    Args:
        burn_in_epochs: Length of the burn-in in epochs.
        burn_in_iters: Length of the burn-in in iterations. Give one of the two.
        save_window: Whether to save the windows of each process beside each checkpoint, as
            ``<checkpoint>.cbn_window_rank<n>``, and to load them on a resume. Then the resumed run goes on as exactly
            as mmengine itself resumes. Otherwise the windows fill anew within k iterations. The checkpoint itself does
            not change. A file is removed after its checkpoint is (``max_keep_ckpts``). A process saves its own windows
            when it saves the checkpoint. If only one process saves it, or if the run dies just then, the windows of the
            others fill anew.
        diagnostics: Whether to log, every 50 iterations, what :meth:`CBN.diagnosis` of each layer returns:
            ``cbn/<layer>/window_length``, ``correction``, ``invalid`` and ``radial``. They go where mmengine's log
            goes, e.g. TensorBoard or WandB.

    Raises:
        TypeError: A length is not an int, or ``save_window`` or ``diagnostics`` is not a bool.
        ValueError: None or both of the lengths are given, or a length is negative.
        RuntimeError: When training begins: there is no CBN layer to burn in, because the model has none and no
            :class:`SwitchNormHook` makes some, ``sync_bn`` converted them, or none is in training mode;
            ``burn_in_epochs`` meets a training loop that counts no epochs; ``window_size='auto'`` finds no batch size;
            or a file of windows does not fit.
    """

    def __init__(
        self,
        burn_in_epochs: int | None = None,
        burn_in_iters: int | None = None,
        save_window: bool = False,
        diagnostics: bool = False,
    ) -> None:
        if (burn_in_epochs is None) == (burn_in_iters is None):
            raise ValueError(
                'CBNBurnInHook: one of burn_in_epochs and burn_in_iters must be given, '
                f'got burn_in_epochs={shown(burn_in_epochs)} and burn_in_iters={shown(burn_in_iters)}'
            )
        self.by_epoch = burn_in_epochs is not None
        name, length = ('burn_in_epochs', burn_in_epochs) if self.by_epoch else ('burn_in_iters', burn_in_iters)
        self.length = check_int('CBNBurnInHook', name, length, at_least=0)
        self.save_window = check_bool('CBNBurnInHook', 'save_window', save_window)
        self.diagnostics = check_bool('CBNBurnInHook', 'diagnostics', diagnostics)
        self._runner: weakref.ref[Runner] | None = None  # the last
        self._runs_again = False  # it trained or tested before
        self._resumed_from: str | None = None
        self._last_saved: str | None = None  # of windows
        self._begins = True  # the first iteration is to come
        self._layers: dict[str, CBN] = {}  # that are in training
        self._all_layers: dict[str, CBN] = {}
        self._announced: list[Set[str]] = []  # sets of layers
        self._bad_batches: dict[str, int] = {}

    def before_run(self, runner: Runner) -> None:
        """Wrap this runner's ``resume`` and ``save_checkpoint``.

        mmengine has no hook that tells, in all processes, which checkpoint is saved or resumed from.
        """
        self._runs_again = self._runner is not None and self._runner() is runner
        self._runner = weakref.ref(runner)
        if self._runs_again or not self.save_window:
            return
        resume, save_checkpoint = runner.resume, runner.save_checkpoint

        def resume_and_note(filename: str, *args: Any, **kwargs: Any) -> None:
            self._resumed_from = filename
            resume(filename, *args, **kwargs)

        def save_window_and_checkpoint(out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
            # First the windows, so that no checkpoint is without its own if the run dies in between. Processes must not
            # wait for each other here, because a hook may save a checkpoint in one of them alone.
            # Nor does the first process, which saves it, wait for this one.
            window_file.remove_orphans(out_dir, get_rank(), kept=self._last_saved if get_rank() > 0 else None)
            path = window_file.path_of(fileio.join_path(out_dir, filename), get_rank())
            # The checkpoint counts so, and a hook may save it before or after this one's after_train_iter.
            # Another hook may have wrapped the method, too, with a signature that tells less.
            given = signature(type(runner).save_checkpoint).bind(runner, out_dir, filename, *args, **kwargs).arguments
            counted = runner.iter if given.get('by_epoch', True) else runner.iter + 1
            window_file.save(path, self._layers, (given.get('meta') or {}).get('iter', counted))
            self._last_saved = path
            save_checkpoint(out_dir, filename, *args, **kwargs)

        runner.resume, runner.save_checkpoint = resume_and_note, save_window_and_checkpoint

    def before_train(self, runner: Runner) -> None:
        """Check that there is, or will be, something to burn in."""
        if self.by_epoch and self.length > 0 and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise RuntimeError(
                f'CBNBurnInHook: burn_in_epochs={self.length} would never end, because IterBasedTrainLoop counts no '
                'epochs. Use burn_in_iters; '
                f'the train dataloader has {len(runner.train_dataloader)} iterations an epoch.'
            )
        self._begins, self._announced = True, []
        model = model_of(runner)
        switches = any(isinstance(hook, SwitchNormHook) and hook.makes(CBN) for hook in runner.hooks)
        if not switches and not active_norms(model, CBN):
            found = [module for module in model.modules() if isinstance(module, CBN)]
            raise RuntimeError(f'CBNBurnInHook: {_why_there_is_none(found, model, runner.cfg)}')
        self._find_layers(runner)
        # A copy that EMAHook has made is only evaluated. It would watch all convolutions for ever.
        watch.keep_only(layer.finder for layer in self._all_layers.values())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Put every layer into or out of burn-in, and into the next iteration."""
        # SwitchNormHook makes layers as an epoch begins, before or after the hooks of this one are called.
        # Another hook may freeze or unfreeze layers at any time.
        may_be_others = batch_idx == 0 or self._begins
        may_be_others |= any(layer.training != (name in self._layers) for name, layer in self._all_layers.items())
        if may_be_others and active_norms(model_of(runner), CBN) != self._layers:
            self._find_layers(runner)
        if self._begins and self.save_window:
            self._resume_windows(runner)
        self._begins = False
        burn_in = self._done(runner) < self.length
        for layer in self._layers.values():
            layer.burn_in = burn_in
            layer.begin_iteration()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Put the window length into the log, and now and then a warning of inf and NaN, and diagnoses."""
        # A teacher, as of mmdet's SemiBaseDetector, is put into evaluation in its forward.
        lengths = [layer.window_length for layer in self._layers.values() if layer.training]
        runner.message_hub.update_scalars(
            {
                'train/cbn_window': max(lengths, default=1),
                'train/cbn_without_window': sum(length <= 1 for length in lengths),
            }
        )
        if self.every_n_train_iters(runner, _ITERS_BETWEEN_READINGS) or self.is_last_train_iter(runner):
            self._warn_of_bad_batches(runner)
            self._log_diagnoses(runner)

    def _find_layers(self, runner: Runner) -> None:
        """Make the CBN layers of this epoch ready, and say what will happen to them."""
        model = model_of(runner)
        self._layers = active_norms(model, CBN)
        self._bad_batches = {name: norm.bad_batches for name, norm in self._layers.items()}
        self._all_layers = {name: module for name, module in model.named_modules() if isinstance(module, CBN)}
        for layer in self._all_layers.values():
            if layer.window_size == 'auto':
                layer.window_size = suggested_window_size(_images_per_gpu(runner.train_dataloader))
        for layer in self._layers.values():
            layer.diagnose = self.diagnostics
        if self._layers.keys() not in self._announced:
            self._announced.append(self._layers.keys())
            self._announce(runner, frozen=len(self._all_layers) - len(self._layers))

    def _log_diagnoses(self, runner: Runner) -> None:
        for name, layer in self._layers.items():
            diagnosis = layer.diagnosis()
            if diagnosis is not None:
                runner.message_hub.update_scalars(
                    {f'train/cbn/{name}/{key}': v for key, v in diagnosis._asdict().items() if v is not None}
                )

    def _warn_of_bad_batches(self, runner: Runner) -> None:
        counts = {name: layer.bad_batches for name, layer in self._layers.items()}
        new = {name: count - self._bad_batches.get(name, 0) for name, count in counts.items()}
        self._bad_batches = counts
        most = max(new, key=new.__getitem__, default='')
        if new.get(most, 0) > 0:
            runner.logger.warning(
                f'CBN: in the last iterations, inf or NaN came into '
                f"{sum(count > 0 for count in new.values())} of {len(new)} layers, into '{most}' in {new[most]} "
                'iterations. They were left out of windows and running statistics. If that goes on, the weights are '
                'inf or NaN: go back to the last checkpoint, with a lower learning rate or clip_grad in optim_wrapper.'
            )

    def _resume_windows(self, runner: Runner) -> None:
        checkpoint, self._resumed_from = self._resumed_from, None
        if checkpoint is None and runner.iter > 0 and not self._has_windows():
            if runner._resume:  # a FlexibleRunner resumes before it calls hooks
                named = runner._resume if isinstance(runner._resume, str) else runner._load_from
                checkpoint = named or find_latest_checkpoint(runner.work_dir)
            elif not self._runs_again:
                runner.logger.warning(
                    'CBN: the run was resumed before its hooks could tell from which checkpoint, so the windows fill '
                    'anew, within k iterations. Resume with resume=True in the config, or --resume, to load them.'
                )
        if checkpoint is not None:
            self._load_window(runner, window_file.path_of(checkpoint, get_rank()))

    def _load_window(self, runner: Runner, path: str) -> None:
        if '://' not in path:
            path = os.path.expanduser(path)  # as mmengine does for the checkpoint
        if not window_file.exists(path):
            runner.logger.warning(f'CBN: {path} is missing, so the windows fill anew, within k iterations.')
            return
        layers, names = self._layers, dict(model_of(runner).named_modules()).keys()
        count = window_file.load(path, layers, names, runner.iter)
        if count is None:
            runner.logger.warning(
                f'CBN: {path} was not written after {runner.iter} iterations, as the checkpoint was, so the windows '
                'fill anew, within k iterations.'
            )
            return
        runner.logger.info(f'CBN: the windows of {count} of {len(layers)} layers come from {path}.')

    def _has_windows(self) -> bool:
        return any(len(window) > 0 for layer in self._layers.values() for window in layer.windows)

    def _done(self, runner: Runner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    def _announce(self, runner: Runner, frozen: int) -> None:
        layers = list(self._layers.values())
        if not layers:
            runner.logger.info('CBN: no layers in training now: SwitchNormHook changes them.')
            return
        unit, total = ('epoch', runner.max_epochs) if self.by_epoch else ('iteration', runner.max_iters)
        sizes = ', '.join(str(size) for size in sorted({layer.window_size for layer in layers}))
        orders = ', '.join(str(order) for order in sorted({layer.order for layer in layers}))
        runner.logger.info(
            f'CBN: {len(layers)} layers in training{f" ({frozen} more are frozen)" if frozen else ""}, '
            f'window size {sizes}, order {orders}; '
            f'burn-in {"ends" if self._done(runner) < self.length else "ended"} after {unit} {self.length}.'
        )
        if self.length >= total:
            runner.logger.warning(
                f'CBN: the burn-in of {self.length} {unit}s is as long as the training of {total}: '
                'this run trains with BN.'
            )


def _images_per_gpu(dataloader: Any) -> int:
    # A dataloader with a batch sampler of mmdet's own, as AspectRatioBatchSampler, has no batch_size itself.
    size = getattr(dataloader.batch_sampler, 'batch_size', None)
    if not isinstance(size, int) or size < 1:
        raise RuntimeError(
            "CBNBurnInHook: window_size='auto' needs the number of images per GPU, but the batch_sampler "
            f'of train_dataloader has no batch_size (an int >= 1), got {size!r}. Give window_size as a number instead.'
        )
    return size


def _why_there_is_none(found: list[CBN], model: nn.Module, cfg: Any) -> str:
    if found:
        return (
            f'all {len(found)} CBN layers of the model are frozen (norm_eval or frozen_stages), so there is nothing to '
            'burn in. Set norm_eval=False or give other parts of the model the CBN norm_cfg, or take out the hook.'
        )
    if cfg.get('sync_bn') is not None and any(_is_sync_bn(module) for module in model.modules()):
        return (
            f'the model has no CBN layers: sync_bn={cfg.sync_bn!r} turned every kind of BatchNorm, CBN too, into '
            'SyncBN. Take sync_bn out of the config and name SyncBN in the norm_cfg of the layers that shall have it.'
        )
    return (
        "the model has no CBN layers. Give its backbone, neck or heads norm_cfg=dict(type='CBN', requires_grad=True), "
        'or take out the hook.'
    )


def _is_sync_bn(module: nn.Module) -> bool:
    return isinstance(module, SyncBatchNorm) or type(module).__name__ == 'SyncBatchNorm'  # the latter is mmcv's own
