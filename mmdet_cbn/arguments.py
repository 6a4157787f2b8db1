"""Checks of constructor arguments: each error names the argument, what is allowed and what came."""

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

_END_OF_INTS = 2**63  # of those that a tensor can hold
_LARGEST = torch.finfo(torch.float32).max  # statistics are float32
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_int(owner: str, name: str, value: Any, at_least: int, alternative: str = '') -> int:
    """Raise unless ``value`` is an int of ``at_least`` or more; one of NumPy's will do.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        at_least: The least value allowed.
        alternative: What else is allowed, to complete "an int >= 1"; allowed by the caller, who does not call then.

    Returns:
        ``value`` as Python's int.

    Raises:
        TypeError: Not an int (a bool is none).
        ValueError: Less than ``at_least``, or more than 64 bits hold.
    """
    allowed = f'an int >= {at_least}{alternative}'
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _of_wrong_type(owner, name, allowed, value)
    value = int(value)
    if value < at_least:
        raise ValueError(f'{owner}: {name} must be {allowed}, got {shown(value)}')
    if value >= _END_OF_INTS:
        raise ValueError(f'{owner}: {name} must be {allowed}, and less than 2**63, got {shown(value)}')
    return value


def check_real(owner: str, name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """Raise unless ``value`` is a real number that ``is_allowed``; one of NumPy's will do.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        allowed: What is allowed, in words.
        is_allowed: Whether a number is allowed.

    Returns:
        ``value`` as a float.

    Raises:
        TypeError: Not a real number (a bool is none).
        ValueError: A number that is not allowed, or not finite in float32.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _of_wrong_type(owner, name, allowed, value)
    try:
        number = float(value)
    except OverflowError:
        number = inf if value > 0 else -inf  # type: ignore[operator]
    if not is_allowed(number):
        raise ValueError(f'{owner}: {name} must be {allowed}, got {shown(value)}')
    if abs(number) > _LARGEST:
        raise ValueError(f'{owner}: {name} must be {allowed}, and finite in float32, got {shown(value)}')
    return number


def check_bool(owner: str, name: str, value: Any) -> bool:
    """Raise unless ``value`` is True or False; one of NumPy's will do.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.

    Returns:
        ``value`` as Python's bool.

    Raises:
        TypeError: Something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise _of_wrong_type(owner, name, 'True or False', value)
    return bool(value)


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        choices: What is allowed.

    Raises:
        TypeError: Not a string.
        ValueError: Another string.
    """
    allowed = ' or '.join(map(repr, choices))
    if not isinstance(value, str):
        raise _of_wrong_type(owner, name, allowed, value)
    if value not in choices:
        raise ValueError(f'{owner}: {name} must be {allowed}, got {shown(value)}')


def check_names(owner: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a str, a list or tuple of one or more, or None.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.

    Raises:
        TypeError: Something else.
        ValueError: An empty list or tuple.
    """
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f'{owner}: {name} must be a name, a list of names or None, got {shown(value)}')
    if not value:
        raise ValueError(f'{owner}: {name} must hold at least one name, got {shown(value)}; None stands for all')


def check_device_and_dtype(owner: str, device: Any, dtype: Any) -> None:
    """Raise unless this machine has ``device``, and ``dtype`` is a precision to train in; either may be None.

    Raises:
        TypeError: ``dtype`` is no ``torch.dtype``.
        ValueError: Another ``dtype``; or a ``device`` that torch does not know, or that is not here.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise _of_wrong_type(owner, 'dtype', 'a torch.dtype or None', dtype)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f'{owner}: dtype must be one of {", ".join(map(str, _DTYPES))} or None, got {dtype}')
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch has many kinds of error for it, AssertionError among them
        raise ValueError(
            f'{owner}: device must be a device that torch finds on this machine, or None, got {shown(device)}'
        ) from error


def shown(value: Any) -> str:
    """``value`` as a message shows it."""
    try:
        return repr(value)
    except Exception:  # an int of too many digits, or an object that is half made
        return f'one of type {type(value).__name__} that cannot be written out'


def _of_wrong_type(owner: str, name: str, allowed: str, value: Any) -> TypeError:
    return TypeError(f'{owner}: {name} must be {allowed}, got {shown(value)} of type {type(value).__name__}')
