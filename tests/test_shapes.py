"""The drawn data set is valid COCO, the same for the same seed, and overwrites nothing that it did not write."""

import json

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmdet_cbn.experiments.data.shapes import CLASSES, write_shapes


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, {'train': 40, 'val': 3})
    return root


def test_annotations_are_those_of_the_pictures(dataset):
    coco = COCO(dataset / 'annotations' / 'instances_train2017.json')
    assert len(coco.imgs) == 40 and {c['name'] for c in coco.cats.values()} == set(CLASSES)
    assert {a['category_id'] for a in coco.anns.values()} == {1, 2, 3, 4}
    for annotation in coco.anns.values():
        image = coco.imgs[annotation['image_id']]
        picture = cv2.imread(str(dataset / 'train2017' / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
        mask = coco.annToMask(annotation)
        x, y, width, height = annotation['bbox']
        assert 0 <= x < x + width <= image['width'] and 0 <= y < y + height <= image['height']
        outside = mask.copy()
        outside[y : y + height, x : x + width] = 0
        assert outside.sum() == 0
        # A polygon loses the rims of its mask, and gains the holes.
        assert abs(int(mask.sum()) - annotation['area']) <= 0.35 * annotation['area']
        if not annotation['iscrowd']:
            colours = picture[mask > 0]
            assert (colours == np.median(colours, axis=0)).all(axis=1).mean() > 0.6, 'one colour an object'


def test_there_are_overlaps_and_crowds(dataset):
    coco = COCO(dataset / 'annotations' / 'instances_train2017.json')
    crowds = [a for a in coco.anns.values() if a['iscrowd']]
    assert crowds and all(isinstance(a['segmentation'], dict) for a in crowds)
    assert all(isinstance(a['segmentation'], list) for a in coco.anns.values() if not a['iscrowd'])
    overlapping = 0
    for anns in coco.imgToAnns.values():
        boxes = np.array([a['bbox'] for a in anns], float)
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        overlapping += int((np.triu(ious, 1) > 0.1).any())
    assert overlapping >= 5


def test_the_same_seed_draws_the_same(dataset, tmp_path):
    write_shapes(tmp_path / 'again', {'train': 2, 'val': 3})
    write_shapes(tmp_path / 'other', {'train': 2, 'val': 3}, seed=1)
    pictures = [(root / 'val2017' / '000000000003.png').read_bytes() for root in (dataset, tmp_path / 'again')]
    assert pictures[0] == pictures[1] != (tmp_path / 'other/val2017/000000000003.png').read_bytes()
    assert (tmp_path / 'again/train2017/000000000001.png').read_bytes() not in pictures
    annotations = [(root / 'annotations/instances_val2017.json').read_text() for root in (dataset, tmp_path / 'again')]
    assert annotations[0] == annotations[1]


def test_the_configs_name_the_same_classes():
    config = Config.fromfile(ROOT / 'configs' / '_base_' / 'shapes.py')
    assert tuple(config.shapes.metainfo.classes) == CLASSES


@pytest.mark.parametrize('content', [json.dumps(dict(info={})), json.dumps([]), 'no json'])
def test_annotations_of_someone_else_are_left_alone(tmp_path, content):
    file = tmp_path / 'annotations' / 'instances_train2017.json'
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(FileExistsError, match=r'instances_train2017\.json was not written by this tool'):
        write_shapes(tmp_path, {'val': 1, 'train': 1})
    assert file.read_text() == content
    assert list(tmp_path.rglob('*.*')) == [file], 'nothing is written before all is checked'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(dict(images={'train': 0}), 'at least 1 in each split, got 0 for train'), (dict(size=(64, 32)), 'got 64 x 32')],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path, **{'images': {'train': 1}, **arguments})
