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


def words_of(method: str) -> list[str]:
    """The parts of the names of its rows."""
    return method.lower().replace(', ', ' ').split()
