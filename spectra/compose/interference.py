r"""How much two updates of one matrix get into each other's way, from the weights alone; chance beside every number.

An update Δ_j harms task i where Δ_j x ≠ 0 on the inputs x of task i. What of that the weights show is on the input
side: Δ_i reads its inputs along its row space, and I_{j→i} = ‖Δ_j Δ_iᵀ‖_F/(‖Δ_j‖_F‖Δ_i‖_F) says how much of it Δ_j
reads too. Outputs that are orthogonal do not help: then UᵀU = I and STI = 0 while Δ_j x is what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.compose.products import Product
from spectra.errors import MatrixError, UsageError


def cosine(i: Product, j: Product) -> float:
    """⟨Δ_i, Δ_j⟩/(‖Δ_i‖_F‖Δ_j‖_F), NaN where one is zero.

    Raises
    ------
    MatrixError
        If the shapes differ.

    Examples
    --------
    >>> e = torch.eye(2, dtype=torch.float64)
    >>> round(cosine(Product.of(e), Product.of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))), 4)
    0.7071
    """
    _check(i, j)
    inner = float(((i.b.t() @ j.b) * (i.a @ j.a.t())).sum())
    return _over(inner, i.norm * j.norm)


def input_interference(j: Product, i: Product) -> float:
    """I_{j→i} = ‖Δ_j Δ_iᵀ‖_F/(‖Δ_j‖_F‖Δ_i‖_F): how much of what Δ_i reads Δ_j reads too; symmetric, at most 1.

    Of an update that is turned at random its square is 1/cols on average (`expected_square`).

    Raises
    ------
    MatrixError
        If the inputs' widths differ.

    Examples
    --------
    >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    >>> writes_elsewhere = Product(torch.tensor([[1.0], [0.0]]), x), Product(y, x)
    >>> input_interference(*writes_elsewhere), cosine(*writes_elsewhere)
    (1.0, 0.0)
    """
    if i.shape[1] != j.shape[1]:
        raise MatrixError(f"updates of {j.shape[1]} and {i.shape[1]} inputs")
    core = j.left_triangle @ (j.a @ i.a.t()) @ i.left_triangle.t()
    return _over(float(torch.linalg.matrix_norm(core)), i.norm * j.norm)


def output_interference(j: Product, i: Product) -> float:
    """‖Δ_jᵀ Δ_i‖_F/(‖Δ_j‖_F‖Δ_i‖_F): how much of what one writes the other writes too.

    Raises
    ------
    MatrixError
        If the outputs' widths differ.
    """
    if i.shape[0] != j.shape[0]:
        raise MatrixError(f"updates of {j.shape[0]} and {i.shape[0]} outputs")
    core = j.right_triangle @ (j.b.t() @ i.b) @ i.right_triangle.t()
    return _over(float(torch.linalg.matrix_norm(core)), i.norm * j.norm)


def expected_square(dimension: int) -> float:
    """Mean square of the input (output) interference of two updates of which one is turned at random: 1/dimension.

    With Q Haar-distributed, E‖Δ_j Q Δ_iᵀ‖² = ‖Δ_j‖²‖Δ_i‖²/n, since E QXQᵀ = tr(X)/n · I. No approximation.

    Examples
    --------
    >>> expected_square(384) ** 0.5 < 0.052
    True
    """
    return 1.0 / dimension


def activation_interference(j: Product, i: Product, moment: torch.Tensor) -> float:
    """‖Δ_j R^{1/2}‖_F/‖Δ_i R^{1/2}‖_F, R = E[xxᵀ] of task i: what Δ_j adds to its outputs against what Δ_i does.

    The square is E‖Δ_j x‖²/E‖Δ_i x‖² over the inputs that R was taken of: 1 where both change the outputs as much.

    Parameters
    ----------
    j, i : Product
    moment : Tensor of shape (cols, cols)
        Second moment of the inputs of task i, or (cols,) its diagonal.

    Raises
    ------
    MatrixError
        If the shapes do not fit.
    """
    _check(i, j)
    if moment.shape not in ((i.shape[1],) * 2, (i.shape[1],)):
        raise MatrixError(f"second moments of shape {tuple(moment.shape)} for {i.shape[1]} inputs")

    def energy(update: Product) -> float:
        weighed = update.a * moment.double() if moment.dim() == 1 else update.a @ moment.double()
        return max(0.0, float((update.b.t() @ update.b * (weighed @ update.a.t())).sum()))

    return _over(math.sqrt(energy(j)), math.sqrt(energy(i)))


def singular_task_interference(updates: Sequence[Product], *, rank: int | None = None) -> float:
    r"""STI = ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of absolute entries, of the updates' stacked singular vectors.

    Parameters
    ----------
    updates : sequence of Product
        Of one matrix.
    rank : int, optional
        Leading triplets of each; by default all.

    References
    ----------
    A. Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025, eq. 3.

    Raises
    ------
    MatrixError
        If the shapes differ.
    UsageError
        If the rank is not positive, or there is no update.

    Examples
    --------
    >>> one = Product(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> singular_task_interference([one, one]), singular_task_interference([one])
    (2.0, 0.0)
    """
    if not updates or (rank is not None and rank < 1):
        raise UsageError(f"{len(updates)} updates, rank {rank}: singular task interference needs one of each at least")
    for update in updates:
        _check(updates[0], update)
    triplets = [update.svd for update in updates]
    u = torch.cat([left[:, :rank] for left, _, _ in triplets], dim=1)
    s = torch.cat([values[:rank] for _, values, _ in triplets])
    v = torch.cat([right[:rank] for _, _, right in triplets])
    unit = torch.eye(len(s), dtype=torch.float64)
    return float(((u.t() @ u - unit) @ (s[:, None] * (v @ v.t() - unit))).abs().sum())


def expected_singular_task_interference(updates: Sequence[Product], *, rank: int | None = None) -> float:
    r"""What STI comes to on average where all updates are turned at random, on both sides.

    Blocks G of UᵀU and H of VᵀV between two tasks then have entries of variance 1/rows and 1/cols, normal up to terms
    of order 1/rows. An entry of the product is Σ_t g_t σ_t h_t over the other tasks' triplets: given g it is normal, so
    that its mean absolute value is √(2/π)·E√(Σ σ_t² g_t²)/√cols, an integral over one variable.

    Raises
    ------
    MatrixError, UsageError
        As `singular_task_interference`.
    """
    if not updates or (rank is not None and rank < 1):
        raise UsageError(f"{len(updates)} updates, rank {rank}: singular task interference needs one of each at least")
    for update in updates:
        _check(updates[0], update)
    rows, cols = updates[0].shape
    values = [update.svd[1][:rank].numpy() for update in updates]
    total = 0.0
    for p, mine in enumerate(values):
        for q, others in enumerate(values):
            between = [s for t, s in enumerate(values) if t not in (p, q)]
            total += len(mine) * len(others) * _mean_root(np.concatenate(between) if between else np.empty(0))
    return math.sqrt(2.0 / math.pi / (rows * cols)) * total


def _mean_root(sigma: NDArray[np.float64]) -> float:
    r"""E√Q for Q = Σ σ²g² with standard normal g: (1/2√π) ∫ (1 − Π(1 + 2σ²t)^{−1/2}) t^{−3/2} dt, by t = eᵘ.

    From √q = (1/2√π)∫(1 − e^{−qt})t^{−3/2}dt; the trapezoidal rule is exact to rounding for such an integrand, which
    falls off as e^{±u/2}.
    """
    size = float(np.linalg.norm(sigma))
    if size == 0.0:
        return 0.0
    u = np.linspace(-80.0, 80.0, 4001)
    product = -0.5 * np.log1p(2.0 * (sigma / size)[:, None] ** 2 * np.exp(u)).sum(axis=0)
    integrand = -np.expm1(product) * np.exp(-u / 2.0)
    return size * float(integrand.sum() * (u[1] - u[0])) / (2.0 * math.sqrt(math.pi))


@dataclass(frozen=True)
class AlignmentRatio:
    """SAR of a task with a merged update: ‖Π Δ_i‖_F/‖Δ_i‖_F, Π on the merged one's `rank` leading left vectors.

    Attributes
    ----------
    value : float
    rank : int
        Least number of directions that leaves at most `left` of the merged update's norm.
    chance : float
        √(rank/rows): of a subspace turned at random, its root mean square.
    """

    value: float
    rank: int
    chance: float


def subspace_alignment(task: Product, merged: Product, *, left: float = 0.05) -> AlignmentRatio:
    """How much of a task's update lies in the output space of a merged one.

    References
    ----------
    D. Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ICML 2025, eqs. 5 and 6.

    Raises
    ------
    MatrixError
        If the shapes differ.
    UsageError
        If `left` is not in [0, 1).

    Examples
    --------
    >>> one = Product(torch.tensor([[1.0], [0.0]]), torch.ones(1, 3))
    >>> found = subspace_alignment(one, one)
    >>> round(found.value, 12), found.rank
    (1.0, 1)
    """
    _check(task, merged)
    if not 0.0 <= left < 1.0:
        raise UsageError(f"left = {left}: the share of the norm that is left out is at least 0 and below 1")
    u, s, _ = merged.svd
    tails = torch.cat([s.square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])  # Σ_{i ≥ r} σ²
    rank = int((tails > left**2 * float(tails[0])).sum()) if len(s) else 0
    caught = float(torch.linalg.matrix_norm((u[:, :rank].t() @ task.b) @ task.right_triangle.t()))
    return AlignmentRatio(_over(caught, task.norm), rank, math.sqrt(rank / task.shape[0]))


def _check(i: Product, j: Product) -> None:
    if i.shape != j.shape:
        raise MatrixError(f"updates of shapes {i.shape} and {j.shape} are not of one matrix")


def _over(value: float, norm: float) -> float:
    return value / norm if norm > 0.0 else math.nan
