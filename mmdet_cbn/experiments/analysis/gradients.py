"""How fast the gradients of a layer's statistics diminish in the weights of earlier layers (Appendix C, Figure 6)."""

from typing import Any, NamedTuple

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ...arguments import check_int
from ...hooks.model import model_of
from .replay import OldIteration, Replay, Seen, predecessors


class Ratio(NamedTuple):
    """||g(r)||_F / ||g(l)||_F of one layer l."""

    iteration: int  #: finished iterations
    layer: str
    before: int  #: l - r
    mean: float  #: of the gradients of mu
    second_moment: float  #: of the gradients of nu


class GradientRatioHook(Hook):
    """Compares the gradients of each CBN layer's statistics in the weights of its own and of earlier convolutions.

    After every ``every``-th iteration its images run again, with the weights that the iteration has made, and mu and nu
    of each layer are differentiated. The training is not touched.

    The Frobenius norm of a Jacobian J is the root of the mean of ||v J||^2 over random signs v: each ``draw`` of v
    costs one backward pass. For the layer's own weight any v gives it exactly.

    Args:
        every: Iterations from one comparison to the next.
        draws: Random vectors for each norm.
        layers_before: The largest l - r.

    Attributes:
        ratios (list[Ratio]): What was found.

    Raises:
        TypeError: A number that is not an int.
        ValueError: A number that is not allowed.
        RuntimeError: When training begins, if backbone, neck and RoI head have no CBN of order 1 in training.
    """

    priority = 'LOW'

    def __init__(self, every: int = 10, draws: int = 4, layers_before: int = 2) -> None:
        self.every = check_int('GradientRatioHook', 'every', every, at_least=1)
        self.draws = check_int('GradientRatioHook', 'draws', draws, at_least=1)
        self.layers_before = check_int('GradientRatioHook', 'layers_before', layers_before, at_least=1)
        self.ratios: list[Ratio] = []
        self._before: dict[str, list[list[str]]] | None = None

    def before_train(self, runner: Runner) -> None:
        """Watch the layers."""
        model = model_of(runner)
        self._replay = Replay(model)
        self._random = torch.Generator().manual_seed(0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the iteration if it is one to look at."""
        self._replay.begin_iteration((runner.iter + 1) % self.every == 0)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Compare."""
        iteration = self._replay.end_iteration(data_batch)
        if iteration is not None:
            if self._before is None:
                self._before = predecessors(self._replay, iteration)
            self._compare(runner.iter + 1, iteration)

    def _compare(self, number: int, iteration: OldIteration) -> None:
        def visit(name: str, seen: Seen) -> None:
            if not seen.conv.weight.requires_grad:
                return
            before = self._before[name][: self.layers_before]  # type: ignore[index]
            layers = [[name], *before]
            weights = [[self._replay.convs[layer].weight for layer in group] for group in layers]
            norms = [self._norms(statistic, weights) for statistic in (seen.mean, seen.var + seen.mean.square())]
            for distance in range(1, len(layers)):
                of_mean, of_second_moment = (norm[distance] / norm[0] for norm in norms)
                self.ratios.append(Ratio(number, name, distance, of_mean.item(), of_second_moment.item()))

        with torch.enable_grad():
            self._replay.run(iteration, visit)

    def _norms(self, statistic: Tensor, weights: list[list[Tensor]]) -> Tensor:
        """Frobenius norms of the Jacobians of ``statistic`` [C] in each group of weights."""
        flat = [weight for group in weights for weight in group]
        squares = torch.zeros(len(weights), dtype=torch.float64)
        for _ in range(self.draws):
            signs = torch.randint(0, 2, statistic.shape, generator=self._random).to(statistic) * 2 - 1
            grads = iter(torch.autograd.grad(statistic, flat, signs, retain_graph=True))
            squares += torch.tensor(
                [sum(next(grads).double().square().sum().item() for _ in group) for group in weights],
                dtype=torch.float64,
            )
        return squares.sqrt()
