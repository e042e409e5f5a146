"""The Walsh–Hadamard transform against scipy's matrix, its identities, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from spectra.errors import UsageError
from spectra.linalg.hadamard import factor_exponents, hadamard_matrix, walsh_hadamard


@pytest.mark.parametrize("exponent", range(12))
def test_against_scipy(exponent: int) -> None:
    """Small integers are summed exactly, so that every bit must agree."""
    n = 1 << exponent
    x = torch.randint(-9, 10, (n, 3), generator=torch.Generator().manual_seed(exponent)).double()
    expected = torch.from_numpy(hadamard(n)).double() @ x
    assert torch.equal(walsh_hadamard(x, dim=0), expected)
    assert torch.equal(walsh_hadamard(x.t(), dim=1), expected.t())
    assert torch.equal(hadamard_matrix(n, torch.float64), torch.from_numpy(hadamard(n)).double())


@given(st.integers(0, 9), st.integers(0, 2), st.integers(0, 2**31))
def test_identities(exponent: int, axis: int, seed: int) -> None:
    """Twice is n times; ⟨Hx, y⟩ = ⟨x, Hy⟩; whatever axis it goes along. Integers again: to the bit."""
    n, shape = 1 << exponent, [3, 2, 4]
    shape[axis] = n
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-9, 10, shape, generator=generator).float() for _ in range(2))
    assert torch.equal(walsh_hadamard(walsh_hadamard(x, dim=axis), dim=axis), n * x)
    assert float((walsh_hadamard(x, dim=axis) * y).sum()) == float((x * walsh_hadamard(y, dim=axis)).sum())
    assert torch.equal(walsh_hadamard(x, dim=axis), walsh_hadamard(x.movedim(axis, -1)).movedim(-1, axis))


def test_long_ones() -> None:
    """2¹⁷ numbers: relative error of a float32 transform against float64 of a few ε, since sums are of ±x alone."""
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))
    exact = walsh_hadamard(x.double())
    error = (walsh_hadamard(x).double() - exact).norm() / exact.norm()
    assert float(error) < 4 * torch.finfo(torch.float32).eps


def test_gradients() -> None:
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(walsh_hadamard, (x,))
    assert torch.autograd.gradgradcheck(lambda t: walsh_hadamard(t).pow(3), (x,))
    y = torch.randn(3, 16, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((walsh_hadamard(x) * y).sum(), x)
    assert torch.allclose(gradient, walsh_hadamard(y), rtol=1e-13)


def test_factors() -> None:
    """Orders multiply to n, none above 32."""
    for exponent, alone in itertools.product(range(21), (False, True)):
        found = factor_exponents(exponent, alone=alone)
        assert sum(found) == exponent
        assert all(1 <= each <= 5 for each in found)
        assert found == sorted(found)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(0), torch.zeros(4, dtype=torch.int64), torch.zeros(())])
def test_refusals(x: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        walsh_hadamard(x)


@pytest.mark.parametrize("order", [0, 3, -2])
def test_no_such_matrix(order: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        hadamard_matrix(order)


def test_inference_first() -> None:
    """Its matrices are kept: made under inference mode, they still serve a gradient afterwards."""
    hadamard_matrix.cache_clear()
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        walsh_hadamard(x)
    walsh_hadamard(x).square().sum().backward()
    assert torch.allclose(x.grad, 128 * x.detach(), rtol=1e-12)
