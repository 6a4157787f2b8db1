"""A data set of small views of real images, each in a light of its own: where the statistics of few images tell little.

Batches of such images differ far more than batches of one microscope's or one camera's, as those of COCO do, and a
network from scratch learns them on a CPU.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .coco_tree import Progress, annotation_files

DESCRIPTION = 'Varied images by mmdet_cbn'
SMALLEST = 0.4  # side of the smallest view, as a share of the image's height
WEAKEST = 0.3  # lowest contrast, as a share of the image's own
VISIBLE = 0.4  # share of a box that must be in the view for it to count
NOISE = 0.01  # deviation, where white is 1


def write_varied(
    source: str | Path,
    root: str | Path,
    variants: int = 4,
    size: tuple[int, int] = (128, 96),
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> None:
    """Write views of the images of a COCO tree, with their boxes.

    A view is a part of the image, 0.4 to 1 times as high (log-uniform), scaled to ``size``; its contrast is 0.3 to 1
    times the image's (log-uniform), its mean brightness 0.2 to 0.8 of white, its colour shifted by up to 0.1 in each
    channel (both uniform), with a little noise. Boxes are cut at the border; where less than 0.4 of one remains, or
    less than 3 pixels, it is left out. The same arguments give the same files.

    Args:
        source: A COCO tree with ``<split>2017`` and ``annotations/instances_<split>2017.json`` for train and val.
        root: Folder to write the like to, with boxes only.
        variants: Views of each image, at least 1.
        size: Width and height of the views in pixels, 32 at least.
        seed: Seed of the choices.
        progress: Called with a line about each finished split.

    Raises:
        ValueError: A number that is too small, or an image that cannot be read.
        FileNotFoundError: Annotations that are not there.
        FileExistsError: ``root`` holds annotations that this function did not write.
    """
    source, root = Path(source), Path(root)
    if variants < 1:
        raise ValueError(f'variants must be at least 1, got {variants}')
    if min(size) < 32:
        raise ValueError(f'size must be at least 32 x 32 pixels, got {size[0]} x {size[1]}')
    files = annotation_files(root, ('train', 'val'), DESCRIPTION)
    datasets = {
        split: json.loads((source / 'annotations' / file.name).read_text(encoding='utf-8'))
        for split, file in files.items()
    }
    for number, (split, file) in enumerate(files.items()):
        folder = root / f'{split}2017'
        for path in (file.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        dataset = datasets[split]
        boxes = defaultdict(list)
        for annotation in dataset['annotations']:
            boxes[annotation['image_id']].append(annotation)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        rng = np.random.default_rng([seed, number])
        for image in dataset['images']:
            picture = cv2.imread(str(source / folder.name / image['file_name']))
            if picture is None:
                raise ValueError(f'{source / folder.name / image["file_name"]} is no image')
            for _ in range(variants):
                x, y, width, height = view = _view(rng, picture, size)
                part = cv2.resize(picture[y : y + height, x : x + width], size, interpolation=cv2.INTER_AREA)
                image_id = len(images) + 1
                file_name = f'{image_id:012d}.png'
                cv2.imwrite(str(folder / file_name), _in_other_light(rng, part))
                images.append(dict(id=image_id, file_name=file_name, width=size[0], height=size[1]))
                for annotation in boxes[image['id']]:
                    if box := _seen(annotation['bbox'], view, size):
                        annotations.append(
                            dict(
                                id=len(annotations) + 1,
                                image_id=image_id,
                                category_id=annotation['category_id'],
                                iscrowd=annotation['iscrowd'],
                                bbox=box,
                                area=box[2] * box[3],
                            )
                        )
        info = dict(description=DESCRIPTION, seed=seed)
        written = dict(info=info, categories=dataset['categories'], images=images, annotations=annotations)
        file.write_text(json.dumps(written), encoding='utf-8')
        progress(f'{split}: {len(images)} images, {len(annotations)} objects')


def _view(rng: np.random.Generator, picture: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of a part with the sides of ``size``."""
    whole_height, whole_width = picture.shape[:2]
    side = min(whole_height / size[1], whole_width / size[0]) * np.exp(rng.uniform(np.log(SMALLEST), 0))
    width, height = round(side * size[0]), round(side * size[1])
    return (
        int(rng.integers(whole_width - width + 1)),
        int(rng.integers(whole_height - height + 1)),
        width,
        height,
    )


def _in_other_light(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    light = picture.astype(np.float32) / 255
    contrast = np.exp(rng.uniform(np.log(WEAKEST), 0))
    colour = rng.uniform(0.2, 0.8) + rng.uniform(-0.1, 0.1, 3)
    light = colour + contrast * (light - light.mean(axis=(0, 1))) + rng.normal(0, NOISE, light.shape)
    return np.clip(255 * light, 0, 255).round().astype(np.uint8)


def _seen(box: list[float], view: tuple[int, int, int, int], size: tuple[int, int]) -> list[float] | None:
    """The part of a box [x, y, width, height] that is in the view, in its pixels; None if that is too little."""
    scale = np.array(size) / view[2:]
    corners = (np.array([box[:2], np.add(box[:2], box[2:])]) - view[:2]) * scale
    cut = corners.clip(0, size)
    sides = cut[1] - cut[0]
    if min(sides) < 3 or sides.prod() < VISIBLE * (corners[1] - corners[0]).prod():
        return None
    return [*cut[0].tolist(), *sides.tolist()]
