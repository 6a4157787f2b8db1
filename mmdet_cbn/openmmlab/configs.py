"""Lets a config inherit from the configs of this package, as from mmdet's: ``_base_ = 'mmdet_cbn::cbn/....py'``."""

from mmengine.config import Config

_get_cfg_path = Config._get_cfg_path


def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """In place of mmengine's ``Config._get_cfg_path``: the path of a base config, and the scope of what it names.

    Ours name what mmdet, mmcv and mmengine have, so they have no scope of their own. mmengine would write one into each
    value taken over from such a base, and normalizers refuse a ``norm_cfg`` with that in it.
    """
    path, scope = _get_cfg_path(cfg_path, filename)
    return path, None if scope == 'mmdet_cbn' else scope


# mmengine looks for .mim beside this module. It is a module's name, not a distribution's: mmengine looks for a
# distribution in site-packages only, and a package that was installed with --editable is not there.
PACKAGE = 'mmdet_cbn.version'
