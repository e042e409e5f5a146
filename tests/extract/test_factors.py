"""Factors are the best of their rank by every route, balanced, and their error is measured right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spectra.errors import MatrixError, NonFiniteMatrix
from spectra.extract import factors
from spectra.extract.factors import dense_error, factored_error, leading_factors, reranked_factors
from tests.extract.tuned import tail, truncated, update
from tests.planted import planted


def norm(matrix: torch.Tensor) -> float:
    return float(matrix.double().norm())


def take(matrix: torch.Tensor, rank: int, **options: object) -> factors.Factors:
    return leading_factors(matrix, rank, frobenius=norm(matrix), **options)  # type: ignore[arg-type]


# Bidiagonal below 128 rows; Gram with few and with many of the vectors, tall and wide.
SHAPES = [(40, 25), (25, 40), (300, 200), (200, 300), (160, 160)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_error_is_eckart_and_youngs(shape: tuple[int, int], rank: int) -> None:
    matrix = update(*shape, seed=4)
    found = take(matrix, rank)
    best = tail(matrix, rank)
    assert norm(matrix - found.b @ found.a) == pytest.approx(best, rel=1e-9)  # LAPACK's own error on these sizes
    assert dense_error(matrix, found.b.float(), found.a.float()) == pytest.approx(best, rel=1e-6)
    assert math.sqrt(norm(matrix) ** 2 - found.captured_high) == pytest.approx(best, rel=1e-9)
    torch.testing.assert_close(found.b @ found.a, truncated(matrix, rank), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced(shape: tuple[int, int]) -> None:
    found = take(update(*shape, seed=4), 5)
    torch.testing.assert_close(found.b.norm(dim=0), found.a.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.b.norm(dim=0) ** 2, torch.from_numpy(found.values), rtol=1e-12, atol=0)
    assert np.all(np.diff(found.values) <= 0)


def test_routes_are_those_that_are_meant() -> None:
    assert "bidiagonal" in take(update(40, 25, seed=0), 2).method
    assert "Gram" in take(update(300, 200, seed=0), 2).method


def test_exact_rank_leaves_no_empty_directions() -> None:
    matrix = torch.from_numpy(planted(np.array([3.0, 1.0]), 200, 150, seed=2))
    found = take(matrix, 2)
    assert found.rank == 2
    assert dense_error(matrix, found.b, found.a) < 1e-12


def test_rank_zero_update_of_zeros_has_no_directions() -> None:
    assert leading_factors(torch.zeros(200, 150), 3, frobenius=0.0).rank == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_sizes(scale: float) -> None:
    """Squares of such entries leave float32's range; the factors' own do not."""
    matrix = update(200, 150, seed=5) * scale
    found = take(matrix, 4)
    assert dense_error(matrix, found.b, found.a) == pytest.approx(tail(matrix.double() / scale, 4) * scale, rel=1e-6)


def test_graded_update_keeps_its_small_directions() -> None:
    """Singular values over nine decades: the Gram matrix alone would lose the last, which rank 10 holds."""
    matrix = torch.from_numpy(planted(10.0 ** -np.arange(12.0), 160, 140, seed=6))
    found = take(matrix, 10, floor=1e-13)
    assert dense_error(matrix, found.b, found.a) == pytest.approx(math.hypot(1e-10, 1e-11), rel=1e-4)


def test_sketch_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the size up to which every vector is found: near the optimum, and never said to be nearer than it is."""
    monkeypatch.setattr(factors, "EXACT_BELOW", 128)
    noise = torch.randn(400, 300, generator=torch.Generator().manual_seed(1)) * 1e-3
    matrix = update(400, 300, seed=7) + noise
    found = take(matrix, 8)
    assert "Lanczos" in found.method
    error, best = dense_error(matrix, found.b, found.a), tail(matrix, 8)
    assert math.sqrt(norm(matrix) ** 2 - found.captured_high) <= best * (1 + 1e-12)
    assert best * (1 - 1e-9) <= error <= best * 1.001  # four blocks resolve values ten times above the noise to 1e-3


def test_same_bytes_twice() -> None:
    matrix = update(300, 200, seed=8)
    one, two = take(matrix, 5), take(matrix.clone(), 5)
    assert torch.equal(one.b, two.b)
    assert torch.equal(one.a, two.a)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_reranking_is_the_svd_of_the_product(rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    b, a = torch.randn(50, 6, generator=generator), torch.randn(6, 30, generator=generator)
    product = 0.7 * (b.double() @ a.double())
    found = reranked_factors(b, a, rank, scale=0.7)
    torch.testing.assert_close(found.b @ found.a, truncated(product, rank), rtol=0, atol=1e-11)
    torch.testing.assert_close(found.b.norm(dim=0), found.a.norm(dim=1), rtol=1e-12, atol=0)
    stored = found.b.float(), found.a.float()
    want = dense_error(product, *stored)
    assert factored_error(b, a, 0.7, *stored) == pytest.approx(want, rel=1e-9)
    assert found.frobenius == pytest.approx(float(product.norm()), rel=1e-12)


def test_reranking_drops_directions_that_are_rounding() -> None:
    b = torch.randn(20, 2, generator=torch.Generator().manual_seed(3))
    doubled = torch.cat([b, b], dim=1)  # four columns, two directions
    a = torch.randn(4, 15, generator=torch.Generator().manual_seed(4))
    assert reranked_factors(doubled, a, 4, scale=1.0).rank == 2


def test_reranking_refuses_what_is_no_product() -> None:
    with pytest.raises(MatrixError, match="have no product"):
        reranked_factors(torch.ones(3, 2), torch.ones(1, 3), 1, scale=1.0)
    with pytest.raises(NonFiniteMatrix):
        reranked_factors(torch.full((3, 1), math.nan), torch.ones(1, 3), 1, scale=1.0)
