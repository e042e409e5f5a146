"""Interference from factors: against dense formulas, chance, planted cases, and the counterexample to STI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.compose import (
    Product,
    activation_interference,
    concatenated,
    cosine,
    input_interference,
    output_interference,
    singular_task_interference,
    subspace_alignment,
)
from spectra.compose.interference import _mean_root, expected_singular_task_interference, expected_square
from spectra.errors import MatrixError, NonFiniteMatrix, UsageError


def product(rows: int, cols: int, rank: int, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    return Product(torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator))


def turned(update: Product, seed: int) -> Product:
    """The update between random orthogonal matrices."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in update.shape
    )
    return Product(left @ update.b, update.a @ right)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    ranks=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    seed=st.integers(0, 99),
)
def test_factors_give_what_matrices_give(rows: int, cols: int, ranks: tuple[int, int], seed: int) -> None:
    """Ranks above the sides, redundant factors and single rows among them; float64 on both sides."""
    i, j = (product(rows, cols, rank, seed + k) for k, rank in enumerate(ranks))
    a, b = i.dense(), j.dense()
    norm = float(a.norm() * b.norm())
    assert i.norm == pytest.approx(float(a.norm()), rel=1e-12)
    assert cosine(i, j) == pytest.approx(float((a * b).sum()) / norm, abs=1e-12)
    assert input_interference(i, j) == pytest.approx(float((a @ b.t()).norm()) / norm, abs=1e-12)
    assert output_interference(i, j) == pytest.approx(float((a.t() @ b).norm()) / norm, abs=1e-12)
    assert input_interference(i, j) == pytest.approx(input_interference(j, i), abs=1e-12)
    u, s, vh = i.svd
    assert torch.allclose((u * s) @ vh, a, atol=1e-11 * float(a.norm()))
    r = torch.randn(cols, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moment = r @ r.t()
    ratio = math.sqrt(float(torch.trace(b @ moment @ b.t())) / float(torch.trace(a @ moment @ a.t())))
    assert activation_interference(j, i, moment) == pytest.approx(ratio, rel=1e-9)
    diagonal = torch.diag(moment)
    ratio = math.sqrt(float((b * b * diagonal).sum()) / float((a * a * diagonal).sum()))
    assert activation_interference(j, i, diagonal) == pytest.approx(ratio, rel=1e-9)


def test_singular_task_interference_by_its_definition() -> None:
    updates = [product(20, 15, rank, seed) for seed, rank in enumerate((3, 2, 4))]
    triplets = [torch.linalg.svd(update.dense(), full_matrices=False) for update in updates]
    for rank, lengths in ((None, (3, 2, 4)), (2, (2, 2, 2))):
        kept = [(u[:, :r], s[:r], vh[:r]) for (u, s, vh), r in zip(triplets, lengths, strict=True)]
        u, s, v = (
            torch.cat([k[0] for k in kept], 1),
            torch.cat([k[1] for k in kept]),
            torch.cat([k[2] for k in kept]).t(),
        )
        eye = torch.eye(len(s), dtype=torch.float64)
        expected = float(((u.t() @ u - eye) @ torch.diag(s) @ (v.t() @ v - eye)).abs().sum())
        assert singular_task_interference(updates, rank=rank) == pytest.approx(expected, rel=1e-10)


def test_outputs_that_are_orthogonal_do_not_help() -> None:
    """STI is 0 and the cosine is 0, and yet every input of task i is met by all of the other update."""
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    outputs = torch.eye(20)
    i, j = Product(outputs[:, :2], x), Product(outputs[:, 2:4], x)
    assert singular_task_interference([i, j]) == pytest.approx(0.0, abs=1e-12)
    assert cosine(i, j) == pytest.approx(0.0, abs=1e-12)
    assert output_interference(i, j) == pytest.approx(0.0, abs=1e-12)
    assert input_interference(j, i) > 0.7
    inputs = x.t() @ x
    assert activation_interference(j, i, inputs) == pytest.approx(1.0, rel=1e-6)


def test_chance_of_input_and_output_interference() -> None:
    """Their mean squares over turned updates are 1/cols and 1/rows, within four standard errors."""
    i, j = product(24, 36, 3, 1), product(24, 36, 5, 2)
    for measure, side in ((input_interference, 36), (output_interference, 24)):
        squares = np.array([measure(turned(j, seed), i) ** 2 for seed in range(200)])
        assert abs(squares.mean() - expected_square(side)) < 4 * squares.std(ddof=1) / math.sqrt(len(squares))


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2, 2)])
def test_chance_of_singular_task_interference(ranks: tuple[int, ...]) -> None:
    """Mean over turned updates, within four standard errors and the 1/rows that entries of a turn are not normal by."""
    updates = [product(60, 80, rank, seed) for seed, rank in enumerate(ranks)]
    found = np.array(
        [
            singular_task_interference([turned(update, 10 * seed + k) for k, update in enumerate(updates)])
            for seed in range(300)
        ]
    )
    expected = expected_singular_task_interference(updates)
    assert abs(found.mean() - expected) < 4 * found.std(ddof=1) / math.sqrt(len(found)) + expected / 60


def test_mean_root() -> None:
    """E|g| = √(2/π), and √2 Γ(5/2)/Γ(2) of four equal terms."""
    assert _mean_root(np.array([3.0])) == pytest.approx(3 * math.sqrt(2 / math.pi), rel=1e-11)
    assert _mean_root(np.full(4, 2.0)) == pytest.approx(2 * math.sqrt(2) * math.gamma(2.5) / math.gamma(2.0), rel=1e-11)
    assert _mean_root(np.zeros(3)) == _mean_root(np.empty(0)) == 0.0


def test_alignment_with_a_merge() -> None:
    one, two = product(40, 30, 2, 0), product(40, 30, 3, 1)
    merge = concatenated([one, two])
    found = subspace_alignment(one, merge, left=0.0)
    assert (found.rank, found.chance) == (5, math.sqrt(5 / 40))
    assert found.value == pytest.approx(1.0, abs=1e-12)
    s = torch.linalg.svdvals(merge.dense())
    tail = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()
    for left in (0.3, 0.6):
        some = subspace_alignment(one, merge, left=left)
        assert tail[some.rank] <= left < tail[some.rank - 1]
        u = torch.linalg.svd(merge.dense())[0][:, : some.rank]
        assert some.value == pytest.approx(float((u.t() @ one.dense()).norm() / one.dense().norm()), rel=1e-9)


def test_bad_input() -> None:
    one, other = product(4, 5, 1, 0), product(5, 5, 1, 1)
    for measure in (cosine, output_interference):
        with pytest.raises(MatrixError):
            measure(one, other)
    with pytest.raises(MatrixError):
        input_interference(one, product(4, 6, 1, 0))
    with pytest.raises(MatrixError):
        singular_task_interference([one, other])
    with pytest.raises(UsageError):
        singular_task_interference([])
    with pytest.raises(UsageError):
        expected_singular_task_interference([one], rank=0)
    with pytest.raises(UsageError):
        subspace_alignment(one, one, left=1.0)
    with pytest.raises(MatrixError):
        Product(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(NonFiniteMatrix):
        Product(torch.full((3, 1), math.nan), torch.ones(1, 2))
    with pytest.raises(MatrixError, match="second moments"):
        activation_interference(one, one, torch.ones(4))
    assert math.isnan(cosine(one, Product(torch.zeros(4, 1), torch.zeros(1, 5))))


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 9)])
def test_dense_updates_are_products_too(shape: tuple[int, int]) -> None:
    """The same numbers as of the factors that they were made of."""
    i, j = product(*shape, 2, 0), product(*shape, 3, 1)
    a, b = Product.of(i.dense()), Product.of(j.dense())
    assert a.is_dense
    assert not i.is_dense
    assert torch.equal(a.dense(), i.dense())
    assert a.norm == pytest.approx(i.norm, rel=1e-13)
    for measure in (cosine, input_interference, output_interference):
        assert measure(a, b) == pytest.approx(measure(i, j), abs=1e-12)
        assert measure(i, b) == pytest.approx(measure(i, j), abs=1e-12)
    assert singular_task_interference([a, b]) == pytest.approx(singular_task_interference([i, j]), rel=1e-9)
    assert torch.allclose(a.times(-2.0).dense(), -2.0 * i.dense())
    assert concatenated([a, j]).is_dense
    assert torch.allclose(concatenated([a, j]).dense(), concatenated([i, j]).dense())
