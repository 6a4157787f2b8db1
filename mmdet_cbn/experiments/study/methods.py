"""The normalizers that our studies of fine-tuning and classification compare."""

from typing import Any

#: By what the tables call them: the normalizer in the name of the paper's config, and what changes in its norm_cfg.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
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


def brn_steps(iterations: int) -> dict[str, tuple[int, int]]:
    """Steps in which the limits of BRN grow in so short a training: as much of it as in the BRN paper's 130,000.

    There r grows from step 5,000 to 40,000, and d to 25,000.
    """
    first, last_of_r, last_of_d = (round(iterations * step / 130_000) for step in (5_000, 40_000, 25_000))
    return {'r_steps': (first, last_of_r), 'd_steps': (first, last_of_d)}


def words_of(method: str) -> list[str]:
    """The parts of the names of its rows."""
    return method.lower().replace(', ', ' ').split()
