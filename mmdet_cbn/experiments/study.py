"""Our study of small batches as data: what is trained, on varied images (configs/_base_/varied.py), 8 epochs each.

The setting was chosen by BN alone: with 1 or 2 images a step it is far below BN with 4 or 8.
"""

from typing import Any

from .paper import BOX, Row, Table

METRICS = BOX[:5]  # there are few large objects
_EPOCHS, _ITERS = 8, 1152  # of about one epoch with 1 image
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'BN': ('bn', {}),
    'GN': ('gn', {}),
    'BRN': ('brn', {}),
    'Naive CBN': ('cbn', {'order': 0}),
    'CBN': ('cbn', {}),
    'CBN, 64 samples': ('cbn', {'samples': 64}),
}
_WORDS = {'running_stats': 'of the', 'momentum': 'momentum'}


def _row(method: str, images: int, x: float, *, rate: float = 1, burn_in: int | None = None, **arguments: Any) -> Row:
    """A method with so many images a step, at ``x`` of its table.

    Args:
        rate: Factor of the learning rate.
        burn_in: Epochs, where they are others than the config's.
        **arguments: Of the normalizer.
    """
    name, of_method = _METHODS[method]
    config = f'retinanet_r18_fpn_{name}_varied'
    changes = {**arguments, **({'lr': rate} if rate != 1 else {}), **({} if burn_in is None else {'burn_in': burn_in})}
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
    }
    words = [method.lower().replace(', ', ' '), str(images), *(f'{key} {value}' for key, value in changes.items())]
    label = ', '.join([method, *(f'{_WORDS[key]} {value}' for key, value in arguments.items() if key in _WORDS)])
    return Row('-'.join(words).replace(' ', '-'), (label, x), config, {}, options, folder='study')


def _table(name: str, title: str, x: str, *rows: Row) -> Table:
    return Table(f'study-{name}', title, ('method', x), METRICS, rows, gpus=1)


def _windows(method: str, sizes: tuple[int, ...]) -> list[Row]:
    return [_row(method, 1, k) if k == 8 else _row(method, 1, k, window_size=k) for k in sizes]


IMAGES = _table(
    'images',
    'Normalizers by images per step',
    'images',
    *(_row('BN', images, images) for images in (1, 2, 4, 8, 16)),
    *(_row(method, images, images) for method in list(_METHODS)[1:] for images in (1, 2, 4)),
)
WINDOW = _table(
    'window',
    'Window size k, 1 image per step (BN: k images per step)',
    'k',
    *(_row('BN', images, images) for images in (1, 2, 4, 8, 16)),
    *_windows('Naive CBN', (2, 4, 8, 16)),
    *_windows('CBN', (2, 4, 8, 16)),
)
BURN_IN = _table(
    'burn-in',
    'Burn-in, of 8 epochs, 1 image per step (8: BN)',
    'epochs of burn-in',
    *(_row('CBN', 1, epochs, **({} if epochs == 2 else {'burn_in': epochs})) for epochs in (0, 2, 4, 7)),
    _row('BN', 1, 8),
)
RATE = _table(
    'rate',
    'Learning rate, 1 image per step',
    'times the learning rate',
    *(_row(method, 1, rate, rate=rate) for method in ('BN', 'CBN') for rate in (0.5, 1, 2, 4)),
)
RUNNING = _table(
    'running',
    'Running statistics of the window (the default) or of the batch',
    'images',
    *(_row('CBN', images, images) for images in (1, 2, 4)),
    *(_row('CBN', images, images, running_stats='batch') for images in (1, 2, 4)),
    _row('CBN', 1, 1, momentum=0.01),
    _row('BN', 1, 1),
    _row('BN', 1, 1, momentum=0.01),
)
STUDY = (IMAGES, WINDOW, BURN_IN, RATE, RUNNING)
