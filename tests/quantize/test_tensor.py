"""`quantize`: error as theory has it, bits counted, blocks that do not divide, degenerate and bad blocks."""

from __future__ import annotations

import pytest
import torch

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.quantize import FORMATS, kernels, quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("format", "published"), [("nf4", 0.00846), ("fp4", 0.01487), ("int4", 0.01158)])
def test_error_on_gaussian_weights(format, published):
    w = normal(1024, 1024)
    error = w - quantize(w, format, double=False).dequantize()
    # 16384 blocks: the mean of their errors has a standard error of 0.2 %; the figures are rounded to 0.06 %.
    assert float(error.square().mean() / w.square().mean()) == pytest.approx(published, rel=0.01)


def test_int8_error_is_the_steps_variance():
    w = normal(512, 512)
    q = quantize(w, "int8", double=False)
    step = q.scales.values().double() / 127
    error = (w - q.dequantize()).double().view(-1, 64)
    # Rounding to a step s leaves s²/12; 262144 entries settle the ratio to 0.2 %.
    assert float((error.square().mean(1) / step.square()).mean()) == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double", [False, True])
def test_bits_are_what_is_held(format, double):
    q = quantize(normal(384, 1536), format, double=double)
    held = [q.codes, *q.scales.tensors().values()]
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in held)
    scales = 8 / 64 + 32 / (64 * 256) + 32 / (384 * 1536) if double else 32 / 64
    assert q.bits_per_weight == pytest.approx(q.format.bits + scales)
    if double and q.format.bits == 4:
        assert q.bits_per_weight <= 4.13


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"), [((7, 11), 64), ((5, 13), 5), ((1, 1), 64), ((3, 100), 7), ((64, 129), 64)]
)
def test_blocks_that_do_not_divide(format, double, shape, block):
    w = normal(*shape)
    q = quantize(w, format, block=block, double=double)
    count, blocks = w.numel(), -(-w.numel() // block)
    assert len(q.codes) == -(-count * q.format.bits // 8)
    assert len(q.scales.values()) == blocks
    levels = torch.tensor(q.format.levels)
    widest = float(levels.sort().values.diff().max()) / 2
    # Entries are off by half the widest gap at most, and by what their scale is: the dynamic map's widest half gap is
    # 0.9/64/2 of the scales' range.
    bound = w.abs().max() * (widest + (0.9 / 128 + 1e-4 if double else 1e-6))
    assert bool(((q.dequantize() - w).abs() <= bound).all())
    last = w.flatten()[(blocks - 1) * block :]
    if not double:
        assert float(q.scales.values()[-1]) == float(last.abs().max())


@pytest.mark.parametrize("block", [7, 64, 300_000])
def test_long_tensors_are_worked_in_pieces_that_do_not_show(block):
    w = normal(600_001)
    q = quantize(w, "nf4", block=block, double=False)
    whole = q.dequantize(backend="torch")
    assert torch.equal(q.dequantize(torch.bfloat16, backend="torch"), whole.bfloat16())
    for start in (0, 250_000 // block * block, 550_000 // block * block):
        piece = w[start : start + 2 * block]
        expected = quantize(piece, "nf4", block=block, double=False).dequantize(backend="torch")
        assert torch.equal(whole[start : start + 2 * block], expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double", [False, True])
def test_zero_and_constant_blocks(format, double):
    w = torch.zeros(4, 64)
    assert torch.equal(quantize(w, format, double=double).dequantize(), w)
    w[1], w[2] = 3.0, -0.25
    back = quantize(w, format, double=double).dequantize()
    assert bool((back[0] == 0).all())
    assert bool((back[3] == 0).all())
    if not double:
        assert torch.equal(back, w)  # ±1 are levels of every format
    equal = torch.full((4, 64), 3.0)
    assert torch.equal(quantize(equal, format, double=double).dequantize(), equal)  # equal scales: their mean is each


def test_extreme_scales():
    for scale in (3e38, 1e-30):
        w = normal(2, 64).clamp(-1, 1) * scale
        q = quantize(w, "nf4", double=False)
        assert float((q.dequantize() - w).abs().max()) <= 0.16 * float(w.abs().max())  # half of NF4's widest gap
    denormal = torch.full((2, 64), 1e-40)
    back = quantize(denormal, "nf4", double=False).dequantize()
    assert bool((back.abs() <= denormal).all())  # below the least scale: towards zero, never NaN


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 77])
def test_nonfinite_entries_are_refused(bad, place):
    w = normal(1, 78).flatten()
    w[place] = bad
    with pytest.raises(NonFiniteMatrix, match="1 of 78 entries"):
        quantize(w)
    with pytest.raises(NonFiniteMatrix, match="beyond float32"):
        quantize(torch.full((64,), 1e300, dtype=torch.float64))


def test_bad_arguments():
    with pytest.raises(UsageError, match="known are nf4"):
        quantize(torch.ones(64), "q4_k")
    with pytest.raises(UsageError, match="empty tensor"):
        quantize(torch.ones(0, 64))
    with pytest.raises(UsageError, match="at least one"):
        quantize(torch.ones(64), block=0)
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
