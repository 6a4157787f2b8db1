"""Whether the models of a zoo train with CBN in place of BatchNorm: a few steps of one model of each family.

The images and annotations are random. So this shows that a model runs, with finite losses and full windows, and nothing
about its accuracy.
"""

import copy
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from ..layers.cbn import CBN
from ..layers.conversion import active_norms
from . import markdown
from .configs import dicts_in

WINDOW_SIZE = 2
STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {'order 1': {}, '64 samples': dict(samples=64)}
TRIES = 3  #: how many configs of a family are tried with BN
_SMALL = re.compile('r18|r34|r50|tiny|nano|small|_s_|_m_|-s_|b0|x0\\.|8xb')


class Family(NamedTuple):
    """A family of models of a zoo, and what became of it."""

    family: str
    config: str  #: '' if none trains with BN
    how: str  #: by which CBN came into the model
    layers: int  #: of CBN
    naive: dict[str, int]  #: how many of these became Naive CBN, by the reason
    problem: str  #: why there is no BN to replace, or what failed; '' if nothing did


class Zoo(NamedTuple):
    """A package of models with configs."""

    package: str
    has_model: Callable[[Config], bool]  #: whether a config is of a model that is looked at
    make_data: Callable[[Config, int, int], Any]  #: config, images and their size to what the data preprocessor takes


def _detection_data(config: Config, images: int, size: int) -> Any:
    from mmdet.testing import demo_mm_inputs

    stride = 8 if 'semantic_head' in config.model.get('roi_head', {}) else 1
    data = demo_mm_inputs(
        images,
        (3, size, size),
        [3] * images,
        sem_seg_output_strides=stride,
        with_mask=any(part.get('with_mask') for part in dicts_in(config.train_dataloader)),
        with_semantic=True,
    )
    classes = min(_values(config.model, 'num_classes'), default=80)
    for sample in data['data_samples']:
        sample.gt_instances.labels %= classes
        sample.proposals = InstanceData(bboxes=sample.gt_instances.bboxes)  # for Fast R-CNN, which makes none
    return data


def _pixels(images: int, size: int) -> list[torch.Tensor]:
    return list(torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8))


def _classification_data(config: Config, images: int, size: int) -> Any:
    from mmpretrain.structures import DataSample

    return dict(inputs=_pixels(images, size), data_samples=[DataSample().set_gt_label(i) for i in range(images)])


def _segmentation_data(config: Config, images: int, size: int) -> Any:
    from mmseg.structures import SegDataSample

    classes = min(_values(config.model, 'num_classes'), default=2)
    samples = []
    for labels in torch.randint(classes, (images, 1, size, size)):
        sample = SegDataSample(metainfo=dict(img_shape=(size, size)))
        sample.gt_sem_seg, sample.gt_edge_map = PixelData(data=labels), PixelData(data=labels % 2)
        samples.append(sample)
    return dict(inputs=_pixels(images, size), data_samples=samples)


ZOOS = {
    zoo.package: zoo
    for zoo in (
        Zoo('mmdet', lambda config: 'detector' not in config.model, _detection_data),
        Zoo('mmpretrain', lambda config: config.model.get('type') == 'ImageClassifier', _classification_data),
        Zoo('mmseg', lambda config: True, _segmentation_data),
    )
}


def survey(package: str, out: Path, families: Iterable[str] = (), images: int = 2, size: int = 128) -> list[Family]:
    """Try each family of a zoo.

    Args:
        package: One of :data:`ZOOS`.
        out: A JSON file of rows. Families that it has are not tried again. It is written after each family.
        families: Names of folders of configs; none for all.
        images: Of a step.
        size: Height and width of the images, in pixels; twice that, or 224, for models that do not train on it.

    Returns:
        All rows of the file, by family.

    Raises:
        ValueError: There is no such family.
    """
    importlib.import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
    folder = Path(importlib.import_module(package).__file__ or '').parent / '.mim' / 'configs'
    known = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != '_base_')
    unknown = sorted(set(families) - set(known))
    if unknown:
        raise ValueError(f'{unknown} are not among the families of {package}: {", ".join(known)}')
    rows = {row['family']: Family(**row) for row in json.loads(out.read_text())} if out.is_file() else {}
    for family in families or known:
        if family not in rows:
            rows[family] = _try_family(ZOOS[package], folder / family, images, size)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps([rows[name]._asdict() for name in sorted(rows)], indent=1) + '\n')
    return [rows[name] for name in sorted(rows)]


def to_markdown(package: str, rows: Iterable[Family]) -> str:
    """A page: a table of the families that train with BN, and one of the others."""
    rows = list(rows)
    tried = [row for row in rows if row.config]
    good = sum(not row.problem for row in tried)
    cells = [[row.family, row.config, row.how, row.layers, _naive_cell(row), row.problem or 'yes'] for row in tried]
    others = [[row.family, row.problem] for row in rows if not row.config]
    return '\n'.join(
        [
            f'# The model zoo of {package} with CBN',
            '',
            f'{good} of {len(tried)} families that train with BN train with CBN, too. Measured by `tools/zoo.py`.',
            '',
            markdown.table(['family', 'config', 'CBN by', 'layers', 'of these naive, because', 'trains'], cells),
            '',
            f'The other {len(others)} families:',
            '',
            markdown.table(['family', 'why not tried'], others),
            '',
        ]
    )


def _naive_cell(row: Family) -> str:
    return '; '.join(f'{count}: {reason}' for reason, count in row.naive.items())


def _try_family(zoo: Zoo, folder: Path, images: int, size: int) -> Family:
    tries = 0
    problem = 'no config of a single model'
    for path in sorted(folder.glob('*.py'), key=_order):
        if tries == TRIES:
            break
        with DefaultScope.overwrite_default_scope(zoo.package):
            try:
                config = Config.fromfile(path)
                if 'model' not in config or not zoo.has_model(config):
                    continue
                tries += 1
                if 'data_preprocessor' in config:  # mmpretrain's, which the Runner puts into the model
                    config.model.setdefault('data_preprocessor', config.data_preprocessor)
                simplify(config.model)
                if not _batch_norms(_build(config.model)):
                    problem = 'no BatchNorm2d'
                    continue
                data = _data_that_trains(zoo, config, images, size)
            except Exception as error:  # whatever a model of somebody else's needs that is not here
                problem = f'does not train with BN here: {_shortened(error)}'
                continue
            return _try_config(folder.name, path.name, config, data)
    return Family(folder.name, '', '', 0, {}, problem)


def _order(path: Path) -> tuple:
    """Configs that name BN come first, then small ones."""
    return 'bn' not in path.name, not _SMALL.search(path.name), len(path.name), path.name


def _data_that_trains(zoo: Zoo, config: Config, images: int, size: int) -> Any:
    """Data on which the model trains with BN. Some models need larger images, and some are for 224x224 alone."""
    sizes = [size, 2 * size, 224]
    while True:
        data = zoo.make_data(config, images, sizes.pop(0))
        try:
            _train(_build(config.model), data)
        except Exception:
            if not sizes:
                raise
        else:
            return data


def _try_config(family: str, name: str, config: Config, data: Any) -> Family:
    row = _try_way(Family(family, name, '', 0, {}, ''), config, data, by_norm_cfg=True)
    if not row.problem or row.how == 'conversion':
        return row
    converted = _try_way(Family(family, name, '', 0, {}, ''), config, data, by_norm_cfg=False)
    return row if converted.problem else converted._replace(how=f'conversion; by `norm_cfg`: {row.problem}')


def _try_way(row: Family, config: Config, data: Any, by_norm_cfg: bool) -> Family:
    for variant, arguments in VARIANTS.items():
        arguments = dict(window_size=WINDOW_SIZE, unsupported='naive', **arguments)
        try:
            model, how = with_cbn(config.model, arguments, by_norm_cfg)
            layers = active_norms(model, CBN)
            row = row._replace(how=how, layers=len(layers))
            _train(model, data)
            row = row._replace(naive=Counter(layer.naive_because for layer in layers.values() if layer.naive_because))
            short = [key for key, layer in layers.items() if layer.window_length != WINDOW_SIZE]
            if short:
                raise RuntimeError(f'windows not full: {", ".join(short)}')
        except Exception as error:  # is the finding
            return row._replace(problem=f'{variant}: {_shortened(error)}')
    return row


def with_cbn(model: Any, arguments: dict[str, Any], by_norm_cfg: bool = True) -> tuple[nn.Module, str]:
    """Build a model with CBN: by its ``norm_cfg``, and by conversion where it has no ``norm_cfg`` of BN.

    Args:
        model: Its config, which does not change.
        arguments: Of CBN.
        by_norm_cfg: False for conversion alone.

    Returns:
        The model, and which of the two was needed.
    """
    model = copy.deepcopy(model)
    for part in dicts_in(model) if by_norm_cfg else ():
        for key, value in part.items():
            if 'norm_cfg' in key and isinstance(value, dict) and value.get('type') == 'BN':
                part[key] = {**value, **arguments, 'type': 'CBN'}
    built = _build(model)
    has_some = any(isinstance(module, CBN) for module in built.modules())
    if not _batch_norms(built):
        return built, '`norm_cfg`'
    CBN.convert_batchnorm(built, **arguments)
    return built, '`norm_cfg` and conversion' if has_some else 'conversion'


def simplify(model: Any) -> None:
    """Let a config of a model train all of it, in place.

    Without files of weights, which would be downloaded; without SyncBN, which needs several GPUs; and without
    augmentation and padding of the batch, which make images of another size.
    """
    for part in dicts_in(model):
        for key, value in part.items():
            if key == 'batch_augments' or (key in ('init_cfg', 'pretrained', 'teacher_ckpt') and _names_a_file(value)):
                part[key] = None
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(part['type']) if isinstance(part.get('type'), str) else None
        if 'seg_pad_val' in part and part.get('size'):  # mmseg's preprocessor
            part.update(size=None, size_divisor=1)
        if part.get('frozen_stages'):  # 0 freezes nothing where -1 is not allowed
            part['frozen_stages'] = -1
        has_norm_eval = kind is not None and 'norm_eval' in inspect.signature(kind).parameters
        if 'norm_eval' in part or has_norm_eval:
            part['norm_eval'] = False
        if str(part.get('type')).endswith('SyncBN'):
            part['type'] = 'BN'


def _names_a_file(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and 'checkpoint' in value)


def _build(model: Any) -> nn.Module:
    torch.manual_seed(0)
    MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0))  # as the Runner; some models ask for it
    built: Any = MODELS.build(copy.deepcopy(model))
    built.init_weights()
    for module in built.modules():
        if type(module).__name__ == 'TridentConv':  # what no checkpoint fills is uninitialized memory
            nn.init.kaiming_normal_(module.weight)
    return built.train()


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [norm for norm in active_norms(model).values() if type(norm) is nn.BatchNorm2d]


def _train(model: Any, data: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(STEPS):
        loss, _ = model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        if not torch.isfinite(loss):
            raise RuntimeError(f'the loss is {loss.item()}')
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()


def _values(config: Any, name: str) -> list[int]:
    return [part[name] for part in dicts_in(config) if isinstance(part.get(name), int)]


def _shortened(error: Exception) -> str:
    (line, *_) = str(error).splitlines() or ['']
    return f'{type(error).__name__}: {" ".join(line.split())[:200]}'.replace('|', '\\|')
