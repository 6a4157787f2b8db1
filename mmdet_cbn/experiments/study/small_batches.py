"""Our study of small batches as data: what is trained, on what, and with which optimizer.

The varied images (configs/_base_/varied.py) were chosen by BN alone: with 1 or 2 images a step it is far below BN with
4 or 8. The length and the learning rates of the trainings on photographs (configs/_base_/facemask.py) and with SGD were
chosen by BN and GN alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...layers.gradient import Gradient
from ...window.size import suggested_window_size
from ..rows.table import BOX, Row, Table
from .methods import words_of

METRICS = BOX[:5]  # there are few large objects


class _Training(NamedTuple):
    """What is trained for how long, and how."""

    model: str  #: begin of the config's name
    data: str  #: end of the config's name
    heads: tuple[str, ...]  #: parts of the model with the normalizer, besides backbone and neck
    epochs: int
    warmup: int  #: epochs
    iters: int  #: of about one epoch with 1 image
    burn_in: int  #: epochs, a quarter of the training, as in the paper
    sgd: float | None = None  #: learning rate for each image with SGD; AdamW otherwise


VARIED = _Training('retinanet_r18_fpn', 'varied', (), 8, 1, 1152, 2)
VARIED_SGD = VARIED._replace(sgd=0.0025)  # with twice this rate BN of 16 images has an AP of 0
FACEMASK = _Training('retinanet_r18_fpn', 'facemask', (), 32, 2, 660, 8)
FASTER = _Training('faster-rcnn_r18_fpn', 'facemask', ('roi_head.bbox_head',), 16, 1, 660, 4)
_OF_CONFIG = {'varied': VARIED, 'facemask': FACEMASK}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'BN': ('bn', {}),
    'BN, population statistics': ('bn-population', {}),
    'GN': ('gn', {}),
    'BRN': ('brn', {}),
    'Naive CBN': ('cbn', {'order': 0}),
    'CBN': ('cbn', {}),
    'CBN, 64 samples': ('cbn', {'samples': 64}),
    'CBN, order 2': ('cbn', {'order': 2}),
    'no drift': ('rerun', {}),
}
_BESIDE_BN = ('GN', 'BRN', 'Naive CBN', 'CBN', 'CBN, 64 samples')
_KINDS: tuple[Gradient, ...] = ('batch', 'weights', 0.25, 'projection')
_WORDS = {'running_stats': 'running statistics of the', 'momentum': 'momentum', 'gradient': 'gradient'}


def _row(
    method: str,
    images: int,
    x: float,
    *,
    on: _Training = VARIED,
    rate: float = 1,
    burn_in: int | None = None,
    whole: bool | None = None,
    updates_of: int | None = None,
    **arguments: Any,
) -> Row:
    """A method with so many images a step, at ``x`` of its table.

    Args:
        on: What is trained.
        rate: Factor of the learning rate.
        burn_in: Epochs, where they are others than the config's.
        whole: Whether, without drift, the gradient goes through the earlier images, too.
        updates_of: Images per step of the training that has as many updates, where it is another.
        **arguments: Of the normalizer.
    """
    name, of_method = _METHODS[method]
    if name == 'cbn' and burn_in is None:
        burn_in = on.burn_in
    if burn_in == _OF_CONFIG[on.data].burn_in:
        burn_in = None
    of_hook = {'burn_in': burn_in, 'whole': whole, 'updates_of': updates_of}
    changes = {**arguments, **({'lr': rate} if rate != 1 else {})}
    changes |= {key: value for key, value in of_hook.items() if value is not None}
    if method == 'BRN':
        # Of that paper's 130,000 steps, the limits grow from 5,000 to 40,000 and 25,000.
        # Here they grow after the warm-up, to the middle of the training and before.
        first, middle, before = (
            int(epochs * (on.iters // images)) for epochs in (on.warmup, on.epochs / 2, on.epochs * 3 / 8)
        )
        arguments = {'r_steps': (first, middle), 'd_steps': (first, before)}
    options = {
        'train_dataloader.batch_size': images,
        **_optimizer(on, images, rate),
        **{
            f'model.{part}.norm_cfg.{key}': value
            for part in ('backbone', 'neck', *on.heads)
            for key, value in {**of_method, **arguments}.items()
        },
        **({} if burn_in is None else {'custom_hooks.0.burn_in_epochs': burn_in}),
        **({} if whole is None else {'custom_hooks.0.gradient': whole}),
        **_schedule(on, 1 if updates_of is None else images // updates_of),
    }
    sgd = [] if on.sgd is None else [f'sgd {on.sgd}']
    words = [
        *words_of(method),
        str(images),
        *sgd,
        *(f'{key} {value}' for key, value in changes.items()),
    ]
    if method.startswith('CBN'):
        arguments = {'gradient': 'batch', **arguments}  # the configs', as in the authors' code
    label = ', '.join([method, *(f'{_WORDS[key]} {value}' for key, value in arguments.items() if key in _WORDS)])
    config = f'{on.model}_{name}_{on.data}'
    return Row('-'.join(words).replace(' ', '-'), (label, x), config, {}, options, folder='study')


def _optimizer(on: _Training, images: int, rate: float) -> dict[str, Any]:
    if on.sgd is None:
        # By the square root of the images, for the steps of Adam do not grow with the gradient.
        return {'optim_wrapper.optimizer.lr': round(0.001 * images**0.5 * rate, 6)}
    optimizer = {'type': 'SGD', 'lr': round(on.sgd * images * rate, 6), 'momentum': 0.9, 'weight_decay': 0.0001}
    return {f'optim_wrapper.optimizer.{key}': value for key, value in optimizer.items()}


def _schedule(on: _Training, times: int) -> dict[str, Any]:
    """So many times the epochs, where they are others than the config's."""
    warmup, epochs = on.warmup * times, on.epochs * times
    if epochs == _OF_CONFIG[on.data].epochs:
        return {}
    return {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs // 4,
        'param_scheduler.0.end': warmup,
        'param_scheduler.1.begin': warmup,
        'param_scheduler.1.end': epochs,
        'param_scheduler.1.T_max': epochs - warmup,
    }


def _table(name: str, title: str, x: str, *rows: Row) -> Table:
    return Table(f'study-{name}', title, ('method', x), METRICS, rows, gpus=1)


def _of(images: int, row: Row) -> Row:
    """``row`` in a table of several numbers of images."""
    method, x = row.labels
    return row._replace(labels=(f'{method}, {images} image{"s" * (images > 1)}', x))


def _series(method: str, images: int, argument: str, values: Sequence[float]) -> list[Row]:
    """One argument of :func:`_row` varied; where it is the config's own value, the row is the one of IMAGES."""
    own = suggested_window_size(images) if argument == 'window_size' else None
    varied: list[dict[str, Any]] = [{} if x == own else {argument: x} for x in values]
    return [_of(images, _row(method, images, x, **each)) for x, each in zip(values, varied, strict=True)]


def _burnt_in(method: str, images: int, burn_in: int, on: _Training = VARIED, **arguments: Any) -> Row:
    """A row whose label has the burn-in, and what its own arguments are."""
    varied = {key: value for key, value in arguments.items() if value != 'batch'}
    row = _row(method, images, images, on=on, burn_in=burn_in, **varied)
    words = [f'gradient {value}' if key == 'gradient' else 'whole gradient' * value for key, value in arguments.items()]
    label = ', '.join([method, *filter(None, words), f'burn-in {burn_in}'])
    return row._replace(labels=(label, images))


def _gradients(
    on: _Training,
    kinds: Sequence[tuple[Gradient, int]],
    images: Sequence[int] = (1, 2, 4),
    beside: Sequence[str] = ('BN', 'BN, population statistics', 'GN', 'BRN'),
) -> list[Row]:
    """Kinds of gradient, each with a burn-in, beside other normalizers."""
    return [
        *(_row(method, each, each, on=on) for method in beside for each in images),
        _row('BN', 16, 4, on=on, updates_of=4)._replace(labels=('BN of 16 images, as many updates', 4)),
        *(_burnt_in('CBN', each, burn_in, on, gradient=kind) for kind, burn_in in kinds for each in images),
    ]


IMAGES = _table(
    'images',
    'Normalizers by images per step',
    'images per step',
    *(_row('BN', images, images) for images in (1, 2, 4, 8, 16)),
    *(_row(method, images, images) for method in _BESIDE_BN for images in (1, 2, 4)),
    _row('CBN, order 2', 1, 1),
    *(_row('CBN', images, images, gradient=0.25) for images in (1, 2, 4)),
)
WINDOW = _table(
    'window',
    'Window size k (BN: k images per step)',
    'k',
    *(_row('BN', images, images) for images in (1, 2, 4, 8, 16)),
    *_series('Naive CBN', 1, 'window_size', (2, 4, 8, 16)),
    *_series('CBN', 1, 'window_size', (2, 4, 8, 16)),
    *_series('CBN', 4, 'window_size', (2, 4, 8)),
)
BURN_IN = _table(
    'burn-in',
    'Burn-in, of 8 epochs (8: BN)',
    'epochs of burn-in',
    *_series('CBN', 1, 'burn_in', (0, 2, 4, 7)),
    _of(1, _row('BN', 1, VARIED.epochs)),
    *_series('CBN', 4, 'burn_in', (0, 2, 4)),
    _of(4, _row('BN', 4, VARIED.epochs)),
)
RATE = _table(
    'rate',
    'Learning rates',
    'times the learning rate',
    *(row for method in ('BN', 'CBN') for row in _series(method, 1, 'rate', (0.5, 1, 2, 4))),
    *(row for method in ('BN', 'CBN') for row in _series(method, 4, 'rate', (0.5, 1, 2))),
)
RUNNING = _table(
    'running',
    'Running statistics of the window (the default) or of the batch',
    'images per step',
    *(_row('CBN', images, images) for images in (1, 2, 4)),
    *(_row('CBN', images, images, running_stats='batch') for images in (1, 2, 4)),
    _row('CBN', 1, 1, momentum=0.01),
    _row('BN', 1, 1),
    _row('BN', 1, 1, momentum=0.01),
)
GRADIENT = _table(
    'gradient',
    'The gradient of the window, with and without burn-in',
    'images per step',
    *_gradients(VARIED, [(kind, burn_in) for kind in _KINDS for burn_in in (0, VARIED.burn_in)]),
    *(_burnt_in('CBN', 4, burn_in, gradient='window') for burn_in in (0, VARIED.burn_in)),
    *(_burnt_in('no drift', 4, 0, whole=whole) for whole in (False, True)),
)
ORDER = _table(
    'order',
    'Order of the compensation',
    'images per step',
    *(_burnt_in('Naive CBN', 4, burn_in, gradient='batch') for burn_in in (0, 2)),
    _burnt_in('Naive CBN', 4, 0, gradient='projection'),
    *(_burnt_in(method, 4, burn_in, gradient=0.25) for method in ('CBN', 'CBN, 64 samples') for burn_in in (0, 2)),
    _burnt_in('CBN, order 2', 4, 0, gradient=0.25),
    *(_burnt_in(method, 1, 2, gradient=kind) for method, kind in (('Naive CBN', 'batch'), ('CBN', 0.25))),
)
PHOTOGRAPHS = _table(
    'facemask',
    'Photographs: RetinaNet',
    'images per step',
    *_gradients(FACEMASK, [*((kind, FACEMASK.burn_in) for kind in ('batch', 'weights', 0.25)), (0.25, 0)], images=(4,)),
)
PHOTOGRAPHS_FASTER = _table(
    'facemask-faster-rcnn',
    'Photographs: Faster R-CNN with a 4conv1fc head',
    'images per step',
    *_gradients(
        FASTER, [('batch', FASTER.burn_in), (0.25, FASTER.burn_in), (0.25, 0)], images=(4,), beside=('BN', 'GN')
    ),
)
_WITH_SGD: tuple[tuple[str, dict[str, Any]], ...] = (('Naive CBN', {}), ('CBN', {}), ('CBN', {'gradient': 0.25}))
SGD = _table(
    'sgd',
    'SGD at the largest rate at which BN of 16 images trains, 4 images per step',
    'k (BN: k images per step)',
    *(_row('BN', images, images, on=VARIED_SGD) for images in (4, 16)),
    *(
        _row(method, 4, k, on=VARIED_SGD, window_size=k, **arguments)
        for method, arguments in _WITH_SGD
        for k in (4, 16)
    ),
)
SMALL_BATCHES = (IMAGES, WINDOW, BURN_IN, RATE, RUNNING, GRADIENT, ORDER, PHOTOGRAPHS, PHOTOGRAPHS_FASTER, SGD)
