"""How the leading singular subspaces of two spectra lie to each other, and which of them are determined at all.

Pure functions of `Spectrum` values with vectors, or of arrays, on numpy alone. What random subspaces would give is in
`spectra.theory.chance`, the perturbation bounds behind `subspace_sines` in `spectra.theory.bounds`.
"""

from __future__ import annotations

from spectra.subspace.angles import chordal_distance, geodesic_distance, principal_angles
from spectra.subspace.bases import Side
from spectra.subspace.energy import Capture, amplification, capture_curve, optimal_capture
from spectra.subspace.intruders import Intruders, intruders
from spectra.subspace.overlap import overlap, overlap_bounds, overlap_table
from spectra.subspace.resolution import direction_sines, resolved_ranks, subspace_sines

__all__ = [
    "Capture",
    "Intruders",
    "Side",
    "amplification",
    "capture_curve",
    "chordal_distance",
    "direction_sines",
    "geodesic_distance",
    "intruders",
    "optimal_capture",
    "overlap",
    "overlap_bounds",
    "overlap_table",
    "principal_angles",
    "resolved_ranks",
    "subspace_sines",
]
