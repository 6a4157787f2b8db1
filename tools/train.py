"""Train a detector: mmdet's own tools/train.py, with its arguments, and with mmdet_cbn registered."""

import runpy

from mmdet_cbn.mmdet_tools import tool

if __name__ == '__main__':
    runpy.run_path(tool('train.py'), run_name='__main__')
