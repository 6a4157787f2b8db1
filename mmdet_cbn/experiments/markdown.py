"""Markdown, as the pages of results have it."""

from collections.abc import Iterable
from typing import Any


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]], rule: str = '---') -> str:
    """A Markdown table, without a line break at its end. ``rule`` is a cell of the line under the heads."""
    heads = list(heads)
    first, *others = (f'| {" | ".join(map(str, row))} |' for row in (heads, *rows))
    return '\n'.join([first, f'|{rule}' * len(heads) + '|', *others])
