"""`Scheme`: names that parse back, and names that say nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from spectra.errors import UsageError
from spectra.quantize import FORMATS, NF4, Scheme, quantize


@pytest.mark.parametrize("format", FORMATS)
def test_names_parse_back(format):
    for block, scales in itertools.product((1, 64, 100, None), ("double", "fp32", "bf16")):
        scheme = Scheme(FORMATS[format], block, scales)
        assert Scheme.parse(scheme.name) == scheme
        assert str(scheme) == scheme.name
        assert Scheme.parse(f"{format}/{'row' if block is None else block}/{scales}") == scheme


@pytest.mark.parametrize(
    ("text", "name"),
    [("nf4/64/double", "nf4"), (" nf4 ", "nf4"), ("int4/128", "int4/128"), ("nf4/64/bf16", "nf4/64/bf16")],
)
def test_the_shortest_name(text, name):
    assert Scheme.parse(text).name == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nf5", "unknown format 'nf5'; known are nf4, nf3"),
        ("", "unknown format ''"),
        ("nf4/0", "'0' is neither a number of entries nor row"),
        ("nf4/-64", "'-64' is neither"),
        ("nf4/²", "'²' is neither"),
        ("nf4/bf16", "'bf16' is neither.*FORMAT/BLOCK/SCALES"),
        ("nf4/64/fp8", "unknown storage of scales 'fp8'; known are double, fp32, bf16"),
        ("nf4/64/", "unknown storage of scales ''"),
        ("nf4/64/fp32/x", "has 4 parts"),
    ],
)
def test_names_that_say_nothing(text, told):
    with pytest.raises(UsageError, match=told):
        Scheme.parse(text)


def test_fields_out_of_range():
    with pytest.raises(UsageError, match="block of 0 entries"):
        Scheme(NF4, 0)
    with pytest.raises(UsageError, match="'fp8'"):
        Scheme(NF4, 64, "fp8")


def test_quantizes_as_it_says():
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    q = Scheme.parse("int5-affine/row/bf16").quantize(w)
    other = quantize(w, "int5-affine", block=None, scales="bf16")
    assert (q.format.name, q.block, q.shape, q.nbytes) == ("int5-affine", 40, (6, 40), other.nbytes)
    assert torch.equal(q.dequantize(), other.dequantize())
