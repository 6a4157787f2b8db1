"""Checks of arguments. Each error names the argument, what is allowed and what came."""

from numbers import Integral
from typing import Any

import numpy as np

_END_OF_INTS = 2**63  # a tensor holds smaller ints only


def check_int(owner: str, name: str, value: Any, at_least: int, alternative: str = '') -> int:
    """Raise unless ``value`` is an int, Python's or NumPy's, of at least ``at_least``.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        at_least: The smallest value allowed.
        alternative: Completes "an int >= 1" in the message where the caller allows something else, too.

    Returns:
        ``value`` as Python's int.

    Raises:
        TypeError: Not an int. A bool is not one.
        ValueError: Less than ``at_least``, or more than 64 bits hold.
    """
    allowed = f'an int >= {at_least}{alternative}'
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong_type(owner, name, allowed, value)
    value = int(value)
    if value < at_least:
        raise ValueError(f'{owner}: {name} must be {allowed}, got {shown(value)}')
    if value >= _END_OF_INTS:
        raise ValueError(f'{owner}: {name} must be {allowed}, and less than 2**63, got {shown(value)}')
    return value


def check_bool(owner: str, name: str, value: Any) -> bool:
    """Raise a TypeError unless ``value`` is a bool, Python's or NumPy's; return it as Python's."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong_type(owner, name, 'True or False', value)
    return bool(value)


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a TypeError unless ``value`` is a string, and a ValueError unless it is one of ``choices``."""
    allowed = ' or '.join(map(repr, choices))
    if not isinstance(value, str):
        raise _wrong_type(owner, name, allowed, value)
    if value not in choices:
        raise ValueError(f'{owner}: {name} must be {allowed}, got {shown(value)}')


def check_names(owner: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a str, a list or tuple of them, or None.

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


def shown(value: Any) -> str:
    """``value`` as a message shows it."""
    try:
        return repr(value)
    except Exception:  # an int of too many digits, or an object that is half made
        return f'one of type {type(value).__name__} that cannot be written out'


def _wrong_type(owner: str, name: str, allowed: str, value: Any) -> TypeError:
    return TypeError(f'{owner}: {name} must be {allowed}, got {shown(value)} of type {type(value).__name__}')
