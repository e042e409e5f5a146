"""Spectra of products from their factors, against dense SVDs and 80-digit arithmetic."""

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

from spectra.errors import MatrixError, NonFiniteMatrix
from spectra.linalg import product_spectrum
from tests.planted import GALLERY, exact_values

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("name", GALLERY)
def test_exact_on_the_gallery(name):
    a = torch.from_numpy(GALLERY[name])
    found = product_spectrum(a, torch.eye(a.shape[1], dtype=torch.float64))
    exact = exact_values(name)
    # 20 ε σ₁, the bound of the bidiagonal route
    assert np.max(np.abs(found.values - exact)) <= 20 * EPS * exact[0]
    low, high = found.interval()
    assert np.all(low <= exact)
    assert np.all(exact <= high)


def test_cancelling_factors_are_still_certified():
    """B·A of size 1e-6 from factors of size 1: the certificate must widen to what float64 can know."""
    rng = np.random.default_rng(0)
    b = rng.standard_normal((6, 3))
    a = scipy.linalg.null_space(b[:, :3].T @ b[:, :3] * 0 + np.array([[1.0, 1.0, 1.0]])).T  # rows orthogonal to (1,1,1)
    b[:, :] = b[:, :1]  # every column the same: B·x = b₁·Σx
    a = a.T @ rng.standard_normal((2, 5)) + 1e-6 * rng.standard_normal((3, 5))
    with mpmath.workdps(80):
        exact = mpmath.svd_r(mpmath.matrix(b.tolist()) * mpmath.matrix(a.tolist()), compute_uv=False)
        exact = np.array([float(v) for v in exact])[:5]
    low, high = product_spectrum(torch.from_numpy(b), torch.from_numpy(a)).interval()
    assert np.all(low <= exact)
    assert np.all(exact <= high)


@pytest.mark.parametrize(("rows", "cols", "r"), [(300, 200, 8), (40, 300, 1), (10, 12, 10), (6, 5, 9)])
def test_agrees_with_the_formed_product(rows, cols, r):
    g = torch.Generator().manual_seed(r)
    b, a = torch.randn(rows, r, generator=g), torch.randn(r, cols, generator=g)
    dense = scipy.linalg.svdvals((b.double() @ a.double()).numpy() * 0.5)
    found = product_spectrum(b, a, scale=0.5)
    assert found.complete
    assert np.allclose(found.values, dense, atol=1e-12 * dense[0])
    assert found.frobenius == pytest.approx(np.sqrt(np.sum(dense**2)), rel=1e-13)
    assert np.all(found.values[r:] == 0.0)


def test_vectors_rebuild_the_product():
    g = torch.Generator().manual_seed(3)
    b, a = torch.randn(30, 4, generator=g), torch.randn(4, 20, generator=g)
    found = product_spectrum(b, a, scale=-2.0, vectors=True)
    assert not found.complete
    assert np.allclose((found.left * found.values) @ found.right, -2.0 * (b.double() @ a.double()).numpy())


def test_refusals():
    with pytest.raises(MatrixError, match=r"q\.weight.*\(3, 2\).*\(3, 4\)"):
        product_spectrum(torch.ones(3, 2), torch.ones(3, 4), name="q.weight")
    with pytest.raises(NonFiniteMatrix, match="1 NaN"):
        product_spectrum(torch.tensor([[float("nan")]]), torch.ones(1, 1))
    with pytest.raises(NonFiniteMatrix, match="scale inf"):
        product_spectrum(torch.ones(1, 1), torch.ones(1, 1), scale=float("inf"))
