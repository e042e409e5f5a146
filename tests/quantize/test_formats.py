"""Code books: published values, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import norm

from spectra.errors import UsageError
from spectra.quantize.formats import FORMATS, FP4, INT4, INT8, NF4, Format, as_format
from spectra.quantize.rounding import boundaries, decode, encode, pack, unpack


def test_nf4_is_the_normal_distributions_quantiles():
    # QLoRA, appendix E, by its authors' offset: the mean of 1 − 1/30 and 1 − 1/32, halved about the middle.
    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    levels = np.concatenate(
        [norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), [0.0], -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])]
    )
    levels = np.sort(levels) / levels.max()
    # The published levels went through float32 quantiles: seven digits, less some where the tail is steep.
    np.testing.assert_allclose(NF4.levels, levels, atol=2e-6)


def test_fp4_and_integers():
    assert [FP4.levels[i] * 12 for i in range(8)] == [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    assert [x * 12 for x in FP4.levels[8:]] == [-0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]
    assert INT4.levels[:15] == tuple(k / 7 for k in range(-7, 8))
    assert INT8.levels[:255] == tuple(k / 127 for k in range(-127, 128))
    assert INT4.levels[15] == INT8.levels[255] == 1.0


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_encoding_is_the_nearest_level(format):
    """Against a search through every level, at random places and one step of float32 either side of every boundary."""
    bounds = boundaries(format)
    near = torch.cat([bounds, *(torch.nextafter(bounds, bounds.new_tensor(s * torch.inf)) for s in (-1, 1))])
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, -1.0000001])
    spread = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat([near, tiny, spread])
    levels = torch.tensor(format.levels)
    found = levels[encode(x, format).long()]
    order = torch.tensor(format.order)
    assert torch.equal(found, levels[order][torch.bucketize(x, bounds)])
    exact = (x.double()[:, None] - levels.double()).abs().amin(1)
    # A midpoint is rounded to float32: within its last bit either neighbour is as near.
    assert bool(((x.double() - found.double()).abs() - exact <= 2**-24).all())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_levels_survive_the_round_trip(format):
    levels = torch.tensor(format.levels)
    codes = encode(levels, format)
    assert torch.equal(levels[codes.long()], levels)
    packed = pack(codes, format.bits)
    assert packed.numel() * 8 == levels.numel() * format.bits
    assert torch.equal(unpack(packed, format.bits), codes)
    out = torch.empty_like(levels)
    decode(packed, format, out)
    assert torch.equal(out, levels)


def test_a_code_book_of_ones_own():
    levels = tuple(np.tanh(np.linspace(-2, 2, 16)) / np.tanh(2))
    mine = Format("mine", 4, levels[::-1])
    assert mine.order == tuple(range(15, -1, -1))
    assert as_format(mine) is mine
    assert torch.equal(encode(torch.tensor(levels, dtype=torch.float32), mine), torch.arange(15, -1, -1).byte())


def test_bad_formats_are_refused():
    with pytest.raises(UsageError, match=r"unknown format 'nf5'; known are nf4, fp4, int4, int8"):
        as_format("nf5")
    with pytest.raises(UsageError, match="15 levels for 4 bits"):
        dataclasses.replace(NF4, levels=NF4.levels[:15])
    with pytest.raises(UsageError, match="must fill a byte"):
        Format("odd", 3, (0.0,) * 8)
    with pytest.raises(UsageError, match="numbers in"):
        dataclasses.replace(NF4, levels=(*NF4.levels[:15], float("nan")))
    with pytest.raises(UsageError, match="'median' is none of absmax"):
        dataclasses.replace(NF4, scaling="median")
    with pytest.raises(UsageError, match="closer than"):
        encode(torch.ones(1), Format("dense", 8, tuple(0.9 + i * 1e-4 for i in range(256))))
