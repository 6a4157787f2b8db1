"""How long a window is by the paper's rule."""

from math import ceil


def suggested_window_size(images_per_gpu: int) -> int:
    """The paper's k = min(ceil(16 / images per GPU), 8) (section 4.3): 16 images, but at most 8 iterations."""
    return min(ceil(16 / images_per_gpu), 8)
