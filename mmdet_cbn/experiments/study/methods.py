"""The normalizers that our studies of fine-tuning and classification compare."""

from typing import Any

_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'BN': ('bn', {}),
    'BN, population statistics': ('bn', {}),
    'GN': ('gn', {}),
    'BRN': ('brn', {}),
    'Naive CBN': ('cbn', {'order': 0}),
    'CBN, gradient batch': ('cbn', {}),
    'CBN, gradient 0.25': ('cbn', {'gradient': 0.25}),
    'CBN, 64 samples, gradient 0.25': ('cbn', {'samples': 64, 'gradient': 0.25}),
    'CBN, order 2, gradient 0.25': ('cbn', {'order': 2, 'gradient': 0.25}),
}


def norm_of(method: str, iterations: int) -> tuple[str, dict[str, Any]]:
    """The normalizer in the name of the paper's config, and what changes in its ``norm_cfg``.

    The limits of BRN grow in the same part of the training as in the BRN paper. Of its 130,000 steps, r grows from
    step 5,000 to 40,000, and d to 25,000.

    Args:
        method: As the tables call it.
        iterations: Of the whole training.
    """
    norm, arguments = _METHODS[method]
    if norm != 'brn':
        return norm, arguments
    first, last_of_r, last_of_d = (round(iterations * step / 130_000) for step in (5_000, 40_000, 25_000))
    return norm, {'r_steps': (first, last_of_r), 'd_steps': (first, last_of_d)}


def words_of(method: str) -> list[str]:
    """The parts of the names of its rows."""
    return method.lower().replace(', ', ' ').split()
