"""Intruder dimensions: leading singular vectors of a tuned matrix that are like none of its base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectra.errors import UsageError
from spectra.subspace.bases import Side, columns, dimension
from spectra.subspace.resolution import direction_sines
from spectra.theory.bounds import RESOLVED
from spectra.values import Spectrum, Vector


@dataclass(frozen=True, eq=False)
class Intruders:
    """How closely each leading vector of a tuned matrix is matched in the base.

    Parameters
    ----------
    cosines : ndarray of shape (k,)
        Greatest |cos| of each tuned vector to the base's singular vectors.
    resolved : ndarray of shape (k,), bool
        Whether the tuned vector is itself determined: no known error turned it by more than 30°.
    basis : int
        n, base vectors that it was matched with.
    dim : int
        D, length of the vectors. A random direction has a closest match of `spectra.theory.chance.match_mean(n, D)`
        and counts with probability `match_below(ε, n, D)`, where no values of the base tie.
    """

    cosines: Vector
    resolved: NDArray[np.bool_]
    basis: int
    dim: int

    def count(self, epsilon: float) -> int:
        """Number of intruders: vectors whose closest match is below ε."""
        return int(np.sum(self.cosines < epsilon))

    def sweep(self, epsilons: Sequence[float]) -> NDArray[np.int64]:
        """`count` at every ε.

        Returns
        -------
        ndarray of shape (len(epsilons),), int64
        """
        return np.array([self.count(epsilon) for epsilon in epsilons], dtype=np.int64)


def intruders(base: Spectrum, tuned: Spectrum, *, top: int = 10, side: Side = "left") -> Intruders:
    """Match the leading singular vectors of a tuned matrix with all of its base's.

    Where base values tie within the certificate, only the subspace they share is determined, not the vectors that a
    driver happened to return: they count as one, and the cosine is to that subspace, √Σcos². Vectors of the value 0
    are none of the base's directions (it does nothing there, as beyond the thin SVD of a tall matrix) and are left
    out, together with those that cannot be told from them. For separate values above 0 this is the published
    algorithm, with the absolute value that the sign of a singular vector demands.

    Parameters
    ----------
    base : Spectrum
        Complete, with vectors.
    tuned : Spectrum
        With at least `top` vectors.
    top : int
        k, leading vectors of the tuned matrix; the source takes 10.
    side : {"left", "right"}
        The source takes left.

    Returns
    -------
    Intruders

    Raises
    ------
    UsageError
        If the base is truncated, vectors are missing or too few, or lengths differ.

    References
    ----------
    R. Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence", 2024, alg. 1.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> turned = np.array([[0.6, 0.0], [0.0, 1.0], [0.8, 0.0]])
    >>> W = Spectrum(np.array([2.0, 1.0]), (3, 2), 5**0.5, Certificate("by hand"), left=np.eye(3)[:, :2])
    >>> T = Spectrum(np.array([3.0, 1.0]), (3, 2), 10**0.5, Certificate("by hand"), left=turned)
    >>> found = intruders(W, T, top=2)
    >>> found.cosines.tolist(), found.count(0.7)
    ([0.6, 1.0], 1)
    """
    known, wanted = columns(base, side, "base"), columns(tuned, side, "tuned")
    if dimension(base, side) != dimension(tuned, side):
        raise UsageError(
            f"{side} vectors of a base of shape {base.shape} and of a tuned matrix of shape {tuned.shape} have "
            "different lengths: one is not the other's base"
        )
    if known.shape[1] < base.rank_limit:
        raise UsageError(
            f"intruders are matched with every vector of the base, and it holds {known.shape[1]} of {base.rank_limit}; "
            "take its whole spectrum with vectors=True (rank=None)"
        )
    if not 1 <= top <= wanted.shape[1]:
        raise UsageError(f"top = {top} is not within 1…{wanted.shape[1]}, the {side} vectors that tuned holds")
    starts, count = _groups(base)
    held, sought = (np.asarray(a, dtype=np.float64) for a in (known[:, :count], wanted[:, :top]))
    squares = np.square(held.T @ sought)  # (n, top)
    grouped = np.add.reduceat(squares, starts, axis=0) if count else np.zeros((1, top))
    return Intruders(
        cosines=np.minimum(np.sqrt(grouped.max(axis=0)), 1.0),
        resolved=np.asarray(direction_sines(tuned)[:top] <= RESOLVED),
        basis=count,
        dim=dimension(base, side),
    )


def _groups(base: Spectrum) -> tuple[NDArray[np.intp], int]:
    """First index of every group of values that tie, and how many vectors there are before those of the value 0.

    Two neighbours tie where their intervals meet; ties are handed on.
    """
    low, high = base.interval()
    apart = np.append(True, low[:-1] > high[1:])[: len(low)]  # from the value before
    starts = np.flatnonzero(apart)
    zeros = np.flatnonzero(low <= 0.0)
    if len(zeros):
        count = int(starts[np.searchsorted(starts, zeros[0], side="right") - 1])
        return starts[starts < count], count
    return starts, len(low)
