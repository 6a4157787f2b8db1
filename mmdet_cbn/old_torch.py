"""What torch 2.1 to 2.12 lack, each with the version that brought it. What here is older than ours can be deleted.

The restricted unpickler of torch 2.1 to 2.5 is in :mod:`mmdet_cbn.openmmlab.old_unpickler`.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from packaging.version import Version
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

Function = TypeVar('Function', bound=Callable)

_TORCH = Version(torch.__version__).release
#: The restricted unpickler cannot be told of further types, and a hook on the calls of all modules gets no keyword
#: arguments.
IS_BEFORE_2_6 = _TORCH < (2, 6)
#: While it traces, the compiler hands no module to a function. Before 2.8 an operator has no tags either, so a CUDA
#: graph would repeat what the window did in one step. Therefore no operator is made, and layers that train stay out of
#: graphs.
IS_BEFORE_2_13 = _TORCH < (2, 13)

if not IS_BEFORE_2_13:
    custom_op: Callable = torch.library.custom_op
    is_compiling = torch.compiler.is_compiling

    def outside_graphs(function: Function) -> Function:
        """``function`` itself: what it does can be part of the graph that ``torch.compile`` makes."""
        return function

else:

    def custom_op(name: str, *, mutates_args: Iterable[str], tags: Any) -> Callable[[Function], Function]:
        """``torch.library.custom_op`` where no graph calls the operator: it stays a function."""

        def as_it_is(function: Function) -> Function:
            function.register_fake = lambda fake: fake  # type: ignore[attr-defined]
            return function

        return as_it_is

    def is_compiling() -> bool:
        """False, since :func:`outside_graphs` keeps all that asks out of graphs. torch >= 2.3 has its own."""
        return False

    def outside_graphs(function: Function) -> Function:
        """``function``, which ``torch.compile`` leaves as it is: a graph ends before it and another begins after it."""
        return torch.compiler.disable(function)


def outside_graphs_in_training(forward: Function) -> Function:
    """A module's ``forward``; if it is in training, as :func:`outside_graphs` makes it."""
    if not IS_BEFORE_2_13:
        return forward
    in_training = outside_graphs(forward)

    @wraps(forward)
    def either(self: Any, input: Any) -> Any:
        return in_training(self, input) if self.training else forward(self, input)

    return either  # type: ignore[return-value]


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device. torch >= 2.4 has it."""
    if _TORCH >= (2, 4):
        return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    name = 'is_autocast_enabled' if device_type == 'cuda' else f'is_autocast_{device_type}_enabled'
    return getattr(torch, name, bool)()


def register_hook_on_all(hook: Callable) -> RemovableHandle:
    """Have ``hook(module, args, kwargs, output)`` called after each forward of any module.

    torch < 2.6 does not tell the keyword arguments: there ``kwargs`` is empty, and ``hook`` is not called where there
    are no other arguments.
    """
    if not IS_BEFORE_2_6:
        return register_module_forward_hook(outside_graphs(hook), with_kwargs=True)

    def without_keywords(module: Any, args: tuple, output: Any) -> Any:
        return hook(module, args, {}, output) if args else None

    return register_module_forward_hook(outside_graphs(without_keywords))
