"""What random subspaces give: every baseline against simulation with fixed seeds, and against closed forms."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from spectra.theory import chance

# Standard errors that a simulated mean may be off by: 4.5 happens by chance once in 150 000 comparisons.
ERRORS = 4.5

SHAPES = [(16, 1, 1), (16, 4, 4), (16, 10, 10), (16, 15, 3), (20, 2, 7), (64, 8, 8), (64, 32, 8), (5, 2, 5)]


def frames(trials, dim, rank, rng):
    """Haar-random orthonormal columns (trials, dim, rank)."""
    q, r = np.linalg.qr(rng.standard_normal((trials, dim, rank)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]


def overlaps(dim, i, j, *, trials=20000, seed=0):
    """Of a fixed subspace with random ones, which is as good as random with random."""
    return (frames(trials, dim, j, np.random.default_rng(seed))[:, :i] ** 2).sum((1, 2)) / min(i, j)


def assert_mean(samples, expected):
    error = np.std(samples) / math.sqrt(len(samples))
    assert abs(np.mean(samples) - expected) <= ERRORS * error + 1e-12


@pytest.mark.parametrize(("dim", "i", "j"), SHAPES)
def test_overlap_moments(dim, i, j):
    found = overlaps(dim, i, j)
    assert_mean(found, chance.overlap_mean(i, j, dim))
    assert_mean((found - chance.overlap_mean(i, j, dim)) ** 2, chance.overlap_std(i, j, dim) ** 2)
    assert chance.overlap_std(i, j, dim) == chance.overlap_std(j, i, dim)


def test_overlap_of_lines_is_a_beta_law():
    for dim in (2, 3, 50):
        law = stats.beta(0.5, (dim - 1) / 2)
        assert chance.overlap_mean(1, 1, dim) == pytest.approx(law.mean(), rel=1e-14)
        assert chance.overlap_std(1, 1, dim) == pytest.approx(law.std(), rel=1e-14)
        values = np.linspace(0, 1, 11)
        assert np.allclose(chance.overlap_pvalue(values, 1, 1, dim), law.sf(values), rtol=1e-10, atol=1e-15)
        law = stats.beta(2, (dim - 4) / 2) if dim > 4 else None
        if law:
            assert np.allclose(chance.overlap_pvalue(values, 1, 4, dim), law.sf(values), rtol=1e-10, atol=1e-15)
            # tr(PQ) = j − tr((1 − P)Q), and 1 − P has rank one
            shared = 4 * values
            expected = np.where(shared < 3, 1.0, law.cdf(np.clip(4 - shared, 0, 1)))
            assert np.allclose(chance.overlap_pvalue(values, dim - 1, 4, dim), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("dim", "i", "j"), SHAPES)
def test_overlap_probabilities(dim, i, j):
    found = overlaps(dim, i, j, trials=40000, seed=1)
    # the documented factor of 1.6, and the error of a quantile that is seen 40 times: 4 √40/40, another factor of 1.6
    for probability, factor in ((0.5, 1.05), (0.1, 1.07), (0.01, 1.45), (0.001, 1.6 * 1.6)):
        if dim in (i, j):
            assert chance.overlap_pvalue(1.0, i, j, dim) == 1.0
            continue
        told = float(chance.overlap_pvalue(np.quantile(found, 1 - probability), i, j, dim))
        assert 1 / factor <= told / probability <= factor, (probability, told)


def test_overlap_probabilities_past_what_is_possible():
    assert chance.overlap_pvalue([0.0, 0.2, 1.0, 1.1], 4, 4, 6).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert chance.overlap_pvalue(0.5, 4, 4, 6) == 1.0, "tr(PQ) ≥ 4 + 4 − 6 = 2: no two have less than a half"
    assert chance.overlap_pvalue(0.51, 4, 4, 6) < 1.0
    falling = chance.overlap_pvalue(np.linspace(0, 1, 101), 8, 12, 64)
    assert np.all(np.diff(falling) <= 0.0)


def test_above_chance():
    assert chance.above_chance(0.25, 0.25) == 0.0
    assert chance.above_chance(1.0, 0.25) == 1.0
    assert chance.above_chance([0.0, 0.5], [[0.5], [0.0]]).tolist() == [[-1.0, 0.0], [0.0, 0.5]]
    assert math.isnan(chance.above_chance(1.0, 1.0))


def test_captured_shares():
    rng = np.random.default_rng(2)
    delta = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 9))
    delta /= np.linalg.norm(delta)
    left, right = frames(20000, 12, 4, rng), frames(20000, 9, 2, rng)
    assert_mean(np.sum((left.mT @ delta) ** 2, (1, 2)), chance.capture_mean(4, 12))
    assert_mean(np.sum((delta @ right) ** 2, (1, 2)), chance.capture_mean(2, 9))
    assert_mean(np.sum((left.mT @ delta @ right) ** 2, (1, 2)), chance.capture_both_mean(4, 2, (12, 9)))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_cosine_of_matrices_whatever_their_ranks(rank):
    rng = np.random.default_rng(rank)
    a = np.diag(np.arange(8, 0, -1.0))[:, :5]
    b = (rng.standard_normal((8, rank)) * 2.0 ** -np.arange(rank)) @ rng.standard_normal((rank, 5))
    moved = frames(20000, 8, 8, rng) @ b @ frames(20000, 5, 5, rng).mT
    cosines = np.sum(a * moved, (1, 2)) / np.linalg.norm(a) / np.linalg.norm(b)
    assert_mean(cosines, 0.0)
    assert_mean(cosines**2, chance.cosine_std((8, 5)) ** 2)


def test_amplification_denominator():
    rng = np.random.default_rng(4)
    w = rng.standard_normal((10, 7)) * np.arange(1, 8)
    cores = frames(20000, 10, 3, rng).mT @ w @ frames(20000, 7, 3, rng)
    assert_mean(np.sum(cores**2, (1, 2)), chance.amplification_mean_square(3, float(np.linalg.norm(w)), (10, 7)))


def matches(n, dim, *, trials, seed=5):
    """Greatest |cos| of random directions to n axes."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(trials // 2000):
        x = rng.standard_normal((2000, dim))
        found.append(np.abs(x[:, :n]).max(1) / np.linalg.norm(x, axis=1))
    return np.concatenate(found)


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (1, 7), (2, 3), (3, 3), (8, 8), (16, 64), (64, 64), (384, 384)])
def test_closest_match(n, dim):
    found = matches(n, dim, trials=20000)
    assert_mean(found, chance.match_mean(n, dim))
    # √(2 ln n / D) is the same to leading order: a tenth too large at n = D = 384
    if n >= 64:
        assert chance.match_mean(n, dim) == pytest.approx(math.sqrt(2 * math.log(n) / dim), rel=0.15)


@pytest.mark.parametrize(("n", "dim"), [(8, 8), (16, 16), (16, 64), (64, 64), (2, 20), (384, 384)])
def test_share_of_directions_without_a_match(n, dim):
    trials = 20000
    found = matches(n, dim, trials=trials, seed=6)
    for probability in (0.01, 0.1, 0.5, 0.9, 0.99):
        told = float(chance.match_below(np.quantile(found, probability), n, dim))
        # 3 % of it by the saddle point, and the error of an empirical quantile
        assert told == pytest.approx(
            probability, abs=0.03 * probability + ERRORS * math.sqrt(probability * (1 - probability) / trials)
        )


def test_share_without_a_match_in_closed_form():
    epsilon = np.linspace(0, 1, 201)
    for dim in (2, 3, 40):  # one vector: x² is Beta(½, (D − 1)/2)
        expected = stats.beta(0.5, (dim - 1) / 2).cdf(epsilon**2)
        assert np.allclose(chance.match_below(epsilon, 1, dim), expected, rtol=1e-9, atol=1e-14)
    # the circle: |cos| and |sin| both below ε leave the arcs between arccos ε and arcsin ε
    arcs = np.maximum(np.arcsin(epsilon) - np.arccos(epsilon), 0.0) / (np.pi / 2)
    assert np.allclose(chance.match_below(epsilon, 2, 2), arcs, atol=1e-12)
    # the sphere, every |x_i|² below ½ < ε²: six caps of height 1 − ε are cut off, 2π(1 − ε) of 4π each
    assert chance.match_below(0.8, 3, 3) == pytest.approx(1 - 6 * (1 - 0.8) / 2, rel=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (2, 3), (3, 3), (15, 16), (384, 384), (4096, 4096), (100, 14336)])
def test_share_without_a_match_is_a_law(n, dim):
    epsilon = np.linspace(-0.1, 1.1, 1201)
    found = chance.match_below(epsilon, n, dim)
    assert found[0] == 0.0
    assert found[-1] == 1.0
    assert np.all(np.diff(found) >= -1e-12)
    mean, _ = integrate.quad(lambda e: 1 - float(chance.match_below(e, n, dim)), 0, 1, points=[0.1, 0.3], limit=100)
    # 1 % is the saddle point's own error in dimension 3; the other mean is exact
    assert mean == pytest.approx(chance.match_mean(n, dim), rel=0.01 if dim < 100 else 1e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: chance.overlap_mean(0, 1, 4),
        lambda: chance.overlap_std(5, 1, 4),
        lambda: chance.overlap_pvalue(0.5, 1, 5, 4),
        lambda: chance.capture_mean(5, 4),
        lambda: chance.capture_both_mean(2, 5, (4, 4)),
        lambda: chance.cosine_std((0, 4)),
        lambda: chance.amplification_mean_square(5, 1.0, (4, 9)),
        lambda: chance.match_mean(5, 4),
        lambda: chance.match_below(0.5, 0, 4),
    ],
)
def test_refusals(call):
    with pytest.raises(ValueError, match=r"is not within 1…"):
        call()
