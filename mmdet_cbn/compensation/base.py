"""The interface of a kind of compensation.

A kind says what the window keeps of an iteration tau, and what the statistics of tau are under the weights of the
current iteration t. The symbols are the paper's: x is the output of the convolution before the layer, without the
convolution's bias (any batch normalization cancels it); theta is the convolution's weight; p is the patch of its input
under the kernel at one position, so that x_j = theta_j . p in output channel j; mu and var are mean and biased variance
of x over the m = N * H * W positions of one iteration (Eq. 2 and 3).

All statistics are float32, or float64 where x is. Call the functions under torch.no_grad().
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from ..pairing import ConvCall


class Moved(NamedTuple):
    """mu' and var' of n earlier iterations, [n, C] each: their statistics under the current weights."""

    mean: Tensor
    var: Tensor
    #: What :meth:`Compensation.weight_slopes` needs again. By order 1, mu' - mu, [n, C]; by samples, their distances
    #: from their mean.
    for_slopes: Tensor | None = None


class Compensation(ABC):
    """One kind of compensation, for one layer.

    Attributes:
        Statistics: The named tuple of tensors that :meth:`keep` returns. Its first two members are ``mean`` and
            ``var``, [C] each. The next two are what shares of the window weigh (:func:`drop_inf_and_nan`). Files of
            windows name this type and its members.
        needs_conv (bool): Whether the kind needs the convolution before the layer.
    """

    Statistics: type[Any]
    needs_conv = True

    @abstractmethod
    def keep(self, x: Tensor, mean: Tensor, var: Tensor, conv: ConvCall | None) -> NamedTuple:
        """What the window keeps of the current iteration.

        Args:
            x: Output of the convolution, bias included, [N, C, H, W].
            mean: Mean of ``x``, bias included, [C], in the precision of the statistics. What is kept has no bias.
            var: var, [C].
            conv: The call that made ``x``. None if the kind does not need it.
        """

    @abstractmethod
    def under_current_weights(self, old: Any, conv: ConvCall | None) -> Moved | None:
        """mu' and var' of n earlier iterations under the current weights (Eq. 7, 8 and the maximum of Eq. 10).

        Args:
            old: What :meth:`keep` returned for each of them, stacked: each member has a leading axis of n.
            conv: The current call of the convolution.

        Returns:
            mu' and var'. None if ``old`` belongs to a convolution of another shape.
        """

    def weight_slopes(
        self, old: Any, past: Moved | None, conv: ConvCall, share: Tensor, factor: Tensor, so_far: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """How mu' and var' depend on theta_t (the derivatives of Eq. 7, 8 and 10), for each output channel j.

        ::

            dmu'_tau / dtheta_j                      = p_tau
            sum over tau of share dvar'_tau/dtheta_j = var_slope_j + 2 sum over tau of factor p_tau

        Args:
            old: As for :meth:`under_current_weights`.
            past: What that method returned. None if theta_t are the weights of the iterations.
            conv: As for that method.
            share: Of each iteration in the sum over var', [n, C_out]; 0 where Eq. 10 takes its maximum.
            factor: [n, C_out]. The second line's is added to it in place. Where an iteration has no share, it may
                become NaN.
            so_far: ``var_slope`` of other iterations, like the weight, which may be overwritten; None for 0.

        Returns:
            p_tau, the mean patch, [n, C_in, kh, kw]; and ``var_slope`` plus ``so_far``.
        """
        raise NotImplementedError(f'the statistics of {type(self).__name__} do not depend on the current weights')

    @abstractmethod
    def could_keep(self, old: Any, num_features: int) -> bool:
        """Whether ``old``, read from a file, has the shapes of a layer of ``num_features`` channels."""

    def state(self) -> dict[str, Any]:
        """What the kind remembers besides the window, as plain data."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError, TypeError: The state is of another kind.
        """
        if state:
            raise ValueError(f'it has {state!r}: order or samples are others')


def are_launches_dear(tensor: Tensor) -> bool:
    """Whether few operators are better than operators that do little, for a small ``tensor``.

    On a GPU it takes longer to launch one than to run it.
    """
    return not tensor.is_cpu


def drop_inf_and_nan(statistics: Any) -> None:
    """Replace inf and NaN by 0 in what shares of the window weigh: the two members after mean and variance.

    What has a weight of 0 must not be NaN in a weighted sum. Mean and variance still tell that the batch was bad.
    """
    for tensor in statistics[2:4]:
        tensor.nan_to_num_(0, 0, 0)


def are_of_channels(num_features: int, *stacked: Tensor) -> bool:
    """Whether all of ``stacked``, read from a file, are [n, num_features]."""
    return all(tensor.shape[1:] == (num_features,) for tensor in stacked)
