"""Rounding to the nearest level and looking levels up, by table and by search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.errors import UsageError
from spectra.quantize.formats import FORMATS, INT8, Format
from spectra.quantize.packing import pack, packed_bytes, unpack
from spectra.quantize.rounding import boundaries, decode, encode

BOOKS = {name: format for name, format in FORMATS.items() if not format.fitted}


def places(bounds: torch.Tensor) -> torch.Tensor:
    """Random places, and one step of float32 either side of every boundary."""
    near = torch.cat([bounds, *(torch.nextafter(bounds, bounds.new_tensor(s * torch.inf)) for s in (-1, 1))])
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, -1.0000001, torch.inf, -torch.inf])
    return torch.cat([near, tiny, torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1])


@pytest.mark.parametrize("format", BOOKS.values(), ids=BOOKS)
def test_encoding_is_the_nearest_level(format):
    """Against a search through every level."""
    bounds = boundaries(format)
    x = places(bounds)
    levels = torch.tensor(format.levels)
    found = levels[encode(x, format).long()]
    order = torch.tensor(format.order)
    assert torch.equal(found, levels[order][torch.bucketize(x, bounds)])
    x, found = x[x.isfinite()].double(), found[x.isfinite()].double()
    exact = (x[:, None] - levels.double()).abs().amin(1)
    # A midpoint is rounded to float32: within its last bit either neighbour is as near.
    assert bool(((x - found).abs() - exact <= 2**-24).all())


@pytest.mark.parametrize("step", [0.1, 1e-4])
def test_fitted_levels_are_found_by_table_or_by_search(step):
    """Levels a ten-thousandth apart share cells, so that there is no table; the answer is the same."""
    book = 0.5 + step * torch.tensor([-3.0, -2.0, 0.5, 1.0])
    bounds = (book[:-1] + book[1:]) / 2
    x = places(bounds)
    assert encode(x, FORMATS["lloyd2"], book).tolist() == torch.bucketize(x, bounds).tolist()


@pytest.mark.parametrize("format", BOOKS.values(), ids=BOOKS)
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_levels_survive_the_round_trip(format, spare):
    levels = torch.tensor(format.levels)[spare:]
    codes = encode(levels, format)
    assert torch.equal(torch.tensor(format.levels)[codes.long()], levels)
    packed = pack(codes, format.bits)
    assert len(packed) == packed_bytes(len(levels), format.bits)
    assert torch.equal(unpack(packed, format.bits)[: len(codes)], codes)
    out = torch.full((len(levels) + 1,), torch.nan)
    decode(packed, format, out[:-1])
    assert torch.equal(out[:-1], levels)
    assert bool(out[-1].isnan())


def test_descending_levels_keep_their_codes():
    levels = torch.from_numpy(np.tanh(np.linspace(-2, 2, 16)) / np.tanh(2)).float()
    mine = Format("mine", 4, tuple(levels.flip(0).tolist()))
    assert torch.equal(encode(levels, mine), torch.arange(15, -1, -1).byte())


def test_levels_that_share_a_cell_are_refused():
    with pytest.raises(UsageError, match="closer than"):
        encode(torch.ones(1), Format("dense", 8, tuple(0.9 + i * 1e-4 for i in range(256))))
    assert encode(torch.ones(1), INT8).item() in (254, 255)
