"""Linear maps P from a few coordinates to all parameters of a model, and what of an update their range holds."""

from spectra.projections.dense import DenseProjection
from spectra.projections.fastfood import FastfoodProjection
from spectra.projections.kronecker import KroneckerProjection
from spectra.projections.low_rank import LowRankProjection
from spectra.projections.make import PROJECTIONS, make_projection, smallest_dimension
from spectra.projections.protocol import Projection, adjoint, forward, moved
from spectra.projections.sparse import SparseProjection

__all__ = [
    "PROJECTIONS",
    "DenseProjection",
    "FastfoodProjection",
    "KroneckerProjection",
    "LowRankProjection",
    "Projection",
    "SparseProjection",
    "adjoint",
    "forward",
    "make_projection",
    "moved",
    "smallest_dimension",
]
