"""Subspaces against dense float64 arithmetic, planted angles, the published algorithm; bounds under planted noise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from spectra.errors import UsageError
from spectra.linalg import as_matrix, by_bidiagonal, by_gram, product_spectrum, truncated
from spectra.subspace import (
    amplification,
    capture_curve,
    chordal_distance,
    direction_sines,
    geodesic_distance,
    intruders,
    optimal_capture,
    overlap,
    overlap_bounds,
    overlap_table,
    principal_angles,
    resolved_ranks,
    subspace_sines,
)
from spectra.values import Certificate, Spectrum
from tests.planted import orthonormal, planted
from tests.test_bounds import ritz, turned, turned_each


def dense(a):
    """Every triplet of a float64 matrix by LAPACK."""
    return by_bidiagonal(as_matrix(np.asarray(a, dtype=np.float64)), vectors=True)


def with_floor(spectrum, floor):
    return replace(spectrum, certificate=replace(spectrum.certificate, storage_floor=floor))


def projector(vectors):
    return vectors @ vectors.T


# Overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_overlap_is_the_trace_of_the_product_of_projections(side):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((30, 20)) for _ in range(2))
    one, two = dense(a), dense(b)
    (u, _, vh), (w, _, xh) = np.linalg.svd(a, full_matrices=False), np.linalg.svd(b, full_matrices=False)
    x, y = (u, w) if side == "left" else (vh.T, xh.T)
    ranks_a, ranks_b = [1, 5, 20, 3], [2, 20, 1]
    expected = [[np.trace(projector(x[:, :i]) @ projector(y[:, :j])) / min(i, j) for j in ranks_b] for i in ranks_a]
    # a few ε·20 of a sum of at most 20 squares
    assert np.allclose(overlap_table(one, two, ranks_a, ranks_b, side=side), expected, atol=1e-13, rtol=0)
    assert overlap(one, two, 5, 2, side=side) == pytest.approx(expected[1][0], abs=1e-13)
    assert overlap(one, one, 7, 7, side=side) == pytest.approx(1.0, abs=1e-13)
    assert overlap(one, one, 3, 9, side=side) == pytest.approx(1.0, abs=1e-13)


def test_overlap_of_the_whole_space_is_one():
    rng = np.random.default_rng(1)
    one, two = dense(rng.standard_normal((6, 9))), dense(rng.standard_normal((6, 9)))
    assert np.allclose(overlap_table(one, two, [6], range(1, 7)), 1.0)
    assert not np.allclose(overlap_table(one, two, [6], range(1, 7), side="right"), 1.0)


def test_signs_and_order_of_ranks_change_nothing():
    rng = np.random.default_rng(2)
    one, two = dense(rng.standard_normal((9, 7))), dense(rng.standard_normal((9, 7)))
    signs = np.array([1.0, -1, -1, 1, -1, 1, 1])
    flipped = replace(one, left=one.left * signs, right=one.right * signs[:, None])
    assert np.allclose(overlap_table(flipped, two, [1, 2, 3], [4, 2]), overlap_table(one, two, [1, 2, 3], [4, 2]))
    assert np.allclose(overlap_table(two, one, [4, 2], [1, 2, 3]).T, overlap_table(one, two, [1, 2, 3], [4, 2]))


def test_float32_vectors_decide_in_float64():
    """Columns that float32 left at 1 ± 1e-6 must not give an overlap above 1, nor one of less with itself."""
    a = planted(np.linspace(2, 1, 8), 300, 200).astype(np.float32)
    found = truncated(as_matrix(a), 8)
    assert found.left.dtype == np.float32
    table = overlap_table(found, found, range(1, 9), range(1, 9))
    assert np.all(table <= 1.0)
    # 8 squares that float64 sums; the basis is one and the same
    assert np.allclose(table, 1.0, atol=1e-14, rtol=0)


def test_values_may_be_more_than_vectors():
    """A spectrum that kept the leading vectors alone, and an adapter's, with fewer values than the matrix has."""
    a = np.random.default_rng(3).standard_normal((40, 30))
    kept = by_gram(as_matrix(a), vectors=True, keep=5)
    assert len(kept.values) == 30
    whole = dense(a)
    # the Gram route's vectors are right to q²/(σ gap) ≈ 1e-13
    assert np.allclose(overlap_table(kept, whole, [5], [5, 9]), 1.0, atol=1e-9)
    assert len(subspace_sines(kept)) == 30
    low_rank = product_spectrum(torch.from_numpy(a[:, :4]), torch.from_numpy(a[:4]), vectors=True)
    assert overlap(low_rank, low_rank, 4, 4) == pytest.approx(1.0)
    for spectrum, held in ((kept, 5), (low_rank, 4)):
        with pytest.raises(UsageError, match=rf"rank 6 of b is not within 1…{held}, the left vectors"):
            overlap(whole, spectrum, 6, 6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s, bare: overlap(s, bare, 1, 1), "b holds no left vectors; take its spectrum with vectors=True"),
        (lambda s, bare: overlap(bare, s, 1, 1, side="right"), "a holds no right vectors"),
        (lambda s, bare: overlap(s, s, 0, 1), "rank 0 of a is not within 1…4"),
        (lambda s, bare: overlap(s, s, 1, 5), "rank 5 of b is not within 1…4"),
        (lambda s, bare: overlap(s, s, 1, 1, side="top"), 'side="top" is neither "left" nor "right"'),
        (lambda s, bare: overlap(s, dense(np.eye(5)), 1, 1), r"\(6, 4\) and \(5, 5\) have different lengths, 6 and 5"),
        (lambda s, bare: overlap_bounds(s, bare, 1, 1), "b holds no left"),
        (lambda s, bare: intruders(s, s, top=5), "top = 5 is not within 1…4"),
        (lambda s, bare: intruders(s, s, top=0), "top = 0"),
        (lambda s, bare: intruders(bare, s), "base holds no left"),
        (lambda s, bare: intruders(s, bare), "tuned holds no left"),
        (lambda s, bare: intruders(s, dense(np.eye(5)), top=1), "one is not the other's base"),
        (lambda s, bare: principal_angles(np.ones((3, 1)), np.eye(3)), "columns of x are not orthonormal"),
        (lambda s, bare: principal_angles(np.eye(3), np.full((3, 1), np.nan)), "columns of y are not orthonormal"),
        (lambda s, bare: principal_angles(np.eye(3), np.eye(2)), "x is in 3 dimensions and y in 2"),
        (lambda s, bare: principal_angles(np.eye(3)[:2], np.eye(3)), r"x of shape \(2, 3\) is no basis"),
        (lambda s, bare: principal_angles(np.eye(3), np.ones(3)), r"y of shape \(3,\) is no basis"),
        (lambda s, bare: capture_curve(np.ones((2, 3)), np.ones((3, 2)), np.ones((3, 3)), 1.0), "do not belong"),
        (lambda s, bare: amplification(1.0, np.ones((2, 3))), r"a core of shape \(2, 3\)"),
    ],
)
def test_refusals(call, says):
    whole = dense(np.arange(24.0).reshape(6, 4) ** 2)
    with pytest.raises(UsageError, match=says):
        call(whole, replace(whole, left=None, right=None))


def test_a_truncated_base_has_no_intruders():
    a = planted(np.linspace(2, 1, 40), 60, 50)
    found = truncated(as_matrix(a), 8)
    with pytest.raises(UsageError, match=r"holds 8 of 50; take its whole spectrum with vectors=True \(rank=None\)"):
        intruders(found, dense(a))


# What is determined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 12), (15, 9), (9, 15)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_overlap_bounds_hold_under_planted_noise(shape, side):
    rng = np.random.default_rng(4)
    informative = 0
    for trial in range(20):
        values = np.sort(rng.uniform(0, 1, 6))[::-1] * np.array([9, 6, 3, 2, 2, 1])
        truths = [planted(values, *shape, seed=10 * trial + n) for n in range(2)]
        truths[1] = truths[1] + 0.7 * truths[0] * rng.integers(0, 2)
        seen = []
        for truth in truths:
            e = rng.standard_normal(shape)
            e *= rng.choice([0.0, 0.01, 0.1, 0.3]) / np.linalg.norm(e, 2)
            seen.append(with_floor(dense(truth + e), float(np.linalg.norm(e, 2))))
        exact = [dense(truth) for truth in truths]
        for i in range(1, 7):
            for j in (1, 3, 6, min(shape)):
                low, high = overlap_bounds(*seen, i, j, side=side)
                found, true = overlap(*seen, i, j, side=side), overlap(*exact, i, j, side=side)
                assert low - 1e-12 <= true <= high + 1e-12
                assert low <= found + 1e-12
                assert found <= high + 1e-12
                informative += high - low < 0.5
    assert informative > 80, "of 480"


def test_bounds_of_the_whole_space_and_of_forced_overlaps():
    noisy = with_floor(dense(np.random.default_rng(5).standard_normal((6, 9))), 100.0)
    assert overlap_bounds(noisy, noisy, 6, 6) == (pytest.approx(1.0), 1.0), "R⁶ cannot be turned"
    assert overlap_bounds(noisy, noisy, 4, 4) == (0.5, 1.0), "two 4-spaces of R⁶ share a plane"
    assert overlap_bounds(noisy, noisy, 4, 4, side="right") == (0.0, 1.0)
    assert subspace_sines(noisy).tolist() == [1.0] * 6
    assert subspace_sines(with_floor(dense(np.eye(3) + np.ones((3, 3))), 9.0)).tolist() == [1.0, 1.0, 0.0]


def test_all_that_is_known_counts():
    values, bare = np.array([5.0, 3.0, 1.0]), Certificate("by hand")
    of = lambda **known: Spectrum(values, (4, 8), 6.5, replace(bare, **known))  # noqa: E731
    known = {"gap": 2.5, "tail_norm": 0.0}
    assert subspace_sines(of(**known)).tolist() == [0.0, 0.0, 0.0]
    assert subspace_sines(of(**known, storage_floor=0.25)).tolist() == pytest.approx([1 / 7, 1 / 7, 1 / 3])
    assert subspace_sines(of(**known, residuals=np.array([0.3, 0.4, 0.0]))).tolist() == [0.15, 0.25, 0.5]
    assert direction_sines(of(**known, residuals=np.array([0.3, 0.4, 0.0]))).tolist() == pytest.approx(
        [0.3 / math.sqrt(2), 0.4 / math.sqrt(2), 0.0]
    )
    assert resolved_ranks(of(**known, residuals=np.array([0.3, 0.4, 0.1]))).tolist() == [True, True, False]
    # a tail of 2 raises what a value may be followed by: AAᵀ may hold up to 3² + 2² behind the first, 1² + 2² behind
    # the second
    found = subspace_sines(of(gap=2.5, tail_norm=2.0, storage_floor=0.25))
    assert found.tolist() == pytest.approx([0.25 / (5 - math.sqrt(13) - 0.25), 0.25 / (3 - math.sqrt(5) - 0.25), 1.0])
    assert np.all(subspace_sines(of(**known, roundoff=0.1)) > 0)
    assert np.all(subspace_sines(of(**known, squared_roundoff=0.1)) > 0)
    assert subspace_sines(of(**known, squared_roundoff=2.0))[2] == 1.0
    single = replace(of(**known), left=np.eye(4, 3, dtype=np.float32))
    assert 1e-7 < subspace_sines(single)[0] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_sketch_bounds_its_own_vectors(dtype, blocks):
    """Unfinished iterations included: against LAPACK's vectors of the same matrix."""
    rng = np.random.default_rng(6)
    told = 0
    for values, noise in (
        (0.5 ** np.arange(60), 0.0),
        (np.arange(1, 151) ** -1.0, 0.0),
        (np.linspace(3, 1, 12), 0.02),
        (np.repeat([5.0, 1.0, 0.999], [3, 10, 100]), 0.0),
        (np.array([2.0, 1.0]), 0.0),
    ):
        a = planted(values, 200, 150) + noise * rng.standard_normal((200, 150))
        a = torch.from_numpy(a).to(dtype)
        u, s, vh = np.linalg.svd(a.double().numpy(), full_matrices=False)
        found = truncated(as_matrix(a), 16, seed=1, blocks=blocks)
        left, right = (np.linalg.qr(x.astype(np.float64))[0] for x in (found.left, found.right.T))
        angles = np.maximum(turned(u[:, :16], left), turned(vh.T[:, :16], right))
        each = np.maximum(turned_each(u[:, :16], left), turned_each(vh.T[:, :16], right))
        # 1e-12: LAPACK's own vectors are not exact either
        assert np.all(angles <= subspace_sines(found) + 1e-12)
        assert np.all((each <= direction_sines(found) + 1e-12) | (direction_sines(found) == 1.0))
        told += np.sum(subspace_sines(found) < 1)
        seen = s[:16] > 1e-3 * s[0]
        off = np.linalg.norm(a.double().numpy() @ found.right.T - found.left * found.values, axis=0)
        certificate = found.certificate
        # the residual itself, taken apart from the certificate's: float products differ by ε σ₁²/s
        assert np.allclose(off[seen], certificate.residuals[seen], atol=1e3 * certificate.roundoff)
        assert np.all(certificate.residuals <= (1 + 1e-6) * certificate.upper[0])
    assert told > (16 if blocks > 1 else 8)


def test_ritz_vectors_of_a_subspace_that_misses_directions():
    rng = np.random.default_rng(7)
    for trial in range(200):
        a = planted(np.sort(rng.uniform(0.2, 1.0, 6))[::-1] * np.array([4, 3, 2, 1, 1, 1]), 9, 7, seed=trial)
        u, s, vh = np.linalg.svd(a, full_matrices=False)
        kept = np.sort(rng.choice(6, 4, replace=False))
        left, values, right, residuals = ritz(a, np.linalg.qr(u[:, kept] + 0.03 * rng.standard_normal((9, 4)))[0])
        tail = float(np.linalg.norm(a - left @ (left.T @ a), 2))
        gap = math.sqrt(max(0.0, np.sum(s**2) - np.sum(values**2)))
        known = Certificate("Ritz", gap=gap, tail_norm=tail, residuals=residuals)
        found = Spectrum(values, a.shape, float(np.linalg.norm(a)), known, left=left, right=right.T)
        angles = np.maximum(turned(u[:, :4], left), turned(vh.T[:, :4], right))
        assert np.all(angles <= subspace_sines(found) + 1e-12)


@pytest.mark.parametrize("shape", [(1100, 1040), (1040, 1100), (120, 200), (200, 120)])
def test_the_gram_route_bounds_its_vectors(shape):
    """Six decades of values, so that σ² spans twelve; in float32 beyond 1024 rows."""
    a = planted(10.0 ** -np.linspace(0, 6, 60), *shape)
    a = torch.from_numpy(a).to(torch.float32 if min(shape) > 1024 else torch.float64)
    u, _, vh = scipy.linalg.svd(a.double().numpy(), full_matrices=False)
    found = by_gram(as_matrix(a), vectors=True, keep=60)
    sines = subspace_sines(found)[:60]
    angles = np.maximum(turned(u[:, :60], found.left), turned(vh.T[:, :60], found.right.T))
    # 1e-10: LAPACK's own vectors, ε σ₁ over a gap of a fifth of 1e-6 σ₁ at the end
    assert np.all((angles <= sines + 1e-10) | (sines == 1.0))
    assert np.sum(sines < 0.01) >= 30


def test_factors_bound_their_vectors():
    rng = np.random.default_rng(8)
    b, a = rng.standard_normal((50, 6)) * 2.0 ** -np.arange(6), rng.standard_normal((6, 40))
    found = product_spectrum(torch.from_numpy(b), torch.from_numpy(a), vectors=True)
    assert np.all(subspace_sines(found) < 1e-11)
    assert len(subspace_sines(found)) == 6


# Angles -----------------------------------------------------------------------------------------------------------


def at_angles(angles, dim, rows, *, seed=0):
    """Bases of `rows` and len(angles) columns in R^dim whose principal angles are known, both turned within."""
    q, k = orthonormal(dim, rows + len(angles), seed), len(angles)
    y = q[:, :k] * np.cos(angles) + q[:, rows : rows + k] * np.sin(angles)
    return q[:, :rows] @ orthonormal(rows, rows, seed + 1), y @ orthonormal(k, k, seed + 2)


PLANTED = np.array([0.0, 1e-12, 1e-8, 1e-4, 0.3, np.pi / 4, np.pi / 4 + 1e-9, 1.2, np.pi / 2 - 1e-8, np.pi / 2])


@pytest.mark.parametrize("rows", [10, 17])
@pytest.mark.parametrize("seed", range(3))
def test_planted_angles_to_a_few_ulps(rows, seed):
    x, y = at_angles(PLANTED, 60, rows, seed=seed)
    # the bases are themselves orthonormal to about 1e-15 only; √ε = 1.5e-8 is what cosines alone would give
    assert np.allclose(principal_angles(x, y), PLANTED, atol=5e-15, rtol=0)
    assert np.allclose(principal_angles(y, x), PLANTED, atol=5e-15, rtol=0)
    # SciPy takes small angles from cosines where there are large ones too: right to √ε
    assert np.allclose(principal_angles(x, y), np.sort(scipy.linalg.subspace_angles(x, y)), atol=1e-7, rtol=0)


def test_angles_of_subspaces_too_large_to_be_apart():
    x, y = orthonormal(7, 5, 0), orthonormal(7, 6, 1)
    found = principal_angles(x, y)
    assert found.shape == (5,)
    assert np.allclose(found[:4], 0.0, atol=5e-15), "5 + 6 − 7 = 4 directions are shared"
    assert found[4] > 0.1
    assert principal_angles(x[:, :0], y).shape == (0,)
    assert np.allclose(principal_angles(np.eye(4), np.eye(4)), 0.0)


def test_float32_bases_are_taken_as_they_are():
    x, y = (b.astype(np.float32) for b in at_angles(np.array([0.1, 0.5]), 40, 3))
    # the columns were rounded to 6e-8 each
    assert np.allclose(principal_angles(x, y), [0.1, 0.5], atol=1e-6)


def test_overlap_is_the_mean_square_cosine():
    x, y = at_angles(np.array([0.2, 0.7, 1.1]), 30, 5)
    one, two = (Spectrum(np.ones(b.shape[1]), (30, 9), 3.0, Certificate(""), left=b) for b in (x, y))
    assert overlap(one, two, 5, 3) == pytest.approx(np.mean(np.cos([0.2, 0.7, 1.1]) ** 2), rel=1e-14)


def test_distances():
    angles = np.array([0.2, 0.7, 1.1])
    x, y = at_angles(angles, 30, 3)
    found = principal_angles(x, y)
    assert chordal_distance(found) == pytest.approx(np.linalg.norm(projector(x) - projector(y)) / math.sqrt(2))
    assert geodesic_distance(found) == pytest.approx(math.sqrt(0.04 + 0.49 + 1.21))
    assert chordal_distance([]) == geodesic_distance([]) == 0.0


# Energy -----------------------------------------------------------------------------------------------------------


def test_captured_shares_against_projections():
    rng = np.random.default_rng(9)
    delta, other = rng.standard_normal((14, 11)), rng.standard_normal((14, 11))
    u, _, vh = np.linalg.svd(other, full_matrices=False)
    u, v = u[:, :6], vh[:6].T
    found = capture_curve(u.T @ delta, delta @ v, u.T @ delta @ v, float(np.linalg.norm(delta)))
    for r in range(1, 7):
        p, q = projector(u[:, :r]), projector(v[:, :r])
        for curve, inside in ((found.left, p @ delta), (found.right, delta @ q), (found.both, p @ delta @ q)):
            assert curve[r - 1] == pytest.approx(np.linalg.norm(inside) ** 2 / np.linalg.norm(delta) ** 2, rel=1e-13)
    best = optimal_capture(dense(delta))
    assert np.all(found.both <= np.minimum(found.left, found.right))
    assert np.all(np.maximum(found.left, found.right) <= best[:6] + 1e-14)
    own = dense(delta)
    image = own.left.T @ delta
    assert np.allclose(capture_curve(image, delta @ own.right.T, image @ own.right.T, own.frobenius).both, best)
    assert best[-1] == pytest.approx(1.0)
    assert np.all(np.isnan(capture_curve(np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 2)), 0.0).both))
    assert np.all(np.isnan(optimal_capture(dense(np.zeros((3, 3))))))


def test_captured_shares_of_tiny_updates_do_not_underflow():
    u, v, tiny = orthonormal(8, 2, 0), orthonormal(6, 2, 1), 1e-200
    found = capture_curve(tiny * v.T, tiny * u, tiny * np.eye(2), tiny * math.sqrt(2))
    assert np.allclose(found.both, [0.5, 1.0])
    assert np.allclose(amplification(tiny, tiny * np.eye(2)), [1.0, 1 / math.sqrt(2)])


def test_amplification_against_a_dense_computation():
    rng = np.random.default_rng(10)
    w, delta = rng.standard_normal((14, 11)), rng.standard_normal((14, 3)) @ rng.standard_normal((3, 11))
    u, _, vh = np.linalg.svd(delta, full_matrices=False)
    found = amplification(float(np.linalg.norm(delta)), u[:, :3].T @ w @ vh[:3].T)
    for r in range(1, 4):
        inside = projector(u[:, :r]) @ w @ projector(vh[:r].T)
        assert found[r - 1] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(inside), rel=1e-12)
    assert amplification(1.0, [[0.0, 0.0], [0.0, 2.0]]).tolist() == [math.inf, 0.5]
    assert math.isnan(amplification(0.0, [[0.0]])[0])
