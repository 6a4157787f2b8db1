"""Test and evaluate a detector: mmdet's own tools/test.py, with its arguments, and with mmdet_cbn registered."""

import runpy

from mmdet_cbn.mmdet_tools import tool

if __name__ == '__main__':
    runpy.run_path(tool('test.py'), run_name='__main__')
