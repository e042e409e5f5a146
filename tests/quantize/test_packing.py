"""Packing: the bits as they are said to lie, at every width, whole bytes or not."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spectra.quantize.packing import joined, pack, packed_bytes, unpack


@st.composite
def codes_of_a_width(draw):
    bits = draw(st.integers(2, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))


@settings(max_examples=200, deadline=None)
@given(codes_of_a_width())
def test_packing_is_a_stream_of_bits_and_comes_back(case):
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    stream = "".join(f"{code:0{bits}b}" for code in codes)
    stream += "0" * (-len(stream) % 8)
    assert packed.tolist() == [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]
    assert len(packed) == packed_bytes(len(codes), bits)
    assert unpack(packed, bits)[: len(codes)].tolist() == codes
    assert len(unpack(packed, bits)) == 8 * len(packed) // bits


@pytest.mark.parametrize(("bits", "together"), [(2, 4), (3, 4), (5, 2), (6, 2), (7, 2)])
def test_runs_of_codes_are_one_number(bits, together):
    codes = torch.randint(0, 2**bits, (24, together), generator=torch.Generator().manual_seed(0))
    expected = (codes << bits * torch.arange(together - 1, -1, -1)).sum(1)
    assert joined(pack(codes.flatten().byte(), bits), bits, together).tolist() == expected.tolist()


def test_packed_bytes_may_lie_anywhere():
    """A view that begins at an odd byte, as a slice of a file does."""
    packed = torch.arange(1, 14, dtype=torch.uint8)
    for bits in range(2, 9):
        assert torch.equal(unpack(packed[1:], bits), unpack(packed[1:].clone(), bits))
