r"""`captured`: how much of an update, in squared norm, the range of a projection could have held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from scipy.stats import beta

from spectra.errors import UsageError
from spectra.projections import Projection, make_projection

# Relative residual of the normal equations: what is left changes a share by its square.
_RESIDUAL = 1e-9


@dataclass(frozen=True)
class Captured:
    """What of an update lies in a subspace, beside what lies in a random one.

    Attributes
    ----------
    projection : str
        Kind of the subspace.
    dimension : int
        d.
    parameters : int
        D.
    share : float
        ‖Π Δ‖²/‖Δ‖² with Π the orthogonal projector onto the subspace.
    chance : float
        d/D, the mean share of uniformly random subspaces of dimension d.
    chance_low, chance_high : float
        95 % of those lie between.
    """

    projection: str
    dimension: int
    parameters: int
    share: float
    chance: float
    chance_low: float
    chance_high: float

    @property
    def times_chance(self) -> float:
        """How many times the share of a random subspace."""
        return self.share / self.chance


def captured(
    update: Mapping[str, torch.Tensor],
    *,
    dimension: int,
    projection: str = "fastfood",
    seed: int = 0,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> Captured:
    r"""Share of an update's squared norm that a d-dimensional subspace of a kind holds.

    Parameters
    ----------
    update : mapping of str to Tensor
        By name, what each parameter moved by: ``{d.name: d.dense() for d in spectra.deltas(base, tuned)}``.
    dimension : int
        d.
    projection : str
        A key of `spectra.projections.PROJECTIONS`.
    seed : int
        Of the subspace.
    gradients : mapping of str to Tensor, optional
        For ``"gradient"``, by the same names.

    Returns
    -------
    Captured

    Raises
    ------
    UsageError
        If the update is empty, zero or not finite, or the projection refuses the dimension.

    Notes
    -----
    Π Δ = P (PᵀP)⁻¹ PᵀΔ. The normal equations are solved by conjugate gradients in float64, with one tensor in memory
    at a time; PᵀP is near the identity while d is far below D, and some ten steps do. Of a fixed vector a uniformly
    random subspace holds a share distributed as Beta(d/2, (D−d)/2), whose mean is d/D.

    Examples
    --------
    >>> update = {"weight": torch.randn(300, 200, generator=torch.Generator().manual_seed(0))}
    >>> found = captured(update, dimension=600)
    >>> found.chance, found.chance_low < found.share < found.chance_high
    (0.01, True)
    """
    names = list(update)
    tensors = [update[name] for name in names]
    norm = math.fsum(float(tensor.double().square().sum()) for tensor in tensors)
    if not names or not 0.0 < norm < math.inf:
        raise UsageError(f"an update of {len(names)} tensors and squared norm {norm:g} has no share that could be held")
    wanted = None if gradients is None else {i: gradients[name] for i, name in enumerate(names) if name in gradients}
    space = make_projection(projection, [t.shape for t in tensors], dimension=dimension, seed=seed, gradients=wanted)
    total = sum(tensor.numel() for tensor in tensors)
    spread = beta(dimension / 2, (total - dimension) / 2) if dimension < total else None
    low, high = (1.0, 1.0) if spread is None else spread.interval(0.95)
    return Captured(
        projection, dimension, total, _share(space, tensors) / norm, dimension / total, float(low), float(high)
    )


def _share(space: Projection, tensors: Sequence[torch.Tensor]) -> float:
    """‖Π Δ‖² = bᵀ(PᵀP)⁻¹b with b = PᵀΔ."""
    pulled = torch.zeros(space.dimension, dtype=torch.float64)
    for piece, tensor in enumerate(tensors):
        pulled += space.adjoint(tensor.double().contiguous(), piece)

    def gram(x: np.ndarray) -> np.ndarray:
        vector, found = torch.from_numpy(np.ascontiguousarray(x)), torch.zeros(space.dimension, dtype=torch.float64)
        for piece, shape in enumerate(space.shapes):
            out = torch.zeros(shape, dtype=torch.float64)
            space.add(vector, piece, out)
            found += space.adjoint(out, piece)
        return found.numpy()

    b = pulled.numpy()
    operator = LinearOperator((len(b), len(b)), matvec=gram, dtype=np.float64)
    x, failed = cg(operator, b, rtol=_RESIDUAL, maxiter=10 * len(b))
    if failed:
        raise UsageError(
            f"the subspace's {len(b)} directions are too nearly dependent to project on: take fewer dimensions"
        )
    return float(b @ x)
