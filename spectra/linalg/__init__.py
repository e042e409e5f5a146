"""Engines that make a `Spectrum`: dense, factored and sketched routes, and the choice among them."""

from spectra.linalg.dense import by_bidiagonal, by_gram
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import Matrix, as_matrix
from spectra.linalg.route import Route, choose, matrix_spectrum, spectrum
from spectra.linalg.sketch import truncated

__all__ = [
    "Matrix",
    "Route",
    "as_matrix",
    "by_bidiagonal",
    "by_gram",
    "choose",
    "matrix_spectrum",
    "product_spectrum",
    "spectrum",
    "truncated",
]
