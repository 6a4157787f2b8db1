"""Our study of fine-tuning: the kinds of rows of Table 5 by their small twin on photographs.

All methods with 2 images a step, and those that people choose between with 1 and 4, too.
"""

from collections.abc import Iterable

from ...window.ring import suggested_window_size
from ..paper.tables import BOX, Row, Table
from .methods import METHODS, words_of

_OF_CONFIG = 4  # images per step
_SHARED = {'train_cfg.val_interval': 3}  # an evaluation takes a third of an epoch's time
_ALIKE = ('Naive CBN', 'CBN, gradient batch', 'CBN, gradient 0.25')
_IN_HEADS = ('BN', 'GN', 'BRN', *_ALIKE)
# The paper has no row with BRN everywhere.
_EVERYWHERE = ('BN', 'BN, population statistics', 'GN', *_ALIKE, 'CBN, 64 samples, gradient 0.25')
_ALSO_WITH_1_AND_4 = ('BN', 'GN', 'CBN, gradient 0.25')


def _row(method: str, where: str, images: int) -> Row:
    """A method in heads or everywhere, with the learning rate linear in the images, as in the paper."""
    norm, arguments = METHODS[method]
    if norm == 'cbn' and images != _OF_CONFIG:
        arguments = {**arguments, 'window_size': suggested_window_size(images)}
    parts = ['neck', 'roi_head.bbox_head', *['backbone'] * (where == 'all')]
    words = [*words_of(method), where, str(images)]
    return Row(
        '-'.join(words),
        (f'{method}, {"everywhere" if where == "all" else "in heads"}', images),
        f'faster-rcnn_r50_fpn_{norm}-{where}_1x_coco',
        {},
        {**_SHARED, **{f'model.{part}.norm_cfg.{key}': value for part in parts for key, value in arguments.items()}},
        times_images=images / _OF_CONFIG,
        twin='facemask_population' if 'population' in method else 'facemask',
    )


def _rows(methods: Iterable[str], where: str) -> list[Row]:
    return [
        _row(method, where, images)
        for method in methods
        for images in ((1, 2, 4) if method in _ALSO_WITH_1_AND_4 else (2,))
    ]


def _frozen(images: int) -> Row:
    config = 'faster-rcnn_r50_fpn_4conv1fc_1x_coco'
    name, labels = f'frozen-bn-{images}', ('frozen BN', images)
    return Row(name, labels, config, {}, _SHARED, times_images=images / _OF_CONFIG, twin='facemask')


FINE_TUNING = Table(
    'study-fine-tuning',
    'Fine-tuning on photographs: Faster R-CNN with a 4conv1fc head',
    ('method', 'images per step'),
    BOX[:5],
    (
        *(_frozen(images) for images in (1, 2, 4)),
        *_rows(_IN_HEADS, 'head'),
        *_rows(_EVERYWHERE, 'all'),
    ),
    gpus=1,
)
