"""Checks of constructor arguments: each error names the argument, what is allowed and what came."""

from collections.abc import Callable
from numbers import Real
from typing import Any


def check_int(owner: str, name: str, value: Any, at_least: int, alternative: str = '') -> None:
    """Raise unless ``value`` is an int of ``at_least`` or more.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        at_least: The least value allowed.
        alternative: What else is allowed, to complete "an int >= 1"; allowed by the caller, who does not call then.

    Raises:
        TypeError: Not an int (a bool is none).
        ValueError: Less than ``at_least``.
    """
    allowed = f'an int >= {at_least}{alternative}'
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{owner}: {name} must be {allowed}, got {value!r} of type {type(value).__name__}')
    if value < at_least:
        raise ValueError(f'{owner}: {name} must be {allowed}, got {value}')


def check_real(owner: str, name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> None:
    """Raise unless ``value`` is a real number that ``is_allowed``.

    Args:
        owner: Class that was given the argument.
        name: Name of the argument.
        value: What came.
        allowed: What is allowed, in words.
        is_allowed: Whether a number is allowed.

    Raises:
        TypeError: Not a real number (a bool is none).
        ValueError: A number that is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{owner}: {name} must be {allowed}, got {value!r} of type {type(value).__name__}')
    if not is_allowed(float(value)):
        raise ValueError(f'{owner}: {name} must be {allowed}, got {value}')


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
        raise TypeError(f'{owner}: {name} must be a name, a list of names or None, got {value!r}')
    if not value:
        raise ValueError(f'{owner}: {name} must hold at least one name, got {value!r}; None stands for all')
