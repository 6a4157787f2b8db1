"""The views of real images are valid COCO, their boxes are where the objects are, and the light is what differs."""

import json

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from pycocotools.coco import COCO

from mmdet_cbn.experiments.data.varied import write_varied


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Two grey images with one white box each, besides a COCO crowd."""
    root = tmp_path_factory.mktemp('source')
    for split in ('train', 'val'):
        (root / f'{split}2017').mkdir()
        images, annotations = [], []
        for number, box in enumerate([[40, 30, 90, 60], [100, 50, 30, 80]], start=1):
            picture = np.full((160, 200, 3), 100, np.uint8)
            x, y, width, height = box
            picture[y : y + height, x : x + width] = 200
            cv2.imwrite(str(root / f'{split}2017' / f'{number}.png'), picture)
            images.append(dict(id=10 * number, file_name=f'{number}.png', width=200, height=160))
            annotations.append(
                dict(id=number, image_id=10 * number, category_id=7, iscrowd=number - 1, bbox=box, area=width * height)
            )
        file = root / 'annotations' / f'instances_{split}2017.json'
        file.parent.mkdir(exist_ok=True)
        dataset = dict(images=images, annotations=annotations, categories=[dict(id=7, name='box')])
        file.write_text(json.dumps(dataset))
    return root


@pytest.fixture(scope='module')
def written(source, tmp_path_factory):
    root = tmp_path_factory.mktemp('varied')
    write_varied(source, root, variants=20)
    return root


def test_boxes_are_where_the_objects_are(written):
    coco = COCO(written / 'annotations' / 'instances_train2017.json')
    assert len(coco.imgs) == 40 and coco.loadCats([7])[0]['name'] == 'box'
    assert 20 <= len(coco.anns) <= 40 and {a['iscrowd'] for a in coco.anns.values()} == {0, 1}
    for annotation in coco.anns.values():
        image = coco.imgs[annotation['image_id']]
        picture = cv2.imread(str(written / 'train2017' / image['file_name'])).mean(axis=2)
        assert picture.shape == (96, 128) == (image['height'], image['width'])
        x, y, width, height = annotation['bbox']
        assert 0 <= x < x + width <= 128 and 0 <= y < y + height <= 96 and min(width, height) >= 3
        assert annotation['area'] == pytest.approx(width * height)
        inside = np.zeros(picture.shape, bool)
        inside[round(y) : round(y + height), round(x) : round(x + width)] = True
        bright = picture > (picture[inside].mean() + picture[~inside].mean()) / 2
        assert (bright == inside).mean() > 0.95


def test_what_is_mostly_out_of_view_is_left_out(written):
    coco = COCO(written / 'annotations' / 'instances_train2017.json')
    left_out = [image for image in coco.imgs if not coco.getAnnIds(image)]
    # The first box has more than this share of the smallest view: it cannot be out of sight in all its views.
    assert 0 < len(left_out) < 20


def test_light_and_contrast_differ_from_view_to_view(written):
    pictures = [cv2.imread(str(file)).astype(float) for file in sorted((written / 'train2017').iterdir())]
    brightness = [picture.mean() / 255 for picture in pictures]
    assert 0.15 < min(brightness) < 0.35 and 0.65 < max(brightness) < 0.85
    deviations = [picture.std(axis=(0, 1)).mean() for picture in pictures]
    assert max(deviations) > 2 * min(deviations)
    assert max(np.ptp(picture.mean(axis=(0, 1))) for picture in pictures) > 15, 'colours are shifted apart'


def test_the_same_arguments_give_the_same_files(source, written, tmp_path):
    write_varied(source, tmp_path / 'again', variants=20)
    write_varied(source, tmp_path / 'other', variants=20, seed=1)
    for file in ('train2017/000000000040.png', 'val2017/000000000001.png', 'annotations/instances_val2017.json'):
        again, other = ((tmp_path / root / file).read_bytes() for root in ('again', 'other'))
        assert again == (written / file).read_bytes() != other


def test_the_study_has_its_classes_and_size():
    config = Config.fromfile(ROOT / 'configs' / '_base_' / 'varied.py')
    assert config.model.bbox_head.num_classes == len(config.varied_classes) == 3
    (resize,) = (step for step in config.test_pipeline if step['type'] == 'Resize')
    assert resize['scale'] == (128, 96)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(variants=0), ValueError, 'variants must be at least 1, got 0'),
        (dict(size=(128, 16)), ValueError, 'size must be at least 32 x 32 pixels, got 128 x 16'),
        (dict(source='nowhere'), FileNotFoundError, 'instances_train2017.json'),
    ],
)
def test_wrong_arguments_are_named(source, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_varied(**{'source': source, 'root': tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_image_is_named(source, tmp_path):
    file = source / 'train2017' / '2.png'
    content = file.read_bytes()
    file.write_text('no image')
    with pytest.raises(ValueError, match=r'2\.png is no image'):
        write_varied(source, tmp_path)
    file.write_bytes(content)


def test_annotations_of_someone_else_are_left_alone(source, tmp_path):
    with pytest.raises(FileExistsError, match=r'instances_train2017\.json was not written by this tool'):
        write_varied(source, source)
