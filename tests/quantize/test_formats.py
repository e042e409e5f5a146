"""Code books: published values, their derivations, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import norm

from spectra.errors import UsageError
from spectra.quantize.formats import AF4, FORMATS, FP4, INT4, INT8, NF4, Format, as_format, normal_float


def test_nf4_is_the_normal_distributions_quantiles():
    # QLoRA, appendix E, by its authors' offset: the mean of 1 − 1/30 and 1 − 1/32, halved about the middle.
    offset = np.float32(0.5 * ((1 - 1 / 30) + (1 - 1 / 32)))
    levels = np.concatenate(
        [norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), [0.0], -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])]
    )
    levels = np.sort(levels) / levels.max()
    # Float32 probabilities, 6e-8 apart, where the quantile is as steep as 13 and is divided by 1.8.
    np.testing.assert_allclose(NF4.levels, levels, atol=5e-7)
    np.testing.assert_allclose(normal_float("nf4", 4).levels, NF4.levels, atol=5e-7)


@pytest.mark.parametrize(("name", "bits"), [("nf3", 3), ("nf2", 2)])
def test_shorter_normal_floats_are_quantiles_too(name, bits):
    """2^(bits−1) even steps of probability from zero to 1, one fewer from −1 to zero, from either end's half share."""
    levels, half = np.array(FORMATS[name].levels), 2 ** (bits - 1)
    assert levels[half - 1] == 0.0
    outermost = 0.5 * (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2))
    probabilities = norm.cdf(levels * norm.isf(outermost))
    steps = np.diff(probabilities)
    np.testing.assert_allclose(steps[: half - 1], (0.5 - outermost) / (half - 1), atol=1e-6)  # levels are float32
    np.testing.assert_allclose(steps[half - 1 :], (0.5 - outermost) / half, atol=1e-6)


def cell_medians(free: int) -> np.ndarray:
    """Levels from 0 to 1 that are medians of their cells, the first beginning at 0, of normals over the largest of 64.

    Given the largest, m, another entry is a normal cut off at ±m; m has the density of the largest of 64.
    """
    m = np.linspace(0.5, 7, 400)
    inside = 2 * norm.cdf(m) - 1
    density = inside**63 * norm.pdf(m)
    x = np.linspace(0, 1, 513)
    share = ((2 * norm.cdf(np.outer(x, m)) - 1) / inside) @ (density / density.sum())
    levels = np.linspace(0, 1, free + 2)
    for _ in range(600):
        edges = np.interp((levels[:-1] + levels[1:]) / 2, x, share)
        edges[0] = 0.0
        levels[1:-1] = np.interp((edges[:-1] + edges[1:]) / 2, share, x)
    return levels


def test_af4_is_the_medians_of_cells():
    # Straight lines between 513 points of the distribution, curved by less than 2: off by 2/513²/8·(a dozen steps).
    np.testing.assert_allclose(AF4.levels[7:], cell_medians(7), atol=2e-5)
    np.testing.assert_allclose(AF4.levels[7::-1], -cell_medians(6), atol=2e-5)


def test_fp4_and_integers():
    assert [FP4.levels[i] * 12 for i in range(8)] == [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    assert [x * 12 for x in FP4.levels[8:]] == [-0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]
    assert INT4.levels[:15] == tuple(k / 7 for k in range(-7, 8))
    assert INT8.levels[:255] == tuple(k / 127 for k in range(-127, 128))
    assert INT4.levels[15] == INT8.levels[255] == 1.0


def test_what_is_known_by_name():
    widths = range(2, 9)
    named = ["nf4", "nf3", "nf2", "fp4", "af4", *(f"int{b}" for b in widths), *(f"int{b}-affine" for b in widths)]
    assert list(FORMATS) == [*named, "lloyd2", "lloyd3", "lloyd4"]
    for name, format in FORMATS.items():
        assert format.name == name
        assert format.affine == name.endswith("affine")
        assert format.fitted == name.startswith("lloyd")
        assert str(format.bits) in name
        if not format.fitted:
            assert max(format.levels) == 1.0
            assert min(format.levels) == (0.0 if format.affine else -1.0)
            assert format.affine or 0.0 in format.levels


def test_a_code_book_of_ones_own():
    levels = tuple(np.tanh(np.linspace(-2, 2, 16)) / np.tanh(2))
    mine = Format("mine", 4, levels[::-1])
    assert mine.order == tuple(range(15, -1, -1))
    assert as_format(mine) is mine


def test_bad_formats_are_refused():
    with pytest.raises(UsageError, match=r"unknown format 'nf5'; known are nf4, nf3, nf2, fp4, af4, int2, .*, lloyd4"):
        as_format("nf5")
    with pytest.raises(UsageError, match="15 levels for 4 bits"):
        dataclasses.replace(NF4, levels=NF4.levels[:15])
    with pytest.raises(UsageError, match="9 bits a code; codes take 2 to 8"):
        Format("odd", 9, (0.0,) * 512)
    with pytest.raises(UsageError, match=r"numbers in \[−1, 1\]"):
        dataclasses.replace(NF4, levels=(*NF4.levels[:15], float("nan")))
    with pytest.raises(UsageError, match=r"numbers in \[0, 1\]"):
        dataclasses.replace(NF4, scaling="affine")
    with pytest.raises(UsageError, match="'median' is none of absmax, affine"):
        dataclasses.replace(NF4, scaling="median")
