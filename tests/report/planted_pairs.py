"""A planted geometry, in the shape of `spectra.Geometry`: updates of a small model whose subspaces are known.

Every matrix is made of planted directions and decomposed here, by numpy alone and in the plainest way, so that what the
report prints can be checked against what was put in. Where an adapter is asked to have found an update, its factors are
the leading directions of that update, turned by a known angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.report.planted import HOSTILE, planted_info

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROLES = {"attention.self.query": (96, 96), "attention.self.value": (96, 96), "output.dense": (96, 160)}
RANK = 8
Matrix = NDArray[np.float64]


@dataclass
class PlantedGeometry:
    """What the report reads of a geometry; `save` writes a marker in place of the Parquet file."""

    records: tuple[dict[str, Any], ...]
    info: dict[str, Any]
    labels: tuple[str, ...]

    def save(self, directory: Any) -> Path:
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = Path(directory) / "geometry.parquet"
        path.write_bytes(b"PAR1")
        return path


@dataclass(frozen=True)
class Update:
    """One update of a matrix: dense, or the product of factors of rank `rank`."""

    delta: Matrix
    kind: str = "dense"
    floor: float = 0.0
    dtype: str = "F32"

    @property
    def limit(self) -> int:
        return RANK if self.kind == "factors" else min(self.delta.shape)


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def dense(shape: tuple[int, int], rng: np.random.Generator, *, size: float = 1.0, noise: float = 0.02) -> Matrix:
    """Sixteen directions that fall as a power law, over noise."""
    signal = orthonormal(shape[0], 16, rng) * np.arange(1, 17) ** -0.5 @ orthonormal(shape[1], 16, rng).T
    return size * (signal + noise * rng.standard_normal(shape))


def found(of: Matrix, rng: np.random.Generator, *, angle: float, size: float = 1.0) -> Matrix:
    """A matrix of rank 8 whose every direction stands at this angle to one of the leading 8 of another matrix."""
    u, s, vh = np.linalg.svd(of)
    left, right = u[:, :RANK], vh[:RANK].T
    away_left = u[:, RANK + 16 :] @ orthonormal(u.shape[1] - RANK - 16, RANK, rng)
    away_right = vh.T[:, RANK + 16 :] @ orthonormal(vh.shape[1] - RANK - 16, RANK, rng)
    left = math.cos(angle) * left + math.sin(angle) * away_left
    right = math.cos(angle) * right + math.sin(angle) * away_right
    return size * left * s[:RANK] @ right.T


def record(name: str, layer: int | None, role: str, base: Matrix, updates: Sequence[Update | None]) -> dict[str, Any]:
    """One tensor's row, everything decomposed."""
    held = [None if u is None else _decomposed(u) for u in updates]
    present = [i for i, u in enumerate(updates) if u is not None]
    left = np.linalg.svd(base, full_matrices=False)[0]
    plain = {
        "name": name, "layer": layer, "role": role, "rows": base.shape[0], "cols": base.shape[1], "dtype_base": "F32",
        "status": "ok" if len(present) > 1 else "one_sided" if present else "unchanged", "reason": "",
        "base_frobenius": float(np.linalg.norm(base)), "nf4_floor": 0.0625 * float(np.linalg.norm(base, 2)),
        "basis": left.shape[1], "route": "gram float64",
    }  # fmt: skip
    plain["updates"] = [
        {"kind": "none"} if u is None else _update(u, h, base, left, plain["nf4_floor"])
        for u, h in zip(updates, held, strict=True)
    ]
    plain["pairs"] = [
        _pair(a, b, updates, held, plain["updates"]) for i, a in enumerate(present) for b in present[i + 1 :]
    ]
    return plain


def planted_geometry(
    *, updates: int = 2, layers: int = 3, hostile: bool = False, seed: int = 0, **info: Any
) -> PlantedGeometry:
    """A full fine-tune, an adapter that found half of its angle, another seed of it, and one that went elsewhere."""
    rng = np.random.default_rng(seed)
    table = []
    for layer in range(layers):
        for role, shape in ROLES.items():
            table.append(_planted(f"encoder.layer.{layer}.{role}.weight", layer, role, shape, updates, rng))
            table.append(_bare(f"encoder.layer.{layer}.{role}.bias", layer, f"{role}.bias", (shape[0], 1), "vector"))
    base, full = rng.standard_normal((96, 96)) / 10, dense((96, 96), rng)
    table.append(record("pooler.dense.weight", None, "pooler.dense", base, [Update(full), *[None] * (updates - 1)]))
    table.append(_bare("embeddings.weight", None, "embeddings", (300, 96), "unchanged"))
    nan = {"reason": "3 of 768 entries of the update are NaN"}
    table.append(_bare("head.weight", None, "head", (96, 8), "nonfinite") | nan)
    if hostile:
        for i, name in enumerate(HOSTILE):
            table.append(
                _planted(name, None if i % 2 else 0, name[:60], (96, 96), updates, rng) | {"reason": name[:80]}
            )
    labels = ("full", "lora", "lora-seed-1", "elsewhere")[:updates]
    return PlantedGeometry(tuple(table), geometry_info(labels, len(table)) | info, labels)


def geometry_of(*records: dict[str, Any], labels: tuple[str, ...] = ("full", "lora"), **info: Any) -> PlantedGeometry:
    """A geometry with just these rows."""
    return PlantedGeometry(records, geometry_info(labels, len(records)) | info, labels)


def geometry_info(labels: Sequence[str], tensors: int) -> dict[str, Any]:
    """Inputs, settings and versions of made-up updates of one base."""
    held = planted_info(max(tensors, 1))
    sides = [
        held["tuned"]
        | {"ref": f"runs/{label}", "label": label, "notes": []}
        | {"digests": [each | {"sha256": f"{i:064x}"} for each in held["tuned"]["digests"]]}
        for i, label in enumerate(labels)
    ]
    return {
        "base": held["base"] | {"notes": []},
        "updates": sides,
        "notes": [],
        "settings": {"rank": 64, "seed": 0, "include": None, "exclude": None, "exact": False},
        "versions": held["versions"],
        "threads": 2,
    }


def _planted(
    name: str, layer: int | None, role: str, shape: tuple[int, int], updates: int, rng: np.random.Generator
) -> dict[str, Any]:
    base = rng.standard_normal(shape) / 10
    full = dense(shape, rng, size=0.1, noise=0.01)
    depth = (layer or 0) / 10
    made = [
        Update(full, floor=1e-4),
        Update(found(full, rng, angle=0.4 + depth), "factors"),
        Update(found(full, rng, angle=0.7 + depth, size=2.0), "factors"),
        Update(found(dense(shape, rng, size=0.1), rng, angle=0.1, size=20.0), "factors"),
    ]
    return record(name, layer, role, base, made[:updates])


def _bare(name: str, layer: int | None, role: str, shape: tuple[int, int], status: str) -> dict[str, Any]:
    return {"name": name, "layer": layer, "role": role, "rows": shape[0], "cols": shape[1], "dtype_base": "F32",
            "status": status, "reason": "", "updates": [], "pairs": []}  # fmt: skip


def _decomposed(update: Update) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vh = np.linalg.svd(update.delta, full_matrices=False)
    keep = min(update.limit, RANKS[-1])
    return u[:, :keep], s[:keep], vh[:keep].T


def _sines(s: Matrix, error: float, after: float) -> Matrix:
    gap = s - np.append(s[1:], after) - error
    with np.errstate(divide="ignore"):
        return np.where(gap > 0, np.minimum(error / np.where(gap > 0, gap, 1.0), 1.0), 1.0 if error > 0 else 0.0)


def _resolved(sines: Matrix) -> int:
    return int(max(np.nonzero(sines <= 0.5)[0], default=-1) + 1)


def _update(update: Update, held: Any, base: Matrix, left: Matrix, nf4: float) -> dict[str, Any]:
    u, s, v = held
    whole, norm, count = np.linalg.norm(update.delta), np.linalg.norm(base), base.size
    every = np.linalg.svd(update.delta, compute_uv=False)
    after = float(every[len(s)]) if len(every) > len(s) else 0.0
    sines = _sines(s, update.floor, after)
    kept = [r for r in RANKS if r <= len(s)]
    core = [float(np.linalg.norm(u[:, :r].T @ base @ v[:, :r])) for r in kept]
    tuned = np.linalg.svd(base + update.delta, full_matrices=False)[0][:, :10]
    fields: dict[str, Any] = {
        "kind": update.kind,
        "dtype": update.dtype,
        "frobenius": float(whole),
        "relative_frobenius": float(whole / norm),
        "spectral_norm": float(s[0]),
        "rank_limit": update.limit,
        "held": len(s),
        "values": [float(x) for x in s],
        "sines": [float(x) for x in sines],
        "vector_sines": [float(x) for x in np.minimum(1.0, 1.5 * sines)],
        "resolved": _resolved(sines),
        "resolved_nf4": _resolved(_sines(s, nf4, after)),
        "optimum": [float(np.sum(every[:r] ** 2) / whole**2) for r in kept],
        "amplification": [float(whole / max(c, 1e-300)) for c in core],
        "amplification_random": [float(whole * math.sqrt(count) / (r * norm)) for r in kept],
        "intruder_cosines": [float(x) for x in np.abs(left.T @ tuned).max(axis=0)],
        "intruder_resolved": [True] * 8 + [False] * 2,
    }
    return fields | ({"storage_floor": update.floor} if update.kind == "dense" else {})


def _pair(a: int, b: int, updates: Sequence[Update | None], held: Sequence[Any], told: Sequence[Any]) -> dict[str, Any]:
    (ua, _, va), (ub, _, vb) = held[a], held[b]
    one, other = (updates[i].delta for i in (a, b))  # type: ignore[union-attr]
    counts = [min(t["resolved"] or t["held"], 64) for t in (told[a], told[b])]
    plain: dict[str, Any] = {
        "a": a,
        "b": b,
        "cosine": float(np.sum(one * other) / (np.linalg.norm(one) * np.linalg.norm(other))),
        "cosine_std": 1 / math.sqrt(one.size),
        "norm_ratio": float(np.linalg.norm(other) / np.linalg.norm(one)),
        "angle_ranks": counts,
        "capture": {"a_in_b": _capture(one, ub, vb), "b_in_a": _capture(other, ua, va)},
    }
    error = [[_error(told[a], i, told[b], j) for j in RANKS] for i in RANKS]
    for side, x, y in (("left", ua, ub), ("right", va, vb)):
        plain[f"overlap_{side}"] = [[_overlap(x, i, y, j) for j in RANKS] for i in RANKS]
        plain[f"overlap_{side}_error"] = error
        cosines = np.linalg.svd(x[:, : counts[0]].T @ y[:, : counts[1]], compute_uv=False)
        angles = np.sort(np.arccos(np.minimum(cosines, 1.0)))
        plain[f"angles_{side}"] = [float(t) for t in angles]
        plain[f"chordal_{side}"] = float(np.linalg.norm(np.sin(angles)))
        plain[f"geodesic_{side}"] = float(np.linalg.norm(angles))
    return plain


def _overlap(x: Matrix, i: int, y: Matrix, j: int) -> float | None:
    if i > x.shape[1] or j > y.shape[1]:
        return None
    return float(np.linalg.norm(x[:, :i].T @ y[:, :j]) ** 2 / min(i, j))


def _error(a: dict[str, Any], i: int, b: dict[str, Any], j: int) -> float | None:
    if i > a["held"] or j > b["held"]:
        return None
    return float(min(a["sines"][i - 1] + b["sines"][j - 1], 1.0))


def _capture(delta: Matrix, u: Matrix, v: Matrix) -> dict[str, Any]:
    whole = np.linalg.norm(delta) ** 2
    kept = [r for r in RANKS if r <= u.shape[1]]
    return {
        "left": [float(np.linalg.norm(u[:, :r].T @ delta) ** 2 / whole) for r in kept],
        "right": [float(np.linalg.norm(delta @ v[:, :r]) ** 2 / whole) for r in kept],
        "both": [float(np.linalg.norm(u[:, :r].T @ delta @ v[:, :r]) ** 2 / whole) for r in kept],
        "held": {
            "rank": u.shape[1],
            "left": float(np.linalg.norm(u.T @ delta) ** 2 / whole),
            "right": float(np.linalg.norm(delta @ v) ** 2 / whole),
            "both": float(np.linalg.norm(u.T @ delta @ v) ** 2 / whole),
        },
    }
