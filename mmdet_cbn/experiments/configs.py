"""Looking through configs."""

from collections.abc import Iterator
from typing import Any


def dicts_in(node: Any) -> Iterator[dict[str, Any]]:
    """All dicts in a part of a config, from outside to inside."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from dicts_in(child)
