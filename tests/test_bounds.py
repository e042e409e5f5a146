"""Perturbation bounds against the angles that known errors make: random ones, the worst ones, and Ritz vectors."""

import math

import numpy as np
import pytest

from spectra.theory.bounds import RESOLVED, vector_sines, wedin_sines, weyl
from tests.planted import orthonormal, planted

KINDS = ("dense", "mixes two pairs", "one direction", "all directions")


def turned(truth, seen):
    """Sine of the largest principal angle between the leading i columns, for every i."""
    return np.array(
        [
            np.linalg.norm(seen[:, :i] - truth[:, :i] @ (truth[:, :i].T @ seen[:, :i]), 2)
            for i in range(1, seen.shape[1] + 1)
        ]
    )


def turned_each(truth, seen):
    return np.linalg.norm(seen - truth * np.sum(truth * seen, axis=0), axis=0)


def error(kind, u, v, rng):
    """An error of norm 1, some of them aligned with the singular vectors it does most to."""
    rows, cols = len(u), len(v)
    i, j = rng.integers(0, min(rows, cols), 2)
    angle = rng.uniform(0, 2 * np.pi)
    made = {
        "dense": lambda: rng.standard_normal((rows, cols)),
        "mixes two pairs": lambda: (
            np.cos(angle) * (np.outer(u[:, i], v[:, j]) + np.outer(u[:, j], v[:, i]))
            + np.sin(angle) * (np.outer(u[:, i], v[:, i]) - np.outer(u[:, j], v[:, j]))
            + 1e-3 * np.outer(u[:, i], v[:, i])
        ),
        "one direction": lambda: np.outer(u[:, rng.integers(0, rows)], v[:, rng.integers(0, cols)]),
        "all directions": lambda: orthonormal(max(rows, cols), min(rows, cols), int(angle * 1e6)),
    }[kind]()
    made = made if made.shape == (rows, cols) else made.T
    return made / np.linalg.norm(made, 2)


def cases(kind):
    """(observed A, its SVD, E): square and not, rank-deficient, nearly tied, of one row."""
    rng = np.random.default_rng(KINDS.index(kind))
    for trial in range(400):
        rows, cols = rng.integers(1, 9, 2)
        least = min(rows, cols)
        values = np.sort(rng.uniform(0, 1, least))[::-1]
        values[least - rng.integers(0, least) :] = rng.choice([0.0, 1e-3])
        a = planted(np.sort(values)[::-1], rows, cols, seed=trial)
        u, s, vh = np.linalg.svd(a)
        yield a, u, s, vh.T, rng.choice([1e-3, 0.01, 0.1, 0.3]) * s[0] * error(kind, u, vh.T, rng)


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_turns_a_subspace_or_a_vector_further(kind):
    told = told_each = 0
    for a, u, s, v, e in cases(kind):
        size, p = np.linalg.norm(e, 2), len(s)
        u0, _, v0h = np.linalg.svd(a - e)
        bound, bound_each = wedin_sines(s, size), vector_sines(s, size)
        found = np.maximum(turned(u0[:, :p], u[:, :p]), turned(v0h.T[:, :p], v[:, :p]))
        # LAPACK's own vectors are turned by ε σ₁/gap ≤ ε σ₁/‖E‖·bound, under 1e-12 of the bound for ‖E‖ ≥ 1e-3 σ₁
        assert np.all(found <= bound * (1 + 1e-9) + 1e-12)
        each = np.hypot(turned_each(u0[:, :p], u[:, :p]), turned_each(v0h.T[:, :p], v[:, :p]))
        assert np.all((each <= bound_each * (1 + 1e-9) + 1e-12) | (bound_each == 1.0))
        told, told_each = told + np.sum(bound < 1), told_each + np.sum(bound_each < 1)
    # The bounds say something: of about 1600 subspaces and vectors some hundreds.
    assert told > 300
    assert told_each > 100


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.4])
def test_the_worst_error_reaches_the_bound_to_first_order(share):
    """Of all E the one that turns diag(1 + δ, 1) most turns it by ½ arcsin(2‖E‖/δ)."""
    gap = 0.5
    size = share * gap
    angle = 0.5 * math.asin(2 * share)
    seen = np.diag([1.0 + gap, 1.0])
    across = np.array([[math.cos(2 * angle), math.sin(2 * angle)], [math.sin(2 * angle), -math.cos(2 * angle)]])
    # A₀'s traceless part is that of A, less its component across A₀'s own axis
    e = gap / 2 * np.diag([1.0, -1.0]) - gap / 2 * math.cos(2 * angle) * across
    assert np.linalg.norm(e, 2) == pytest.approx(size)
    u0 = np.linalg.svd(seen - e)[0]
    found = turned(u0[:, :1], np.eye(2)[:, :1])[0]
    assert found == pytest.approx(math.sin(angle))
    bound = wedin_sines([1.0 + gap, 1.0], size)[0]
    assert found <= bound <= found / (1 - share) ** 2
    if share > 0.1:
        assert found > share, "without −‖E‖ under the bar the bound would be wrong"


def test_weyl_holds_and_is_reached():
    for kind in KINDS:
        for a, _, s, _, e in cases(kind):
            low, high = weyl(s, np.linalg.norm(e, 2))
            truth = np.linalg.svd(a - e, compute_uv=False)
            assert np.all((low - 1e-14 <= truth) & (truth <= high + 1e-14))
    assert np.allclose(np.linalg.svd(np.diag([3.0, 1.0]) + 0.5 * np.eye(2), compute_uv=False), weyl([3, 1], 0.5)[1])


def ritz(a, basis):
    """Rayleigh–Ritz triplets of an arbitrary subspace, and ‖Av_i − s_iu_i‖: what an unfinished iteration holds."""
    turn, s, vh = np.linalg.svd(basis.T @ a, full_matrices=False)
    u = basis @ turn
    return u, s, vh.T, np.linalg.norm(a @ vh.T - u * s, axis=0)


@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-4])
def test_ritz_vectors_of_any_subspace_are_within_the_bound(near):
    """Some miss a direction altogether: then the next value has to be bounded from above."""
    rng = np.random.default_rng(1)
    told = 0
    for trial in range(300):
        a = planted(np.sort(rng.uniform(0.2, 1.0, 6))[::-1] * np.array([4, 3, 2, 1, 1, 1]), 9, 7, seed=trial)
        u0, s0, v0h = np.linalg.svd(a, full_matrices=False)
        kept = np.sort(rng.choice(6, 4, replace=False))
        basis = np.linalg.qr(u0[:, kept] + near * rng.standard_normal((9, 4)))[0]
        u, s, v, residuals = ritz(a, basis)
        e = rng.choice([1e-3, 0.05, 0.2]) * error("dense", u0, v0h.T, rng)
        given = {"next_value": s0[4], "upper": s0[:4]}
        bound = wedin_sines(s, np.linalg.norm(e, 2), residuals=np.sqrt(np.cumsum(residuals**2)), **given)
        bound_each = vector_sines(s, np.linalg.norm(e, 2), residuals=residuals, **given)
        t0, _, w0h = np.linalg.svd(a - e, full_matrices=False)
        found = np.maximum(turned(t0[:, :4], u), turned(w0h.T[:, :4], v))
        assert np.all(found <= bound * (1 + 1e-9) + 1e-12)
        each = np.maximum(turned_each(t0[:, :4], u), turned_each(w0h.T[:, :4], v))
        assert np.all(each <= bound_each * (1 + 1e-9) + 1e-12)
        told += np.sum(bound < 1)
    assert told > 100


def test_a_missed_direction_counts_in_the_gap():
    """diag(3, 2, 1) seen as (3, 1): what mixes the first two turns the first further than 3 − 1 would allow."""
    share, gap = 0.3, 1.0
    angle = 0.5 * math.asin(2 * share)
    across = np.array([[math.cos(2 * angle), math.sin(2 * angle)], [math.sin(2 * angle), -math.cos(2 * angle)]])
    e = np.zeros((3, 3))
    e[:2, :2] = gap / 2 * np.diag([1.0, -1.0]) - gap / 2 * math.cos(2 * angle) * across
    found = turned(np.linalg.svd(np.diag([3.0, 2.0, 1.0]) - e)[0][:, :1], np.eye(3)[:, :1])[0]
    assert wedin_sines([3.0, 1.0], share)[0] < found <= wedin_sines([3.0, 1.0], share, upper=[3.0, 2.0])[0]


def test_edges():
    assert wedin_sines([2.0, 2.0, 1.0], 0.0).tolist() == [1.0, 0.0, 0.0], "a tie determines nothing, error or not"
    assert wedin_sines([2.0, 0.0], 0.0).tolist() == [0.0, 1.0]
    assert wedin_sines([2.0], 0.5, next_value=1.0).tolist() == [1.0], "0.5/0.5: past the last informative value"
    assert wedin_sines([2.0, 1.0], math.nan).tolist() == [1.0, 1.0]
    assert wedin_sines([2.0, 1.0], math.inf).tolist() == [1.0, 1.0]
    assert wedin_sines([4.0, 2.0], [0.5, 0.25]).tolist() == [0.5 / 1.5, 0.25 / 1.75]
    assert wedin_sines([], 1.0).shape == vector_sines([], 1.0).shape == (0,)
    assert vector_sines([4.0], 0.5).tolist() == [math.sqrt(2) * 0.5 / 3.5], "one value has one neighbour, next_value"
    assert vector_sines([4.0, 1.0], 0.5)[1] == 1.0
    # an upper bound below its value is of no use, and no value exceeds one before it
    assert wedin_sines([4.0, 2.0], 0.1, upper=[3.0, 9.0]).tolist() == [0.1 / 0.9, 0.1 / 1.9]
    assert math.asin(RESOLVED) == pytest.approx(math.pi / 6), "30°, as every text about it says"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wedin_sines([1.0], -0.1), "perturbation = -0.1 is negative"),
        (lambda: vector_sines([1.0], 0.1, residuals=-1.0), "residuals = -1.0 is negative"),
        (lambda: wedin_sines([1.0], 0.1, next_value=-1.0), "next_value = -1.0"),
        (lambda: wedin_sines([1.0], 0.1, next_value=math.nan), "next_value = nan"),
        (lambda: wedin_sines([2.0, 1.0], [0.1] * 3), r"\(3,\) does not go with values of shape \(2,\)"),
        (lambda: wedin_sines([2.0, 1.0], 0.1, upper=[1.0]), r"upper of shape \(1,\)"),
        (lambda: weyl([[1.0]], 0.1), r"values of shape \(1, 1\)"),
        (lambda: weyl([1.0], -1.0), "negative"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
