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


def run_without(*modules, code):
    hide = ''.join(f"sys.modules['{module}'] = None\n" for module in modules)
    return subprocess.run([sys.executable, '-c', f'import sys\n{hide}{code}'], capture_output=True, text=True)


def test_everything_that_is_wrong_is_named_at_once():
    result = run_without('mmengine', 'mmcv', 'mmdet', code='import mmdet_cbn')
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmdet_cbn needs mmengine>=0.10,<1 (importing mmengine failed')
    assert '[openmmlab]' in last and '[onedl]' in last


PLAIN = """
import torch
from torch import nn
from mmdet_cbn import BRN, CBN, SwitchNormHook

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), BRN(4))
CBN.convert_batchnorm(model[:2], window_size=3)
for _ in range(4):
    model(torch.randn(2, 3, 8, 8)).sum().backward()
print(type(model[1]).__name__, model[1].window_length)
try:
    SwitchNormHook(epoch=1)
except ImportError as error:
    print(error)
"""


def test_the_layers_need_torch_and_mmengine_alone():
    result = run_without('mmcv', 'mmdet', code=PLAIN)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.strip().splitlines()
    assert first == 'CBN 3' and second.startswith('SwitchNormHook needs mmcv>=2.1,<3 (')
