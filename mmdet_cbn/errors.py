"""Errors that name the file they come from, where those who read it do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(file: str | Path, is_what: str) -> Iterator[None]:
    """Let an error that does not name ``file`` do so.

    Args:
        file: What is being read, or a folder.
        is_what: What an error means, to follow the name, as "is no checkpoint".

    Raises:
        RuntimeError: In place of an error that does not name the file.
    """
    try:
        yield
    except Exception as error:
        if str(file) in str(error):
            raise
        raise RuntimeError(f'{file} {is_what} ({type(error).__name__}: {error})') from error
