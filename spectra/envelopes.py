"""What a truncated spectrum leaves possible: curves that the concentration curve of all its values lies between.

How bounds are found. Effective ranks, energies and errors depend only on the *concentration curve* P_j = Σ_{i≤j}
σ_i^q / Σ σ_i^q, j = 0…p, with q = 1 or 2. It is concave. The certificate gives P^low_j ≤ P_j ≤ P^high_j: the leading
part from the intervals of the values, the rest from the energy they leave (‖A‖²_F − Σs²) and the largest size a left-
out value can have, either spread evenly or packed into as few values as possible. The least concave majorant of
either side is again the curve of some distribution, and it lies below (above) every admissible curve: it is majorised
by (majorises) the truth. Entropy and participation ratio are Schur-concave, so their values on the two envelopes
bracket the truth (A. Marshall, I. Olkin and B. Arnold, "Inequalities", 2nd ed., ch. 3); ranks and errors are read off
the envelopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from spectra.values import Spectrum, Vector

Bounds = tuple[float, float]

# ‖A‖²_F is summed in float64 from entries of either precision; 64 ulps cover the summation of any real matrix.
_FROBENIUS_RELATIVE_ERROR = 64 * np.finfo(np.float64).eps


def _concave_majorant(curve: Vector) -> Vector:
    """Least concave function above the points (j, curve_j).

    A point on or below the chord of its neighbours is no vertex of the hull, so all such points may go at once, until
    none is left.
    """
    kept = np.arange(len(curve))
    while True:
        slopes = np.diff(curve[kept]) / np.diff(kept)
        vertex = np.concatenate([[True], slopes[1:] < slopes[:-1], [True]])
        if vertex.all():
            return np.interp(np.arange(len(curve)), kept, curve[kept])
        kept = kept[vertex]


def head_and_tail(spectrum: Spectrum) -> tuple[Vector, Vector, Bounds, float, int]:
    """Intervals of the known values, energy and largest size of the others, how many others: all for ‖A‖_F = 1."""
    low, high = (end / spectrum.frobenius for end in spectrum.interval())
    slack = _FROBENIUS_RELATIVE_ERROR
    left_out = max(0.0, 1.0 - slack - float(np.sum(high**2))), max(0.0, 1.0 + slack - float(np.sum(low**2)))
    others = spectrum.rank_limit - len(spectrum.values)
    largest = min((spectrum.tail_limit() + spectrum.certificate.roundoff) / spectrum.frobenius, math.sqrt(left_out[1]))
    if len(high):
        largest = min(largest, float(high[-1]))
    return low, high, left_out if others else (0.0, 0.0), largest, others


@lru_cache(maxsize=4)  # a row of a report asks a dozen times for the same two
def envelopes(spectrum: Spectrum, power: int) -> tuple[Vector, Vector]:
    """Curves Q^low, Q^high of length p + 1, both concave from 0 to 1, that every admissible P lies between."""
    low, high, (energy_low, energy_high), largest, others = head_and_tail(spectrum)
    known = len(low)
    # Of all sequences with this energy and this largest member, even ones have the most mass, packed ones the least.
    rest_low = energy_low / largest if largest > 0 else 0.0
    rest_high = math.sqrt(others * energy_high)
    head_low: Vector = np.cumsum(low**power)
    head_high: Vector = np.cumsum(high**power)
    if power == 2:  # the total is known: ‖A‖²_F = 1
        known_low, known_high = head_low - _FROBENIUS_RELATIVE_ERROR, head_high + _FROBENIUS_RELATIVE_ERROR
    else:  # P_j rises with the first j values and falls with all later ones
        known_low = _share(head_low, np.asarray(head_high[-1:] - head_high + rest_high))
        known_high = _share(head_high, np.asarray(head_low[-1:] - head_low + rest_low))
    curve_low = np.concatenate(
        [[0.0], np.maximum(known_low, 0.0), np.full(others, max(0.0, known_low[-1]) if known else 0.0)]
    )
    curve_high = np.concatenate([[0.0], known_high, np.ones(others)])
    if others and largest > 0:
        step: Vector = np.arange(1.0, others + 1.0)
        remaining = np.maximum(0.0, energy_low - step * largest**2) * float(largest) ** (power - 2)
        before = head_high[-1] if known else 0.0
        curve_high[known + 1 :] = _share(before + step * largest**power, remaining)
    curve_low[-1] = curve_high[-1] = 1.0
    return _concave_majorant(np.minimum(curve_low, 1.0)), _concave_majorant(np.minimum(curve_high, 1.0))


def _share(part: Vector, other: Vector | float) -> Vector:
    total = part + other
    return np.divide(part, total, out=np.ones_like(total), where=total > 0)


def schur_bounds(spectrum: Spectrum, power: int, measure: Callable[[Vector], float]) -> Bounds:
    """Bounds of a Schur-concave measure of σ^q/Σσ^q: on the curve that majorises all, and on the one all majorise."""
    if spectrum.frobenius == 0.0:
        return 0.0, 0.0
    low, high = envelopes(spectrum, power)
    return measure(np.maximum(np.diff(high), 0.0)), measure(np.maximum(np.diff(low), 0.0))
