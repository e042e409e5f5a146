"""`quantize`: error as theory has it, bits counted, blocks that do not divide, degenerate and bad blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.quantize import FORMATS, QuantizedTensor, kernels, quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return normal(4096, 1024)


@pytest.mark.parametrize(
    ("format", "published"), [("nf4", 0.00846), ("fp4", 0.01487), ("int4", 0.01158), ("lloyd4", 0.00763)]
)
def test_error_on_gaussian_weights(gaussian, format, published):
    error = gaussian - quantize(gaussian, format, scales="fp32").dequantize()
    # 65536 blocks: the mean of their errors has a standard error of 0.1 %; the figures are rounded to 0.07 %.
    assert float(error.square().mean() / gaussian.square().mean()) == pytest.approx(published, rel=0.01)


def test_int8_error_is_the_steps_variance():
    w = normal(512, 512)
    q = quantize(w, "int8", double=False)
    step = q.scales.values().double() / 127
    error = (w - q.dequantize()).double().view(-1, 64)
    # Rounding to a step s leaves s²/12; 262144 entries settle the ratio to 0.2 %.
    assert float((error.square().mean(1) / step.square()).mean()) == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scales", ["double", "fp32", "bf16"])
def test_bits_are_what_is_held(format, scales):
    q = quantize(normal(64, 1536), format, scales=scales)
    held = [q.codes, *q.scales.tensors().values()] + ([q.book] if q.format.fitted else [])
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in held)
    a_scale = {"double": 8 / 64 + 32 / (64 * 256) + 32 / (64 * 1536), "fp32": 32 / 64, "bf16": 16 / 64}[scales]
    book = 32 * 2**q.format.bits / (64 * 1536) if q.format.fitted else 0
    assert q.bits_per_weight == pytest.approx(q.format.bits + a_scale * (2 if q.format.affine else 1) + book)


def reach(q: QuantizedTensor) -> float:
    """How far from its levels a scaled entry can lie: half of the widest gap, or past the outermost level."""
    levels = q.levels.sort().values.double()
    if q.format.affine:
        return float(levels.diff().max()) / 2
    largest = 1 + 2**-8 if q.scales.tensors()["absmax"].dtype == torch.bfloat16 else 1.0
    return max(float(levels.diff().max()) / 2, largest - float(levels[-1]), largest + float(levels[0]))


def by_entry(q: QuantizedTensor, values: torch.Tensor) -> torch.Tensor:
    """A block's number at each of its entries."""
    return values.double().repeat_interleave(q.block)[: q.count].view(q.shape)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scales", ["double", "fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "block"), [((7, 11), 64), ((5, 13), 5), ((1, 1), 64), ((), None), ((3, 100), 7), ((33, 129), 64)]
)
def test_blocks_that_do_not_divide(format, scales, shape, block):
    w = normal(*shape)
    q = quantize(w, format, block=block, scales=scales)
    blocks = -(-w.numel() // q.block)
    assert len(q.codes) == -(-w.numel() * q.format.bits // 8)
    assert len(q.scales.values()) == blocks
    off = (q.dequantize() - w).double().abs()
    if scales == "double":
        # The dynamic map's widest half gap is 0.9/64/2 of its range, in the scale and, where there is one, the minimum
        # that the scale is reckoned from, of which neither spreads over more than twice the largest span.
        spread = 2 * float(w.max() - w.min() if q.format.affine else w.abs().max())
        assert bool((off <= by_entry(q, q.scales.values()).abs() * reach(q) + 3 * 0.9 / 128 * spread + 1e-6).all())
    else:
        # A scaled entry, its level and what comes of both are float32: some roundings of 2⁻²⁴ each.
        assert bool((off <= by_entry(q, q.scales.values()) * (reach(q) + 1e-6) + 1e-6 * w.abs()).all())
    last = w.flatten()[(blocks - 1) * q.block :]
    if scales == "fp32" and not q.format.affine:
        assert float(q.scales.values()[-1]) == float(last.abs().max())


def test_a_scale_for_every_row():
    w = normal(3, 5, 24)
    rows = quantize(w, "int8", block=None, scales="fp32")
    assert torch.equal(rows.scales.values(), w.abs().amax(-1).flatten())
    assert torch.equal(rows.codes, quantize(w, "int8", block=24, scales="fp32").codes)
    assert quantize(torch.tensor(-3.0), "nf4", block=None, scales="fp32").dequantize().item() == -3.0


@pytest.mark.parametrize("format", ["nf4", "int3", "int5-affine"])
@pytest.mark.parametrize("block", [7, 64, 300_000])
def test_long_tensors_are_worked_in_pieces_that_do_not_show(format, block):
    w = normal(600_001)
    q = quantize(w, format, block=block, double=False)
    whole = q.dequantize(backend="torch")
    assert torch.equal(q.dequantize(torch.bfloat16, backend="torch"), whole.bfloat16())
    for start in (0, 250_000 // block * block, 550_000 // block * block):
        piece = w[start : start + 2 * block]
        expected = quantize(piece, format, block=block, double=False).dequantize(backend="torch")
        assert torch.equal(whole[start : start + 2 * block], expected)


@pytest.mark.parametrize("format", [name for name in FORMATS if not FORMATS[name].fitted])
@pytest.mark.parametrize("scales", ["double", "fp32", "bf16"])
def test_zero_and_constant_blocks(format, scales):
    w = torch.zeros(4, 64)
    assert torch.equal(quantize(w, format, scales=scales).dequantize(), w)
    w[1], w[2] = 3.0, -0.25
    back = quantize(w, format, scales=scales).dequantize()
    if scales != "double":
        assert torch.equal(back, w)  # ±1 are levels of every absmax format, and a span of 0 leaves the minimum
    elif not FORMATS[format].affine:
        assert bool((back[[0, 3]] == 0).all())
    equal = torch.full((4, 64), 3.0)
    assert torch.equal(quantize(equal, format, scales=scales).dequantize(), equal)  # equal scales: their mean is each


@pytest.mark.parametrize("format", [name for name in FORMATS if not FORMATS[name].fitted])
@pytest.mark.parametrize("scales", ["fp32", "bf16"])
def test_quantizing_again_changes_nothing(format, scales):
    """Where scales can be stored as they are: least and largest entries are bfloat16 here, and so are their spans."""
    w = (normal(40, 64) * 8).round().clamp(-31, 31) / 8
    w[:, 0], w[:, 1] = -4.0, 4.0
    once = quantize(w, format, scales=scales).dequantize()
    again = quantize(once, format, scales=scales)
    assert torch.equal(again.dequantize(), once)


def test_extreme_scales():
    for scale in (3e38, 1e-30):
        w = normal(2, 64).clamp(-1, 1) * scale
        q = quantize(w, "nf4", double=False)
        assert float((q.dequantize() - w).abs().max()) <= 0.16 * float(w.abs().max())  # half of NF4's widest gap
    with pytest.raises(UsageError, match="spans more than float32 holds"):
        quantize(torch.tensor([-3e38, 3e38]), "int4-affine")
    top = torch.tensor([3.4e38, -1e38])  # beyond bfloat16's largest number, which then is the scale
    assert bool(quantize(top, "int4", scales="bf16").dequantize().isfinite().all())
    denormal = torch.full((2, 64), 1e-40)
    back = quantize(denormal, "nf4", double=False).dequantize()
    assert bool((back.abs() <= denormal).all())  # below the least scale: towards zero, never NaN


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 77])
def test_nonfinite_entries_are_refused(bad, place):
    w = normal(1, 78).flatten()
    w[place] = bad
    for format in ("nf4", "int4-affine", "lloyd4"):
        with pytest.raises(NonFiniteMatrix, match="1 of 78 entries"):
            quantize(w, format)
    with pytest.raises(NonFiniteMatrix, match="beyond float32"):
        quantize(torch.full((64,), 1e300, dtype=torch.float64))


def test_bad_arguments():
    with pytest.raises(UsageError, match="known are nf4"):
        quantize(torch.ones(64), "q4_k")
    with pytest.raises(UsageError, match="empty tensor"):
        quantize(torch.ones(0, 64))
    with pytest.raises(UsageError, match="at least one"):
        quantize(torch.ones(64), block=0)
    with pytest.raises(UsageError, match="unknown storage of scales 'fp8'; known are double, fp32, bf16"):
        quantize(torch.ones(64), scales="fp8")
    with pytest.raises(UsageError, match="needs a minimum beside each scale"):
        dataclasses.replace(quantize(torch.ones(64), "int4"), format=FORMATS["int4-affine"])
    with pytest.raises(UsageError, match="has no minima"):
        dataclasses.replace(quantize(torch.ones(64), "int4-affine"), format=FORMATS["int4"])
    with pytest.raises(UsageError, match="needs its fitted levels"):
        dataclasses.replace(quantize(torch.ones(64), "int4"), format=FORMATS["lloyd4"])
    with pytest.raises(UsageError, match="no fitted ones"):
        dataclasses.replace(quantize(torch.ones(64), "lloyd4"), format=FORMATS["int4"])
    with pytest.raises(UsageError, match=r"torch\.int64"):
        quantize(torch.ones(64, dtype=torch.int64))
    with pytest.raises(UsageError, match="it knows nf4 and fp4, not int8"):
        quantize(torch.ones(64), "int8").dequantize(backend="bitsandbytes")


def test_works_without_bitsandbytes(monkeypatch):
    q = quantize(normal(8, 64))
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert torch.equal(q.dequantize(), q.dequantize(backend="torch"))
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        q.dequantize(backend="bitsandbytes")


def test_dtypes_and_layout():
    w = normal(48, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        q = quantize(w.to(dtype))
        assert q.dtype == q.dequantize().dtype == dtype
    transposed = w.t()
    assert torch.equal(quantize(transposed).dequantize(), quantize(transposed.contiguous()).dequantize())
    before = w.clone()
    quantize(w)
    assert torch.equal(w, before)
    assert not quantize(w.requires_grad_()).dequantize().requires_grad
    assert repr(quantize(w)).startswith("QuantizedTensor(nf4, 48 × 64, 4.1")


def test_every_stored_tensor_is_mapped():
    for format in ("nf4", "int3-affine", "lloyd2"):
        q = quantize(normal(4, 64), format)
        copy = q.map(torch.clone)
        q.map(torch.Tensor.zero_)
        assert float(copy.dequantize().abs().max()) > 1.0
        assert float(q.dequantize().abs().max()) == 0.0


def test_threads_do_not_show():
    w = normal(700, 640)
    answers, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            q = quantize(w, "fp4", double=False)
            with torch.inference_mode():
                assert torch.equal(quantize(w, "fp4", double=False).codes, q.codes)
            answers.append((q.codes, q.scales.values(), q.dequantize(backend="torch")))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert all(torch.equal(one, other) for one, other in zip(answers[0], answer, strict=True))
