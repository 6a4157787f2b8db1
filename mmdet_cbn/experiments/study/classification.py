"""Our study of classification with SGD: small versions of the paper's rows of ResNet-18, on Imagenette.

It has 4 epochs, for the time that they take; the small versions have 8. With 1 image a step, the slowest, there are BN,
GN and CBN only.
"""

from ..paper.imagenet import METRICS, at_least_16, imagenet_row
from ..rows.table import Row, Table
from .methods import norm_of, words_of

_EPOCHS = 4
_SHORT = {'train_cfg.max_epochs': _EPOCHS, 'param_scheduler.T_max': _EPOCHS}
_IMAGES = 9469  # of Imagenette, to train on
_BURN_IN = 1  # epochs


def _ours(method: str, images: int, rate: float = 1, burn_in: int = _BURN_IN) -> Row:
    norm, arguments = norm_of(method, _EPOCHS * _IMAGES // images)
    words = ['small', *words_of(method), str(images), *[f'rate-{rate}'] * (rate != 1)]
    changes = {**arguments, **at_least_16(norm, images), 'times_rate': rate, 'small': 'imagenette'}
    if burn_in != _BURN_IN:
        method = f'{method}, burn-in {burn_in}'
        words.append(f'burn-in-{burn_in}')
    row = imagenet_row('-'.join(words), (method, images), images, norm, None, **changes)
    of_hook = {'custom_hooks.0.burn_in_epochs': burn_in} if norm == 'cbn' else {}
    return row._replace(options={**row.options, **_SHORT, **of_hook})


def _of_rate(method: str, images: int, rate: float) -> Row:
    return _ours(method, images, rate)._replace(labels=(f'{method}, {images} images', rate))


CLASSIFICATION = Table(
    name='study-classification',
    title='Classification of Imagenette with SGD',
    labels=('method', 'images per step'),
    metrics=METRICS,
    rows=(
        *(_ours(method, images) for method in ('BN', 'GN') for images in (32, 8, 4, 2, 1)),
        *(_ours('BRN', images) for images in (32, 8, 4, 2)),
        *(_ours(method, images) for method in ('Naive CBN', 'CBN, gradient batch') for images in (4, 2)),
        *(_ours('CBN, gradient 0.25', images) for images in (8, 4, 2, 1)),
        _ours('CBN, 64 samples, gradient 0.25', 4),
        _ours('CBN, order 2, gradient 0.25', 4),
        *(_ours(method, 4, burn_in=0) for method in ('CBN, gradient batch', 'CBN, gradient 0.25')),
    ),
    gpus=1,
)
_RATES = (1, 4, 16)
CLASSIFICATION_RATES = Table(
    name='study-classification-rate',
    title='Classification of Imagenette: learning rates',
    labels=('method', "times the paper's learning rate"),
    metrics=METRICS,
    rows=(
        *(_of_rate('BN', 32, rate) for rate in _RATES),
        *(
            _of_rate(method, 2, rate)
            for method in ('BN', 'Naive CBN', 'CBN, gradient batch', 'CBN, gradient 0.25')
            for rate in _RATES
        ),
    ),
    gpus=1,
)
