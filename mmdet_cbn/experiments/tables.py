"""All tables: of the paper on COCO and on ImageNet, and of our study."""

from .paper.coco import COCO
from .paper.imagenet import IMAGENET
from .study import STUDY

TABLES = (*COCO, *IMAGENET, *STUDY)

#: What tools take for ``--table``.
NUMBERS = (*dict.fromkeys(table.number for table in TABLES), 'study')
