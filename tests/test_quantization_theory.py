"""Quantization theory against closed forms, published tables, quadrature and simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from spectra.quantize import FORMATS
from spectra.theory import noise
from spectra.theory.quantization import (
    best_rank_share,
    gaussian_block_mse,
    lloyd_max,
    marchenko_pastur_tail,
    rate_distortion,
)


@pytest.mark.parametrize(("name", "mse"), [("nf4", 0.00846), ("fp4", 0.01487), ("int4", 0.01158)])
def test_gaussian_weights_in_blocks_of_64(name, mse):
    assert gaussian_block_mse(FORMATS[name].levels, 64) == pytest.approx(mse, abs=5e-6)  # its last digit


@pytest.mark.parametrize("block", [1, 2, 64, 4096, 10**6])
def test_rounding_all_to_zero_loses_all(block):
    assert gaussian_block_mse([0.0], block) == pytest.approx(1.0, rel=1e-12)


def test_blocks_with_a_closed_form():
    """One entry: its scale is itself. Two entries, levels ±1: the smaller is taken for the larger, 1 − E|w|E|v|."""
    assert gaussian_block_mse([0.25], 1) == pytest.approx(1.0 + 0.25**2, rel=1e-12)
    assert gaussian_block_mse([-1.0, 0.3, 1.0], 1) == 0.0
    assert gaussian_block_mse([1.0, -1.0], 2) == pytest.approx(1.0 - 2.0 / math.pi, rel=1e-12)


@pytest.mark.parametrize(("levels", "block"), [((-0.8, -0.1, 0.5), 3), ((-1.0, 0.2, 0.9), 16)])
def test_any_levels_against_simulation(levels, block):
    w = np.random.default_rng(0).standard_normal((50_000, block))
    largest = np.abs(w).max(axis=1, keepdims=True)
    book = np.array(levels)
    nearest = book[np.abs((w / largest)[..., None] - book).argmin(axis=-1)]
    errors = ((w - largest * nearest) ** 2).mean(axis=1)
    # Five standard errors of the mean of independent blocks.
    assert gaussian_block_mse(levels, block) == pytest.approx(
        float(errors.mean()), abs=5.0 * float(errors.std()) / math.sqrt(len(w))
    )


def test_larger_blocks_cost_more():
    found = [gaussian_block_mse(FORMATS["nf4"].levels, block) for block in (16, 64, 256, 4096)]
    assert found == sorted(found)
    assert found[0] > rate_distortion(4.0)


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_max_1960(bits, mse):
    found = lloyd_max(bits)
    assert len(found.levels) == 2**bits
    assert found.mse == pytest.approx(mse, rel=5e-4)  # his fourth digit is off by four at 4 bits


@pytest.mark.parametrize("bits", [1.6, 3, 4.127])
def test_levels_are_means_of_their_cells(bits):
    levels = lloyd_max(bits).levels
    assert len(levels) == math.floor(2**bits)
    ends = [-12.0, *(np.array(levels[1:]) + np.array(levels[:-1])) / 2.0, 12.0]
    total = 0.0
    for level, low, high in zip(levels, ends[:-1], ends[1:], strict=True):
        mass, moment, square = (
            integrate.quad(lambda x, k=k: x**k * stats.norm.pdf(x), low, high, epsabs=1e-13)[0] for k in range(3)
        )
        assert level == pytest.approx(moment / mass, abs=1e-9)  # ten digits under quad's own error
        total += square - 2.0 * level * moment + level**2 * mass
    assert lloyd_max(bits).mse == pytest.approx(total, rel=1e-9)


def test_many_levels_follow_panter_and_dite():
    # The law is asymptotic: its relative error falls about as 1/levels; 1.1 % at 256.
    assert lloyd_max(8).mse == pytest.approx(math.sqrt(3.0) * math.pi / 2.0 * 2.0**-16, rel=0.02)
    assert lloyd_max(10).mse == pytest.approx(math.sqrt(3.0) * math.pi / 2.0 * 2.0**-20, rel=0.005)


def test_no_scalar_code_passes_shannon():
    assert rate_distortion(4.127) == pytest.approx(0.00328, abs=5e-6)
    assert rate_distortion(0.0) == lloyd_max(0).mse == 1.0
    for bits in (1, 2.5, 4, 7):
        assert lloyd_max(bits).mse > rate_distortion(bits)


@pytest.mark.parametrize("beta", [1.0, 0.999, 0.4, 1e-3])
def test_tail_against_quadrature(beta):
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(x):
        return math.sqrt(max((high - x) * (x - low), 0.0)) / (2.0 * math.pi * beta * x)

    for part in (0.15, 0.5, 0.9):
        x = low + part * (high - low)
        mass, share = marchenko_pastur_tail(x, beta)
        assert float(mass) == pytest.approx(noise._mp_mass_above(x, beta), abs=1e-10)
        energy = integrate.quad(lambda at: at * density(at), x, high, epsabs=1e-12)[0]
        assert float(share) == pytest.approx(energy, abs=1e-8)  # quad at a square root's end
    below, above = marchenko_pastur_tail(np.array([0.0, high + 1.0]), beta)
    np.testing.assert_allclose(below, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(above, [1.0, 0.0], atol=1e-12)


def test_rank_64_of_wide_and_narrow_models():
    assert best_rank_share(1.0, 64 / 4096) == pytest.approx(0.058, abs=5e-4)
    assert best_rank_share(1.0, 64 / 384) == pytest.approx(0.47, abs=5e-3)


@pytest.mark.parametrize("shape", [(200, 200), (150, 600)])
def test_shares_of_random_matrices(shape):
    draw = np.random.default_rng(1)
    # Uniform entries, as rounding errors are nearly: the law does not depend on theirs.
    squares = np.linalg.svd(draw.uniform(-1.0, 1.0, (4, *shape)), compute_uv=False) ** 2
    found = np.cumsum(squares, axis=1).mean(axis=0) / squares.sum(axis=1).mean()
    for rank in (4, 20, 100):
        # Shares of one matrix fluctuate by 1/p of themselves, and their mean is off by as much.
        assert best_rank_share(shape[0] / shape[1], rank / shape[0]) == pytest.approx(found[rank - 1], rel=0.02)


def test_ends_of_the_share():
    assert [best_rank_share(0.3, fraction) for fraction in (0.0, 1.0)] == [0.0, 1.0]
    assert best_rank_share(1e-8, 0.25) == pytest.approx(0.25, rel=1e-3)  # a very long matrix: all values are equal


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_block_mse([], 64),
        lambda: gaussian_block_mse([1.5], 64),
        lambda: gaussian_block_mse([math.nan], 64),
        lambda: gaussian_block_mse([1.0], 0),
        lambda: lloyd_max(10.5),
        lambda: lloyd_max(-1),
        lambda: rate_distortion(-0.1),
        lambda: rate_distortion(math.nan),
        lambda: best_rank_share(0.0, 0.5),
        lambda: best_rank_share(0.5, 1.01),
        lambda: marchenko_pastur_tail(1.0, 1.5),
    ],
)
def test_refuses(call):
    with pytest.raises(ValueError, match=r"outside|negative|levels|block|fraction"):
        call()
