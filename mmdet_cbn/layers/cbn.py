"""The normalizer: Cross-Iteration Batch Normalization (Yao et al., Cross-Iteration Batch Normalization)."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.fx
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..arguments import check_bool, check_choice, check_int, check_names, shown
from ..compensation import drop_inf_and_nan, make_compensation
from ..errors import refuse_data_parallel, title_of
from ..old_torch import IS_BEFORE_2_13, is_compiling, outside_graphs_in_training
from ..pairing import ConvCall, ConvFinder, claim_call, version_of, weight_of, why_unsupported
from ..window.calls import CallWindows, is_recomputing
from .batch_renorm import BRN
from .compilation import eps_of, opaque_to_compiler
from .conversion import active_norms, as_leaf, convert_all, select
from .diagnosis import Diagnosis, DiagnosisRecorder
from .gradient import DEFAULT_GRADIENT, GRADIENTS, Gradient, stand_in, statistics_gradient
from .normalization import WindowNorm
from .statistics import Running, batch_norm, batch_statistics, update_running, window_statistics
from .step import WindowStep, once_per_step

Model = TypeVar('Model', bound=nn.Module)

_is_exporting = getattr(torch.compiler, 'is_exporting', bool)  # an old torch has no such function: never

_REMEDY = (
    "Use order=0 (Naive CBN), which needs no convolution, or type='BN', in the norm_cfg of this layer; or "
    "unsupported='naive', for order=0 in all such layers; or call the layer as norm(conv(x)) with a torch.nn.Conv2d; "
    'or, if another convolution is called in between, build it with conv=conv.'
)
if IS_BEFORE_2_13:
    _REMEDY += (
        ' Under torch.compile the layer may not see the call: train one step without torch.compile before, or use '
        'torch >= 2.13.'
    )


@MODELS.register_module()
class CBN(nn.BatchNorm2d):
    """Batch normalization over the last k iterations, corrected for the change of the weights since then.

    In training the layer normalizes with the statistics of the current batch and of the ``window_size - 1`` iterations
    before it on the same GPU. A Taylor polynomial of first order moves the earlier statistics to the current weights of
    the convolution that feeds the layer (Eq. 7 to 12, Algorithm 1). The layer finds this convolution by itself: just
    call ``norm(conv(x))``.

    Everything else is as in ``nn.BatchNorm2d``: evaluation, parameters, checkpoints, and training with
    ``window_size=1``, during burn-in, or on an empty input. The window is not in the state dict. It fills anew after a
    checkpoint was loaded, unless :class:`CBNBurnInHook` saves it for a resumed run. It also fills anew after
    ``reset_running_stats()``, which torch's ``update_bn`` calls, and where the weights were trained while the layer was
    in evaluation.

    Where the paper is silent:

    - Statistics with inf or NaN enter neither the window nor the running statistics.
    - With ``order`` 1 or 2 a bias of the convolution cancels and receives no gradient.
    - Statistics are float32 or float64, whatever the precision of the input.
    - A layer that is called several times in an iteration keeps one window for each call. Examples are a head shared by
      the levels of an FPN, and a norm behind two convolutions. Only their order tells the calls apart.
    - A backward pass through any CBN layer of the process ends the iteration of all, because the last call of a layer
      need not be in the loss. So each micro-batch counts under gradient accumulation.

    Double backward is not supported.

    Args:
        num_features: C of an input of [N, C, H, W].
        eps: Added to the variance.
        momentum: Weight of the current iteration in the running statistics; None for their cumulative average.
        affine: Whether to learn gamma and beta.
        track_running_stats: Whether to keep running statistics.
        window_size: The paper's k. It counts the current iteration, too. ``'auto'`` means
            min(ceil(16 / images per GPU), 8) (section 4.3); :class:`CBNBurnInHook` sets it from the train dataloader.
        order: Order of the Taylor polynomial. 1 is the paper's compensation. 0 is none (Naive CBN), which needs no
            convolution. 2 (Table 9) is exact for the layer and slow: it keeps the covariance of the patches,
            (C_in / groups kh kw)^2 numbers for each group and earlier iteration.
        samples: Estimate the correction from this many sampled positions of each iteration (e.g. 64) instead of
            gradients. It has no error from ending the Taylor series, but one from sampling. With all positions it is
            exact for the layer. None for the paper's compensation by gradients at all positions.
        running_stats: Which statistics the running averages record. ``'window'``: the statistics that the layer
            normalized with. ``'batch'``: the current batch's, as in BatchNorm and in the authors' code.
        gradient: How the backward pass treats the dependence of the window on the current iteration. ``'batch'``, as in
            the authors' code: only the current batch's share of the window depends on the input. ``'weights'``: also
            the compensated earlier statistics depend on the weight of the convolution (Eq. 7 and 8). ``'window'``: for
            the layers before, the current batch stands for the whole window, too. A number from 0 (``'weights'``) to 1
            (``'window'``): it stands for this part of the earlier iterations. ``'projection'``: the input receives
            BatchNorm's gradient for the current batch. None for 0.25; with ``order=0``, which allows ``'batch'`` and
            ``'projection'`` alone, for ``'batch'``.
        conv: The convolution that feeds the layer, for models that you build yourself. It does not become a part of
            the layer. None to find it in training.
        unsupported: What the layer does in its first training forward if it needs a convolution, and no supported one
            feeds it. ``'error'``: raise an error. ``'naive'``: log that, and be Naive CBN (``order=0``) from then on.
        device: Of parameters and buffers, as in torch.
        dtype: Of parameters and buffers, as in torch.
        bias: With ``affine``, whether to learn beta, too.

    Attributes:
        finder (ConvFinder): Finds the convolution that feeds the layer.
        naive_because (str | None): Why the layer became Naive CBN (``unsupported='naive'``); None if it did not.
        window_length (int): Over how many iterations the last training forward averaged; 0 before the first.
        windows (CallWindows): What the layer remembers, one window for each of its calls in an iteration.
        diagnose (bool): While True, record what :meth:`diagnosis` returns, which costs a few small operators.
            :class:`CBNBurnInHook` sets it with ``diagnostics=True``.

    Shape:
        [N, C, H, W] to [N, C, H, W].

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument has a value that is not allowed; in training, the input has one value a channel, as in
            torch.
        RuntimeError: In training: the input has another number of channels; ``torch.nn.DataParallel`` replicates the
            layer; it is unknown which call of a checkpointed block runs again; ``window_size`` is still ``'auto'``;
            under ``torch.export``. In the first training forward with ``order`` 1 or 2 and ``unsupported='error'``: no
            supported convolution feeds the layer, or an old torch compiles it.
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
        gradient: Gradient | None = None,
        conv: nn.Conv2d | nn.ConvTranspose2d | None = None,
        unsupported: Literal['error', 'naive'] = 'error',
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        num_features = check_int('CBN', 'num_features', num_features, at_least=1)
        order = check_int('CBN', 'order', order, at_least=0)
        if order > 2:
            raise ValueError(f'CBN: order must be 0 (Naive CBN), 1 or 2 (of the Taylor polynomial), got {shown(order)}')
        if samples is not None:
            samples = check_int('CBN', 'samples', samples, at_least=2, alternative=' or None')
            if order != 1:
                raise ValueError(f'CBN: samples must be None with order={order}, got {samples}; they go with order=1')
        check_choice('CBN', 'running_stats', running_stats, ('batch', 'window'))
        check_choice('CBN', 'unsupported', unsupported, ('error', 'naive'))
        if gradient is None:
            gradient = 'batch' if order == 0 else DEFAULT_GRADIENT
        _check_gradient(gradient)
        if order == 0 and stand_in(gradient) is not None:
            raise ValueError(
                f"CBN: gradient must be 'batch' or 'projection' with order=0, got {gradient!r}: without compensation "
                'the window does not depend on the current weights'
            )
        if conv is not None:
            _check_conv(conv, num_features)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not check_bool('CBN', 'bias', bias):  # which torch.nn.BatchNorm2d has since torch 2.13
            self.register_parameter('bias', None)
        self.order = order
        self.samples = samples
        self.running_stats = running_stats
        self.gradient = gradient
        self.unsupported = unsupported
        self.naive_because: str | None = None
        self.compensation = make_compensation(order, samples)
        self._burn_in = False
        self._versions_in_evaluation: list[int] | None = None  # of the weights, when it began
        self.window_length = 0
        self.diagnose = False
        self.step_hooks: OrderedDict[int, Callable[[CBN, WindowStep], None]] = OrderedDict()
        self._recorder = DiagnosisRecorder()
        self._has_warned = False
        self.finder = ConvFinder(conv)
        # On the device: the host must not wait for it.
        self._bad_batches = torch.zeros((), dtype=torch.long, device=device)
        self.window_size = window_size

    @outside_graphs_in_training
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, the output of a convolution, [N, C, H, W] (Algorithm 1)."""
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input)
        has_window = self.training and self.window_size != 1
        found = self._find_conv(input) if has_window else None
        if has_window and input.numel() == 0:
            return self._without_window(super().forward(input), None if found is None else found[0])
        if not has_window or self.burn_in:
            return self._batch_norm(input)
        if found is None and self.compensation.needs_conv:
            return self._without_window(self._batch_norm(input), None)
        conv = None if found is None else ConvCall.of(*found, input)
        mean, var, gradient, call = self.window_step(input, conv, self._running())
        # A convolution that ran without gradients receives none here, either.
        conv_bias = conv_weight = None
        if conv is not None and input.requires_grad:
            conv_bias, conv_weight = conv.bias, conv.weight
        parameters = (self.weight, self.bias, conv_bias, conv_weight)
        return WindowNorm.apply(input, *parameters, mean, var, eps_of(self), call, *gradient)  # Eq. 12

    def _make_step(self, x: Tensor, conv: ConvCall | None, running: Running) -> WindowStep:
        """The statistics of the window with ``x``, which the window and the running statistics then remember."""
        mean, var = batch_statistics(x)  # Eq. 2 and 3
        old = self.windows.current.stacked()
        past = None if old is None else self.compensation.under_current_weights(old, conv)  # Eq. 7, 8 and 10
        own_mean = mean if conv is None else conv.without_bias(mean)
        window = window_statistics(own_mean, var, past)  # Eq. 9 to 11
        kept = self.compensation.keep(x, mean, var, conv)
        gradient = statistics_gradient(
            self.gradient, int(self.window_size), self.compensation, conv, mean, kept, old, past, window
        )
        biased_mean = window.mean if conv is None else conv.with_bias(window.mean)
        step = WindowStep(
            x, conv, mean, var, old, past, window.mean, biased_mean, window.var, window.fraction, gradient
        )
        self._observe(step)
        self.windows.current.push(kept)
        self._update_running(step, running)
        return step

    # (x, conv, running) to the mean, bias included, the variance, their gradient, and the call.
    window_step = opaque_to_compiler(once_per_step(_make_step))

    def _running(self) -> Running:
        if not self.track_running_stats:
            return Running(None, None, None)
        return Running(self.running_mean, self.running_var, self.num_batches_tracked)

    def _batch_norm(self, input: Tensor) -> Tensor:
        """BatchNorm (k = 1); but in training inf and NaN stay out of the running statistics, as with a window."""
        if self.training:
            self.window_length = 1
        if not self.training or input.numel() == 0:
            return super().forward(input)
        self._check_input_dim(input)
        output, finite = batch_norm(input, self._running(), self.weight, self.bias, self.momentum, self.eps)
        self._count_if_bad(finite)
        return output

    def _without_window(self, output: Tensor, conv: Any) -> Tensor:
        """Count the call that made ``output``. Otherwise the calls that follow would use each other's windows."""
        if output.grad_fn is not None and not is_compiling() and not is_recomputing():
            call = self.windows.begin_call(conv)
            output.grad_fn.register_prehook(call.note_backward)
        return output

    def _find_conv(self, input: Tensor) -> tuple[Any, Tensor] | None:
        """The convolution that made ``input``, and its own input.

        None if the compensation needs no convolution, or from now on needs none, if it is none of those known, or where
        a checkpointed block runs again in burn-in.
        """
        self._check_training_input(input)
        if not self.compensation.needs_conv:
            return None
        if is_recomputing():
            return self._find_conv_again(input)
        reason: str | None = (
            'its input is not the output of a convolution that was called just before, unchanged; or another layer has '
            'taken this call, or it was conv.forward(x), which runs no hooks'
        )
        try:
            found = self.finder.find(input)
        except LookupError:
            found = None
        else:
            if found is None:
                if not self.burn_in:
                    self.warn_once('another convolution feeds it than before; it looks for that one')
                return None
            reason = why_unsupported(found[0])
        if reason is not None:
            self._do_without_conv(reason)
            return None
        return found

    def _find_conv_again(self, input: Tensor) -> tuple[Any, Tensor] | None:
        """As :meth:`_find_conv`, in a checkpointed block that runs again. Nothing is learned from that."""
        found = claim_call(input, self.finder.told)  # in burn-in, too: it lets go of the convolution's input
        if self.burn_in:
            return None
        if found is None:
            raise RuntimeError(
                f'{title_of(self)} runs again in a checkpointed block, and its convolution does not: begin the block '
                'before the convolution.'
            )
        return found

    @torch.compiler.disable
    def _do_without_conv(self, reason: str) -> None:
        """Become Naive CBN, or raise an error."""
        if self.unsupported == 'error':
            raise RuntimeError(
                f'{title_of(self)} cannot compensate for the change of the convolution that feeds it, because '
                f'{reason}. {_REMEDY}'
            )
        print_log(f'{title_of(self)} takes order=0 (Naive CBN) from now on, because {reason}.', logger='current')
        self._become_naive(reason)

    def _become_naive(self, reason: str) -> None:
        self.naive_because = reason
        self.finder.stop()
        self.order, self.samples = 0, None
        self.compensation = make_compensation(0, None)
        if stand_in(self.gradient) is not None:
            self.gradient = 'batch'

    def _observe(self, step: WindowStep) -> None:
        self.window_length = 1 if step.past is None else 1 + len(self.windows.current)
        if self.diagnose:
            self._recorder(self, step)
        for hook in self.step_hooks.values():
            hook(self, step)

    def _update_running(self, step: WindowStep, running: Running) -> None:
        positions = step.x.numel() // step.x.size(1)
        if self.running_stats == 'batch':
            mean, var = step.mean, step.var * (positions / (positions - 1))
        else:
            # Unbiased, as in BatchNorm. The window has positions / fraction positions.
            mean, var = step.biased_window_mean, step.window_var / torch.rsub(step.fraction, 1, alpha=1 / positions)
        self._count_if_bad(update_running(running, mean, var, self.momentum))

    def _count_if_bad(self, finite: Tensor | None) -> None:
        if finite is None:
            return
        if self._bad_batches.device != finite.device:  # converted on another device
            self._bad_batches = torch.zeros_like(self._bad_batches, device=finite.device)
        self._bad_batches.add_(finite.all().logical_not())

    def _check_training_input(self, input: Tensor) -> None:
        if self.window_size == 'auto':
            raise RuntimeError(
                f"{title_of(self)} was built with window_size='auto', which CBNBurnInHook replaces by a number when "
                "mmengine's Runner begins to train. Add dict(type='CBNBurnInHook', burn_in_epochs=3) to custom_hooks, "
                'or set the window_size of the layer.'
            )
        if _is_exporting() or torch.jit.is_tracing():
            # It would trace the window into the graph, and leave tensors of its own in it.
            raise RuntimeError(f'{title_of(self)} cannot be exported in training: call model.eval() before.')
        self._check_input_dim(input)
        if not self.burn_in and 0 < input.numel() == input.size(1):
            raise ValueError(
                f'{title_of(self)} expected more than 1 value per channel when training, got input size {input.size()}'
            )

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        # Without this check one channel would be taken for all, or all for one.
        if self.training and input.numel() > 0 and input.size(1) != self.num_features:
            raise RuntimeError(
                f'{title_of(self)} expected an input of {self.num_features} channels, got input size {input.size()}'
            )

    def warn_once(self, reason: str) -> None:
        """Log a warning that the layer normalizes with the current batch alone, because of ``reason``; once a layer."""
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
    def burn_in(self) -> bool:
        """While True, train as ``nn.BatchNorm2d`` (k = 1). :class:`CBNBurnInHook` sets it. To begin it empties the
        window."""
        return self._burn_in

    @burn_in.setter
    def burn_in(self, burn_in: bool) -> None:
        if burn_in and not self._burn_in:
            self.forget_window()
        self._burn_in = burn_in

    def train(self, mode: bool = True) -> 'CBN':
        if self.training and not mode:
            self._versions_in_evaluation = self._versions_of_weights()
        elif mode and not self.training and self._versions_in_evaluation not in (None, self._versions_of_weights()):
            self.forget_window()  # its statistics froze while the weights trained: too far to extrapolate
        super().train(mode)
        self._start_or_stop_finder()
        return self

    def _versions_of_weights(self) -> list[int]:
        """How often the weights were changed in place: the layer's own, and those of its convolutions."""
        tensors = (self.weight, self.bias, *map(weight_of, self.finder.convs))
        return [version_of(tensor) for tensor in tensors if tensor is not None]

    def reset_running_stats(self) -> None:
        """As in BatchNorm; and empty the windows. torch's ``update_bn`` calls this for weights that are an average."""
        super().reset_running_stats()
        if '_window_size' in vars(self):  # not while BatchNorm is being built
            self.forget_window()

    def _start_or_stop_finder(self) -> None:
        if self.training and self.compensation.needs_conv and self.window_size != 1:
            self.finder.start()
        else:
            self.finder.stop()

    def begin_iteration(self) -> None:
        """Start a new iteration. :class:`CBNBurnInHook` calls this.

        Without it, the layer finds out by itself: a new iteration starts if the last call had its backward pass, if
        the weights have changed, or if the graph of the last call is gone and the layer was called as often as in the
        iterations before. Call it yourself where you leave out the backward pass, as for a loss that is NaN, and keep
        the loss or have compiled the model; and after a forward that failed in a layer with several calls.
        """
        self.windows.begin_iteration()

    def forget_window(self) -> None:
        """Empty the windows, because they belong to other weights."""
        self.windows = CallWindows(0 if self._window_size == 'auto' else self._window_size - 1)

    def window_state(self) -> dict[str, Any]:
        """What :meth:`load_window_state` restores: plain data and tensors."""
        return dict(order=self.order, windows=self.windows.state(), compensation=self.compensation.state())

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`window_state` returned, on the device of the layer.

        Raises:
            ValueError, TypeError, KeyError: The state is something else, or of a layer with other arguments.
        """
        self.forget_window()
        if state.get('order') == 0 and self.unsupported == 'naive':
            self._become_naive('it was, when its window was saved')
        place = next((tensor for tensor in (self.weight, self.running_mean) if tensor is not None), self._bad_batches)
        self.windows.load(state['windows'], self.compensation.Statistics, place.device)
        for window in self.windows:
            old = window.stacked()
            if old is not None and not self.compensation.could_keep(old, self.num_features):
                raise ValueError(f'it is of a layer with other than {self.num_features} features')
            if old is not None:
                drop_inf_and_nan(old)  # which a layer with another ``gradient`` keeps
        self.compensation.load_state(state.get('compensation', {}))

    def register_step_hook(self, hook: 'Callable[[CBN, WindowStep], None]') -> RemovableHandle:
        """Have ``hook(layer, step)`` called in each training forward that uses the window.

        It runs under ``torch.no_grad()``, before the window changes. It must not change the tensors of the step, nor
        keep ``step.old`` and ``step.past``, which the window may overwrite. A checkpointed block that runs again does
        not call it.

        Returns:
            A handle. ``handle.remove()`` takes the hook away.
        """
        handle = RemovableHandle(self.step_hooks)
        self.step_hooks[handle.id] = hook
        return handle

    @property
    def bad_batches(self) -> int:
        """In how many training batches a channel had inf or NaN, since the layer was made, copied or moved.

        Without running statistics, batches of burn-in do not count. Reading it makes the host wait for the device.
        """
        return int(self._bad_batches)

    def diagnosis(self) -> Diagnosis | None:
        """Means over the forwards since the last call of this method, without burn-in; None if there were none.

        Set :attr:`diagnose` first. This makes the host wait for the device.
        """
        return self._recorder.read(self.window_length)

    @classmethod
    def convert_batchnorm(cls, module: Model, prefixes: str | Sequence[str] | None = None, **arguments: Any) -> Model:
        """Turn the active BatchNorms of a built model into CBN, as ``SyncBatchNorm.convert_sync_batchnorm`` does.

        Use it for models that know no ``norm_cfg``. A BatchNorm is active if it trains. It is not active if
        ``module.train()`` itself puts it into evaluation (mmdet's ``norm_eval`` and ``frozen_stages``), or if it is in
        evaluation while ``module`` is in training. The layers change in place and keep parameters, statistics, hooks
        and mode, so an optimizer that was made before keeps them, too.

        Args:
            module: A model with ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` layers, or one of these layers itself.
            prefixes: Names of the parts to convert, as in ``named_modules``; None for all.
            **arguments: ``window_size``, ``order``, ``samples``, ``running_stats``, ``gradient`` and ``unsupported`` of
                the new layers. The old layers give the other arguments.

        Returns:
            ``module``.

        Raises:
            TypeError: An argument has a wrong type.
            ValueError: The model, or a part named in ``prefixes``, has no active BatchNorm, or one of a subclass that
                does more; or an argument has a value that is not allowed.
        """
        check_names('CBN.convert_batchnorm', 'prefixes', prefixes)
        active = active_norms(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
        found = {name: norm for name, norm in active.items() if not isinstance(norm, CBN)}
        if active and not found:
            raise ValueError(f'CBN.convert_batchnorm: all {len(active)} BatchNorms of the model in training are CBN')
        selected = select(found, prefixes, 'CBN.convert_batchnorm')
        for name, norm in selected.items():
            if not _is_plain(norm):
                raise ValueError(
                    f'CBN.convert_batchnorm: {name!r} is a {type(norm).__name__}, which does more than BatchNorm. '
                    'Name the parts to convert in prefixes'
                )

        def as_cbn(norm: Any) -> CBN:
            shared = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
            return cls(*shared, bias=norm.bias is not None, **arguments)

        convert_all(selected.values(), as_cbn)
        return module

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, window_size={self.window_size!r}, order={self.order}, samples={self.samples}, '
            f'running_stats={self.running_stats!r}, gradient={self.gradient!r}, unsupported={self.unsupported!r}'
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins to count.
        new = dict(_bad_batches=torch.zeros_like(self._bad_batches), _versions_in_evaluation=None)
        return {**self.__dict__, **new}

    def _apply(self, fn: Any, recurse: bool = True) -> 'CBN':
        before = self._places()
        super()._apply(fn, recurse)
        self._bad_batches = fn(self._bad_batches).zero_()
        if not before or self._places() != before:
            self.forget_window()  # it stays behind
            self._recorder.forget()
        return self

    def _places(self) -> list[tuple[torch.device, torch.dtype]]:
        """Where parameters and running statistics are, and in what precision; empty if there are none."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return [(tensor.device, tensor.dtype) for tensor in tensors if tensor is not None]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget_window()  # the window belongs to other weights

    def _replicate_for_data_parallel(self) -> 'CBN':
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()


def _is_plain(norm: nn.Module) -> bool:
    """Whether a BatchNorm, of whatever subclass, normalizes and does nothing more."""
    plain = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, BRN.forward}
    return type(norm).forward in plain and next(norm.children(), None) is None


def _check_gradient(gradient: Any) -> None:
    allowed = f'{", ".join(map(repr, GRADIENTS))}, a number from 0 to 1 or None'
    if isinstance(gradient, bool) or not isinstance(gradient, str | float | int):
        raise TypeError(f'CBN: gradient must be {allowed}, got {shown(gradient)} of type {type(gradient).__name__}')
    if gradient not in GRADIENTS if isinstance(gradient, str) else not 0 <= gradient <= 1:
        raise ValueError(f'CBN: gradient must be {allowed}, got {shown(gradient)}')


def _check_conv(conv: Any, num_features: int) -> None:
    if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
        raise TypeError(
            'CBN: conv must be a torch.nn.Conv2d or ConvTranspose2d, or None, '
            f'got {shown(conv)} of type {type(conv).__name__}'
        )
    reason = why_unsupported(conv)
    if reason is not None:
        raise ValueError(f'CBN: conv must be a convolution that it can compensate for, got {shown(conv)}: {reason}')
    if conv.out_channels != num_features:
        raise ValueError(f'CBN: conv must have out_channels={num_features}, as num_features, got {shown(conv)}')
