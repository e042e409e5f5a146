"""Two updates side by side: overlap of adapters against dense decompositions, intruders against the base's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from spectra.linalg import as_matrix, by_gram, product_spectrum
from spectra.pairwise.operand import decomposed, leading
from spectra.subspace import intruders, overlap
from spectra.values import Spectrum
from tests.benchmarks.timing import Row, in_turn

SIDE, RANK, TOP = 4096, 64, 10


def overlaps() -> Iterator[Row]:
    """φ(64, 64) of two adapters of rank 64 on 4096 × 4096, half of one's directions the other's."""
    generator = torch.Generator().manual_seed(0)
    one, two = (_factors(generator) for _ in range(2))
    two = (torch.cat([one[0][:, : RANK // 2], two[0][:, RANK // 2 :]], 1), two[1])
    ours, _ = in_turn(lambda: overlap(*(_spectrum(*factors) for factors in (one, two)), RANK, RANK), lambda: None)
    (dense,) = in_turn(
        lambda: [torch.linalg.svd(b @ a, full_matrices=False)[0][:, :RANK] for b, a in (one, two)], rounds=1
    )
    # The column spaces of the factors themselves, in float64, are the subspaces.
    x, y = (torch.linalg.qr(b.double())[0] for b, _ in (one, two))
    exact = float((x.T @ y).square().sum()) / RANK
    left = [u.double() for u in dense.result]
    theirs = float((left[0].T @ left[1]).square().sum()) / RANK
    error = abs(ours.result - exact)
    yield Row(
        f"φ({RANK}, {RANK}) of adapters on {SIDE} × {SIDE}",
        ours.seconds,
        "torch thin SVD of both",
        dense.seconds,
        "≥ 100×",
        dense.seconds / ours.seconds >= 100 and error <= 1e-10,
        f"φ = {exact:.4f}, off by {error:.0e} (≤ 1e-10; the dense one by {abs(theirs - exact):.0e})",
    )


def intruder_search() -> Iterator[Row]:
    """Ten leading directions of a tuned 4096 × 4096 weight against all of its base, beside decomposing the base."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SIDE, SIDE, generator=generator) * 0.02
    b, a = _factors(generator, rank=8)
    # The update's largest value is three times the base's: what it adds comes out on top.
    size = float(product_spectrum(b, a).values[0])
    tuned = base + (b @ a) * (3.0 * 0.02 * 2.0 * SIDE**0.5 / size)
    ours, gram, thin = in_turn(
        lambda: intruders(decomposed(base), leading(tuned, TOP), top=TOP),
        lambda: by_gram(as_matrix(base), vectors=True),
        lambda: torch.linalg.svd(base, full_matrices=False),
        rounds=1,
    )
    u, v = (torch.linalg.eigh(w.double() @ w.double().T)[1].flip(1) for w in (base, tuned))
    exact = (u.T @ v[:, :TOP]).abs().amax(0).numpy()
    error = float(np.abs(ours.result.cosines - exact).max())
    accuracy = f"greatest |cos| off by {error:.0e} (≤ 1e-3) of float64's, {ours.result.count(0.5)} intruders of {TOP}"
    for rival, timing in (("the base's Gram route with vectors", gram), ("torch thin SVD of the base", thin)):
        yield Row(
            f"intruders of a {SIDE} × {SIDE} pair",
            ours.seconds,
            rival,
            timing.seconds,
            "≥ 0.83×",
            ours.seconds <= 1.2 * timing.seconds and error <= 1e-3,
            accuracy,
        )


def _factors(generator: torch.Generator, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = torch.randn(SIDE, rank, generator=generator), torch.randn(rank, SIDE, generator=generator)
    return b * torch.arange(1, rank + 1) ** -0.5, a


def _spectrum(b: torch.Tensor, a: torch.Tensor) -> Spectrum:
    return product_spectrum(b, a, vectors=True)
