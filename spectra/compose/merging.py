r"""How several updates of one matrix become one: pure functions of products B·A, never of B and A apart.

Averaging A and B apart gives (ΣB)(ΣA), whose cross terms B_iA_j belong to no task. Everything is computed in float64
from products; what is linear stays in factors, of which the concatenation [a₁B₁ … ][A₁; …] is exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spectra.compose.products import Product
from spectra.errors import UsageError
from spectra.projections.draws import stream

METHODS: dict[str, str] = {
    "sum": "Σ aᵢΔᵢ (task arithmetic, Ilharco 2023)",
    "ties": "largest entries, one sign each, mean of those that have it (Yadav 2023)",
    "dare": "entries dropped at random, the others scaled up, then the sum (Yu 2024)",
    "dare-ties": "entries dropped at random, then TIES (Yu 2024)",
    "knots": "TIES on the updates' coordinates in one shared basis (Stoica 2025)",
    "tsv": "leading singular vectors of every task, made orthogonal together (Gargiulo 2025)",
    "iso": "the sum with all of its singular values at their mean (Marczak 2025)",
    "orthogonal": "each update without what earlier ones read (O-LoRA's condition, Wang 2023, enforced)",
    "svd": "the best update of a rank to the sum",
}
"""Every method by name, with one line on it."""


@dataclass(frozen=True)
class Merge:
    """How updates are merged.

    Attributes
    ----------
    method : str
        A key of `METHODS`.
    density : float
        Share of entries that TIES keeps, by size, and DARE, at random.
    rank : int or None
        Directions of the result (``"svd"``), or of each task (``"tsv"``: by default its share of min(rows, cols)).
    side : {"input", "output"}
        On which ``"orthogonal"`` clears an update of earlier ones.
    scale : float
        Factor on the merged update.
    seed : int
        Of DARE's draws.

    Raises
    ------
    UsageError
        If a field is out of its range.
    """

    method: str = "sum"
    density: float = 0.2
    rank: int | None = None
    side: str = "input"
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"no merge is called {self.method!r}; there are {', '.join(METHODS)}")
        if not 0.0 < self.density <= 1.0:
            raise UsageError(f"density = {self.density}: the share of entries that are kept is above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank = {self.rank}: at least one direction")
        if self.method == "svd" and self.rank is None:
            raise UsageError("an svd merge needs a rank")
        if self.side not in ("input", "output"):
            raise UsageError(f"side = {self.side!r} is neither input nor output")
        if not math.isfinite(self.scale):
            raise UsageError(f"scale = {self.scale} is not finite")


def merged(updates: Sequence[Product], how: Merge, *, coefficients: Sequence[float] | None = None) -> Product:
    """Merge the updates of one matrix.

    Parameters
    ----------
    updates : sequence of Product
        One a task.
    how : Merge
    coefficients : sequence of float, optional
        aᵢ, which multiply the updates first; by default 1 each.

    Returns
    -------
    Product
        In factors of rank Σrᵢ where the method is linear.

    Raises
    ------
    UsageError
        If there is no update, or the coefficients are of another number or not finite.

    Notes
    -----
    TIES [1]_ keeps the largest entries of each update, elects the sign of their sum, and takes the mean of the entries
    that have it. DARE [2]_ keeps each entry with a probability and divides by it; draws depend on the seed and the
    update's own entries, so that the order of tasks changes nothing. KnOTS [3]_ takes the singular value decomposition
    [Δ₁ … Δ_T] = UΣ[V₁ … V_T]ᵀ and merges the Vᵢ by TIES. TSV-Merge [4]_ takes the nearest orthonormal columns to the
    stacked U and V. Iso-C [5]_ puts all singular values of the sum at their mean.

    References
    ----------
    .. [1] P. Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1.
    .. [2] L. Yu et al., "Language Models are Super Mario", ICML 2024, section 3.
    .. [3] G. Stoica et al., "Model Merging with SVD to Tie the Knots", ICLR 2025, section 4.
    .. [4] A. Gargiulo et al., "Task Singular Vectors", CVPR 2025, section 4.2.
    .. [5] D. Marczak et al., "No Task Left Behind", ICML 2025, section 4.

    Examples
    --------
    >>> one, two = Product(torch.ones(2, 1), torch.ones(1, 3)), Product(torch.ones(2, 1), -torch.ones(1, 3))
    >>> float(merged([one, two], Merge("sum"), coefficients=[2.0, 0.5]).dense()[0, 0])
    1.5
    """
    weights = [1.0] * len(updates) if coefficients is None else [float(value) for value in coefficients]
    if not updates or len(weights) != len(updates):
        raise UsageError(f"{len(weights)} coefficients for {len(updates)} updates")
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"coefficients {weights} must be finite")
    if how.method.startswith("dare"):  # before they are scaled, so that coefficients change no draw
        updates = [_thinned(update, how) for update in updates]
    scaled = [update.times(weight) for weight, update in zip(weights, updates, strict=True)]
    found = _MERGES[how.method](scaled, how)
    return found if how.scale == 1.0 else found.times(how.scale)


def concatenated(updates: Sequence[Product]) -> Product:
    """Σ Δᵢ in factors, of which the ranks add up, exactly; dense where one of them is."""
    if any(update.is_dense for update in updates):
        return Product.of(in_any_order([update.dense() for update in updates]))
    return Product(torch.cat([update.b for update in updates], dim=1), torch.cat([update.a for update in updates]))


def truncated(update: Product, rank: int) -> tuple[Product, float]:
    """The best update of a rank, and the share of the norm that it leaves, √(Σ_{i>r}σ²)/‖Δ‖ (Eckart–Young).

    Examples
    --------
    >>> best, error = truncated(Product.of(torch.diag(torch.tensor([4.0, 3.0]))), 1)
    >>> round(error, 6), round(best.norm, 6)
    (0.6, 4.0)
    """
    u, s, vh = update.svd
    norm = float(s.square().sum().sqrt())
    error = float(s[rank:].square().sum().sqrt()) / norm if norm > 0.0 else 0.0
    root = s[:rank].sqrt()
    return Product(u[:, :rank] * root, root[:, None] * vh[:rank]), error


def _svd(updates: Sequence[Product], how: Merge) -> Product:
    assert how.rank is not None
    return truncated(concatenated(updates), how.rank)[0]


def _sum(updates: Sequence[Product], how: Merge) -> Product:
    return concatenated(updates)


def _ties(updates: Sequence[Product], how: Merge) -> Product:
    return Product.of(ties([update.dense() for update in updates], how.density))


def _thinned(update: Product, how: Merge) -> Product:
    """DARE's part of an update; what is drawn depends on its factors, which no matrix product has rounded."""
    digest = hashlib.sha256(b"".join(factor.contiguous().numpy().tobytes() for factor in (update.b, update.a)))
    return Product.of(dropped(update.dense(), how.density, stream(how.seed, int.from_bytes(digest.digest(), "little"))))


def _dare_ties(updates: Sequence[Product], how: Merge) -> Product:
    return Product.of(ties([update.dense() for update in updates], 1.0))


def _knots(updates: Sequence[Product], how: Merge) -> Product:
    """U Σ times the TIES of the V's; U and Σ are those of the outputs alone, [Δ₁ …][Δ₁ …]ᵀ = UΣ²Uᵀ."""
    beside = torch.cat([update.b @ update.right_triangle.t() for update in updates], dim=1)
    u, s, _ = Product.of(beside).svd
    # Updates are differences of numbers in float32 at best: directions below that are rounding, as large in V as any.
    kept = s > max(updates[0].shape) * torch.finfo(torch.float32).eps * (s[0] if len(s) else 0.0)
    u, s = u[:, kept], s[kept]
    coordinates = [(u.t() @ update.b) @ update.a / s[:, None] for update in updates]  # Vᵢᵀ, (r, cols)
    return Product(u * s, ties(coordinates, how.density))


def _tsv(updates: Sequence[Product], how: Merge) -> Product:
    share = how.rank or max(1, min(updates[0].shape) // len(updates))
    triplets = [update.svd for update in updates]
    u = torch.cat([left[:, :share] for left, _, _ in triplets], dim=1)
    s = torch.cat([values[:share] for _, values, _ in triplets])
    v = torch.cat([right[:share] for _, _, right in triplets]).t()
    return Product(_nearest_orthonormal(u) * s, _nearest_orthonormal(v).t())


def _iso(updates: Sequence[Product], how: Merge) -> Product:
    u, s, vh = concatenated(updates).svd  # of low rank: the directions that are there
    return Product(u * (float(s.mean()) if len(s) else 0.0), vh)


def _orthogonal(updates: Sequence[Product], how: Merge) -> Product:
    """Each update loses what it reads (writes) of the span of those before it: the order counts."""
    cleared: list[Product] = []
    for update in updates:
        b, a = update.b, update.a
        if cleared:
            u, _, vh = concatenated(cleared).svd
            if how.side == "input":
                a = a - (a @ vh.t()) @ vh
            else:
                b = b - u @ (u.t() @ b)
        cleared.append(Product(b, a))
    return concatenated(cleared)


def _nearest_orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """P Qᵀ of P Σ Qᵀ: the nearest matrix with orthonormal columns (rows, where there are more columns).

    Where columns depend on each other, the isometry of their span alone: no direction is added that no task has.
    """
    p, s, qt = torch.linalg.svd(columns, full_matrices=False)
    kept = s > max(columns.shape) * torch.finfo(torch.float32).eps * s[0]
    found: torch.Tensor = p[:, kept] @ qt[kept]
    return found


def ties(tasks: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Trim, elect a sign, take the mean of the entries that have it; see `merged`.

    Parameters
    ----------
    tasks : sequence of Tensor of one shape
    density : float
        ⌊density·n⌋ entries of each are kept, at least one; of equal ones those that stand first.
    """
    kept = torch.stack([_trimmed(task, density) for task in tasks])
    elected = in_any_order(list(kept)).sign()
    agreeing = (kept.sign() == elected) & (kept != 0.0)
    total = in_any_order(list(torch.where(agreeing, kept, 0.0)))
    return total / agreeing.sum(dim=0).clamp_min(1)


def _trimmed(task: torch.Tensor, density: float) -> torch.Tensor:
    count = max(1, math.floor(density * task.numel() + 1e-9))  # 0.29 · 100 is 28.999… in binary
    if count >= task.numel():
        return task
    flat = task.reshape(-1)
    order = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
    return torch.zeros_like(flat).index_copy_(0, order, flat[order]).view_as(task)


def dropped(task: torch.Tensor, density: float, generator: np.random.Generator) -> torch.Tensor:
    """Every entry kept with a probability and divided by it."""
    kept = torch.from_numpy(generator.random(task.numel()) < density).view_as(task)
    return torch.where(kept, task / density, 0.0)


def in_any_order(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of tensors, to the same bits in whatever order they are given: entries are sorted before they are added."""
    return torch.stack(list(tensors)).sort(dim=0).values.sum(dim=0)


_MERGES = {
    "sum": _sum,
    "ties": _ties,
    "dare": _sum,
    "dare-ties": _dare_ties,
    "knots": _knots,
    "tsv": _tsv,
    "iso": _iso,
    "orthogonal": _orthogonal,
    "svd": _svd,
}
