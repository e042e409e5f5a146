"""The Walsh–Hadamard transform, as a few small matrix products in place of a loop of butterflies.

The matrix of order 2^k is the Kronecker product of smaller ones, H = H_a ⊗ H_b ⊗ H_c, so that a transform is one
product with each, of 16 rows mostly, along its own axis: more additions than the butterfly's, at a product's rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from spectra.errors import UsageError

# Exponents of the factors' orders: larger ones cost additions, more of them cost passes over memory. Orders up to 32
# are one factor; above, 16 was the fastest of 4 … 256 on two cores with AVX-512, and 32 for a vector by itself.
_LARGEST = 4
_ALONE = 5


def walsh_hadamard(x: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    r"""Multiply by the Hadamard matrix in Sylvester's order, unnormalised: H Hᵀ = n·I and H = Hᵀ.

    Parameters
    ----------
    x : Tensor
        Real, n = 2^k along `dim`, on any device.
    dim : int
        Axis that is transformed. The first axis is the fastest.

    Returns
    -------
    Tensor
        Of x's shape, dtype and device. Differentiable any number of times: its adjoint is itself, and its inverse is
        itself divided by n.

    Raises
    ------
    UsageError
        If x is not real floating point, or its length along `dim` is no power of two.

    Notes
    -----
    Entry (i, j) of H is (−1)^(number of ones in i AND j) [1]_. Of a random x, the error of all entries together has a
    norm of 1 to 2 times ε·√n·‖x‖, that is 1 to 2 ε of the result's: sums are of ±x alone.

    References
    ----------
    .. [1] J. L. Shanks, "Computation of the Fast Walsh-Fourier Transform", IEEE Transactions on Computers C-18, 1969.

    Examples
    --------
    >>> walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    >>> walsh_hadamard(walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))) / 4
    tensor([1., 2., 3., 4.])
    """
    axis = _checked(x, dim)
    found = x
    for matrix, outer, inner in _products(x, axis):
        order = len(matrix)
        if inner == 1:
            found = found.reshape(outer, order) @ matrix
        elif outer == 1:
            found = matrix @ found.reshape(order, inner)
        else:
            found = torch.matmul(matrix, found.reshape(outer, order, inner))
    return found.reshape(x.shape)


def transform_between(x: torch.Tensor, spare: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`walsh_hadamard` without an allocation: products go to and fro between two tensors, and no gradient is kept.

    Parameters
    ----------
    x : Tensor
        Contiguous; overwritten.
    spare : Tensor
        Contiguous, another one of x's shape, dtype and device; overwritten.
    dim : int
        Axis that is transformed.

    Returns
    -------
    result, other : Tensor
        x and `spare`, the one that holds the transform first.

    Raises
    ------
    UsageError
        As `walsh_hadamard`.

    Examples
    --------
    >>> result, _ = transform_between(torch.tensor([1.0, 2.0]), torch.empty(2), dim=0)
    >>> result
    tensor([ 3., -1.])
    """
    axis = _checked(x, dim)
    for matrix, outer, inner in _products(x, axis):
        order = len(matrix)
        if inner == 1:
            torch.mm(x.view(outer, order), matrix, out=spare.view(outer, order))
        elif outer == 1:
            torch.mm(matrix, x.view(order, inner), out=spare.view(order, inner))
        else:
            shape = (outer, order, inner)
            torch.bmm(matrix.expand(outer, order, order), x.view(shape), out=spare.view(shape))
        x, spare = spare, x
    return x, spare


def _checked(x: torch.Tensor, dim: int) -> int:
    """The axis, counted from 0."""
    if not x.is_floating_point():
        raise UsageError(f"the Walsh–Hadamard transform is of real floating point numbers, not {x.dtype}")
    if not -x.dim() <= dim < x.dim():
        raise UsageError(f"dim = {dim} of a tensor of {x.dim()} axes")
    n = x.shape[dim]
    if n < 1 or n & (n - 1):
        raise UsageError(f"the Walsh–Hadamard transform needs a power of two along its axis, not {n}")
    return dim % x.dim()


def _products(x: torch.Tensor, axis: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Factors H_i of the transform, each with the numbers of entries before and behind its own axis."""
    n, before, after = x.shape[axis], x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    done = 1
    for exponent in factor_exponents(n.bit_length() - 1, alone=before == after == 1):
        order = 1 << exponent
        yield hadamard_matrix(order, x.dtype, x.device), before * done, n // (done * order) * after
        done *= order


@lru_cache(maxsize=64)
def hadamard_matrix(order: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
    """The Hadamard matrix in Sylvester's order, (order, order) of ±1; it is shared, so it must not be written to.

    Raises
    ------
    UsageError
        If `order` is no power of two.

    Examples
    --------
    >>> hadamard_matrix(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]])
    """
    if order < 1 or order & (order - 1):
        raise UsageError(f"a Hadamard matrix in Sylvester's order has a power of two of rows, not {order}")
    with torch.inference_mode(False):  # it is kept, and a tensor made in that mode takes part in no gradient later
        found = torch.ones(1, 1, dtype=dtype, device=device)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype, device=device)
        while len(found) < order:
            found = torch.kron(pair, found)
    return found


def factor_exponents(exponent: int, *, alone: bool = False) -> list[int]:
    """Exponents of the factors of a transform of 2^exponent, the smaller ones first, where a product is longest.

    Parameters
    ----------
    exponent : int
        At least 0.
    alone : bool
        Whether it is of one vector: what calls cost counts then, and not what additions do.

    Examples
    --------
    >>> factor_exponents(13), factor_exponents(13, alone=True), factor_exponents(5), factor_exponents(0)
    ([1, 4, 4, 4], [3, 5, 5], [5], [])
    """
    if exponent <= _ALONE:
        return [exponent] if exponent else []
    largest = _ALONE if alone else _LARGEST
    count = -(-exponent // largest)
    return sorted([exponent - largest * (count - 1), *[largest] * (count - 1)])
