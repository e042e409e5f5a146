"""The leading eigenvectors of a symmetric matrix by LAPACK's dsyevr, called so that other threads go on meanwhile.

SciPy's own wrapper holds the interpreter's lock: matrices on two threads took hardly less time than in turn. SciPy
offers its LAPACK to compiled code by address (`scipy.linalg.cython_lapack`), and ctypes calls that unlocked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg import cython_lapack

# The arguments of dsyevr, all by address: characters, integers of 32 bits and doubles.
_ARGUMENTS = "char char char int d int d d int int d int d d int int d int int int int"


def leading_eigenvectors(matrix: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Eigenvectors of the largest eigenvalues, the largest first.

    Parameters
    ----------
    matrix : ndarray of shape (p, p), float64
        Symmetric, contiguous and finite; overwritten.
    count : int
        How many, 1 ≤ count ≤ p.

    Returns
    -------
    ndarray of shape (p, count), float64
        Orthonormal columns.

    Raises
    ------
    numpy.linalg.LinAlgError
        If LAPACK does not find them.

    References
    ----------
    .. [1] I. S. Dhillon, B. N. Parlett and C. Vömel, "The design and implementation of the MRRR algorithm", ACM
       Transactions on Mathematical Software 32, 2006.

    Examples
    --------
    >>> np.abs(leading_eigenvectors(np.diag([1.0, 4.0, 2.0]), 2)).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    p, routine = len(matrix), _dsyevr()
    if routine is None:
        wanted = {"subset_by_index": [p - count, p - 1], "driver": "evr"}
        top: NDArray[np.float64] = scipy.linalg.eigh(matrix, overwrite_a=True, check_finite=False, **wanted)[1]
        return np.array(top[:, ::-1], order="C")
    values, vectors = np.empty(p), np.empty((count, p))  # LAPACK's columns are NumPy's rows
    support, found, info = np.empty(2 * count, np.int32), ctypes.c_int(), ctypes.c_int()

    def call(reals: NDArray[np.float64], integers: NDArray[np.int32], lengths: tuple[int, int]) -> None:
        what = b"V", b"I", b"L", _int(p), _at(matrix), _int(p), _double(0.0), _double(0.0)
        which = _int(p - count + 1), _int(p), _double(0.0), ctypes.byref(found), _at(values), _at(vectors), _int(p)
        work = _at(support), _at(reals), _int(lengths[0]), _at(integers), _int(lengths[1]), ctypes.byref(info)
        routine(*what, *which, *work)

    sizes = np.empty(1), np.empty(1, np.int32)
    call(*sizes, (-1, -1))
    needs = int(sizes[0][0]), int(sizes[1][0])
    call(np.empty(needs[0]), np.empty(needs[1], np.int32), needs)
    if info.value or found.value != count:
        raise np.linalg.LinAlgError(f"dsyevr gave {found.value} of {count} eigenvectors and the code {info.value}")
    return np.array(vectors[::-1].T, order="C")


@cache
def _dsyevr() -> Callable[..., None] | None:
    """The routine; None where this SciPy has none of those arguments."""
    capsule = cython_lapack.__pyx_capi__.get("dsyevr")
    api = ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    name = b"" if capsule is None else name_of(capsule)
    if _arguments(name.decode()) != _ARGUMENTS.split():
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(_ARGUMENTS.split()))(address_of(capsule, name))


def _arguments(signature: str) -> list[str]:
    """Kinds of the arguments of a C function: SciPy's name for a double ends in ``_d``."""
    words = signature.removeprefix("void (").removesuffix(")").split(", ")
    return [word.removesuffix(" *").rpartition("_")[2] if word.endswith(" *") else "" for word in words]


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


def _double(value: float) -> Any:
    return ctypes.byref(ctypes.c_double(value))
