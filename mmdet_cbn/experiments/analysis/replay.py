"""Images of earlier iterations, run once more through a network that trains with CBN."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ...layers.cbn import CBN
from ...layers.conversion import active_norms
from ...layers.statistics import batch_statistics
from ...layers.step import WindowStep
from ...pairing import ConvCall

_PARTS = ('backbone', 'neck', 'roi_head')


class Seen(NamedTuple):
    """The output of a convolution where it comes into a CBN."""

    layer: CBN
    conv: ConvCall
    x: Tensor  #: [N, C, H, W]
    batch_mean: Tensor  #: [C]
    mean: Tensor  #: without the bias of the convolution, [C]
    var: Tensor  #: biased, [C]


class OldLayer(NamedTuple):
    """A layer in an old iteration, all [C]."""

    mean: Tensor
    var: Tensor
    window_mean: Tensor
    window_var: Tensor


class OldIteration(NamedTuple):
    """What runs again later."""

    inputs: Tensor
    rois: dict[str, Tensor]  #: by the kind of RoI head
    layers: dict[str, OldLayer]  #: in the order of their calls
    parameters: dict[str, Tensor]  #: what the iteration began with


class _Far(Exception):
    """The last layer that is wanted has been run."""


class Replay:
    """Watches the CBN layers of backbone, neck and RoI heads, and runs images of earlier iterations again.

    They run with the RoIs of their own iteration. Each layer normalizes with its window of that iteration, moved as far
    as the statistics of the old batch have moved. So the input of the next layers differs from what it was then by the
    change of the weights alone. Layers whose convolution does not use its parameter as it is (mmcv's ``ConvWS2d``, a
    transposed convolution) are not watched, nor those that became Naive CBN.

    Args:
        model: A detector, or another model with ``extract_feat``, in training.
        note: Called with the name and what is seen of each layer of an iteration that is kept.

    Raises:
        RuntimeError: There are no CBN layers of order 1 in training there.

    Attributes:
        layers (dict[str, CBN]): Those of order 1, by name.
        convs (dict[str, nn.Conv2d]): What feeds them, from the first iteration kept on.
    """

    def __init__(self, model: Any, note: Callable[[str, Seen], None] = lambda name, seen: None) -> None:
        self._model = model
        self._note = note
        self.layers = {
            name: norm
            for name, norm in active_norms(model, CBN).items()
            if norm.order == 1 and name.split('.')[0] in _PARTS
        }
        if not self.layers:
            raise RuntimeError(
                'backbone, neck and RoI head have no CBN of order 1 in training to look at. '
                "Give them norm_cfg=dict(type='CBN') in the config."
            )
        self.convs: dict[str, nn.Conv2d] = {}
        self._visit: Callable[[str, Seen], None] | None = None
        self._running: OldIteration | None = None
        self._last: str | None = None
        self._conv_call: Any = None  # the last convolution that ran, and its input
        self._not_watched: set[str] = set()
        self._current: OldIteration | None = None
        for name, layer in self.layers.items():
            layer.register_step_hook(partial(self._keep, name))
        for kind, extractor in self._roi_extractors().items():
            extractor.register_forward_pre_hook(partial(self._note_rois, kind))

    def begin_iteration(self, is_kept: bool) -> None:
        """The next iteration begins."""
        self._current = None
        if is_kept:
            parameters = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}
            self._current = OldIteration(torch.empty(0), {}, {}, parameters)

    def end_iteration(self, data_batch: Any) -> OldIteration | None:
        """What was kept of the iteration; None if that was nothing, as in burn-in."""
        if self._current is None or not self._current.layers:
            return None
        inputs = self._model.data_preprocessor(data_batch, training=True)['inputs']
        return self._current._replace(inputs=inputs)

    def run(self, old: OldIteration, visit: Callable[[str, Seen], None], last: str | None = None) -> None:
        """Run the images of an old iteration, as far as the layer ``last`` if one is named.

        ``visit`` is called with the name and what is seen of each layer.
        """
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._running, self._visit, self._last = old, visit, last
        convs = [module for module in self._model.modules() if isinstance(module, nn.Conv2d)]
        handles = [conv.register_forward_hook(self._note_conv, with_kwargs=True) for conv in convs]
        for name in old.layers:
            layer = self.layers[name]
            layer.eval()  # so that it remembers nothing of this; the hook replaces its output
            handles.append(layer.register_forward_hook(partial(self._replace_output, name)))
        modules = {id(module): module for module in self._model.modules()}  # which are not copied
        windows = {
            module: copy.deepcopy(module.windows, dict(modules))
            for module in modules.values()
            if isinstance(module, CBN) and module.training
        }
        try:
            features = self._model.extract_feat(old.inputs)
            for kind, rois in old.rois.items():
                extractor = self._roi_extractors()[kind]
                in_rois = extractor(features[: extractor.num_inputs], rois)
                getattr(self._model.roi_head, f'{kind}_head')(in_rois)
        except _Far:
            pass
        finally:
            self._running = None
            for handle in handles:
                handle.remove()
            for name in old.layers:
                self.layers[name].train()
            # Other normalizers on the way have counted the old images once more.
            for other, its_windows in windows.items():
                other.windows = its_windows
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    @contextmanager
    def weights_of(self, old: OldIteration, but: set[str]) -> Iterator[None]:
        """The old weights in place of the current ones, except in the layers named."""
        modules = [module for name in but for module in (self.layers[name], self.convs[name])]
        of_now = {parameter for module in modules for parameter in module.parameters()}
        replaced = {name: p for name, p in self._model.named_parameters() if p not in of_now}
        data_of_now = {name: p.data for name, p in replaced.items()}
        try:
            for name, parameter in replaced.items():
                parameter.data = old.parameters[name]
            yield
        finally:
            for name, parameter in replaced.items():
                parameter.data = data_of_now[name]

    def _roi_extractors(self) -> dict[str, Any]:
        """Those of the RoI heads by their kind; heads of several stages, or without one, are not looked at."""
        head = getattr(self._model, 'roi_head', None)
        found = {kind: getattr(head, f'{kind}_roi_extractor', None) for kind in ('bbox', 'mask')}
        if found['mask'] is found['bbox']:
            del found['mask']
        return {kind: module for kind, module in found.items() if hasattr(module, 'num_inputs')}

    def _note_rois(self, kind: str, extractor: nn.Module, args: tuple) -> None:
        if extractor.training and self._running is None and self._current is not None and len(args[1]) > 0:
            self._current.rois.setdefault(kind, args[1])

    def _note_conv(self, conv: nn.Conv2d, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        self._conv_call = conv, args[0] if args else kwargs['input']

    def _replace_output(self, name: str, layer: CBN, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook: what the layer hands on in a replay."""
        (x,) = args
        if x.numel() == 0:
            return None
        with torch.autocast(x.device.type, enabled=False):
            conv = ConvCall.of(self._conv_call[0], self._conv_call[1], x)
            batch_mean, var = batch_statistics(x)
            return self._replay(name, Seen(layer, conv, x, batch_mean, conv.without_bias(batch_mean), var))

    def _keep(self, name: str, layer: CBN, step: WindowStep) -> None:
        """Step hook: keep the first call of the layer in this iteration."""
        if self._current is None or name in self._current.layers:
            return
        conv: Any = step.conv
        if conv is None or conv.weight is not conv.module.weight:
            if name not in self._not_watched:
                what = 'has no convolution' if conv is None else f'follows a {type(conv.module).__name__}'
                print_log(f'{name} is not looked at, because it {what}.', logger='current')
                self._not_watched.add(name)
            return
        seen = Seen(layer, conv, step.x, step.mean, conv.without_bias(step.mean), step.var)
        self._current.layers[name] = OldLayer(seen.mean, seen.var, step.window_mean, step.window_var)
        self.convs[name] = conv.module
        self._note(name, seen)

    def _replay(self, name: str, seen: Seen) -> Tensor:
        self._visit(name, seen)  # type: ignore[misc]
        if name == self._last:
            raise _Far
        layer, old = seen.layer, self._running.layers[name]  # type: ignore[union-attr]
        moved_mean = old.window_mean + (seen.batch_mean - old.mean)
        moved_var = old.window_var * ((seen.var + layer.eps) / (old.var + layer.eps))
        # By hand, for batch_norm has no gradient in the statistics that it is given.
        scale = (moved_var + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight
        y = (seen.x - moved_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        y = y if layer.bias is None else y + layer.bias.view(-1, 1, 1)
        return y.to(seen.x.dtype)


def predecessors(replay: Replay, old: OldIteration) -> dict[str, list[list[str]]]:
    """For each layer those that come before it, the paper's l - 1, l - 2 and so on.

    l - 1 are the layers that feed it with no other in between, several where their outputs are added or taken
    together; l - 2 are those that then come next, and so on back to the first.
    """
    ancestors: dict[str, set[str]] = {}

    def visit(name: str, seen: Seen) -> None:
        before = [other for other in ancestors if replay.convs[other].weight.requires_grad]
        weights = [replay.convs[other].weight for other in before]
        grads = torch.autograd.grad(seen.mean.sum(), weights, retain_graph=True, allow_unused=True) if before else ()
        ancestors[name] = {other for other, grad in zip(before, grads, strict=True) if grad is not None}

    with torch.enable_grad():
        replay.run(old, visit)
    found = {}
    for name, left in ancestors.items():
        generations = []
        left = set(left)
        while left:
            nearest = {other for other in left if not any(other in ancestors[later] for later in left)}
            generations.append(sorted(nearest))
            left -= nearest
        found[name] = generations
    return found
