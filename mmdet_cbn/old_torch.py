"""What torch 2.1 to 2.5 lack, each thing with the version that brought it: what here is older than ours can be deleted.

The restricted unpickler of these versions is in :mod:`mmdet_cbn.old_unpickler`.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from .requirements import release

Function = TypeVar('Function', bound=Callable)

#: The restricted unpickler can be told further types, an operator for the compiler can have tags, and a hook on the
#: calls of all modules gets keyword arguments.
IS_BEFORE_2_6 = release(torch.__version__) < (2, 6)

if not IS_BEFORE_2_6:
    custom_op: Callable = torch.library.custom_op
    is_compiling = torch.compiler.is_compiling
    is_autocast_enabled: Callable = torch.is_autocast_enabled

    def outside_graphs(function: Function) -> Function:
        """``function`` itself: what it does can be part of the graph that ``torch.compile`` makes."""
        return function

    def register_hook_on_all(hook: Callable) -> RemovableHandle:
        """Have ``hook(module, args, kwargs, output)`` called after each forward of any module."""
        return register_module_forward_hook(hook, with_kwargs=True)

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

    def is_autocast_enabled(device_type: str) -> bool:
        """As torch >= 2.4 has it."""
        name = 'is_autocast_enabled' if device_type == 'cuda' else f'is_autocast_{device_type}_enabled'
        return getattr(torch, name, bool)()

    def outside_graphs(function: Function) -> Function:
        """``function``, which ``torch.compile`` leaves as it is: a graph ends before it and another begins after it."""
        return torch.compiler.disable(function)

    def register_hook_on_all(hook: Callable) -> RemovableHandle:
        """Have ``hook(module, args, kwargs, output)`` called after each forward of any module, with empty ``kwargs``.

        These versions do not tell the keyword arguments. ``hook`` is not called where there are no others.
        """

        def without_keywords(module: Any, args: tuple, output: Any) -> Any:
            return hook(module, args, {}, output) if args else None

        return register_module_forward_hook(outside_graphs(without_keywords))
