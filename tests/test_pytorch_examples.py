"""The examples of docs/pytorch.md run as they are written, for fewer steps."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'pytorch.md').read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(('example', 'steps', 'shorter'), zip(EXAMPLES, (50, 25), (15, 3), strict=True))
def test_an_example_trains_without_mmdet_and_mmcv(example, steps, shorter):
    assert f'range({steps})' in example
    hidden = "import sys; sys.modules.update({'mmcv': None, 'mmdet': None})  # to import them is an error\n"
    seed = 'import torch; torch.manual_seed(0)\n'
    code = hidden + seed + example.replace(f'range({steps})', f'range({shorter})')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = [line for line in result.stdout.splitlines() if line.startswith('epoch')]
    assert reports[0].endswith('window of 1') and reports[3].endswith('window of 8')
    for accuracy in re.findall(r'accuracy (\S+),', reports[3]):
        assert float(accuracy) > 0.5, 'of four classes'
