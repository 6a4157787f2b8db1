"""Our study of small batches as data: what is trained, on varied images (configs/_base_/varied.py), 8 epochs each.

The setting was chosen by BN alone: with 1 or 2 images a step it is far below BN with 4 or 8.
"""

from collections.abc import Sequence
from typing import Any

from ...layers.gradient import GRADIENTS
from ...window.ring import suggested_window_size
from .tables import BOX, Row, Table

METRICS = BOX[:5]  # there are few large objects
_EPOCHS, _ITERS = 8, 1152  # of about one epoch with 1 image
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'BN': ('bn', {}),
    'GN': ('gn', {}),
    'BRN': ('brn', {}),
    'Naive CBN': ('cbn', {'order': 0}),
    'CBN': ('cbn', {}),
    'CBN, 64 samples': ('cbn', {'samples': 64}),
    'CBN, order 2': ('cbn', {'order': 2}),
    'no drift': ('rerun', {}),
}
_BESIDE_BN = ('GN', 'BRN', 'Naive CBN', 'CBN', 'CBN, 64 samples')
_WORDS = {'running_stats': 'of the', 'momentum': 'momentum', 'gradient': 'gradient'}


def _row(
    method: str,
    images: int,
    x: float,
    *,
    rate: float = 1,
    burn_in: int | None = None,
    whole: bool | None = None,
    **arguments: Any,
) -> Row:
    """A method with so many images a step, at ``x`` of its table.

    Args:
        rate: Factor of the learning rate.
        burn_in: Epochs, where they are others than the config's.
        whole: Whether, without drift, the gradient goes through the earlier images, too.
        **arguments: Of the normalizer.
    """
    name, of_method = _METHODS[method]
    config = f'retinanet_r18_fpn_{name}_varied'
    of_hook = {'burn_in': burn_in, 'whole': whole}
    changes = {**arguments, **({'lr': rate} if rate != 1 else {})}
    changes |= {key: value for key, value in of_hook.items() if value is not None}
    if method == 'BRN':
        # Of that paper's 130,000 steps, the limits grow from 5,000 to 40,000 and 25,000.
        # Here they grow after the warm-up, to the middle of the training and before.
        epoch = _ITERS // images
        arguments = {'r_steps': (epoch, _EPOCHS // 2 * epoch), 'd_steps': (epoch, (_EPOCHS // 2 - 1) * epoch)}
    options = {
        'train_dataloader.batch_size': images,
        # By the square root of the images, for the steps of Adam do not grow with the gradient.
        'optim_wrapper.optimizer.lr': round(0.001 * images**0.5 * rate, 6),
        **{
            f'model.{part}.norm_cfg.{key}': value
            for part in ('backbone', 'neck')
            for key, value in {**of_method, **arguments}.items()
        },
        **({} if burn_in is None else {'custom_hooks.0.burn_in_epochs': burn_in}),
        **({} if whole is None else {'custom_hooks.0.gradient': whole}),
    }
    words = [method.lower().replace(', ', ' '), str(images), *(f'{key} {value}' for key, value in changes.items())]
    label = ', '.join([method, *(f'{_WORDS[key]} {value}' for key, value in arguments.items() if key in _WORDS)])
    return Row('-'.join(words).replace(' ', '-'), (label, x), config, {}, options, folder='study')


def _table(name: str, title: str, x: str, *rows: Row) -> Table:
    return Table(f'study-{name}', title, ('method', x), METRICS, rows, gpus=1)


def _of(images: int, row: Row) -> Row:
    """``row`` in a table of several numbers of images."""
    method, x = row.labels
    return row._replace(labels=(f'{method}, {images} image{"s" * (images > 1)}', x))


def _series(method: str, images: int, argument: str, values: Sequence[float]) -> list[Row]:
    """One argument of :func:`_row` varied; where it is the config's own value, the row is that of IMAGES."""
    own = {'window_size': suggested_window_size(images), 'burn_in': 2, 'rate': 1}[argument]
    varied: list[dict[str, Any]] = [{} if x == own else {argument: x} for x in values]
    return [_of(images, _row(method, images, x, **each)) for x, each in zip(values, varied, strict=True)]


def _burnt_in(method: str, images: int, burn_in: int, **arguments: Any) -> Row:
    """A row whose label has the burn-in, and what its own arguments are."""
    # The gradient that CBN has by default, and the config's burn-in, are those of IMAGES.
    varied = {key: value for key, value in arguments.items() if value != 'batch'}
    row = _row(method, images, images, burn_in=None if burn_in == 2 else burn_in, **varied)
    words = [f'gradient {value}' if key == 'gradient' else 'whole gradient' * value for key, value in arguments.items()]
    label = ', '.join([method, *filter(None, words), f'burn-in {burn_in}'])
    return row._replace(labels=(label, images))


IMAGES = _table(
    'images',
    'Normalizers by images per step',
    'images per step',
    *(_row('BN', images, images) for images in (1, 2, 4, 8, 16)),
    *(_row(method, images, images) for method in _BESIDE_BN for images in (1, 2, 4)),
    _row('CBN, order 2', 1, 1),
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
    _of(1, _row('BN', 1, _EPOCHS)),
    *_series('CBN', 4, 'burn_in', (0, 2, 4)),
    _of(4, _row('BN', 4, _EPOCHS)),
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
    *(_row(method, images, images) for method in ('BN', 'GN', 'BRN') for images in (1, 2, 4)),
    *(
        _burnt_in('CBN', images, burn_in, gradient=gradient)
        for gradient in (*GRADIENTS, 0.25, 0.5)
        for burn_in in (0, 2)
        for images in (1, 2, 4)
    ),
    *(_burnt_in('no drift', 4, burn_in, whole=whole) for whole in (False, True) for burn_in in (0, 2)),
)
STUDY = (IMAGES, WINDOW, BURN_IN, RATE, RUNNING, GRADIENT)
