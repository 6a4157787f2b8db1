"""Models that hard-code BatchNorm, with a normalizer that a config names."""

from typing import Any

from mmengine.registry import MODELS
from torch import nn

from ..requirements import wanted


@MODELS.register_module(name='WithNorm')
def with_norm(model: dict[str, Any], norm_cfg: dict[str, Any], **others: Any) -> nn.Module:
    """Build a model and give each of its ``nn.BatchNorm2d`` layers another type: ``dict(type='WithNorm', ...)``.

    Unlike :class:`SwitchNormHook`, it does so before the optimizer is built, so the new layers may have other
    parameters or buffers, as GN. It needs mmcv.

    Args:
        model: Config of the model.
        norm_cfg: The config of the new layers. If it has no eps, they take that of the old layers.
        **others: What the model's own config lacks. mmengine's Runner puts the config's ``data_preprocessor`` here.

    Returns:
        The model.

    Raises:
        ImportError: mmcv is missing.
        ValueError: The model has no ``nn.BatchNorm2d``.
    """
    try:
        from mmcv.cnn import build_norm_layer
    except ImportError as error:
        raise ImportError(f'WithNorm needs {wanted("mmcv")} ({error})') from error
    built: nn.Module = MODELS.build({**others, **model})
    # A layer may have two names.
    names = {
        name: module for name, module in built.named_modules(remove_duplicate=False) if type(module) is nn.BatchNorm2d
    }
    if not names:
        raise ValueError(f'WithNorm: model must have layers of nn.BatchNorm2d, {model.get("type")} has none')
    replaced = {
        layer: _like(layer, build_norm_layer({'eps': layer.eps, **norm_cfg}, layer.num_features)[1])
        for layer in names.values()
    }
    for name, layer in names.items():
        parent, _, child = name.rpartition('.')
        setattr(built.get_submodule(parent), child, replaced[layer])
    return built


def _like(layer: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with what it has in common with ``layer``: values, which parameters are trained, and the mode."""
    own = new.state_dict()
    shared = {key: value for key, value in layer.state_dict().items() if key in own and own[key].shape == value.shape}
    new.load_state_dict({**own, **shared})
    for name, parameter in new.named_parameters():
        if name in shared:
            parameter.requires_grad_(parameter.requires_grad and layer.get_parameter(name).requires_grad)
    return new.train(layer.training)
