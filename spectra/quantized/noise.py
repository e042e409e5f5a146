"""The spectrum that noise of a shape would have: quantiles of Marchenko and Pastur's law where a curve needs them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from spectra.quantized.running import kept_places
from spectra.theory.quantization import marchenko_pastur_tail

_GRID = 4096  # of the law's support, even in the angle: between two points the mass is a straight line within 1e-6


@lru_cache(maxsize=64)
def noise_curve(rows: int, cols: int) -> tuple[float, ...]:
    """Singular values of noise at the places that a row's curve keeps, over the edge.

    Parameters
    ----------
    rows, cols : int
        Shape of the matrix.

    Examples
    --------
    >>> curve = noise_curve(384, 384)
    >>> len(curve), round(curve[0], 2), round(curve[32], 2), round(curve[-1], 3)
    (65, 0.99, 0.4, 0.001)
    """
    count = min(rows, cols)
    beta = count / max(rows, cols)
    angle = np.linspace(0.0, math.pi, _GRID)
    value = 1.0 + beta + 2.0 * math.sqrt(beta) * np.cos(angle)
    mass = marchenko_pastur_tail(value, beta)[0]  # ascending: from the edge down
    at = (np.array(kept_places(count)) + 0.5) / count
    found = np.sqrt(np.maximum(np.interp(at, mass, value), 0.0)) / (1.0 + math.sqrt(beta))
    return tuple(float(one) for one in found)
