"""`CRITERIA`: every rule here that reads a number of directions off one spectrum, each with the band it is certain to.

The criteria ask different things, and only some ask for a rank:

- ``energy_50`` … ``energy_99``: least rank that keeps this share of ‖Δ‖²_F.
- ``entropy``, ``stable``: effective ranks, of Roy and Vetterli (2007) and of Rudelson and Vershynin (2007): how evenly
  the values are spread, not how many are needed.
- ``signal``: directions above the norm of what rounding to the stored dtype adds: no more can be real for certain.
- ``marchenko_pastur``, ``gavish_donoho``: directions above the edge of noise of one variance, or worth keeping under
  it (Gavish and Donoho 2014, eq. 4), the variance matched to the median of all values. Where the lower half of the
  spectrum is not noise of one variance, they are cautious: they take for noise what may be a heavy tail.
- ``elbow``: where the curve of kept energy P_r, r = 0 … p, bends most, by Kneedle (Satopää et al. 2011).

On the elbow. Kneedle scales the curve to the unit square and takes the largest P_r − r/p. P is concave, so there is one
such point whatever the sensitivity, and it needs no smoothing: P_r − r/p grows as long as σ_r²/‖Δ‖²_F > 1/p. So the
elbow is the number of directions of more than the average energy, which is Kaiser's rule (1960), and follows from the
exact ‖Δ‖_F even where the spectrum is truncated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from spectra import measures
from spectra.envelopes import Bounds
from spectra.errors import UsageError
from spectra.theory.noise import finite_edge, gavish_donoho_unknown, noise_std
from spectra.values import Spectrum

ENERGY_SHARES = (0.5, 0.9, 0.95, 0.99)

# Values that differ from the mean by no more than this do not stand out: it is above any rounding of a flat spectrum.
_FLAT = 1e-9


@dataclass(frozen=True)
class Band:
    """What a criterion says of a spectrum: certain to lie between `low` and `high`, which are one where it is known.

    Parameters
    ----------
    low, high : float
        Directions; NaN where the criterion does not apply.
    reason : str
        Why it does not apply.

    Examples
    --------
    >>> str(Band(3.0, 3.0)), str(Band(2.3, 4.0)), str(Band(math.nan, math.nan, "no floor"))
    ('3', '2.3–4', '—')
    """

    low: float
    high: float
    reason: str = ""

    @property
    def applies(self) -> bool:
        """Whether the criterion says anything."""
        return not math.isnan(self.low)

    @property
    def known(self) -> bool:
        """Whether the value is known, and not only bounded."""
        return self.low == self.high

    @property
    def value(self) -> float:
        """The value; NaN where it is only bounded, or does not apply."""
        return self.low if self.known else math.nan

    @property
    def rank(self) -> int:
        """Directions to keep to be certain: the upper end, rounded up.

        Raises
        ------
        UsageError
            If the criterion does not apply; the message says why.
        """
        if not self.applies:
            raise UsageError(f"the criterion does not apply: {self.reason}; choose another")
        return math.ceil(self.high)

    def __str__(self) -> str:
        if not self.applies:
            return "—"
        low, high = (f"{end:.1f}".removesuffix(".0") for end in (self.low, self.high))
        return low if low == high else f"{low}–{high}"


def _exactly(value: float) -> Band:
    return Band(float(value), float(value))


def _lacking(reason: str) -> Band:
    return Band(math.nan, math.nan, reason)


_Value = Callable[[Spectrum], float]
_Interval = Callable[[Spectrum], Bounds]


def _measured(spectrum: Spectrum, *, value: _Value, bounds: _Interval) -> Band:
    return _exactly(value(spectrum)) if spectrum.complete else Band(*bounds(spectrum))


def _energy(share: float) -> Callable[[Spectrum], Band]:
    return partial(
        _measured,
        value=partial(measures.energy_rank, share=share),
        bounds=partial(measures.energy_rank_bounds, share=share),
    )


def _floor(spectrum: Spectrum) -> float:
    """Norm of what rounding adds, where it is known, or the error of the values themselves."""
    certificate = spectrum.certificate
    stored = 0.0 if math.isnan(certificate.storage_floor) else certificate.storage_floor
    return max(stored, certificate.roundoff, certificate.squared_roundoff)


def signal(spectrum: Spectrum) -> Band:
    """Directions above the storage floor (`spectra.signal_rank`).

    Parameters
    ----------
    spectrum : Spectrum
    """
    if math.isnan(spectrum.certificate.storage_floor):
        return _lacking("the matrix is not the difference of two stored tensors, so it has no storage floor")
    return _measured(spectrum, value=measures.signal_rank, bounds=measures.signal_rank_bounds)


def above_noise(spectrum: Spectrum, threshold: Callable[[Spectrum, float], float]) -> Band:
    """Directions above a threshold that a noise level sets, matched to the median of all values.

    Parameters
    ----------
    spectrum : Spectrum
    threshold : callable (spectrum, median) -> float
        Growing with the median, in the units of a singular value.

    Returns
    -------
    Band
        Not below the storage floor: where most entries did not change, the few steps of rounding stand above the edge
        of even noise.
    """
    low, high = median_bounds(spectrum)
    if spectrum.certificate.method.startswith("factors") or high <= 0.0:
        return _lacking("a product of thin factors has no tail of noise to take a level from")
    floor = _floor(spectrum)
    least, most = (max(threshold(spectrum, median), floor) for median in (low, high))
    if spectrum.complete:
        return _exactly(measures.rank_above(spectrum, most))
    return Band(measures.rank_above_bounds(spectrum, most)[0], measures.rank_above_bounds(spectrum, least)[1])


def median_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain the median of all singular values, the truncated ones too.

    Let k values be known, the others hold the energy E, and none of them pass L. For j > k, (j − k)σ_j² ≤ E, since
    σ_{k+1} … σ_j are at least σ_j; and E ≤ (j − 1 − k)L² + (p − j + 1)σ_j².

    Parameters
    ----------
    spectrum : Spectrum

    Returns
    -------
    low, high : float
        In the units of a singular value.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> vectors_known = Certificate("by hand", gap=2**0.5, tail_norm=1.0, upper=np.array([3.0, 1.0]))
    >>> [round(end, 6) for end in median_bounds(Spectrum(np.array([3.0, 1.0]), (4, 4), 12**0.5, vectors_known))]
    [1.0, 1.0]
    """
    count, known = spectrum.rank_limit, len(spectrum.values)
    if spectrum.complete:
        median = float(np.median(spectrum.values))
        return median, median
    lower, upper = spectrum.interval()
    squared = spectrum.frobenius**2
    slack = 64 * np.finfo(np.float64).eps * squared  # as measures allows for the rounding of ‖A‖²_F
    least, most = squared - slack - float(np.sum(upper**2)), squared + slack - float(np.sum(lower**2))
    largest = min(spectrum.tail_limit() + spectrum.certificate.roundoff, math.sqrt(max(0.0, most)))
    if known:
        largest = min(largest, float(upper[-1]))

    def bounds(j: int) -> Bounds:
        if j <= known:
            return float(lower[j - 1]), float(upper[j - 1])
        left = (least - (j - 1 - known) * largest**2) / (count - j + 1)
        return math.sqrt(max(0.0, left)), min(largest, math.sqrt(max(0.0, most) / (j - known)))

    first, second = bounds((count + 1) // 2), bounds(count // 2 + 1)
    return (first[0] + second[0]) / 2.0, (first[1] + second[1]) / 2.0


def _gavish_donoho(spectrum: Spectrum, median: float) -> float:
    return gavish_donoho_unknown(min(spectrum.shape) / max(spectrum.shape)) * median


def _marchenko_pastur(spectrum: Spectrum, median: float) -> float:
    return finite_edge(spectrum.shape, noise_std(median, spectrum.shape))


def elbow(spectrum: Spectrum) -> Band:
    """Kneedle's elbow of the curve of kept energy: directions of more than the average energy.

    Parameters
    ----------
    spectrum : Spectrum

    Returns
    -------
    Band
        0 where all are alike: a straight line has no elbow.
    """
    average = spectrum.frobenius / math.sqrt(spectrum.rank_limit) * (1.0 + _FLAT)
    if spectrum.complete:
        return _exactly(measures.rank_above(spectrum, average))
    return Band(*measures.rank_above_bounds(spectrum, average))


CRITERIA: dict[str, Callable[[Spectrum], Band]] = {
    **{f"energy_{round(100 * share)}": _energy(share) for share in ENERGY_SHARES},
    "entropy": partial(_measured, value=measures.entropy_rank, bounds=measures.entropy_rank_bounds),
    "stable": partial(_measured, value=measures.stable_rank, bounds=measures.stable_rank_bounds),
    "signal": signal,
    "marchenko_pastur": partial(above_noise, threshold=_marchenko_pastur),
    "gavish_donoho": partial(above_noise, threshold=_gavish_donoho),
    "elbow": elbow,
}

LABELS = {
    **{f"energy_{round(100 * share)}": f"{100 * share:.0f}\xa0% of the energy" for share in ENERGY_SHARES},
    "entropy": "entropy rank",
    "stable": "stable rank",
    "signal": "above the storage floor",
    "marchenko_pastur": "above the Marchenko–Pastur edge",
    "gavish_donoho": "Gavish–Donoho threshold",
    "elbow": "elbow of the energy curve",
}
