"""Lloyd's iteration: the code book whose squared error on a tensor's own entries is locally least.

Entries go to a histogram first: then an iteration costs what there are levels, not what there are weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from spectra.linalg.threads import each_in_threads
from spectra.quantize.scales import LEAST_SCALE

# Centres of the histogram's cells, with −1, 0 and 1 among them. A boundary between levels lies within half a cell of
# its place, a thousandth of the gap between 16 levels; the error, stationary there, is off by the square of that.
_HALF = 1 << 12
_CENTRES: npt.NDArray[np.float64] = np.arange(-_HALF, _HALF + 1) / _HALF

# Parts that are counted apart and added in order, so that sums do not depend on the number of threads.
_PARTS = 32
_LEAST_PART = 1 << 16

# Blocks counted at a time: what is scaled fits a core's cache.
_AT_ONCE = 1 << 17

# 16 levels on 4M normal entries stand still to 1e-7 after about 150.
_ITERATIONS = 1000
_STILL = 1e-7


def fitted(flat: torch.Tensor, scales: torch.Tensor, block: int, bits: int) -> torch.Tensor:
    r"""Levels for a tensor's entries divided by their blocks' scales.

    Minimises :math:`\sum_i s_{b(i)}^2 \min_k (x_i / s_{b(i)} − \ell_k)^2`, the squared error of the tensor itself,
    by Lloyd's iteration [1]_: every level moves to the mean of the entries nearest to it, weighted by their squared
    scales. It begins where the density of levels is the cube root of the entries', which is best for many levels
    [2]_. A level that no entry is nearest to stays where it is.

    Parameters
    ----------
    flat : Tensor of shape (n,)
        Entries, row-major.
    scales : Tensor of shape (⌈n/block⌉,), float32
        Finite and not negative; blocks of scale 0 have no weight.
    block : int
        Entries a scale.
    bits : int
        2^bits levels.

    Returns
    -------
    Tensor of shape (2^bits,), float32
        Ascending, on the entries' device.

    References
    ----------
    .. [1] S. Lloyd, "Least Squares Quantization in PCM", IEEE Trans. Information Theory 28 (1982), method I.
    .. [2] P. Panter, W. Dite, "Quantization Distortion in Pulse-Count Modulation", Proc. IRE 39 (1951).

    Examples
    --------
    >>> fitted(torch.tensor([-1.0, -0.9, 0.0, 0.1, 0.5, 0.6, 1.0]), torch.ones(1), 7, 2)
    tensor([-0.9500,  0.0500,  0.5500,  1.0000])
    """
    weights = _histogram(flat, scales, block)
    weight_below, sum_below = (np.concatenate([[0.0], np.cumsum(part)]) for part in (weights, weights * _CENTRES))
    levels = _start(weights, 2**bits)
    for _ in range(_ITERATIONS):
        middles = (levels[:-1] + levels[1:]) / 2
        edges = np.concatenate([[0], np.searchsorted(_CENTRES, middles, side="right"), [len(_CENTRES)]])
        weight, moment = np.diff(weight_below[edges]), np.diff(sum_below[edges])
        moved = np.divide(moment, weight, out=levels.copy(), where=weight > 0.0)
        done = np.abs(moved - levels).max() < _STILL
        levels = moved
        if done:
            break
    return torch.from_numpy(levels.astype(np.float32)).to(flat.device)


def _histogram(flat: torch.Tensor, scales: torch.Tensor, block: int) -> npt.NDArray[np.float64]:
    """Squared scales of the entries nearest to every centre, summing to 1, or to 0 where all scales are 0."""
    inverse = 1.0 / scales.clamp_min(LEAST_SCALE)
    weight = (scales / scales.max().clamp_min(LEAST_SCALE)).square()  # squares of the scales may leave float32
    blocks_a_part = max(_LEAST_PART // block + 1, -(-len(scales) // _PARTS))
    blocks_at_once = min(blocks_a_part, _AT_ONCE // block + 1)
    parts = range(0, len(scales), blocks_a_part)
    counts = np.zeros((len(parts), len(_CENTRES)))

    def count(part: int) -> None:
        stop = min(parts[part] + blocks_a_part, len(scales))
        for first in range(parts[part], stop, blocks_at_once):
            of = slice(first, min(first + blocks_at_once, stop))
            entries = flat[of.start * block : of.stop * block].float()
            rows = torch.nn.functional.pad(entries, (0, -len(entries) % block)).view(-1, block)
            place = (rows * inverse[of, None]).clamp_(-1.0, 1.0).mul_(_HALF).add_(_HALF + 0.5)
            cells = place.to(torch.int32).flatten()[: len(entries)]
            weights = weight[of, None].double().expand(rows.shape).flatten()[: len(entries)]
            counts[part] += torch.bincount(cells, weights, len(_CENTRES)).cpu().numpy()

    each_in_threads(count, range(len(parts)))
    counted: npt.NDArray[np.float64] = counts.sum(0)
    counted /= counted.sum() or 1.0
    return counted


def _start(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Middles of equal shares of the cube root of the density."""
    share = np.cumsum(np.cbrt(weights))
    if share[-1] == 0.0:
        return np.linspace(-1.0, 1.0, count)
    levels: npt.NDArray[np.float64] = _CENTRES[np.searchsorted(share, (np.arange(count) + 0.5) / count * share[-1])]
    return levels
