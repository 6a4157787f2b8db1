"""Says for which device mmcv's operators will be compiled, and why: tools/setup_env.sh prints it before they are.

The setup.py of mmcv compiles them for the GPU, too, where torch sees one or FORCE_CUDA=1 is set, and else for the CPU
alone. For the GPU it takes the nvcc of torch.utils.cpp_extension.CUDA_HOME.

Exit status: 0 if they can be compiled, 1 if that is bound to fail.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path


def version_of(nvcc: Path) -> str | None:
    """The CUDA version of a compiler, as ``'12.1'``; None if it does not run."""
    try:
        told = subprocess.run([nvcc, '--version'], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r'release (\d+\.\d+)', told)
    return found[1] if found else None


def plan(target: str, cuda: str | None, sees_gpu: bool, is_forced: bool, nvcc: str | None) -> tuple[bool, str]:
    """What mmcv's setup.py will do.

    Args:
        target: The target of make.
        cuda: The CUDA version of torch; None for a build for the CPU.
        sees_gpu: Whether torch sees a GPU.
        is_forced: Whether FORCE_CUDA=1 is set.
        nvcc: The CUDA version of nvcc; None if there is none.

    Returns:
        Whether that can succeed, and what to tell.
    """
    again = f'make clean, and then FORCE_CUDA=1 make {target}'
    if cuda is None and is_forced:
        return False, (
            'mmcv cannot be compiled: FORCE_CUDA=1 asks for operators for the GPU, and this torch is a build for the '
            'CPU. Leave FORCE_CUDA out, or take a torch for CUDA with TORCH_INDEX_URL.'
        )
    if cuda is None:
        return True, (
            'If mmcv is compiled here, its operators are for the CPU only, because this torch is a build for the CPU. '
            'For the GPU take a torch for CUDA (TORCH_INDEX_URL, after make clean) and nvcc.'
        )
    missing = None
    if nvcc is None:
        missing = f'there is no nvcc. Install the one of CUDA {cuda}, in the PATH or in CUDA_HOME'
    elif nvcc.split('.')[0] != cuda.split('.')[0]:
        missing = f'nvcc is of CUDA {nvcc}, and torch of CUDA {cuda}. Install the one of {cuda} and set CUDA_HOME'
    if not sees_gpu and not is_forced:
        how = f'{missing}. Then {again}' if missing else again
        return True, (
            'If mmcv is compiled here, its operators are for the CPU only, because torch sees no GPU and FORCE_CUDA=1 '
            f'is not set. A training on a GPU would stop at the first of them. For the GPU: {how}.'
        )
    if missing:
        return False, (
            f'mmcv cannot be compiled for the GPU, because {missing}. For operators for the CPU only: '
            f'CUDA_VISIBLE_DEVICES= FORCE_CUDA=0 make {target}.'
        )
    return True, f'If mmcv is compiled here, its operators are for the GPU, too, by nvcc {nvcc}.'


def main() -> int:
    with contextlib.redirect_stderr(io.StringIO()):  # torch speaks of CUDA_HOME where it sees no GPU
        import torch
        from torch.utils import cpp_extension

    if torch.version.hip is not None:
        print(f'make {sys.argv[1]}: If mmcv is compiled here, its operators are for the GPU, too, by ROCm.')
        return 0
    home = cpp_extension.CUDA_HOME
    nvcc = version_of(Path(home, 'bin', 'nvcc')) if home else None
    is_forced = os.environ.get('FORCE_CUDA', '0') == '1'
    can_succeed, told = plan(sys.argv[1], torch.version.cuda, torch.cuda.is_available(), is_forced, nvcc)
    print(f'make {sys.argv[1]}: {told}', file=sys.stdout if can_succeed else sys.stderr)
    return 0 if can_succeed else 1


if __name__ == '__main__':
    sys.exit(main())
