"""Test and evaluate a detector: mmdet's own tools/test.py, with its arguments, and with mmdet_cbn registered."""

from mmdet_cbn.openmmlab.tools import run_tool

if __name__ == '__main__':
    run_tool('test.py')
