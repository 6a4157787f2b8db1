"""What tools/mmcv_operators.py tells before mmcv is compiled is what its setup.py does."""

import re
from runpy import run_path

import pytest
from conftest import ROOT

plan = run_path(str(ROOT / 'tools' / 'mmcv_operators.py'))['plan']


@pytest.mark.parametrize(
    ('cuda', 'sees_gpu', 'is_forced', 'nvcc', 'can_succeed', 'told'),
    [
        (None, False, False, None, True, 'CPU only, because this torch is a build for the CPU'),
        (None, False, True, '12.1', False, 'Leave FORCE_CUDA out'),
        ('12.1', False, False, '12.1', True, 'CPU only, because torch sees no GPU.*FORCE_CUDA=1 make env'),
        ('12.1', False, False, None, True, 'CPU only, because torch sees no GPU.*there is no nvcc'),
        ('12.1', True, False, None, False, 'there is no nvcc.*CUDA_VISIBLE_DEVICES= FORCE_CUDA=0 make env'),
        ('12.1', False, True, None, False, 'there is no nvcc'),
        ('12.1', True, False, '13.0', False, 'nvcc is of CUDA 13.0, and torch of CUDA 12.1'),
        ('12.1', True, False, '12.8', True, 'for the GPU, too, by nvcc 12.8'),
        ('12.1', False, True, '12.1', True, 'for the GPU, too'),
    ],
)
def test_it_tells_what_comes_out(cuda, sees_gpu, is_forced, nvcc, can_succeed, told):
    assert plan('env', cuda, sees_gpu, is_forced, nvcc)[0] is can_succeed
    assert re.search(told, plan('env', cuda, sees_gpu, is_forced, nvcc)[1])
