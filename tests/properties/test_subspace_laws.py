"""Laws of subspaces: overlaps are shares, angles see only spans, distances are metrics, bounds grow with the error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.subspace import (
    capture_curve,
    chordal_distance,
    geodesic_distance,
    optimal_capture,
    overlap_bounds,
    overlap_table,
    principal_angles,
)
from spectra.theory import chance
from spectra.theory.bounds import vector_sines, wedin_sines
from spectra.values import Certificate, Spectrum
from tests.planted import orthonormal

seeds = st.integers(0, 2**16)
dims = st.integers(2, 12)
values = st.lists(st.one_of(st.floats(1e-6, 10), st.just(0.0), st.just(1.0)), min_size=1, max_size=12).map(
    lambda found: np.sort(np.array(found))[::-1]
)


def of(rows, cols, seed, *, floor=0.0):
    a = np.random.default_rng(seed).standard_normal((rows, cols))
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    known = Certificate("LAPACK", roundoff=1e-14 * s[0], storage_floor=floor)
    return Spectrum(s, a.shape, float(np.linalg.norm(a)), known, left=u, right=vh)


@settings(deadline=None)
@given(dims, dims, seeds, seeds, st.sampled_from(["left", "right"]))
def test_overlaps_are_symmetric_shares(rows, cols, one, two, side):
    a, b = of(rows, cols, one), of(rows, cols, two)
    ranks, dim = range(1, min(rows, cols) + 1), rows if side == "left" else cols
    table = overlap_table(a, b, ranks, ranks, side=side)
    assert np.all((table >= 0.0) & (table <= 1.0))
    assert np.allclose(table, overlap_table(b, a, ranks, ranks, side=side).T, atol=1e-13, rtol=0)
    least = [[max(0, i + j - dim) / min(i, j) for j in ranks] for i in ranks]
    assert np.all(table >= np.array(least) - 1e-13), "subspaces too large to be apart"
    if len(ranks) == dim:
        assert np.allclose(table[-1], 1.0, atol=1e-13, rtol=0), "the whole space holds every other"
    shared = table * np.minimum.outer(ranks, ranks)
    assert np.all(np.diff(shared, axis=0) >= -1e-13), "a larger subspace shares no less"
    assert np.allclose(overlap_table(a, a, ranks, ranks, side=side), 1.0, atol=1e-13, rtol=0)


@settings(deadline=None)
@given(dims, dims, seeds, seeds, st.floats(0, 3), st.floats(0, 3))
def test_bounds_contain_the_overlap_and_grow_with_the_error(rows, cols, one, two, small, more):
    i, j = np.random.default_rng(one).integers(1, min(rows, cols) + 1, 2)
    table = overlap_table(of(rows, cols, one), of(rows, cols, two), [i], [j])[0, 0]
    widths = []
    for floor in (small, small + more):
        low, high = overlap_bounds(of(rows, cols, one, floor=floor), of(rows, cols, two), i, j)
        assert 0.0 <= low <= table + 1e-12
        assert table - 1e-12 <= high <= 1.0
        widths.append(high - low)
    assert widths[0] <= widths[1] + 1e-12


@settings(deadline=None)
@given(values, st.floats(0, 5), st.floats(0, 5), st.floats(1e-3, 1e3))
def test_sines_are_sines_that_grow_with_the_error_and_have_no_units(found, size, more, factor):
    for bound in (wedin_sines, vector_sines):
        small, large = bound(found, size), bound(found, size + more)
        assert np.all((small >= 0) & (small <= large) & (large <= 1))
        assert np.all(bound(found, size, next_value=found[-1] / 2) >= small)
        assert np.all(bound(found, size, residuals=more) >= small)
        # values a rounding error apart may tie in one unit and not in another
        scaled, clear = bound(found * factor, size * factor), small < 0.99
        assert np.allclose(scaled[clear], small[clear], rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.integers(3, 12), seeds, st.data())
def test_angles_see_spans_alone(dim, seed, data):
    i, j = data.draw(st.integers(1, dim)), data.draw(st.integers(1, dim))
    x, y = orthonormal(dim, i, seed), orthonormal(dim, j, seed + 1)
    found = principal_angles(x, y)
    assert found.shape == (min(i, j),)
    assert np.all((found >= 0) & (found <= np.pi / 2 + 1e-15))
    assert np.all(np.diff(found) >= 0)
    turn = orthonormal(dim, dim, seed + 2)
    moved = principal_angles(turn @ x @ orthonormal(i, i, seed + 3), turn @ y @ orthonormal(j, j, seed + 4))
    assert np.allclose(moved, found, atol=1e-13, rtol=0)
    assert np.allclose(principal_angles(y, x), found, atol=1e-13, rtol=0)
    assert np.allclose(principal_angles(x, x), 0.0, atol=1e-14)
    assert np.sum(np.cos(found) ** 2) == pytest.approx(np.sum((x.T @ y) ** 2), abs=1e-12)
    assert np.sum(found > 1e-7) <= dim - max(i, j), "what does not fit beside the larger one lies in it"


@settings(deadline=None)
@given(st.integers(2, 10), seeds, st.data())
def test_distances_are_metrics(dim, seed, data):
    rank = data.draw(st.integers(1, dim))
    x, y, z = (orthonormal(dim, rank, seed + n) for n in range(3))
    if data.draw(st.booleans()):  # close ones too
        y = np.linalg.qr(x + 1e-6 * y)[0]
    for distance in (chordal_distance, geodesic_distance):
        one, two, three = (distance(principal_angles(p, q)) for p, q in ((x, y), (y, z), (x, z)))
        assert three <= one + two + 1e-13
        assert two <= one + three + 1e-13
        assert distance(principal_angles(x, x)) <= 1e-14 * dim
    assert chordal_distance(principal_angles(x, y)) <= geodesic_distance(principal_angles(x, y)) + 1e-15
    assert chordal_distance(principal_angles(x, z)) ** 2 <= rank + 1e-12


@settings(deadline=None)
@given(dims, dims, seeds, seeds)
def test_no_directions_capture_more_than_the_best(rows, cols, one, two):
    a, b = of(rows, cols, one), of(rows, cols, two)
    delta = (a.left * a.values) @ a.right
    image = b.left.T @ delta
    found = capture_curve(image, delta @ b.right.T, image @ b.right.T, a.frobenius)
    for curve in (found.left, found.right, found.both):
        assert np.all(curve <= optimal_capture(a) + 1e-12)
        assert np.all(np.diff(curve) >= -1e-15)
        assert np.all(curve <= 1.0)
    assert np.all(found.both <= np.minimum(found.left, found.right) + 1e-13)
    if rows <= cols:
        assert found.left[-1] == pytest.approx(1.0)


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_chance_of_overlap_is_a_law(dim, data):
    i, j = data.draw(st.integers(1, dim)), data.draw(st.integers(1, dim))
    mean, std = chance.overlap_mean(i, j, dim), chance.overlap_std(i, j, dim)
    least = max(0, i + j - dim) / min(i, j)
    assert least <= mean + 1e-15 <= 1 + 1e-15
    # no law on [least, 1] with this mean spreads further (Bhatia and Davis 2000)
    assert std**2 <= (1 - mean) * (mean - least) * (1 + 1e-12) + 1e-15
    chances = chance.overlap_pvalue(np.linspace(0, 1, 21), i, j, dim)
    assert np.all(np.diff(chances) <= 0)
    assert np.all((chances >= 0) & (chances <= 1))
    assert np.all(chances[np.linspace(0, 1, 21) <= least] == 1.0)
