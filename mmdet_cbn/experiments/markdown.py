"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a line of ``heads`` and a line for each of ``rows``. It ends with a line break."""
    lines = [heads, ['---'] * len(heads), *rows]
    text = ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)
    return text.replace('| ' + ' | '.join(['---'] * len(heads)) + ' |', '|---' * len(heads) + '|', 1)
