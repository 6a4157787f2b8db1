"""A data set of drawn shapes in COCO format, for running the whole path with nothing downloaded."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from .coco_tree import Progress, annotation_files

DESCRIPTION = 'Drawn shapes by mmdet_cbn'
CLASSES = ('circle', 'square', 'triangle', 'star')

Outline = np.ndarray  #: Polygon, [points, 2] of x and y


def write_shapes(
    root: str | Path,
    images: dict[str, int],
    size: tuple[int, int] = (256, 160),
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> None:
    """Write images and COCO annotations of shapes in random colours, sizes and turns on noisy ground.

    Shapes overlap; the annotation is what is to be seen of one, as polygons. In some images a dense group of small
    shapes of one class is annotated as a crowd region in RLE. The same arguments give the same files.

    Args:
        root: Folder to write to: ``<split>2017/*.png`` and ``annotations/instances_<split>2017.json``.
        images: Number of images of each split, e.g. ``{'train': 200, 'val': 50}``.
        size: Width and height of the images in pixels, 64 at least.
        seed: Seed of the drawing.
        progress: Called with a line about each finished split.

    Raises:
        ValueError: A size or number of images that is too small.
        FileExistsError: ``root`` holds annotations that this function did not write.
    """
    if min(size) < 64:
        raise ValueError(f'size must be at least 64 x 64 pixels, got {size[0]} x {size[1]}')
    root = Path(root)
    for split, number in images.items():
        if number < 1:
            raise ValueError(f'images must be at least 1 in each split, got {number} for {split}')
    for number, (split, annotation_file) in enumerate(annotation_files(root, images, DESCRIPTION).items()):
        image_dir = root / f'{split}2017'
        for folder in (annotation_file.parent, image_dir):
            folder.mkdir(parents=True, exist_ok=True)
        dataset: dict[str, Any] = dict(
            info=dict(description=DESCRIPTION, seed=seed),
            categories=[dict(id=index, name=name) for index, name in enumerate(CLASSES, start=1)],
            images=[],
            annotations=[],
        )
        rng = np.random.default_rng([seed, number])
        for image_id in range(1, images[split] + 1):
            picture, annotations = _draw(rng, size)
            file_name = f'{image_id:012d}.png'
            cv2.imwrite(str(image_dir / file_name), picture)
            dataset['images'].append(dict(id=image_id, file_name=file_name, width=size[0], height=size[1]))
            for annotation in annotations:
                dataset['annotations'].append(dict(id=len(dataset['annotations']) + 1, image_id=image_id, **annotation))
        annotation_file.write_text(json.dumps(dataset), encoding='utf-8')
        crowds = sum(annotation['iscrowd'] for annotation in dataset['annotations'])
        progress(f'{split}: {images[split]} images, {len(dataset["annotations"])} objects, {crowds} of them crowds')


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One picture [H, W, 3] and its annotations, without ids."""
    width, height = size
    picture = _ground(rng, size)
    objects: list[tuple[int, bool, np.ndarray]] = []  # class, crowd, mask [H, W]: the later, the nearer
    for _ in range(rng.integers(2, 7)):
        label = int(rng.integers(len(CLASSES)))
        radius = np.exp(rng.uniform(np.log(0.1), np.log(0.3))) * min(size)
        centre = rng.uniform((0, 0), size)
        outlines = [_outline(rng, CLASSES[label], centre, radius)]
        objects.append((label, False, _paint(rng, picture, outlines)))
    if rng.random() < 0.1:
        label = int(rng.integers(len(CLASSES)))
        centre = rng.uniform((0.2 * width, 0.2 * height), (0.8 * width, 0.8 * height))
        outlines = [
            _outline(rng, CLASSES[label], rng.normal(centre, 0.1 * min(size)), 0.03 * min(size)) for _ in range(12)
        ]
        objects.append((label, True, _paint(rng, picture, outlines)))

    annotations = []
    covered = np.zeros((height, width), np.uint8)
    for label, crowd, mask in reversed(objects):
        visible = mask & ~covered
        covered |= mask
        area = int(visible.sum())
        segmentation = _rle(visible) if crowd else _polygons(visible)
        # What is nearly hidden cannot be told, and would not have been annotated.
        if area < max(30, 0.4 * mask.sum()) or not segmentation:
            continue
        annotations.append(
            dict(
                category_id=label + 1,
                iscrowd=int(crowd),
                area=area,
                bbox=list(cv2.boundingRect(visible)),
                segmentation=segmentation,
            )
        )
    return picture, annotations


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A slope between two dark or light colours, with noise."""
    width, height = size
    corners = rng.uniform(40, 215, (2, 2, 3)).astype(np.float32)
    slope = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(slope + rng.normal(0, 12, slope.shape), 0, 255).astype(np.uint8)


def _outline(rng: np.random.Generator, name: str, centre: np.ndarray, radius: float) -> Outline:
    corners = {'circle': 40, 'square': 4, 'triangle': 3, 'star': 10}[name]
    angles = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 2 * np.pi)
    radii = np.where(np.arange(corners) % 2, 0.45 * radius, radius) if name == 'star' else np.full(corners, radius)
    return centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _paint(rng: np.random.Generator, picture: np.ndarray, outlines: list[Outline]) -> np.ndarray:
    """Paint the outlines in one colour; returns their mask [H, W] of 0 and 1."""
    mask = np.zeros(picture.shape[:2], np.uint8)
    for outline in outlines:
        cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
    picture[mask > 0] = rng.uniform(0, 255, 3)
    return mask


def _polygons(mask: np.ndarray) -> list[list[float]]:
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # A polygon of COCO has three corners at least; smaller specks stand in the area and the box all the same.
    return [contour.flatten().tolist() for contour in contours if len(contour) >= 3]


def _rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return dict(size=list(mask.shape), counts=encoded['counts'].decode('ascii'))
