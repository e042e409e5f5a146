"""Laws of measures and engines: invariance, scaling, transposition, and intervals that contain the truth."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra import measures
from spectra.linalg import as_matrix, by_bidiagonal, by_gram, product_spectrum, truncated
from spectra.values import Certificate, Spectrum
from tests.planted import orthonormal

SCALE_FREE = (
    measures.stable_rank,
    measures.entropy_rank,
    measures.entropy_rank_energy,
    measures.participation_ratio,
    lambda A: measures.truncation_error(A, 3),
)
WITH_BOUNDS = (
    (measures.entropy_rank, measures.entropy_rank_bounds),
    (measures.entropy_rank_energy, measures.entropy_rank_energy_bounds),
    (measures.participation_ratio, measures.participation_ratio_bounds),
    (measures.nuclear_norm, measures.nuclear_norm_bounds),
    (measures.stable_rank, measures.stable_rank_bounds),
    (lambda A: measures.energy_rank(A, 0.9), lambda A: measures.energy_rank_bounds(A, 0.9)),
    (lambda A: measures.truncation_error(A, 4), lambda A: measures.truncation_error_bounds(A, 4)),
    (lambda A: measures.rank_above(A, 0.3), lambda A: measures.rank_above_bounds(A, 0.3)),
)

# Values that span sixteen decades, zeros and ties included.
spectra_values = st.lists(st.one_of(st.floats(1e-12, 1e4), st.just(0.0), st.just(1.0)), min_size=2, max_size=40).map(
    lambda values: np.sort(np.array(values))[::-1]
)
matrices = st.builds(
    lambda rows, cols, seed, decay: (
        np.random.default_rng(seed).standard_normal((rows, cols)) * np.exp(-decay * np.arange(cols))
    ),
    st.integers(2, 30),
    st.integers(2, 30),
    st.integers(0, 2**16),
    st.floats(0, 1),
)


def of(values):
    return Spectrum(values, (len(values), len(values)), float(np.linalg.norm(values)), Certificate("given"))


@given(spectra_values, st.floats(1e-3, 1e3))
def test_scaling_changes_no_rank(values, factor):
    if values[0] == 0:
        return
    for measure in SCALE_FREE:
        assert measure(of(values * factor)) == pytest.approx(measure(of(values)), rel=1e-9, abs=1e-12)


@given(spectra_values)
def test_ranks_are_ordered_and_bounded(values):
    A = of(values)
    if values[0] == 0:
        return
    nonzero = int(np.sum(values > 0))
    # Rényi entropies fall with their order: of σ², H_∞ ≤ H_2 ≤ H_1; and σ is spread more evenly than σ²
    chain = [
        1.0,
        measures.stable_rank(A),
        measures.participation_ratio(A),
        measures.entropy_rank_energy(A),
        measures.entropy_rank(A),
        float(nonzero),
    ]
    for smaller, larger in pairwise(chain):
        assert smaller <= larger * (1 + 1e-9)


@given(spectra_values, st.data())
def test_bounds_of_any_truncation_contain_the_truth(values, data):
    whole = of(values)
    if whole.frobenius == 0:
        return
    k = data.draw(st.integers(1, len(values) - 1))
    slack = data.draw(st.floats(1.0, 1.5))  # certificates need not be tight
    gap = float(np.linalg.norm(values[k:]))
    certificate = Certificate("cut", gap=gap, tail_norm=float(values[k]) * slack, upper=values[:k] * slack)
    cut = Spectrum(values[:k], whole.shape, whole.frobenius, certificate)
    for measure, interval in WITH_BOUNDS:
        low, high = interval(cut)
        exact = measure(whole)
        # √ε: what is left out is known as the difference of two sums of squares
        assert low <= exact * (1 + 1e-7) + 1e-7
        assert exact <= high * (1 + 1e-7) + 1e-7


@given(matrices)
@settings(max_examples=60, deadline=None)
def test_transposition_and_rotation_leave_the_spectrum(a):
    rows, cols = a.shape
    exact = np.linalg.svd(a, compute_uv=False)
    turned = orthonormal(rows, rows, 1) @ a @ orthonormal(cols, cols, 2)
    for matrix in (a, a.T, turned):
        for route in (by_gram, by_bidiagonal):
            low, high = route(as_matrix(matrix)).interval()
            # the rotation itself rounds: a few ε σ₁
            assert np.all(low <= exact + 1e-13 * exact[0])
            assert np.all(exact <= high + 1e-13 * exact[0])


@given(matrices, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_sketch_intervals_contain_the_truth_on_any_matrix(a, seed):
    if min(a.shape) < 3:
        return
    exact = np.linalg.svd(a, compute_uv=False)
    found = truncated(as_matrix(a), 2, seed=seed)
    low, high = found.interval()
    assert np.all(low <= exact[:2] * (1 + 1e-12))
    assert np.all(exact[:2] <= high * (1 + 1e-12))
    assert exact[2] <= found.tail_limit() * (1 + 1e-12) + 1e-300


@given(matrices, st.integers(1, 6), st.floats(-4, 4))
@settings(max_examples=60, deadline=None)
def test_a_product_is_its_dense_form(a, r, scale):
    b = torch.from_numpy(np.random.default_rng(r).standard_normal((12, a.shape[0])))
    found = product_spectrum(b, torch.from_numpy(a), scale=scale)
    exact = np.linalg.svd(scale * (b.numpy() @ a), compute_uv=False)
    assert np.allclose(found.values, exact, atol=1e-12 * max(exact[0], 1e-300))
    assert found.frobenius == pytest.approx(math.sqrt(np.sum(exact**2)), rel=1e-11, abs=1e-300)
