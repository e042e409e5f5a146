"""Stored scales: how far each storage may be off, and that what is stored comes back whole."""

from __future__ import annotations

import pytest
import torch

from spectra.quantize import quantize
from spectra.quantize.scales import AffineScales, from_tensors, store, store_affine


def spread(count: int, *, seed: int = 0) -> torch.Tensor:
    """Numbers of every size that float32 has, both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(-40, 38, (count,), generator=generator)


def test_float32_is_kept_and_bfloat16_is_the_nearest():
    scales = spread(5000).abs()
    assert torch.equal(store(scales, "fp32").values(), scales)
    kept = store(scales, "bf16")
    assert kept.absmax.dtype == torch.bfloat16
    assert kept.nbytes == 2 * 5000
    assert torch.equal(kept.values(), scales.bfloat16().float())
    assert store(torch.tensor([3.4e38]), "bf16").values().item() == torch.finfo(torch.bfloat16).max


def test_double_quantization_is_off_by_half_a_gap_of_the_dynamic_map():
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    kept = store(scales, "double")
    largest = kept.nested_absmax.repeat_interleave(256)[:1000]
    # 0.9/64/2 of the block's largest, and one of 65536 steps on the way.
    assert bool(((kept.values() - scales).abs() <= (0.9 / 128 + 2**-15) * largest).all())
    assert kept.nbytes == 1000 + 4 * 4 + 4


def test_bfloat16_minima_and_spans_hold_every_block():
    low, more = spread(5000), spread(5000, seed=1).abs()
    high = torch.maximum(low + more, low)
    kept = store_affine(low, high, "bf16")
    assert bool((kept.minima() <= low).all())
    # A minimum is down by less than one of 2⁷ steps an octave; so is a span up.
    assert bool(((low - kept.minima()).double() <= low.double().abs() * 2**-7 + 1e-40).all())
    needed = (high - kept.minima()).double()
    assert bool((kept.values().double() >= needed).all())
    assert bool((kept.values().double() <= needed * (1 + 2**-7) + 1e-40).all())


@pytest.mark.parametrize("storage", ["double", "fp32", "bf16"])
def test_affine_scales_count_both_and_are_never_negative(storage):
    low = -torch.rand(300, generator=torch.Generator().manual_seed(0))
    high = torch.where(torch.arange(300) % 3 == 0, low, -low)
    kept = store_affine(low, high, storage)
    assert kept.nbytes == sum(t.nbytes for t in kept.tensors().values()) == kept.span.nbytes + kept.minimum.nbytes
    assert bool((kept.values() >= 0.0).all())


@pytest.mark.parametrize("storage", ["double", "fp32", "bf16"])
def test_scales_come_back_from_what_is_stored(storage):
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    for kept in (store(values, storage), store_affine(-values, values, storage)):
        again = from_tensors({"codes": torch.zeros(1), **kept.map(torch.clone).tensors()})
        assert type(again) is type(kept)
        assert torch.equal(again.values(), kept.values())
        if isinstance(kept, AffineScales):
            assert torch.equal(again.minima(), kept.minima())


@pytest.mark.parametrize("size", [3e37, 1e-39, 1e-42])
def test_enormous_and_tiny_scales(size: float) -> None:
    """Their sum overflows float32, or their inverse does: quantized scales stay finite, and no code is out of range."""
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size
    found = quantize(weights, "nf4").dequantize()
    assert bool(torch.isfinite(found).all())
    if size > 1.0:
        assert float((found / size - weights / size).norm()) < 0.15 * float((weights / size).norm())


def test_no_half_is_infinite() -> None:
    """Levels past the largest half, which a quantized scale may reach, stay the largest half."""
    weights = torch.linspace(-65504.0, 65504.0, 64 * 64).view(64, 64).half()
    assert bool(torch.isfinite(quantize(weights, "int4-affine").dequantize()).all())
