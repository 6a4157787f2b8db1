"""Our study of fine-tuning: the kinds of rows of Table 5 by their small version on photographs.

All methods with 2 images a step, and those that people choose between with 1 and 4, too. The learning rate was chosen
by BN everywhere with 2 images: the paper's is too small for so few images.
"""

from collections.abc import Iterable
from typing import Any

from ...window.size import suggested_window_size
from ..rows.table import BOX, Row, Table
from .methods import norm_of, words_of

_OF_CONFIG = 4  # images per step
_EPOCHS, _IMAGES = 12, 660  # of the config; images with a face, to train on
_RATE = 4  # times the paper's learning rate for each image
_RATES = (1, 4, 16)
_METRICS = BOX[:5]
_SHARED = {'train_cfg.val_interval': 3}  # an evaluation takes a third of an epoch's time
_ALIKE = ('Naive CBN', 'CBN, gradient batch', 'CBN, gradient 0.25')
_IN_HEADS = ('BN', 'GN', 'BRN', *_ALIKE)
# The paper has no row with BRN everywhere.
_EVERYWHERE = ('BN', 'BN, population statistics', 'GN', *_ALIKE, 'CBN, 64 samples, gradient 0.25')
_ALSO_WITH_1_AND_4 = ('BN', 'GN', 'CBN, gradient 0.25')
_FROZEN = 'frozen BN'


def _row(method: str, where: str, images: int, rate: float = _RATE) -> Row:
    """A method in heads or everywhere, with the learning rate linear in the images, as in the paper."""
    arguments: dict[str, Any] = {}
    parts: list[str] = []
    if method == _FROZEN:
        name, label, norm = ['frozen-bn'], method, '4conv1fc'
    else:
        norm, arguments = norm_of(method, _EPOCHS * _IMAGES // images)
        if norm == 'cbn' and images != _OF_CONFIG:
            arguments = {**arguments, 'window_size': suggested_window_size(images)}
        parts = ['neck', 'roi_head.bbox_head', *['backbone'] * (where == 'all')]
        name, label = [*words_of(method), where], f'{method}, {"everywhere" if where == "all" else "in heads"}'
        norm = f'{norm}-{where}'
    return Row(
        '-'.join([*name, str(images), *[f'rate-{rate}'] * (rate != 1)]),
        (label, images),
        f'faster-rcnn_r50_fpn_{norm}_1x_coco',
        {},
        {**_SHARED, **{f'model.{part}.norm_cfg.{key}': value for part in parts for key, value in arguments.items()}},
        times_images=images / _OF_CONFIG,
        times_rate=rate,
        small='facemask_population' if 'population' in method else 'facemask',
    )


def _of_rate(method: str, rate: float) -> Row:
    row = _row(method, 'all', 2, rate)
    return row._replace(labels=(row.labels[0], rate))


def _rows(methods: Iterable[str], where: str) -> list[Row]:
    return [
        _row(method, where, images)
        for method in methods
        for images in ((1, 2, 4) if method in _ALSO_WITH_1_AND_4 else (2,))
    ]


FINE_TUNING = Table(
    'study-fine-tuning',
    'Fine-tuning on photographs: Faster R-CNN with a 4conv1fc head',
    ('method', 'images per step'),
    _METRICS,
    (
        *(_row(_FROZEN, '', images) for images in (1, 2, 4)),
        *_rows(_IN_HEADS, 'head'),
        *_rows(_EVERYWHERE, 'all'),
    ),
    gpus=1,
)
FINE_TUNING_RATES = Table(
    'study-fine-tuning-rate',
    'Fine-tuning with 2 images per step: learning rates',
    ('method', "times the paper's learning rate"),
    _METRICS,
    tuple(_of_rate(method, rate) for method in (_FROZEN, 'BN', *_ALIKE) for rate in _RATES),
    gpus=1,
)
