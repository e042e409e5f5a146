"""`QuantizedLinear`: passes, gradients, what is kept, dtypes; and the LoftQ start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectra.errors import UsageError
from spectra.quantize import QuantizedLinear, loftq, paged_adamw, quantize

FORMATS = ["nf4", "fp4", "int4", "int8"]


def layer(rows: int = 24, cols: int = 32, *, format: str = "nf4", bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.of(nn.Linear(cols, rows, bias=bias), format, block=16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_map(format, bias):
    quantized = layer(format=format, bias=bias)
    dense = nn.Linear(32, 24, bias=bias)
    dense.weight.data = quantized.weight
    if bias:
        dense.bias.data = quantized.bias.data
    x = torch.randn(3, 5, 32, requires_grad=True)
    y = torch.randn(3, 5, 24)
    ours, theirs = (torch.autograd.grad((m(x) * y).sum(), x)[0] for m in (quantized, dense))
    assert torch.equal(quantized(x), dense(x))
    torch.testing.assert_close(ours, theirs)  # the same product; its summation may be ordered otherwise


def test_gradients_in_float64():
    quantized = layer().double()
    quantized.bias.requires_grad_()
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: quantized(x), (x, quantized.bias))
    assert torch.autograd.gradgradcheck(quantized, (x,))


def test_keeps_no_dense_weight_and_no_gradient_for_it():
    quantized = layer(64, 64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantized(torch.randn(2, 64, requires_grad=True))
    assert kept == []
    y.sum().backward()
    assert [name for name, _ in quantized.named_parameters()] == ["bias"]
    held = sum(b.nbytes for b in quantized.buffers())
    assert held == quantized.quantized.nbytes


def test_dtype_changes_leave_codes_and_scales_alone():
    quantized = layer()
    before = {name: b.clone() for name, b in quantized.named_buffers()}
    quantized.to(torch.bfloat16)
    assert quantized.bias.dtype == torch.bfloat16
    for name, b in quantized.named_buffers():
        assert b.dtype == before[name].dtype
        assert torch.equal(b, before[name])
    assert quantized(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(2, 32, requires_grad=True)
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_copies_and_state_dicts_are_whole():
    quantized = layer()
    x = torch.randn(2, 32)
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))
    other = QuantizedLinear.of(nn.Linear(32, 24), "nf4", block=16)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))


def test_checkpointed_activations_give_the_same_gradients():
    quantized = layer(32, 32)
    x = torch.randn(4, 32, requires_grad=True)
    plain = torch.autograd.grad(quantized(torch.tanh(quantized(x))).sum(), x)[0]
    saved = checkpoint(lambda x: quantized(torch.tanh(quantized(x))).sum(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(saved, x)[0], plain)


def test_hold_and_release():
    quantized = layer()
    x, weight = torch.randn(2, 32), torch.randn(24, 32)
    before = quantized(x)
    quantized.hold(weight)
    assert torch.equal(quantized(x), nn.functional.linear(x, weight, quantized.bias))
    quantized.release()
    assert torch.equal(quantized(x), before)


def test_a_conv1d_is_quantized_by_its_transpose():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 32)
    quantized = QuantizedLinear.of(conv, "int8", double=False)
    assert quantized.fan_in_fan_out
    assert quantized.quantized.shape == (24, 32)
    x = torch.randn(5, 32)
    # Half a step of int8, 1/254 of the largest weight (0.02 · 4 here), in each of 32 products.
    bound = float(x.abs().sum(1).max() * conv.weight.detach().abs().max() / 254)
    assert float((quantized(x) - conv(x)).detach().abs().max()) <= bound


@pytest.mark.parametrize("scale", [1.0, 4.0, -0.5])
def test_loftq_begins_at_the_best_factors(scale):
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    quantized, a, b = loftq(w, 6, scale=scale, iterations=3)
    left = w.double() - quantized.dequantize().double()
    error = float(torch.linalg.norm(left - scale * b.double() @ a.double()))
    tail = float(torch.linalg.svdvals(left)[6:].square().sum().sqrt())
    assert error == pytest.approx(tail, rel=1e-5)  # Eckart–Young; float32 factors
    plain = float(torch.linalg.norm(w - quantize(w).dequantize()))
    assert error < 0.85 * plain  # 0.74 of it, measured
    assert a.shape == (6, 64)
    assert b.shape == (48, 6)


def test_loftq_without_the_division_would_gain_nothing():
    """α = 2r: adding 2L where L is the error's best approximation leaves as much as L itself took away."""
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    quantized, a, b = loftq(w, 6, scale=1.0)
    left = w - quantized.dequantize()
    torch.testing.assert_close(torch.linalg.norm(left - 2.0 * b @ a), torch.linalg.norm(left))


def test_loftq_refuses():
    with pytest.raises(UsageError, match="rank 9"):
        loftq(torch.randn(8, 64), 9, scale=1.0)
    with pytest.raises(UsageError, match="not zero"):
        loftq(torch.randn(8, 64), 2, scale=0.0)


def test_paged_adamw_without_a_device():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for group in (parameters, [{"params": parameters, "weight_decay": 0.1}]):
        optimizer = paged_adamw(group, learning_rate=0.5, weight_decay=0.2)
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(UsageError, match="32 or 8"):
        paged_adamw(parameters, learning_rate=0.1, bits=16)
