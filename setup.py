from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
requirements = run_path(str(ROOT / 'mmdet_cbn' / 'requirements.py'))
wanted = requirements['wanted']

setup(
    name='mmdet-cbn',
    version=run_path(str(ROOT / 'mmdet_cbn' / 'version.py'))['__version__'],
    description='Cross-Iteration Batch Normalization for MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The mmdet-cbn authors',
    license='Apache-2.0',
    packages=find_packages(include=['mmdet_cbn', 'mmdet_cbn.*']),
    package_data={'mmdet_cbn': ['py.typed', '.mim/model-index.yml', '.mim/configs/*/*', '.mim/tools/*']},
    python_requires='>=3.10',
    # torch and mmcv (which is compiled against torch) are the user's to choose: they stand only in the extras, so that
    # neither is ever replaced by an install of this package alone. import checks both.
    install_requires=['numpy', 'packaging', 'pycocotools'],
    extras_require={
        # An extra of its own: each torchvision pins its torch, so pip would replace the torch that is there.
        'torch': requirements['TORCH_AND_TORCHVISION'],
        # mmdet 3.3.0 refuses mmcv 2.2.
        'openmmlab': [wanted('mmengine'), wanted('mmcv') + ',<2.2', wanted('mmdet')],
        # For configs/imagenet alone.
        'mmpretrain': ['mmpretrain>=1.2,<2'],
        # The maintained forks: other distributions with the same import names.
        'onedl': [
            'onedl-' + wanted('mmengine'),
            'onedl-' + wanted('mmcv'),
            'onedl-' + wanted('mmdet').replace('mmdet', 'mmdetection'),
        ],
    },
)
