"""Overlap of the leading singular subspaces of two spectra, and how far it may be from that of the true ones.

The vectors held are those of A + F: A the matrix that was meant, F the error of storage, of arithmetic, and what an
iteration has left. `subspace_sines` bounds the sine s_i of the largest angle that F can have turned the leading i by.
P and P', the projections before and after, differ by a matrix whose eigenvalues are ± the sines of their principal
angles; against a projection of rank j its trace is at most the sum of its j largest eigenvalues (Ky Fan), of which no
more than i are positive: min(i, j)·s_i. Hence |φ − φ_true| ≤ s_i(a) + s_j(b).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectra.errors import UsageError
from spectra.subspace.bases import Array, Side, basis, dimension
from spectra.subspace.resolution import subspace_sines
from spectra.values import Spectrum


def overlap(a: Spectrum, b: Spectrum, i: int, j: int, *, side: Side = "left") -> float:
    """φ(i, j) = ‖U_A[:, :i]ᵀ U_B[:, :j]‖²_F / min(i, j): share of the smaller subspace that lies in the larger.

    Parameters
    ----------
    a, b : Spectrum
        With vectors, of matrices with as many rows (columns, on the right).
    i, j : int
        Leading singular vectors of either.
    side : {"left", "right"}

    Returns
    -------
    float
        In [0, 1]. Random subspaces give max(i, j)/D (`spectra.theory.chance.overlap_mean`).

    Raises
    ------
    UsageError
        If vectors are missing, or fewer than asked for, or of different lengths.

    References
    ----------
    E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. 4.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.ones(2), (3, 2), 2**0.5, Certificate("by hand"), left=np.eye(3)[:, :2])
    >>> B = Spectrum(np.ones(2), (3, 2), 2**0.5, Certificate("by hand"), left=np.eye(3)[:, 1:])
    >>> overlap(A, B, 2, 2), overlap(A, B, 1, 2)
    (0.5, 0.0)
    """
    return float(overlap_table(a, b, [i], [j], side=side)[0, 0])


def overlap_bounds(a: Spectrum, b: Spectrum, i: int, j: int, *, side: Side = "left") -> tuple[float, float]:
    """(low, high) that contain the overlap of the true subspaces: φ ± (s_i(a) + s_j(b)), s from `subspace_sines`.

    Parameters
    ----------
    a, b, i, j, side
        As of `overlap`.

    Returns
    -------
    low, high : float
        Within what is possible, max(0, i + j − D)/min(i, j) to 1: (1, 1) for the whole space.

    Raises
    ------
    UsageError
        As `overlap`.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A, B = (
    ...     Spectrum(np.array([3.0, 1.0]), (3, 2), 10**0.5, Certificate("", storage_floor=floor), left=np.eye(3)[:, :2])
    ...     for floor in (0.0, 0.4)
    ... )
    >>> overlap_bounds(A, B, 1, 1)
    (0.75, 1.0)
    """
    found = overlap(a, b, i, j, side=side)
    space = dimension(a, side)
    error = float(subspace_sines(a)[i - 1] + subspace_sines(b)[j - 1])
    least = max(0, i + j - space) / min(i, j)
    return max(least, found - error), min(1.0, found + error)


def overlap_table(
    a: Spectrum, b: Spectrum, ranks_a: Sequence[int], ranks_b: Sequence[int], *, side: Side = "left"
) -> Array:
    """Overlaps at every two of two lists of ranks, from one product of the vectors by cumulative sums.

    Parameters
    ----------
    a, b, side
        As of `overlap`.
    ranks_a, ranks_b : sequence of int
        In any order.

    Returns
    -------
    ndarray of shape (len(ranks_a), len(ranks_b))

    Raises
    ------
    UsageError
        As `overlap`.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.ones(3), (4, 3), 3**0.5, Certificate("by hand"), left=np.eye(4)[:, :3])
    >>> B = Spectrum(np.ones(3), (4, 3), 3**0.5, Certificate("by hand"), left=np.eye(4)[:, 1:])
    >>> overlap_table(A, B, [1, 2], [1, 3]).tolist()
    [[0.0, 0.0], [1.0, 0.5]]
    """
    if dimension(a, side) != dimension(b, side):
        raise UsageError(
            f"{side} vectors of matrices of shapes {a.shape} and {b.shape} have different lengths, "
            f"{dimension(a, side)} and {dimension(b, side)}: they have no overlap"
        )
    rows, cols = (np.asarray(ranks, dtype=np.intp) for ranks in (ranks_a, ranks_b))
    cross = basis(a, rows, side, "a").T @ basis(b, cols, side, "b")
    shared = np.cumsum(np.cumsum(cross**2, axis=0), axis=1)[np.ix_(rows - 1, cols - 1)]
    return np.minimum(shared / np.minimum.outer(rows, cols), 1.0)
