"""An environment that cannot work says what it wants, on import."""

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

from mmdet_cbn import requirements


def test_this_environment_is_supported():
    requirements.check_installed()


@pytest.mark.parametrize('version', ['2.1.0', '2.3.6', '2.9.0+cpu'])
def test_supported_versions_pass(monkeypatch, version):
    monkeypatch.setattr(importlib.import_module('mmcv'), '__version__', version)
    requirements.check_installed()


@pytest.mark.parametrize('version', ['1.7.2', '2.0.1', '3.0.0rc1'])
def test_an_unsupported_version_names_the_supported_ones(monkeypatch, version):
    monkeypatch.setattr(importlib.import_module('mmcv'), '__version__', version)
    with pytest.raises(ImportError, match=rf'needs mmcv>=2\.1,<3 \(installed: {version}\)'):
        requirements.check_installed()


@pytest.mark.parametrize('version', ['2.0.1', '3.0.0'])
def test_an_unsupported_torch_is_named(monkeypatch, version):
    monkeypatch.setattr(importlib.import_module('torch'), '__version__', version)
    with pytest.raises(ImportError, match=rf'needs torch>=2\.1,<3 \(installed: {version}\)'):
        requirements.check_installed()


def test_the_extra_has_the_torch_of_the_tests():
    pins = (ROOT / 'requirements-openmmlab.txt').read_text().split()
    assert set(requirements.TORCH_AND_TORCHVISION) <= set(pins)


def test_everything_that_is_missing_is_named_at_once():
    code = """
import sys
sys.modules['mmdet'] = sys.modules['mmcv'] = None
import mmdet_cbn
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmdet_cbn needs mmcv>=2.1,<3 (importing mmcv failed')
    assert 'mmdet>=3.3,<4 (importing mmdet failed' in last and '[openmmlab]' in last and '[onedl]' in last
