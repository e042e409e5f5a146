"""Leading eigenvectors: LAPACK's by its address are those of all, however many and on however many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from spectra.extract import eigenvectors
from spectra.extract.eigenvectors import leading_eigenvectors


def gram(p: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2 * p, p)) * np.logspace(0, -4, p)
    return np.asarray(x.T @ x)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("p", "count"), [(1, 1), (2, 1), (7, 7), (60, 5), (200, 16)])
def test_those_of_all(p: int, count: int, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrapped:
        monkeypatch.setattr(eigenvectors, "_dsyevr", lambda: None)
    matrix = gram(p)
    values, vectors = np.linalg.eigh(matrix)
    found = leading_eigenvectors(matrix.copy(), count)
    assert found.shape == (p, count)
    # p ε of LAPACK's backward error, relative to the largest eigenvalue, and a factor of ten.
    np.testing.assert_allclose(found.T @ found, np.eye(count), atol=10 * p * np.finfo(float).eps)
    left = matrix @ found - found * values[::-1][:count]
    assert np.abs(left).max() <= 10 * p * np.finfo(float).eps * values[-1]
    assert np.abs(np.sum(found[:, :1] * vectors[:, -1:])) == pytest.approx(1.0)


def test_this_scipys_is_reached() -> None:
    assert eigenvectors._dsyevr() is not None


def test_another_signature_is_not_called() -> None:
    assert eigenvectors._arguments("void (char *, int *, __pyx_scipy_6linalg_d *)") == ["char", "int", "d"]
    assert eigenvectors._arguments("void (char *, long *)") != ["char", "int"]
    assert eigenvectors._arguments("") == [""]


def test_threads_do_not_disturb_each_other() -> None:
    alone = [leading_eigenvectors(gram(150, seed), 9) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: leading_eigenvectors(gram(150, seed), 9), range(12)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_converge_is_said() -> None:
    with pytest.raises(np.linalg.LinAlgError, match="dsyevr gave 0 of 2"):
        leading_eigenvectors(np.full((6, 6), np.nan), 2)
