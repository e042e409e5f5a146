"""QERA's factors against a numerical optimiser, the article's formula and the plain truncated SVD."""

import pytest
import torch

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.moments import Moments
from spectra.quantize import loftq, quantize
from spectra.quantize.qera import error_factors, qera
from spectra.quantize.scheme import Scheme


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inputs, *, rank=None, seed=1):
    """Moments of inputs whose sizes spread over two decades, in random directions."""
    mix = draw(inputs, rank or inputs, seed=seed) * torch.logspace(0, -2, rank or inputs, dtype=torch.float64)
    return Moments(mix @ mix.T, 1)


def cost(error, a, b, moments):
    return float(torch.linalg.norm((error - b @ a) @ moments.root))


def found_by_search(error, rank, moments, starts):
    """Least cost that LBFGS finds over factors."""
    best = float("inf")
    for seed in range(starts):
        a, b = draw(rank, error.shape[1], seed=seed).requires_grad_(), draw(error.shape[0], rank, seed=99 - seed)
        b.requires_grad_()
        search = torch.optim.LBFGS([a, b], max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(search=search, a=a, b=b):
            search.zero_grad()
            loss = ((error - b @ a) @ moments.root).square().sum()
            loss.backward()
            return loss

        search.step(closure)
        best = min(best, cost(error, a.detach(), b.detach(), moments))
    return best


@pytest.mark.parametrize(("shape", "inputs_rank"), [((6, 5), 5), ((4, 6), 3)])
def test_no_search_finds_better_factors(shape, inputs_rank):
    error, moments = draw(*shape), correlated(shape[1], rank=inputs_rank)
    a, b = error_factors(error, 2, moments=moments)
    # LBFGS stops within 1e-6 of a minimum; one of two starts ends in the global one.
    assert found_by_search(error, 2, moments, 5) == pytest.approx(cost(error, a, b, moments), rel=1e-5)


def test_the_articles_formula():
    """SVD_r(E R^½) R^{−½} where R is regular."""
    error, moments = draw(9, 7), correlated(7)
    values, vectors = torch.linalg.eigh(moments.matrix)
    root = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(error @ root, full_matrices=False)
    a, b = error_factors(error, 3, moments=moments)
    expected = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(root)
    # The inverse amplifies rounding by the root's condition, a few hundred here.
    torch.testing.assert_close(b @ a, expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_never_worse_than_plain_or_diagonal(rank):
    for seed in range(5):
        error, moments = draw(12, 8, seed=seed), correlated(8, seed=seed + 50)
        exact, diagonal, plain = (
            cost(error, *error_factors(error, rank, moments=known, diagonal=flag), moments)
            for known, flag in ((moments, False), (moments, True), (None, False))
        )
        tail = torch.linalg.svdvals(error @ moments.root)[rank:].square().sum().sqrt()
        assert exact == pytest.approx(float(tail), abs=1e-9)  # Eckart and Young
        assert exact <= min(diagonal, plain) + 1e-9


def test_uncorrelated_inputs_need_the_diagonal_alone():
    error = draw(10, 6)
    moments = Moments(torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.5, 0.0, 2.0])), 1)
    full, diagonal = (error_factors(error, 2, moments=moments, diagonal=flag) for flag in (False, True))
    torch.testing.assert_close(full[1] @ full[0], diagonal[1] @ diagonal[0], rtol=0.0, atol=1e-10)
    alike = error_factors(error, 2, moments=Moments(3.0 * torch.eye(6), 1))
    plain = error_factors(error, 2)
    torch.testing.assert_close(alike[1] @ alike[0], plain[1] @ plain[0], rtol=0.0, atol=1e-10)


def test_directions_that_no_input_takes():
    """Two directions are taken and the rank is four: they cost nothing any more, and the rest is the plain SVD."""
    error, moments = draw(8, 6), correlated(6, rank=2)
    a, b = error_factors(error, 4, moments=moments)
    assert cost(error, a, b, moments) < 1e-9 * float(torch.linalg.norm(error @ moments.root))
    # By the pseudo-inverse the error outside the range stays as it was.
    inside = moments.root @ torch.linalg.pinv(moments.root)
    assert float(torch.linalg.norm(error - b @ a)) < float(torch.linalg.norm(error - error @ inside))
    assert bool((a.abs().amax(1) > 0).all())  # no direction lies idle
    nothing = Moments(torch.zeros(6, 6), 5)
    for flag in (False, True):
        unread, plain = error_factors(error, 3, moments=nothing, diagonal=flag), error_factors(error, 3)
        torch.testing.assert_close(unread[1] @ unread[0], plain[1] @ plain[0], rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_factors_are_divided_and_balanced(scale):
    weight, moments = draw(24, 64).float(), correlated(64)
    quantized, a, b = qera(weight, 4, scale=scale, moments=moments)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((4, 64), (24, 4), torch.float32, torch.float32)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-6)  # float32 factors
    error = weight.double() - quantized.dequantize().double()
    tail = float(torch.linalg.svdvals(error @ moments.root)[4:].square().sum().sqrt())
    assert cost(error, scale * a.double(), b.double(), moments) == pytest.approx(tail, rel=1e-5)
    assert torch.equal(quantized.dequantize(), quantize(weight).dequantize())


def test_without_moments_it_is_loftqs_first_step():
    weight = draw(24, 64).float()
    for ours, theirs in zip(qera(weight, 4, scale=2.0, moments=None)[1:], loftq(weight, 4, scale=2.0)[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_a_scheme_in_place_of_a_format():
    weight = draw(24, 64).float()
    named = qera(weight, 4, scale=1.0, moments=None, scheme="int4/32/fp32")
    value = qera(weight, 4, scale=1.0, moments=None, scheme=Scheme.parse("int4/32/fp32"))
    apart = qera(weight, 4, scale=1.0, moments=None, format="int4", block=32, double=False)
    for other in (value, apart):
        assert torch.equal(named[0].dequantize(), other[0].dequantize())
        assert torch.equal(named[1], other[1])


def test_refuses():
    weight = draw(8, 64).float()
    with pytest.raises(UsageError, match="rank 9"):
        qera(weight, 9, scale=1.0, moments=None)
    with pytest.raises(UsageError, match="not zero"):
        qera(weight, 2, scale=0.0, moments=None)
    with pytest.raises(UsageError, match="of 63 inputs"):
        qera(weight, 2, scale=1.0, moments=correlated(63))
    with pytest.raises(UsageError, match="rank 0"):
        error_factors(weight, 0)
    with pytest.raises(NonFiniteMatrix):
        error_factors(weight * float("nan"), 2)
