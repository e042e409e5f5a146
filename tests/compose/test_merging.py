"""Merges: identities, permutations, definitions in plain loops, agreement with peft where it is right."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from spectra.compose import METHODS, Merge, Product, concatenated, merged, truncated
from spectra.compose.merging import dropped, ties
from spectra.errors import UsageError

ROWS, COLS = 18, 14


def updates(count: int = 3, rank: int = 2) -> list[Product]:
    generator = torch.Generator().manual_seed(0)
    return [
        Product(torch.randn(ROWS, rank, generator=generator), torch.randn(rank, COLS, generator=generator))
        for _ in range(count)
    ]


def how(method: str, **fields: object) -> Merge:
    return Merge(method, rank=4 if method == "svd" else None, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "iso"])
def test_one_task_is_itself(method: str) -> None:
    (one,) = updates(1)
    assert torch.allclose(merged([one], how(method, density=1.0)).dense(), one.dense(), atol=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "orthogonal"])
def test_the_order_of_tasks_changes_nothing(method: str) -> None:
    """To rounding; `orthogonal` clears later tasks of earlier ones, and says so."""
    tasks, first = updates(), None
    for order in itertools.permutations(range(3)):
        found = merged(
            [tasks[k] for k in order], how(method, density=0.4), coefficients=[(0.5, 1.0, 2.0)[k] for k in order]
        )
        first = found.dense() if first is None else first
        assert torch.allclose(found.dense(), first, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_coefficients(method: str) -> None:
    """`scale` multiplies what comes out, a common coefficient what goes in: every method is homogeneous."""
    tasks = updates()
    plain = merged(tasks, how(method, density=0.4))
    assert torch.allclose(merged(tasks, how(method, density=0.4, scale=-2.0)).dense(), -2.0 * plain.dense(), atol=1e-12)
    if not method.startswith("dare"):  # whose draws belong to the entries
        doubled = merged(tasks, how(method, density=0.4), coefficients=[2.0] * 3).dense()
        assert torch.allclose(doubled, 2.0 * plain.dense(), atol=1e-12)


def test_sum_is_exact_in_factors() -> None:
    tasks = updates()
    found = merged(tasks, Merge("sum"), coefficients=[0.3, -1.0, 2.0])
    expected = sum(a * task.dense() for a, task in zip((0.3, -1.0, 2.0), tasks, strict=True))
    assert found.b.shape[1] == 6
    assert torch.allclose(found.dense(), expected, atol=1e-13)
    assert int(torch.linalg.matrix_rank(found.dense())) == 6


def test_factors_apart_have_cross_terms() -> None:
    """(B₁ + B₂)(A₁ + A₂), which averages of factors are, differs from the sum by B₁A₂ + B₂A₁, as large as itself."""
    one, two = updates(2)
    apart = (one.b + two.b) @ (one.a + two.a)
    together = concatenated([one, two]).dense()
    cross = one.b @ two.a + two.b @ one.a
    assert torch.allclose(apart - together, cross, atol=1e-12)
    assert float(cross.norm()) > 0.5 * float(together.norm())


def test_ties_by_loops() -> None:
    """Entry by entry in plain Python."""
    tasks = [task.dense() for task in updates()]
    found = ties(tasks, 0.3)
    count = int(0.3 * ROWS * COLS)
    kept = []
    for task in tasks:
        flat = task.reshape(-1).tolist()
        chosen = sorted(range(len(flat)), key=lambda k: -abs(flat[k]))[:count]
        kept.append([value if k in chosen else 0.0 for k, value in enumerate(flat)])
    for k, value in enumerate(found.reshape(-1).tolist()):
        entries = [task[k] for task in kept]
        sign = np.sign(sum(entries))
        agreeing = [entry for entry in entries if entry != 0.0 and np.sign(entry) == sign]
        assert value == pytest.approx(sum(agreeing) / len(agreeing) if agreeing else 0.0, abs=1e-14)


def test_ties_as_peft() -> None:
    """On matrices peft's TIES is right: the same entries to float64's rounding."""
    tasks = [task.dense() for task in updates()]
    theirs = merge_utils.ties(tasks, torch.ones(3, dtype=torch.float64), density=0.3)
    assert torch.allclose(ties(tasks, 0.3), theirs, atol=1e-14)


def test_dare_is_unbiased() -> None:
    """Kept entries are divided by the density: the mean over seeds is the entry, within four standard errors."""
    (one,) = updates(1)
    task = one.dense()
    draws = torch.stack([dropped(task, 0.25, np.random.default_rng(seed)) for seed in range(400)])
    share = float((draws != 0).double().mean())
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / draws.numel()) ** 0.5)
    error = (draws.mean(dim=0) - task).abs() / (task.abs() * (3.0 / 400) ** 0.5)  # variance w²(1 − p)/p
    assert float(error.max()) < 4.5


def test_coefficients_change_no_draw_of_dare() -> None:
    """What is kept of an update belongs to it and the seed; two updates do not share it."""
    one, two = updates(2)
    alone = [merged([task], how("dare", density=0.3)).dense() for task in (one, two)]
    both = merged([one, two], how("dare", density=0.3), coefficients=[1.0, 0.99]).dense()
    assert torch.allclose(both, alone[0] + 0.99 * alone[1], atol=1e-14)
    assert not torch.equal(alone[0] == 0.0, alone[1] == 0.0)
    assert not torch.equal(alone[0], merged([one], how("dare", density=0.3, seed=1)).dense())


def test_tasks_that_share_directions_get_no_others_from_tsv() -> None:
    """One update twice: what comes out lies in its spaces, to float64's rounding; in whatever order."""
    one, two = updates(2)
    found = merged([one, one], Merge("tsv")).dense()
    u, _, vh = one.svd
    assert float((found - u @ (u.t() @ found) @ vh.t() @ vh).norm()) < 1e-10
    shared = [one, Product(two.b, one.a)]
    assert torch.allclose(merged(shared, Merge("tsv")).dense(), merged(shared[::-1], Merge("tsv")).dense(), atol=1e-10)


def test_rounding_is_no_direction_of_knots() -> None:
    """Constant updates with float32's noise: half of the entries of one direction are kept, and not the noise's."""
    noise = 1e-7 * torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tasks = [Product.of(torch.ones(12, 9) + noise), Product.of(torch.ones(12, 9) - noise)]
    found = merged(tasks, how("knots", density=0.5)).dense()
    assert float((found - 1.0).abs().lt(1e-5).double().mean()) >= 0.4


def test_knots_by_its_definition() -> None:
    tasks = updates()
    _, s, vh = torch.linalg.svd(torch.cat([task.dense() for task in tasks], dim=1), full_matrices=False)
    u = torch.linalg.svd(torch.cat([task.dense() for task in tasks], dim=1), full_matrices=False)[0]
    kept = s > 1e-10 * s[0]
    parts = [part[kept] for part in torch.split(vh, COLS, dim=1)]
    expected = (u[:, kept] * s[kept]) @ ties(parts, 0.4)
    assert torch.allclose(merged(tasks, how("knots", density=0.4)).dense(), expected, atol=1e-10)


def test_tsv_vectors_are_orthonormal() -> None:
    tasks = updates()
    found = merged(tasks, Merge("tsv"))
    s = torch.cat([task.svd[1] for task in tasks]).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(found.dense())[:6], s, atol=1e-10)


def test_iso_has_one_singular_value() -> None:
    tasks = updates()
    s = torch.linalg.svdvals(merged(tasks, Merge("iso")).dense())
    before = torch.linalg.svdvals(concatenated(tasks).dense())
    assert torch.allclose(s[:6], before[:6].mean().expand(6), atol=1e-10)
    assert float(s[6:].max()) < 1e-10


@pytest.mark.parametrize("side", ["input", "output"])
def test_orthogonal_clears_later_ones(side: str) -> None:
    first, second = updates(2)
    found = merged([first, second], Merge("orthogonal", side=side)).dense() - first.dense()
    cross = found @ first.dense().t() if side == "input" else found.t() @ first.dense()
    assert float(cross.norm()) < 1e-10
    assert float(found.norm()) > 0.5 * second.norm


def test_svd_is_the_best_of_its_rank() -> None:
    tasks = updates()
    total = concatenated(tasks)
    best, error = truncated(total, 4)
    u, s, vh = torch.linalg.svd(total.dense())
    assert torch.allclose(best.dense(), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-11)
    assert error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-9)


def test_bad_input() -> None:
    tasks = updates()
    with pytest.raises(UsageError, match="2 coefficients for 3 updates"):
        merged(tasks, Merge(), coefficients=[1.0, 2.0])
    with pytest.raises(UsageError, match="finite"):
        merged(tasks, Merge(), coefficients=[1.0, 2.0, float("inf")])
    with pytest.raises(UsageError):
        merged([], Merge())
    for bad in (
        {"method": "fisher"},
        {"density": 0.0},
        {"rank": 0},
        {"method": "svd"},
        {"side": "top"},
        {"scale": float("nan")},
    ):
        with pytest.raises(UsageError):
            Merge(**bad)  # type: ignore[arg-type]


def test_a_share_of_entries_is_counted_in_decimals() -> None:
    """.29 of 100 entries are 29, though binary's .29 · 100 lies below."""
    assert int(torch.count_nonzero(ties([torch.arange(1.0, 101.0).double().view(10, 10)], 0.29))) == 29
