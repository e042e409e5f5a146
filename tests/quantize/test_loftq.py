"""LoftQ's alternation: what it reaches, that more steps never give less, and that its factors are divided."""

import math

import pytest
import torch

from spectra.errors import UsageError
from spectra.quantize import loftq, quantize
from spectra.quantize.scheme import Scheme


def distance(weight, quantized, a, b, scale):
    return float(torch.linalg.norm(weight.double() - quantized.dequantize().double() - scale * b.double() @ a.double()))


def alternated(weight, rank, scheme, steps):
    """Distances of the alternation by itself, each step by a plain SVD."""
    low_rank, found = torch.zeros_like(weight), []
    for _ in range(steps):
        error = weight - scheme.quantize(weight - low_rank).dequantize()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found.append(float(torch.linalg.norm(error - low_rank)))
    return found


@pytest.mark.parametrize("name", ["nf4", "nf2", "int2/32"])
def test_the_nearest_of_all_steps(name):
    weight, scheme = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), Scheme.parse(name)
    steps = alternated(weight, 8, scheme, 6)
    for count in (1, 2, 6):
        found = distance(weight, *loftq(weight, 8, scale=2.0, scheme=scheme, iterations=count), 2.0)
        # Float32 steps round a few entries that lie between two levels otherwise.
        assert found == pytest.approx(min(steps[:count]), rel=2e-3)


def test_a_step_may_lead_away():
    """Otherwise the last step would be as good as the nearest, and the test above would hold for it as well."""
    weight, scheme = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), Scheme.parse("int2/32")
    steps = alternated(weight, 8, scheme, 6)
    assert steps[-1] > 1.01 * min(steps)


@pytest.mark.parametrize("rank", [4, 16])
def test_undivided_factors_gain_nothing_at_twice_the_rank(rank):
    """α = 2r makes γ = 2: W − Q − 2L is as far from 0 as W − Q; with L/2 in the factors the gain is that of L."""
    weight, scale = torch.randn(96, 128, generator=torch.Generator().manual_seed(4)), 2.0
    plain = float(torch.linalg.norm(weight - quantize(weight).dequantize()))
    undivided = distance(weight, *loftq(weight, rank, scale=1.0), scale)
    divided = distance(weight, *loftq(weight, rank, scale=scale), scale)
    assert undivided == pytest.approx(plain, rel=1e-5)  # float32 factors
    held = torch.linalg.svdvals((weight - quantize(weight).dequantize()).double())[:rank].square().sum()
    assert divided == pytest.approx(math.sqrt(plain**2 - float(held)), rel=1e-5)


def test_a_weight_in_half_precision_keeps_its_dtype():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    quantized, a, b = loftq(weight, 4, scale=1.0, iterations=2)
    assert quantized.dtype == torch.bfloat16
    assert a.dtype == b.dtype == torch.float32


def test_zeros_have_factors_of_zeros():
    quantized, a, b = loftq(torch.zeros(16, 64), 2, scale=2.0, iterations=2)
    assert not quantized.dequantize().any()
    assert not a.any()
    assert not b.any()


def test_refuses():
    weight = torch.randn(8, 64)
    with pytest.raises(UsageError, match="iteration, not 0"):
        loftq(weight, 2, scale=1.0, iterations=0)
    with pytest.raises(UsageError, match="unknown format"):
        loftq(weight, 2, scale=1.0, scheme="nf5")
    with pytest.raises(UsageError, match="at least that rank"):
        loftq(weight[0], 1, scale=1.0)
