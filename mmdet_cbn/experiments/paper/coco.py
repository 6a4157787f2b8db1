"""The paper's results on COCO as data: Tables 5 to 8 and the COCO halves of Figures 3 and 5, row by row.

This is the one place where they stand. Each row names the config of configs/cbn that makes it. imagenet.py has the
paper's results on ImageNet.
"""

from typing import Any

from ..rows.table import BOX, Row, Table

BOX_AND_MASK = ('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75', 'segm_mAP', 'segm_mAP_50', 'segm_mAP_75')
COST = ('memory (GB)', 'FLOPs (M)', 'training (iter/s)', 'inference (iter/s)')


def _row(name: str, labels: tuple[str | float, ...], config: str, metrics: tuple[str, ...], *numbers: float) -> Row:
    return Row(name, labels, config, dict(zip(metrics, numbers, strict=True)))


def _table5(where: str, backbone: str, head: str, norm: str, *numbers: float) -> Row:
    return _row(f'{norm}-{where}', (backbone, head), f'faster-rcnn_r50_fpn_{norm}-{where}_1x_coco', BOX, *numbers)


TABLE5 = Table(
    name='table5',
    title='Table 5: normalizers on Faster R-CNN with FPN and ResNet-50',
    labels=('backbone', 'box head'),
    metrics=BOX,
    rows=(
        _row(
            'none', ('fixed BN', '-'), 'faster-rcnn_r50_fpn_4conv1fc_1x_coco', BOX, 36.9, 58.2, 39.9, 21.2, 40.8, 46.9
        ),
        _table5('head', 'fixed BN', 'BN', 'bn', 36.3, 57.3, 39.2, 20.8, 39.7, 47.3),
        _table5('head', 'fixed BN', 'SyncBN', 'syncbn', 37.7, 58.5, 41.1, 22.0, 40.9, 49.0),
        _table5('head', 'fixed BN', 'GN', 'gn', 37.8, 59.0, 40.8, 22.3, 41.2, 48.4),
        _table5('head', 'fixed BN', 'BRN', 'brn', 37.4, 58.1, 40.3, 22.0, 40.7, 48.3),
        _table5('head', 'fixed BN', 'CBN', 'cbn', 37.7, 59.0, 40.7, 22.1, 40.9, 48.8),
        _table5('all', 'BN', 'BN', 'bn', 35.5, 56.4, 38.7, 19.7, 38.8, 47.3),
        _table5('all', 'SyncBN', 'SyncBN', 'syncbn', 37.9, 58.5, 41.1, 21.7, 41.5, 49.7),
        _table5('all', 'GN', 'GN', 'gn', 37.8, 59.1, 40.9, 22.4, 41.2, 49.0),
        _table5('all', 'CBN', 'CBN', 'cbn', 37.7, 58.9, 40.6, 22.0, 41.4, 48.9),
    ),
)
_IN_TABLE5 = {row.name: row for row in TABLE5.rows}


def _table6(detector: str, depth: int, norm: str, *numbers: float) -> Row:
    return _row(
        f'{detector}-r{depth}-{norm.lower()}',
        (f'R{depth}+FPN', norm),
        f'{detector}-rcnn_r{depth}_fpn_{norm.lower()}-head_1x_coco',
        BOX if detector == 'faster' else BOX_AND_MASK,
        *numbers,
    )


TABLE6_FASTER = Table(
    name='table6-faster',
    title='Table 6: stronger backbones, Faster R-CNN',
    labels=('backbone', 'norm'),
    metrics=BOX,
    rows=(
        *(
            Row(f'faster-r50-{norm.lower()}', ('R50+FPN', norm), row.config, row.paper)
            for norm in ('GN', 'SyncBN', 'CBN')
            for row in [_IN_TABLE5[f'{norm.lower()}-head']]
        ),
        _table6('faster', 101, 'GN', 39.3, 60.6, 42.7, 22.5, 42.5, 51.3),
        _table6('faster', 101, 'SyncBN', 39.2, 59.8, 43.0, 22.2, 42.9, 51.6),
        _table6('faster', 101, 'CBN', 39.2, 60.0, 42.6, 22.3, 42.6, 51.1),
    ),
)
TABLE6_MASK = Table(
    name='table6-mask',
    title='Table 6: stronger backbones, Mask R-CNN',
    labels=('backbone', 'norm'),
    metrics=BOX_AND_MASK,
    rows=(
        _table6('mask', 50, 'GN', 38.6, 59.8, 41.9, 35.0, 56.7, 37.3),
        _table6('mask', 50, 'SyncBN', 38.5, 58.9, 42.3, 34.7, 56.3, 36.8),
        _table6('mask', 50, 'CBN', 38.5, 59.2, 42.1, 34.6, 56.4, 36.6),
        _table6('mask', 101, 'GN', 40.3, 61.2, 44.2, 36.6, 58.5, 39.2),
        _table6('mask', 101, 'SyncBN', 40.3, 60.8, 44.2, 36.0, 57.7, 38.6),
        _table6('mask', 101, 'CBN', 40.1, 60.5, 44.1, 35.8, 57.3, 38.5),
    ),
)

TABLE7 = Table(
    name='table7',
    title='Table 7: BN, switched to SyncBN (Faster R-CNN, ResNet-50)',
    labels=('switched at',),
    metrics=('bbox_mAP',),
    rows=tuple(
        Row(
            f'epoch-{epoch}',
            (f'epoch {epoch}',),
            f'faster-rcnn_r50_fpn_bn-syncbn-{epoch}-head_1x_coco',
            {'bbox_mAP': ap},
        )
        for epoch, ap in ((8, 37.7), (9, 37.7), (10, 37.6), (11, 37.3))
    ),
)

TABLE8 = Table(
    name='table8',
    title='Table 8: cost (Mask R-CNN, ResNet-50, 4 images per GPU)',
    labels=('norm',),
    metrics=COST,
    rows=(
        _row('bn', ('BN',), 'mask-rcnn_r50_fpn_bn-head_1x_coco', COST, 14.1, 5155.1, 1.3, 6.2),
        _row('gn', ('GN',), 'mask-rcnn_r50_fpn_gn-head_1x_coco', COST, 14.1, 5274.2, 1.2, 3.7),
        _row('cbn', ('CBN',), 'mask-rcnn_r50_fpn_cbn-head_1x_coco', COST, 15.1, 5809.7, 1.0, 6.2),
    ),
)


def _with_norm(**options: Any) -> dict[str, Any]:
    """Options for the norm_cfg of FPN and box head."""
    places = ('model.neck.norm_cfg', 'model.roi_head.bbox_head.norm_cfg')
    return {f'{place}.{name}': value for name, value in options.items() for place in places}


def _window_rows() -> tuple[Row, ...]:
    """The sizes 1 and 4 are rows of Table 5. The text names also 8, from where it saturates; the others are ours."""
    bn, cbn = _IN_TABLE5['bn-head'], _IN_TABLE5['cbn-head']
    ap = {row.name: {'bbox_mAP': row.paper['bbox_mAP']} for row in (bn, cbn)}
    bns = [Row('bn-k1', ('BN', 1), bn.config, ap[bn.name])]
    # As many images a GPU as CBN has in its window; more do not fit.
    bns += [Row(f'bn-k{k}', ('BN', k), bn.config, {}, times_images=k) for k in (2, 4, 8)]
    cbns, naives = [], []
    for k in (2, 4, 8, 12):
        paper, size = (ap[cbn.name], {}) if k == 4 else ({}, _with_norm(window_size=k))
        cbns.append(Row(f'cbn-k{k}', ('CBN', k), cbn.config, paper, size))
        naives.append(Row(f'naive-k{k}', ('Naive CBN', k), cbn.config, {}, {**size, **_with_norm(order=0)}))
    return (*bns, *naives, *cbns)


FIGURE3 = Table(
    name='figure3',
    title='Figure 3, COCO: temporal window size (Faster R-CNN, ResNet-50, 4 images per GPU; BN: 4 k images per GPU)',
    labels=('method', 'k'),
    metrics=('bbox_mAP',),
    rows=_window_rows(),
)


def _burn_in_rows() -> tuple[Row, ...]:
    """The text names 3, the default; the others are ours. Burn-in for all 12 epochs is BN."""
    bn, cbn = _IN_TABLE5['bn-head'], _IN_TABLE5['cbn-head']
    rows = []
    for epochs in (0, 1, 2, 3, 4, 6, 8, 10, 12):
        like, options = (bn, {}) if epochs == 12 else (cbn, {'custom_hooks.0.burn_in_epochs': epochs})
        paper = {'bbox_mAP': like.paper['bbox_mAP']} if epochs in (3, 12) else {}
        rows.append(Row(f't{epochs}', ('CBN', epochs), like.config, paper, {} if epochs == 3 else options))
    return tuple(rows)


FIGURE5 = Table(
    name='figure5',
    title='Figure 5, COCO: burn-in period (Faster R-CNN, ResNet-50, 4 images per GPU)',
    labels=('method', 'burn-in epochs'),
    metrics=('bbox_mAP',),
    rows=_burn_in_rows(),
)

COCO = (TABLE5, TABLE6_FASTER, TABLE6_MASK, TABLE7, TABLE8, FIGURE3, FIGURE5)
