"""The normalizer: Cross-Iteration Batch Normalization (Yao et al., Cross-Iteration Batch Normalization)."""

import logging
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from . import compiled
from .arguments import check_bool, check_choice, check_device_and_dtype, check_int, check_names, check_real, shown
from .calls import Call, CallWindows, recall
from .conversion import active_norms, become, under
from .convolution import ConvCall, ConvFinder, unsupported_because
from .errors import refuse_data_parallel, title_of
from .normalization import WindowNorm, runs_again
from .old_torch import IS_BEFORE_2_8, is_autocast_enabled, is_compiling, outside_graphs
from .statistics import (
    CompensatedStatistics,
    NaiveStatistics,
    SampledStatistics,
    SecondOrderStatistics,
    batch_statistics,
    compensate,
    compensate_samples,
    compensate_second_order,
    pad_samples,
    sampled_statistics,
    second_order_gradients,
    statistics_gradients,
    window_statistics,
)

Model = TypeVar('Model', bound=nn.Module)

_is_exporting = getattr(torch.compiler, 'is_exporting', bool)  # a torch without it: never


class Diagnosis(NamedTuple):
    """How far a layer relied on its compensation."""

    window_length: int  #: Over how many iterations the last training forward averaged.
    correction: float  #: Mean distance that compensation moved the old means, in sigma of the current batch.
    invalid: float  #: Share of the old variances, from 0 to 1, that the maximum of Eq. 10 kept from being negative.


_REMEDY = (
    "Use order=0 (Naive CBN), which needs no convolution, or type='BN', in the norm_cfg of this layer; "
    'or call the layer as norm(conv(x)) with a torch.nn.Conv2d.'
)
if IS_BEFORE_2_8:
    _REMEDY += (
        ' Under torch.compile the layer does not see the call: train one step without torch.compile before, or use '
        'torch >= 2.8.'
    )


@MODELS.register_module()
class CBN(nn.BatchNorm2d):
    """Batch normalization over the last k iterations, corrected for the change of the weights since then.

    In training the mean and variance are those of the current batch and of the ``window_size - 1`` iterations before it
    on the same GPU. The earlier ones are moved to the current weights of the convolution that feeds the layer by a
    Taylor polynomial of first order (Eq. 7 to 12, Algorithm 1). The layer finds that convolution by itself:
    ``norm(conv(x))`` is all that is needed.

    Everything else is ``nn.BatchNorm2d``: evaluation, running statistics (see ``running_stats``), parameters,
    checkpoints, and training with ``window_size=1``, during burn-in, or on an empty input. The window is no part of the
    state dict and fills anew after loading, unless :class:`CBNBurnInHook` keeps it for a resumed run.

    Where the paper is silent: statistics of inf or NaN enter neither the window nor the running statistics. With
    ``order`` 1 or 2 a bias of the convolution cancels and receives no gradient. Statistics are float32 or better,
    whatever the precision of the input. A layer that is called several times an iteration (a head shared by the levels
    of an FPN, a norm behind two convolutions) keeps a window for each call, in their order. An iteration ends with a
    backward pass through the layer, so that with gradient accumulation the micro-batches count. Double backward is not
    supported.

    Args:
        num_features: C of an input of [N, C, H, W].
        eps: Added to the variance; larger than 0.
        momentum: Weight of the current batch in the running statistics; None for their cumulative average.
        affine: Whether to learn gamma and beta.
        track_running_stats: Whether to keep running statistics.
        window_size: The paper's k, the current iteration included. ``'auto'`` stands for
            min(ceil(16 / images per GPU), 8) (section 4.3), which :class:`CBNBurnInHook` puts in from the train
            dataloader.
        order: 1 for the paper's compensation; 0 for none (Naive CBN), which needs no convolution; 2 for a Taylor
            polynomial of second order (Table 9), which is exact for the layer, and slow: it keeps the covariance of the
            patches, (C_in / groups kh kw)^2 numbers for each group and earlier iteration.
        samples: None for the paper's compensation by gradients at all positions. A number, as 64, for one by so many
            positions of each iteration, drawn at random: mean and variance change as they do at these. It needs no
            gradient and has no error from ending the Taylor series, but one from sampling: with all positions it is
            exact for the layer (second order), and as the number grows it tends to that. Random numbers are drawn from
            a stream of the layer's own, of ``torch.initial_seed()``.
        running_stats: Which statistics the running averages record in training: ``'window'``, those that the layer
            normalized with, so that evaluation scales as training did: their variance contains the one between
            iterations; or ``'batch'``, those of the current batch, as in BatchNorm and in the authors' code.
        device: Of parameters and buffers, as in torch.
        dtype: Of parameters and buffers, as in torch.

    Attributes:
        burn_in (bool): While True, train as ``nn.BatchNorm2d`` (k = 1). :class:`CBNBurnInHook` sets it.
        window_length (int): Over how many iterations the last training forward averaged; 0 before the first.
        diagnose (bool): While True, what :meth:`diagnosis` returns is computed, at the cost of some small operators.
            :class:`CBNBurnInHook` sets it where ``diagnostics=True``.

    Shape:
        [N, C, H, W] to [N, C, H, W].

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument of a value that is not allowed; in training, one value a channel, as in torch.
        RuntimeError: In training, an input of another number of channels; in ``torch.nn.DataParallel``, whose replicas
            cannot keep a window; in a checkpointed block, if it cannot be known which of several calls runs again; in
            the first training forward with ``order`` 1 or 2, if no supported convolution feeds the layer, or if
            torch < 2.8 compiles it; in training with ``window_size='auto'``, if nothing has put in a number; in
            training under ``torch.export``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        window_size: int | Literal['auto'] = 4,
        order: int = 1,
        samples: int | None = None,
        running_stats: Literal['batch', 'window'] = 'window',
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        num_features = check_int('CBN', 'num_features', num_features, at_least=1)
        eps = check_real('CBN', 'eps', eps, 'a number > 0', lambda value: value > 0)
        if momentum is not None:
            allowed = 'a number from 0 to 1 or None'
            momentum = check_real('CBN', 'momentum', momentum, allowed, lambda value: 0 <= value <= 1)
        affine = check_bool('CBN', 'affine', affine)
        track_running_stats = check_bool('CBN', 'track_running_stats', track_running_stats)
        check_device_and_dtype('CBN', device, dtype)
        order = check_int('CBN', 'order', order, at_least=0)
        if order > 2:
            raise ValueError(f'CBN: order must be 0 (Naive CBN), 1 or 2 (of the Taylor polynomial), got {shown(order)}')
        if samples is not None:
            samples = check_int('CBN', 'samples', samples, at_least=2, alternative=' or None')
            if order != 1:
                raise ValueError(f'CBN: samples must be None with order={order}, got {samples}; they go with order=1')
        check_choice('CBN', 'running_stats', running_stats, ('batch', 'window'))
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.order = order
        self.samples = samples
        self.running_stats = running_stats
        # Its own, so that no other stream of random numbers is touched; of a seeded run always the same.
        self._random = random.Random(torch.initial_seed())
        self.burn_in = False
        self.window_length = 0
        self.diagnose = False
        self._has_warned = False
        self._finder = ConvFinder()
        # On the device: the host must not wait for them.
        self._bad_batches = torch.zeros((), dtype=torch.long, device=device)
        self._diagnosed: Tensor | None = None
        self.window_size = window_size

    @classmethod
    def convert_batchnorm(cls, module: Model, prefixes: str | Sequence[str] | None = None, **arguments: Any) -> Model:
        """Make the active BatchNorms of a built model CBN, as ``SyncBatchNorm.convert_sync_batchnorm`` does.

        For models that know no ``norm_cfg``. Active are those that train: not the ones that ``module.train()`` itself
        puts into evaluation (mmdet's ``norm_eval`` and ``frozen_stages``), nor those that are in evaluation while
        ``module`` is in training. The layers change in place and keep parameters, statistics, hooks and mode, so an
        optimizer made before keeps them too.

        Args:
            module: A model with ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` layers, or one of them itself.
            prefixes: Names of the parts to convert, as in ``named_modules``; None for all.
            **arguments: ``window_size``, ``order``, ``samples`` and ``running_stats`` of the new layers; the others are
                the old layers'.

        Returns:
            ``module``.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: No active BatchNorm in the model, or none under one of the prefixes; or a value that is not
                allowed.
        """
        check_names('CBN.convert_batchnorm', 'prefixes', prefixes)
        found = {
            name: norm
            for name, norm in active_norms(module).items()
            if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and not isinstance(norm, CBN)
        }
        for norm in under(prefixes, found, 'CBN.convert_batchnorm').values():
            shared = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
            become(norm, cls(*shared, **arguments))
        return module

    @property
    def window_size(self) -> int | Literal['auto']:
        """The paper's k. Setting it empties the window."""
        return self._window_size

    @window_size.setter
    def window_size(self, window_size: int | Literal['auto']) -> None:
        if not isinstance(window_size, str) or window_size != 'auto':
            window_size = check_int('CBN', 'window_size', window_size, at_least=1, alternative=" or 'auto'")
        self._window_size = window_size
        self.forget_window()
        self._start_or_stop_finder()

    @property
    def bad_batches(self) -> int:
        """In how many training batches a channel had inf or NaN, since the layer was made, copied or moved.

        Without running statistics, batches of burn-in do not count. To read it makes the host wait for the device.
        """
        return int(self._bad_batches)

    def diagnosis(self) -> Diagnosis | None:
        """Means over the forwards since this was last called, those of burn-in left out; None if there were none.

        Only of a layer that is told to :attr:`diagnose`. Makes the host wait for the device.
        """
        if self._diagnosed is None:
            return None
        correction, invalid, forwards = self._diagnosed.tolist()
        self._diagnosed = None
        return Diagnosis(self.window_length, correction / forwards, invalid / forwards)

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, window_size={self.window_size!r}, order={self.order}, samples={self.samples}, '
            f'running_stats={self.running_stats!r}'
        )

    def train(self, mode: bool = True) -> 'CBN':
        super().train(mode)
        self._start_or_stop_finder()
        return self

    def _start_or_stop_finder(self) -> None:
        if self.training and self.order > 0 and self.window_size != 1:
            self._finder.start()
        else:
            self._finder.stop()

    def forget_window(self) -> None:
        """Empty the windows: they belong to other weights."""
        self._windows = CallWindows(0 if self._window_size == 'auto' else self._window_size - 1)

    def window_state(self) -> dict[str, Any]:
        """The windows, and where the layer is in its random numbers: plain data and tensors."""
        return dict(windows=self._windows.state(), random=list(self._random.getstate()[1]))

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`window_state` returned.

        Raises:
            ValueError, TypeError, KeyError: It is something else, or that of a layer with another window size.
        """
        self.forget_window()
        self._windows.load(
            state['windows'], [NaiveStatistics, CompensatedStatistics, SecondOrderStatistics, SampledStatistics]
        )
        for window in self._windows:
            past = window.stacked()
            if past is not None and not all(
                _may_be(name, statistics, self.num_features) for name, statistics in past._asdict().items()
            ):
                raise ValueError(f'it is of a layer with other than {self.num_features} features')
        version, _, gauss = self._random.getstate()
        self._random.setstate((version, tuple(state['random']), gauss))

    def begin_iteration(self) -> None:
        """What the layer is called with from now on belongs to another iteration than before.

        :class:`CBNBurnInHook` says so. Without it the layer finds that out: since its last call, the backward pass has
        gone through that, the weights have changed, or its graph is gone.
        """
        self._windows.begin_iteration()

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins to count.
        return {**self.__dict__, '_bad_batches': torch.zeros_like(self._bad_batches), '_diagnosed': None}

    def _apply(self, fn: Any, recurse: bool = True) -> 'CBN':
        super()._apply(fn, recurse)
        self.forget_window()  # the window stays behind on a move to another device or precision
        self._bad_batches = fn(self._bad_batches).zero_()
        self._diagnosed = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget_window()  # the window belongs to other weights

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        # Else one channel would be taken for all, or all for one.
        if self.training and input.numel() > 0 and input.size(1) != self.num_features:
            raise RuntimeError(
                f'{title_of(self)} expected an input of {self.num_features} channels, got input size {input.size()}'
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, the output of a convolution, [N, C, H, W]."""
        return self._training_forward(input) if self.training else super().forward(input)

    @outside_graphs
    def _training_forward(self, input: Tensor) -> Tensor:
        if self.window_size == 'auto':
            raise RuntimeError(
                f"{title_of(self)} was built with window_size='auto', which CBNBurnInHook replaces by a number when "
                "mmengine's Runner begins to train. Add dict(type='CBNBurnInHook', burn_in_epochs=3) to custom_hooks, "
                'or set the window_size of the layer.'
            )
        if self.window_size == 1:
            return self._batch_norm(input)
        if _is_exporting():
            # It would trace the window into the graph, and leave tensors of its own in it.
            raise RuntimeError(f'{title_of(self)} cannot be exported in training: call model.eval() before.')
        self._check_input_dim(input)
        feeding = self._feeding_call(input) if self.order > 0 else None
        if input.numel() == 0:
            return self._empty_forward(input, None if feeding is None else feeding[0])
        if self.burn_in:
            return self._batch_norm(input)
        if self.order > 0 and feeding is None:
            self._warn_once('the convolution that fed it before has been replaced; it looks for the new one')
            return self._batch_norm(input)
        return self._cross_iteration_forward(input, feeding)

    def _batch_norm(self, input: Tensor) -> Tensor:
        """BatchNorm in training (k = 1); but inf and NaN stay out of the running statistics, as with a window."""
        self.window_length = 1
        if input.numel() == 0 or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        self._check_input_dim(input)
        # Autograd keeps the statistics that BatchNorm updates, and they must not change after that: hence the copies.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        momentum = 1.0 if self.momentum is None else self.momentum
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, momentum, self.eps)
        with torch.no_grad():
            finite = var < torch.inf
            self._count_if_bad(finite)
            count = self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                if self.momentum is None:  # for the cumulative average
                    new = running.lerp(new, 1 / count.to(new.dtype))
                running.copy_(new.where(finite, running))
        return output

    def _empty_forward(self, input: Tensor, conv: nn.Conv2d | None) -> Tensor:
        output = super().forward(input)
        if output.grad_fn is not None and not is_compiling():
            # A call like the others, lest those after it take up each other's windows; and alive for as long.
            output.grad_fn.register_prehook(self._windows.begin_call(conv).go_back)
        return output

    def _feeding_call(self, input: Tensor) -> tuple[nn.Conv2d, Tensor] | None:
        """The convolution that made ``input``, and its own input; None where :meth:`ConvFinder.find` returns that."""
        try:
            found = self._finder.find(input)
        except LookupError:
            raise RuntimeError(
                f'{title_of(self)} compensates for the change of the convolution that feeds it, but its input is not '
                f'the output of a convolution that was called just before, unchanged. {_REMEDY}'
            ) from None
        if found is None:
            return None
        conv, conv_input = found
        reason = unsupported_because(conv)
        if reason is not None:
            raise RuntimeError(
                f'{title_of(self)} cannot compensate for the change of the convolution that feeds it, because '
                f'{reason}. {_REMEDY}'
            )
        return conv, conv_input  # type: ignore[return-value]

    def _cross_iteration_forward(self, input: Tensor, feeding: tuple[nn.Conv2d, Tensor] | None) -> Tensor:
        if input.numel() == input.size(1):
            raise ValueError(
                f'{title_of(self)} expected more than 1 value per channel when training, got input size {input.size()}'
            )
        conv, conv_input = feeding or (None, None)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        call: Call | int
        if is_compiling():
            call = compiled.number_of(self)
            conv_number = -1 if conv is None else compiled.number_of(conv)
            learning = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in (input, self.weight, self.bias)
            )
            with torch.no_grad():
                statistics = compiled.window_statistics(input, conv_input, *running, call, conv_number, learning)
        else:
            *statistics, call = self._window_statistics(input, feeding, *running)
        conv_bias = None if conv is None else conv.bias
        return WindowNorm.apply(input, self.weight, self.bias, conv_bias, *statistics, self.eps, call)

    def _window_statistics(
        self, input: Tensor, feeding: tuple[nn.Conv2d, Tensor] | None, *running: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Call]:
        """Mean, variance and share of :class:`WindowNorm`; the window and the ``running`` statistics go on."""
        positions = input.numel() // input.size(1)
        second_run = runs_again()
        module = None if feeding is None else feeding[0]
        conv = None if feeding is None else ConvCall.of(*feeding)
        conv_bias = None if conv is None else conv.bias
        call = Call(None) if second_run else self._windows.begin_call(module)
        device = input.device.type
        # Made only where there is one to be kept out: it takes as long as some of the statistics.
        autocast = torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), autocast:
            batch_mean, var = batch_statistics(input)
            mean = batch_mean if conv_bias is None else batch_mean - conv_bias
            if second_run:
                past = recall(self, self._windows.iteration, input.shape, module)
            else:
                past = self._past_statistics(conv)
                if self._windows.misfit or (past is None and len(self._windows.current) > 0):
                    self._warn_once('its window has statistics of another convolution, which are dropped')
                self._windows.iteration.note(input.shape, module, past)
                if self.diagnose and past is not None:
                    self._note_diagnosis(past, var)
            if past is None:
                window_mean, window_var, share = mean, var, torch.ones_like(mean)
            else:
                window_mean, window_var, share = window_statistics(mean, var, *past)
            if not second_run:
                self.window_length = 1 if past is None else 1 + len(self._windows.current)
                self._windows.current.push(self._statistics_to_keep(input, batch_mean, mean, var, conv))
            if conv_bias is not None:
                window_mean = window_mean + conv_bias
            if not second_run and self.running_stats == 'batch':
                self._update_running_statistics(batch_mean, var * (positions / (positions - 1)), *running)
            elif not second_run:
                # Unbiased, as BatchNorm's: there are positions / share of them.
                self._update_running_statistics(window_mean, window_var * (positions / (positions - share)), *running)
        return window_mean, window_var, share, call

    def _statistics_to_keep(
        self, input: Tensor, batch_mean: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None
    ) -> NaiveStatistics | CompensatedStatistics | SecondOrderStatistics | SampledStatistics:
        if conv is None:
            return NaiveStatistics(mean, var)
        if self.order == 2:
            return SecondOrderStatistics(mean, var, *second_order_gradients(input, batch_mean, conv))
        if self.samples is None:
            return CompensatedStatistics(mean, var, *statistics_gradients(input, batch_mean, conv))
        kept = sampled_statistics(input, mean, var, conv, self.samples, start=self._random.random())
        return pad_samples(kept, self.samples)

    def _past_statistics(self, conv: ConvCall | None) -> tuple[Tensor, Tensor] | None:
        """mu' and var' of the earlier iterations, [n, C] each; None if there are none."""
        past = self._windows.current.stacked()
        if past is None:
            return None
        if conv is None:
            # Of their own, lest the second run of a checkpointed block see what the first put into the window.
            return past.mean.clone(), past.var.clone()
        # Else the layer is fed by unlike convolutions in turn.
        if isinstance(past, SampledStatistics):
            fits = past.patches.size(-1) * conv.weight.size(0) == conv.weight.numel() * conv.groups
            return compensate_samples(past, conv.weight, conv.groups) if fits else None
        if isinstance(past, SecondOrderStatistics):
            fits = past.mean_grad.shape[1:] == (conv.weight.size(1) * conv.groups, *conv.weight.shape[2:])
            return compensate_second_order(past, conv.weight, conv.groups) if fits else None
        fits = past.var_grad.shape[1:] == conv.weight.shape
        return compensate(past, conv.weight, conv.groups) if fits else None

    def _note_diagnosis(self, past: tuple[Tensor, Tensor], var: Tensor) -> None:
        old = self._windows.current.stacked()
        correction = (past[0] - old.mean).abs() / (var + self.eps).sqrt()  # type: ignore[union-attr]
        invalid = (past[1] == 0) & (old.var > 0)  # type: ignore[union-attr]
        # What is inf or NaN was left out of the window, so it corrected nothing.
        noted = [correction.nan_to_num(0, 0, 0).mean(), invalid.to(var.dtype).mean(), var.new_ones(())]
        self._diagnosed = torch.stack(noted) if self._diagnosed is None else self._diagnosed + torch.stack(noted)

    def _update_running_statistics(
        self,
        mean: Tensor,
        unbiased_var: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
    ) -> None:
        """As in BatchNorm, the variance unbiased; but not from channels of inf or NaN."""
        finite = unbiased_var < torch.inf  # NaN is not; and where the mean is inf or NaN, the variance is NaN
        self._count_if_bad(finite)
        if running_mean is None or running_var is None or num_batches_tracked is None:
            return
        num_batches_tracked.add_(1)
        for running, current in ((running_mean, mean), (running_var, unbiased_var)):
            # The cumulative average divides on the device: a Python number would make the host wait for it.
            weight = 1 / num_batches_tracked.to(running.dtype) if self.momentum is None else self.momentum
            running.lerp_(current.to(running.dtype).where(finite, running), weight)

    def _count_if_bad(self, finite: Tensor) -> None:
        if self._bad_batches.device != finite.device:  # converted on another device
            self._bad_batches = torch.zeros_like(self._bad_batches, device=finite.device)
        self._bad_batches.add_(finite.all().logical_not())

    def _warn_once(self, reason: str) -> None:
        if self._has_warned or is_compiling():
            return
        self._has_warned = True
        print_log(
            f'{title_of(self)} normalizes with the current batch alone in this iteration, because {reason}. If that '
            'goes on, it trains as BatchNorm. This is said once; CBNBurnInHook logs the number of layers without a '
            'window as cbn_without_window.',
            logger='current',
            level=logging.WARNING,
        )

    def _replicate_for_data_parallel(self) -> 'CBN':
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()


def _may_be(name: str, statistics: Tensor, num_features: int) -> bool:
    """Whether the stacked ``statistics`` can be the member ``name`` of a window's, of a layer of ``num_features``."""
    of_inputs = dict(mean_grad=4, covariance=4, patches=3, share=2)
    if name in of_inputs:
        return statistics.dim() == of_inputs[name]
    return statistics.dim() == (5 if name == 'var_grad' else 2) and statistics.size(1) == num_features
