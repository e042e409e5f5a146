"""The sketch: its intervals contain the truth, with and without the probability, on every kind of tail."""

import numpy as np
import pytest
import torch

from spectra.linalg import as_matrix, by_bidiagonal, truncated
from spectra.linalg import sketch as module
from spectra.theory.bounds import block_lanczos_factor
from tests.planted import planted


def tails():
    n = 400
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n, 300)) * 0.02
    yield "fast decay", planted(0.5 ** np.arange(60), n, 300)
    yield "power law", planted(np.arange(1, 301) ** -0.5, n, 300)
    yield "flat", planted(np.ones(300), n, 300)
    yield "signal in noise", planted(np.linspace(3, 1, 12), n, 300) + noise
    yield "pure noise", noise
    yield "exact rank", planted(np.ones(10), n, 300)
    yield "rank below k", planted(np.array([2.0, 1.0]), n, 300)
    yield "clusters", planted(np.repeat([5.0, 1.0, 0.999], [20, 20, 200]), n, 300)
    yield "one entry", np.eye(1, n * 300).reshape(n, 300)
    yield "wide", planted(np.arange(1, 301) ** -1.0, 300, n)


TAILS = dict(tails())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TAILS)
def test_intervals_contain_the_truth(kind, dtype):
    a = torch.from_numpy(TAILS[kind]).to(dtype)
    exact = by_bidiagonal(as_matrix(a)).values
    for seed in range(3):
        found = truncated(as_matrix(a), 16, seed=seed)
        for deterministic in (False, True):
            low, high = found.interval(deterministic=deterministic)
            assert np.all(low <= exact[:16] * (1 + 1e-12)), (kind, seed)
            assert np.all(exact[:16] <= high * (1 + 1e-12)), (kind, seed)
            assert exact[16] <= found.tail_limit(deterministic=deterministic) * (1 + 1e-12) + 1e-14


def test_leading_values_are_certified_tightly():
    a = torch.from_numpy(TAILS["signal in noise"]).float()
    low, high = truncated(as_matrix(a), 16, seed=0).interval()
    # twelve planted values stand clear of the noise edge (0.7): residual bounds close on them to float32 accuracy
    assert np.all((high - low)[:12] <= 1e-4 * high[:12])


def test_tail_norm_is_close_to_the_truth():
    exact = np.linalg.svd(TAILS["pure noise"], compute_uv=False)
    found = truncated(as_matrix(torch.from_numpy(TAILS["pure noise"])), 16, seed=0)
    assert exact[16] <= found.certificate.tail_norm <= 1.35 * exact[16]


def test_tail_bound_holds_for_every_start():
    """An unlucky direction: nothing but one hidden value in the tail, which a start orthogonal to it would miss."""
    a = np.zeros((300, 300))
    a[7, 11] = 1.0
    a = torch.from_numpy(a)
    left = torch.eye(300, dtype=torch.float64)[:, 100:116]
    for seed in range(50):
        assert module.tail_norm(a, left, torch.Generator().manual_seed(seed)) >= 1.0


def test_the_tail_factor_fails_as_often_as_it_says_and_no_more():
    """One step from one vector on a matrix of rank one sees the cosine alone: there the bound is an equality."""
    dimension, probability, trials = 40, 0.1, 20000
    starts = np.random.default_rng(0).standard_normal((trials, dimension))
    seen = np.abs(starts[:, 0]) / np.linalg.norm(starts, axis=1)
    failures = np.mean(seen * block_lanczos_factor(dimension, 1, 1, probability) < 1.0)
    assert failures == pytest.approx(probability, abs=4 * (probability * (1 - probability) / trials) ** 0.5)


@pytest.mark.parametrize(("width", "blocks"), [(1, 4), (2, 3), (4, 2)])
def test_the_tail_factor_holds_on_a_spectrum_with_company(width, blocks):
    """Values up to nine tenths of the largest: the estimate falls short always, past the factor as rarely as told."""
    values, probability = np.append(1.0, np.linspace(0.0, 0.9, 119)), 0.05
    rng, short = np.random.default_rng(1), []
    for _ in range(400):
        start = rng.standard_normal((120, width))
        space = np.linalg.qr(np.hstack([values[:, None] ** (2 * j) * start for j in range(blocks)]))[0]
        short.append(np.linalg.norm(values[:, None] * space, 2))
    factor = block_lanczos_factor(120, width, blocks, probability)
    assert np.max(short) < 1.0
    assert np.mean(np.array(short) * factor < 1.0) <= probability + 3 * (probability / 400) ** 0.5


def test_vectors_are_orthonormal_and_aligned():
    a = planted(np.linspace(3, 1, 12), 400, 300)
    found = truncated(as_matrix(torch.from_numpy(a)), 12, seed=0)
    assert np.allclose(found.left.T @ found.left, np.eye(12), atol=1e-10)
    assert np.allclose(found.right @ found.right.T, np.eye(12), atol=1e-10)
    assert np.allclose((found.left * found.values) @ found.right, a, atol=1e-9)
    assert np.all(found.left[np.abs(found.left).argmax(0), np.arange(12)] > 0)


def test_same_seed_same_bytes_other_seed_other_start():
    a = as_matrix(torch.from_numpy(TAILS["power law"]).float())
    one, two, three = (truncated(a, 16, seed=seed).values for seed in (5, 5, 6))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != three.tobytes()


def test_zero_matrix():
    found = truncated(as_matrix(torch.zeros(200, 150)), 4)
    assert found.values.tolist() == [0.0] * 4
    assert found.interval()[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales(scale):
    a = planted(np.arange(1, 151) ** -1.0, 200, 150) * scale
    found = truncated(as_matrix(torch.from_numpy(a)), 4)
    low, high = found.interval()
    assert np.all(low <= np.arange(1, 5) ** -1.0 * scale * (1 + 1e-12))
    assert np.all(high * (1 + 1e-12) >= np.arange(1, 5) ** -1.0 * scale)
