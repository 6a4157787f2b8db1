"""What both data sets share: where the files of a COCO tree go, and how its writer tells of them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Progress = Callable[[str], None]


def annotation_files(root: Path, splits: Iterable[str], description: str) -> dict[str, Path]:
    """The files of a COCO tree to write, by split.

    Raises:
        FileExistsError: One is there, and its description is another.
    """
    files = {split: root / 'annotations' / f'instances_{split}2017.json' for split in splits}
    for file in files.values():
        if file.exists() and _description(file) != description:
            raise FileExistsError(f'{file} was not written by this tool; name another folder')
    return files


def _description(annotation_file: Path) -> Any:
    try:
        return json.loads(annotation_file.read_text(encoding='utf-8'))['info']['description']
    except (ValueError, KeyError, TypeError):
        return None
