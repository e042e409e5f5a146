"""Dense routes against 80-digit arithmetic, planted spectra, SciPy and NumPy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from spectra.errors import MatrixError, NoConvergence, NonFiniteMatrix, UnsupportedFormat
from spectra.linalg import as_matrix, by_bidiagonal, by_gram, dense
from spectra.linalg.matrix import sum_of_squares
from tests.planted import GALLERY, exact_values, planted

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("name", GALLERY)
def test_bidiagonal_is_within_twenty_ulps_of_the_top_value(name):
    exact = exact_values(name)
    found = by_bidiagonal(as_matrix(GALLERY[name]))
    # 20 ε σ₁: the bound LAPACK's driver is held to for matrices of this size
    assert np.max(np.abs(found.values - exact)) <= 20 * EPS * exact[0]


@pytest.mark.parametrize("name", GALLERY)
@pytest.mark.parametrize("route", [by_gram, by_bidiagonal])
def test_certificate_contains_the_truth(name, route):
    exact = exact_values(name)
    low, high = route(as_matrix(GALLERY[name])).interval()
    assert np.all(low <= exact)
    assert np.all(exact <= high)


@pytest.mark.parametrize("name", GALLERY)
def test_certificate_is_not_vacuous(name):
    exact = exact_values(name)
    low, high = by_gram(as_matrix(GALLERY[name])).interval()
    seen = exact > 1e-5 * exact[0]
    # at 1e-5 σ₁ the Gram route's interval is (1.4e-7/1e-5)² ≈ 2e-4 wide, half on either side
    assert np.all((high - low)[seen] <= 3e-4 * exact[seen])


@pytest.mark.parametrize("shape", [(60, 60), (300, 150), (150, 300), (2300, 40), (40, 2300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_agrees_with_scipy_in_every_orientation(shape, dtype):
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    kept = a.clone()
    found = by_gram(as_matrix(a))
    expected = scipy.linalg.svdvals(a.double().numpy())
    # float64 sums of at most 2300 products: relative error of σ far below 1e-11 where σ > 1e-2 σ₁
    assert np.allclose(found.values, expected, rtol=1e-11, atol=1e-9 * expected[0])
    assert torch.equal(a, kept), "the input was written to"


def test_gram_of_a_non_contiguous_view():
    a = torch.randn(200, 90, generator=torch.Generator().manual_seed(2))
    assert np.allclose(by_gram(as_matrix(a.T)).values, by_gram(as_matrix(a)).values, rtol=1e-12)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50)])
@pytest.mark.parametrize("route", [by_gram, by_bidiagonal])
def test_vectors_rebuild_the_matrix(shape, route):
    a = np.random.default_rng(3).standard_normal(shape)
    found = route(as_matrix(a), vectors=True)
    rebuilt = (found.left * found.values) @ found.right
    # the Gram route's right vectors carry √ε-type errors of the smallest values: 1e-7 covers them
    assert np.allclose(rebuilt, a, atol=1e-7)
    assert np.allclose(found.left.T @ found.left, np.eye(min(shape)), atol=1e-7)


def test_frobenius_is_summed_from_the_entries():
    a = np.random.default_rng(4).standard_normal((300, 200)).astype(np.float32)
    exact = np.sqrt(np.sum(a.astype(np.float64) ** 2))
    assert as_matrix(a).frobenius == pytest.approx(exact, rel=1e-14)
    for tensor in (torch.ones(3, 3, dtype=torch.float64), torch.ones(3, 3)):
        sum_of_squares(tensor * 2)
        assert sum_of_squares(tensor * 2) == 36.0


@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1e30, 1e150])
def test_extreme_scales(scale):
    values = np.array([3.0, 2.0, 1.0])
    a = planted(values, 20, 12, seed=5) * scale
    for route in (by_gram, by_bidiagonal):
        found = route(as_matrix(a))
        assert np.allclose(found.values[:3], values * scale, rtol=1e-12)
        assert found.frobenius == pytest.approx(np.sqrt(14.0) * scale, rel=1e-12)


def test_float32_denormals():
    a = torch.full((4, 4), 1e-42)
    expected = 4 * float(a[0, 0])  # the entry as float32 stores it
    assert by_bidiagonal(as_matrix(a)).values[0] == pytest.approx(expected, rel=1e-12)


def test_second_driver_takes_over_and_says_so(monkeypatch):
    def refuse(*_):
        raise torch.linalg.LinAlgError("no convergence")

    a = planted(np.array([2.0, 1.0]), 6, 5)
    monkeypatch.setattr(dense, "_by_divide_and_conquer", refuse)
    found = by_bidiagonal(as_matrix(a), vectors=True)
    assert "QR iteration" in found.certificate.method
    assert np.allclose(found.values[:2], [2.0, 1.0])
    assert np.allclose((found.left * found.values) @ found.right, a)

    def refuse_too(*_, **__):
        raise np.linalg.LinAlgError("nor here")

    monkeypatch.setattr(scipy.linalg, "svd", refuse_too)
    with pytest.raises(NoConvergence, match="no singular value driver"):
        by_bidiagonal(as_matrix(a))


def test_refusals_name_the_matrix_and_count():
    bad = torch.ones(3, 3)
    bad[0, 1], bad[2, 2] = float("nan"), float("inf")
    with pytest.raises(NonFiniteMatrix, match=r"layer\.7.*2 NaN or infinite entries of 9"):
        as_matrix(bad, name="layer.7")
    with pytest.raises(MatrixError, match=r"\(3,\)"):
        as_matrix(torch.ones(3))
    with pytest.raises(MatrixError, match=r"\(0, 3\)"):
        as_matrix(torch.ones(0, 3))
    with pytest.raises(UnsupportedFormat, match="complex"):
        as_matrix(torch.ones(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_short_types_are_upcast_exactly(dtype):
    a = torch.tensor([[1.0, 2.0], [0.0, -3.0]]).to(dtype)
    expected = scipy.linalg.svdvals(a.double().numpy())
    assert np.allclose(by_bidiagonal(as_matrix(a)).values, expected, rtol=1e-14)


def test_zero_matrix():
    for route in (by_gram, by_bidiagonal):
        found = route(as_matrix(np.zeros((5, 3))))
        assert found.values.tolist() == [0.0, 0.0, 0.0]
        assert found.frobenius == 0.0


@pytest.mark.parametrize("shape", [(500, 500), (300, 900)])
def test_certificates_leave_room_for_what_routes_and_drivers_differ_by(shape):
    """Errors grow with size: both routes against QR iteration, each within half of what its certificate allows."""
    a = np.random.default_rng(1).standard_normal(shape)
    other = scipy.linalg.svd(a, compute_uv=False, lapack_driver="gesvd")
    squares = by_gram(as_matrix(a)).values ** 2
    assert np.max(np.abs(squares - other**2)) <= 0.5 * (dense.gram_roundoff(*shape) * other[0]) ** 2
    values = by_bidiagonal(as_matrix(a)).values
    assert np.max(np.abs(values - other)) <= 0.5 * dense.bidiagonal_roundoff(*shape) * other[0]
