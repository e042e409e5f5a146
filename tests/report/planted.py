"""A planted run, in the shape of `spectra.Run`: a six-layer BERT whose spectra are drawn from a known law.

Nothing is decomposed: singular values are planted (signal over a noise bulk), and every column follows from them by its
definition, so that what the report prints can be checked against the values that were put in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectra.values import Certificate, Spectrum

ROLES = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
BOUNDED = (
    "spectral_norm", "nuclear_norm", "signal_rank", "stable_rank", "entropy_rank", "entropy_rank_energy",
    "participation_ratio", "numerical_rank", "rank_50", "rank_90", "rank_95", "rank_99",
    "error_r1", "error_r2", "error_r4", "error_r8", "error_r16", "error_r32", "error_r64",
)  # fmt: skip
COLUMNS = (
    "name", "layer", "role", "rows", "cols", "dtype_base", "dtype_tuned", "status", "reason", "route", "frobenius",
    "relative_frobenius", "base_frobenius", "storage_floor", "storage_frobenius", "zero_fraction", "merge_loss",
    "mp_edge", "mp_rank", "gd_rank", "decay_exponent", "gap", "tail_norm", "roundoff", *BOUNDED,
    *(f"{name}_{end}" for name in BOUNDED for end in ("low", "high")),
)  # fmt: skip
HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "javascript:window.pwned=1",
    "\u202egnp.live\u202c",
    "bell\x07 and clear\x1b[2J\x1b[H\r\n\x00",
    "$\\frac{1}{0}$ _math_ {{ 7*7 }} {% raw %}",
    "層.重み.\u0301\u0301",
    "x" * 10_000,
)


@dataclass
class PlantedRun:
    """What the report reads of a run; `save` writes a marker in place of the Parquet file."""

    frame: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)

    def spectrum(self, name: str) -> Spectrum:
        line = self.frame[self.frame["name"] == name].iloc[0]
        high = line.singular_values_high
        certificate = Certificate(
            line.route,
            gap=line.gap,
            tail_norm=line.tail_norm,
            roundoff=line.roundoff,
            storage_floor=line.storage_floor,
            upper=high if len(high) else None,
        )
        return Spectrum(line.singular_values, (int(line.rows), int(line.cols)), line.frobenius, certificate)

    def save(self, directory: Any) -> Path:
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = Path(directory) / "spectra.parquet"
        path.write_bytes(b"PAR1")
        return path


def spectrum(
    shape: tuple[int, int], rng: np.random.Generator, *, signal: int, noise: float, decay: float
) -> np.ndarray:
    """`signal` values falling as a power law over a quarter-circle bulk that ends at `noise`."""
    p = min(shape)
    bulk = noise * np.sqrt(np.linspace(1.0, 0.0025, p))
    bulk[:signal] = np.maximum(bulk[:signal], np.arange(1, signal + 1) ** -decay)
    return np.sort(bulk * rng.uniform(0.97, 1.03, p))[::-1]


def measures(s: np.ndarray, shape: tuple[int, int], floor: float) -> dict[str, float]:
    """Every measure of a complete spectrum, from its definition."""
    energy, p, q = s**2, s / s.sum(), s**2 / np.sum(s**2)
    curve = np.cumsum(energy) / energy.sum()
    tail = np.sqrt(np.maximum(1 - curve, 0))
    ranks = {f"rank_{t}": float(np.searchsorted(curve, t / 100) + 1) for t in (50, 90, 95, 99)}
    errors = {f"error_r{r}": float(tail[r - 1]) if r <= len(s) else 0.0 for r in (1, 2, 4, 8, 16, 32, 64)}
    return ranks | errors | {
        "spectral_norm": s[0],
        "nuclear_norm": s.sum(),
        "signal_rank": float(np.sum(s > floor)) if math.isfinite(floor) else math.nan,
        "stable_rank": energy.sum() / energy[0],
        "entropy_rank": math.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)))),
        "entropy_rank_energy": math.exp(-np.sum(q * np.log(np.where(q > 0, q, 1)))),
        "participation_ratio": energy.sum() ** 2 / np.sum(energy**2),
        "numerical_rank": float(np.sum(s > max(shape) * 1.2e-7 * s[0])),
    }  # fmt: skip


def row(name: str, layer: int | None, role: str, shape: tuple[int, ...], status: str, **known: Any) -> dict[str, Any]:
    """A row with every column, unknown unless given."""
    empty: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    empty |= {"name": name, "layer": layer, "role": role, "status": status, "reason": "", "route": ""}
    empty |= {"rows": shape[0] if shape else None, "cols": shape[1] if len(shape) > 1 else None}
    empty |= {"dtype_base": "F32", "dtype_tuned": "F32", "singular_values": np.empty(0)}
    empty["singular_values_high"] = np.empty(0)
    return empty | known


def matrix_row(
    name: str,
    layer: int | None,
    role: str,
    shape: tuple[int, int],
    s: np.ndarray,
    *,
    relative: float,
    floor: float,
    rounding: float,
    keep: int | None = None,
    **known: Any,
) -> dict[str, Any]:
    """A changed matrix with these singular values; `keep` leaves only so many, with bounds in place of measures."""
    found = measures(s, shape, floor)
    whole = float(np.sqrt(np.sum(s**2)))
    fields: dict[str, Any] = {
        "frobenius": whole,
        "relative_frobenius": relative,
        "base_frobenius": whole / relative,
        "storage_floor": floor,
        "storage_frobenius": rounding * whole,
        "zero_fraction": 0.01,
        "mp_edge": float(np.median(s) * 2.3),
        "mp_rank": float(np.sum(s > np.median(s) * 2.3)),
        "gd_rank": float(np.sum(s > np.median(s) * 2.86)),
        "decay_exponent": 0.4,
        "gap": 0.0,
        "tail_norm": 0.0,
        "roundoff": 3e-14 * s[0],
        "route": "gram float64",
    }
    if keep is None:
        fields |= found | {"singular_values": s}
    else:
        gap = float(np.sqrt(np.sum(s[keep:] ** 2)))
        fields |= {f"{k}_low": v * 0.98 for k, v in found.items()} | {
            f"{k}_high": min(v * 1.05, min(shape)) for k, v in found.items()
        }
        fields |= {"singular_values": s[:keep], "singular_values_high": np.sqrt(s[:keep] ** 2 + s[keep] ** 2)}
        fields |= {"gap": gap, "tail_norm": float(s[keep]), "route": "sketch: block Krylov, 80 columns, 2 iterations"}
        fields |= {"mp_edge": math.nan, "mp_rank": math.nan, "gd_rank": math.nan}
    return row(name, layer, role, shape, "ok", **(fields | known))


def planted_run(*, hostile: bool = False, layers: int = 6, seed: int = 0) -> PlantedRun:
    """A full report's worth: every role, a truncated embedding, vectors, buffers, a noisy layer, a NaN."""
    rng = np.random.default_rng(seed)
    table = [_embedding(rng)]
    ids = "embeddings.position_ids"
    one_side = {"dtype_base": "I64", "dtype_tuned": "", "reason": "buffer on one side only"}
    table.append(row(ids, None, ids, (1, 512), "base_only", **one_side))
    for layer in range(layers):
        for place, (role, shape) in enumerate(ROLES.items()):
            name = f"encoder.layer.{layer}.{role}"
            depth = layer / max(layers - 1, 1)
            signal, noise = 10 + 4 * place, 0.10 + 0.05 * depth
            s = spectrum(shape, rng, signal=signal, noise=noise, decay=0.35) * 0.2
            noisy = role == "attention.self.key" and layer == 0
            table.append(matrix_row(
                f"{name}.weight", layer, role, shape, s, relative=0.006 + 0.002 * place + 0.01 * depth,
                floor=0.035 if noisy else 0.002, rounding=0.81 if noisy else 0.03,
            ))  # fmt: skip
            table.append(row(f"{name}.bias", layer, f"{role}.bias", (shape[0],), "vector", frobenius=1e-3,
                             relative_frobenius=0.004, base_frobenius=0.25))  # fmt: skip
        norm = f"encoder.layer.{layer}.output.LayerNorm.weight"
        table.append(
            row(
                norm,
                layer,
                "output.LayerNorm",
                (384,),
                "vector",
                frobenius=2e-3,
                relative_frobenius=1e-4,
                base_frobenius=20.0,
            )
        )
    table.append(row("pooler.dense.weight", None, "pooler.dense", (384, 384), "unchanged", frobenius=0.0,
                     relative_frobenius=0.0, base_frobenius=10.0, singular_values=np.zeros(384)))  # fmt: skip
    table.append(row("head.weight", None, "head", (2, 384), "nonfinite", reason="3 of 768 entries are NaN"))
    if hostile:
        for i, name in enumerate(HOSTILE):
            s = spectrum((64, 48), rng, signal=4, noise=0.1, decay=0.5)
            table.append(matrix_row(name, None if i % 2 else 0, name[:60], (64, 48), s, relative=0.02, floor=0.01,
                                    rounding=0.1, reason=name[:80]))  # fmt: skip
    frame = pd.DataFrame(table).astype({"layer": "Int64", "rows": "Int64", "cols": "Int64"})
    return PlantedRun(frame, planted_info(len(table)))


def adapter_run(rank: int = 8, layers: int = 4) -> PlantedRun:
    """A LoRA adapter: the spectrum of every update is exact from its factors and has `rank` values."""
    rng = np.random.default_rng(3)
    table = []
    for layer in range(layers):
        for role in ("attention.self.query", "attention.self.value"):
            s = np.concatenate([np.sort(rng.uniform(0.2, 1.0, rank))[::-1], np.zeros(384 - rank)])
            table.append(matrix_row(f"encoder.layer.{layer}.{role}.weight", layer, role, (384, 384), s, relative=0.03,
                                    floor=1e-4, rounding=1e-4, route=f"factors of rank {rank} in float64",
                                    merge_loss=0.2))  # fmt: skip
    frame = pd.DataFrame(table).astype({"layer": "Int64", "rows": "Int64", "cols": "Int64"})
    return PlantedRun(frame, planted_info(len(table)))


def run_of(*rows: dict[str, Any]) -> PlantedRun:
    """A run with just these rows."""
    frame = pd.DataFrame(list(rows)).astype({"layer": "Int64", "rows": "Int64", "cols": "Int64"})
    return PlantedRun(frame, planted_info(len(rows)))


def _embedding(rng: np.random.Generator) -> dict[str, Any]:
    s = spectrum((30522, 384), rng, signal=30, noise=0.3, decay=0.3)
    return matrix_row("embeddings.word_embeddings.weight", None, "embeddings.word_embeddings", (30522, 384), s,
                      relative=0.004, floor=0.01, rounding=0.05, keep=64, reason="")  # fmt: skip


def planted_info(tensors: int) -> dict[str, Any]:
    """Inputs, matching, settings and versions of a made-up pair."""
    side = {"kind": "safetensors", "tensors": tensors, "parameters": 22_713_216, "bytes": 90_868_376, "revision": None}
    digest = {"name": "model.safetensors", "bytes": 90_868_376, "sha256": "53aa51172d142c89" * 4, "sampled": False}
    return {
        "base": side | {"ref": "models/minilm-base", "digests": [digest]},
        "tuned": side | {"ref": "models/minilm-tuned", "digests": [digest]},
        "matching": {
            "matched": tensors - 1,
            "total": tensors,
            "share": (tensors - 1) / tensors,
            "transforms": ["prefix “bert.” stripped from every name of the tuned checkpoint"],
        },
        "settings": {"rank": 64, "seed": 0, "include": None, "exclude": None, "exact": False},
        "versions": {"spectra": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.0"},
        "threads": 2,
    }
