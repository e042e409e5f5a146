"""Updates that are added: how they are merged, and how far they get into each other's way."""

from spectra.compose.interference import (
    activation_interference,
    cosine,
    input_interference,
    output_interference,
    singular_task_interference,
    subspace_alignment,
)
from spectra.compose.merging import METHODS, Merge, concatenated, merged, truncated
from spectra.compose.products import Product

__all__ = [
    "METHODS",
    "Merge",
    "Product",
    "activation_interference",
    "concatenated",
    "cosine",
    "input_interference",
    "merged",
    "output_interference",
    "singular_task_interference",
    "subspace_alignment",
    "truncated",
]
