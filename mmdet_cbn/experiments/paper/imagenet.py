"""The paper's results on ImageNet as data: Tables 2, 3, 4 and 9 and the ImageNet halves of Figures 3 and 5.

Each row names the config of configs/imagenet that makes it.
"""

from typing import Any

from ..rows.table import Row, Table

METRICS = ('top1',)  # accuracy
BATCH_SIZES = (32, 16, 8, 4, 2, 1)  # of Table 3
_OF_CONFIG = 32  # images per GPU


def imagenet_row(
    name: str, labels: tuple[str | float, ...], images: int, norm: str, top1: float | None, **changes: Any
) -> Row:
    """A row with so many images per GPU.

    Args:
        name: Unique in its table.
        labels: What stands in the table's own columns.
        images: Per GPU.
        norm: As in the config's name.
        top1: The paper's number; None if the paper has none.
        **changes: Arguments of the normalizer; ``burn_in``, ``times_rate`` and ``small``, as of :class:`Row`; and
            ``network``, as in the config's name, for another than ResNet-18.
    """
    network = changes.pop('network', 'resnet18')
    of_row = {key: changes.pop(key) for key in ('burn_in', 'times_rate', 'small') if key in changes}
    return Row(
        name,
        labels,
        f'{network}_{norm}_4xb32_in1k',
        {} if top1 is None else {'top1': top1},
        {f'model.backbone.norm_cfg.{key}': value for key, value in changes.items()},
        times_images=images / _OF_CONFIG,
        folder='imagenet',
        **of_row,
    )


TABLE2 = Table(
    name='table2',
    title='Table 2: normalizers of ResNet-18 on ImageNet, 32 images per GPU',
    labels=('norm',),
    metrics=METRICS,
    rows=tuple(
        imagenet_row(norm.lower(), (norm,), 32, norm.lower(), top1)
        for norm, top1 in (('IN', 64.4), ('LN', 67.9), ('GN', 68.9), ('CBN', 70.2), ('BN', 70.2))
    ),
)

_TABLE3 = {
    'BN': (70.2, 70.2, 68.4, 65.1, 55.9, None),
    'GN': (68.9, 69.0, 68.9, 69.0, 69.1, 68.9),
    'BRN': (70.1, 69.5, 68.2, 67.9, 60.3, None),
    'CBN': (70.2, 70.2, 70.1, 70.0, 69.6, 69.3),
}


def at_least_16(norm: str, images: int) -> dict[str, Any]:
    """The window size where the paper's rule ends too early: with 1 image k is 16, not 8.

    "The number of effective examples is no fewer than 16."
    """
    return {'window_size': 16} if (norm, images) == ('cbn', 1) else {}


def _table3_row(norm: str, images: int, top1: float | None) -> Row:
    name = norm.lower()
    return imagenet_row(f'{name}-{images}', (norm, images), images, name, top1, **at_least_16(name, images))


TABLE3 = Table(
    name='table3',
    title='Table 3: images per GPU, ResNet-18 on ImageNet',
    labels=('norm', 'images per GPU'),
    metrics=METRICS,
    rows=tuple(
        _table3_row(norm, images, top1)
        for norm, numbers in _TABLE3.items()
        for images, top1 in zip(BATCH_SIZES, numbers, strict=True)
    ),
)

_TABLE4 = {  # BN with 32 images, then with 4 images BN, GN, BRN and CBN
    'ResNet-50': (76.1, 72.2, 75.5, 73.8, 76.0),
    'VGG-16': (73.3, 68.2, 72.7, 70.3, 73.1),
    'Inception-v3': (77.5, 72.9, 76.8, 75.1, 77.2),
    'DenseNet-121': (74.7, 72.6, 74.2, 74.0, 74.6),
    'MobileNet-v2': (71.6, 67.3, 71.0, 70.7, 71.6),
}
_IN_CONFIGS = {'ResNet-50': 'resnet50', 'VGG-16': 'vgg16', 'DenseNet-121': 'densenet121'}
# Of GN; the paper does not give them. The most, up to 32, that divide the channels of each layer.
_GROUPS = {'Inception-v3': 16, 'MobileNet-v2': 8}


def _table4_row(network: str, norm: str, images: int, top1: float) -> Row:
    in_config = _IN_CONFIGS.get(network, network.lower())
    of_norm: dict[str, dict[str, Any]] = {
        'BRN': {'type': 'BRN'},
        'GN': {'type': 'GN', 'num_groups': _GROUPS.get(network, 32)},
    }
    name, config = f'{in_config}-{norm.lower()}-{images}', 'cbn' if norm == 'CBN' else 'bn'
    labels = (network, norm, images)
    return imagenet_row(name, labels, images, config, top1, network=in_config, **of_norm.get(norm, {}))


TABLE4 = Table(
    name='table4',
    title='Table 4: networks on ImageNet',
    labels=('network', 'norm', 'images per GPU'),
    metrics=METRICS,
    rows=tuple(
        _table4_row(network, norm, images, top1)
        for network, numbers in _TABLE4.items()
        for (norm, images), top1 in zip(
            (('BN', 32), ('BN', 4), ('GN', 4), ('BRN', 4), ('CBN', 4)), numbers, strict=True
        )
    ),
)

TABLE9 = Table(
    name='table9',
    title='Table 9: order of the compensation, ResNet-18 on ImageNet, 4 images per GPU',
    labels=('norm',),
    metrics=METRICS,
    rows=(
        imagenet_row('bn-4', ('BN',), 4, 'bn', 65.1),
        imagenet_row('naive-4', ('Naive CBN',), 4, 'cbn', 66.8, order=0),
        imagenet_row('cbn-4', ('CBN, order 1',), 4, 'cbn', 70.0),
        imagenet_row('cbn-4-order-2', ('CBN, order 2',), 4, 'cbn', 70.0, order=2),
    ),
)


def _window_rows() -> list[Row]:
    """The sizes 1 and 4 are rows of Tables 3 and 9; the text names also 8. The others are ours."""
    rows = [
        imagenet_row(f'bn-{4 * k}', ('BN', k), 4 * k, 'bn', top1)
        for k, top1 in ((1, 65.1), (2, 68.4), (4, 70.2), (8, 70.2))
    ]
    for norm, name, order, numbers in (('Naive CBN', 'naive', {'order': 0}, {4: 66.8}), ('CBN', 'cbn', {}, {4: 70.0})):
        for k in (2, 4, 8, 12):
            size = {} if k == 4 else {'window_size': k}
            suffix = '' if k == 4 else f'-k{k}'
            rows.append(imagenet_row(f'{name}-4{suffix}', (norm, k), 4, 'cbn', numbers.get(k), **order, **size))
    return rows


FIGURE3 = Table(
    name='figure3-imagenet',
    title='Figure 3, ImageNet: temporal window size (ResNet-18, 4 images per GPU; BN: 4 k images per GPU)',
    labels=('method', 'k'),
    metrics=METRICS,
    rows=tuple(_window_rows()),
)

FIGURE5 = Table(
    name='figure5-imagenet',
    title='Figure 5, ImageNet: burn-in period (ResNet-18, 4 images per GPU)',
    labels=('method', 'burn-in epochs'),
    metrics=METRICS,
    # The text names 25, the default; the others are ours. Burn-in for all 100 epochs is BN.
    rows=(
        *(
            imagenet_row('cbn-4', ('CBN', 25), 4, 'cbn', 70.0)
            if epochs == 25
            else imagenet_row(f'cbn-4-t{epochs}', ('CBN', epochs), 4, 'cbn', None, burn_in=epochs / 100)
            for epochs in (0, 5, 10, 25, 50, 75)
        ),
        imagenet_row('bn-4', ('CBN', 100), 4, 'bn', 65.1),
    ),
)

IMAGENET = (TABLE2, TABLE3, TABLE4, TABLE9, FIGURE3, FIGURE5)
