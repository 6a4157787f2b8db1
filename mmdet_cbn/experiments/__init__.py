"""The paper's experiments on COCO: its numbers, the runs that reproduce them, and the comparison of the two."""
