"""Whether an error matrix looks like noise: against Marchenko and Pastur's law, as it is and with its profile removed.

Rounding in blocks makes errors as large as the block's scale. Where rows or columns of a weight differ in size, so do
those of its error, and the law for entries of one variance fails for that reason alone. With every row and column
divided by its own size what is left to see is structure: directions that stand out of the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from spectra.linalg import Matrix
from spectra.theory.noise import finite_edge, marchenko_pastur_edge
from spectra.theory.quantization import marchenko_pastur_tail
from spectra.values import Vector

# Rounds of dividing by rows, then by columns. Of MiniLM's errors the distances that are measured move in the fourth
# digit after two.
_ROUNDS = 3

# Rows at a time, whose squares stay in a core's cache.
_ROWS = 512

# Of fewer singular values an empirical law says too little.
_FEWEST = 50


@dataclass(frozen=True)
class NoiseFit:
    """How far a matrix is from independent entries of one variance.

    Attributes
    ----------
    edge_ratio : float
        σ₁ over the edge s(√d + √k) of noise with entries of the same root mean square s: about 1 for noise. NaN for a
        matrix of zeros.
    outliers : int
        Singular values above that edge and its fluctuation, which noise passes once in a thousand matrices.
    distance : float
        Kolmogorov–Smirnov distance between the squares of the other singular values and Marchenko–Pastur's law of the
        same mean: about 2.7/p for noise, p values (measured at p from 50 to 1000). NaN for fewer than 50.
    """

    edge_ratio: float
    outliers: int
    distance: float


def noise_fit(values: Vector, shape: tuple[int, int]) -> NoiseFit:
    """Singular values against Marchenko–Pastur's law; nothing is fitted but the mean of their squares.

    Parameters
    ----------
    values : ndarray of shape (p,), float64
        All singular values, descending.
    shape : tuple of int
        Rows and columns, without those that are zero throughout; min(shape) is p.

    Examples
    --------
    >>> noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    >>> fit = noise_fit(torch.linalg.svdvals(noise.double()).numpy(), (200, 400))
    >>> round(fit.edge_ratio, 2), fit.outliers, fit.distance < 0.02
    (0.99, 0, True)
    """
    largest = float(values[0])
    if largest == 0.0:
        return NoiseFit(math.nan, 0, math.nan)
    values = values / largest
    std = math.sqrt(float(values @ values) / (shape[0] * shape[1]))
    outliers = int((values > finite_edge(shape, std)).sum())
    ratio = 1.0 / marchenko_pastur_edge(shape, std)
    return NoiseFit(ratio, outliers, _distance(values[outliers:], max(shape) - outliers))


def _distance(values: Vector, large: int) -> float:
    """Kolmogorov–Smirnov distance of p singular values of a p × large matrix from noise's.

    Noise without its k leading directions is noise of k rows and columns fewer.
    """
    small = len(values)
    if small < _FEWEST or not values.any():  # nothing is left where E has few directions
        return math.nan
    scaled = values**2 * (small / float(values @ values))
    below = 1.0 - marchenko_pastur_tail(scaled, small / large)[0]  # descending
    steps = np.arange(small, -1, -1) / small
    return float(max((steps[:-1] - below).max(), (below - steps[1:]).max()))


def whitened_fit(error: Matrix) -> NoiseFit:
    """The same of a matrix whose rows and columns have been divided by their sizes, in float32.

    Singular values are right to 10⁻³ of the largest at least, what noise cannot show.

    Examples
    --------
    Rows of very different sizes hide that the rest is noise:

    >>> from spectra.linalg import as_matrix
    >>> noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    >>> uneven = noise * torch.logspace(-1, 1, 200)[:, None]
    >>> found = torch.linalg.svdvals(uneven.double()).numpy()
    >>> noise_fit(found, (200, 400)).outliers > 10, whitened_fit(as_matrix(uneven)).outliers
    (True, 0)
    """
    tall = error.scaled if error.shape[0] >= error.shape[1] else error.scaled.T
    row, col = _weights(tall)
    rows, cols = int((row > 0.0).sum()), int((col > 0.0).sum())
    if rows == 0:
        return NoiseFit(math.nan, 0, math.nan)
    gram = col.new_zeros(len(col), len(col))
    for block, weight in zip(_blocks(tall), _blocks(row), strict=True):
        whitened = block.float() * weight.sqrt()[:, None]
        gram.addmm_(whitened.T, whitened)
    sides = col.sqrt()
    squares = torch.linalg.eigvalsh(gram * sides[:, None] * sides).flip(0).clamp_min(0.0)
    return noise_fit(squares[: min(rows, cols)].double().sqrt().cpu().numpy(), (rows, cols))


def _weights(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b of float32 with a mean of a_i E_ij² b_j that is the same in every row and column; 0 where all is 0.

    The alternation is Sinkhorn and Knopp's (Pacific J. Math. 21, 1967).
    """
    col = tall.new_ones(tall.shape[1], dtype=torch.float32)
    row = tall.new_zeros(tall.shape[0], dtype=torch.float32)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(col)
        for block, part in zip(_blocks(tall), _blocks(row), strict=True):
            squares = block.float().square()
            part.copy_(_inverse(squares @ col))
            sums += part @ squares
        col = _inverse(sums)
    return row, col


def _blocks(tall: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tall, _ROWS)


def _inverse(sizes: torch.Tensor) -> torch.Tensor:
    return torch.where(sizes > 0.0, 1.0 / sizes, 0.0)
