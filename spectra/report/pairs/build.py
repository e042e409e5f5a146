"""From a geometry to everything the report says, as plain values: no file, no HTML and no figure in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spectra.pairwise.pooled import PooledPair, PooledUpdate, capture_told, pool_groups, pool_pairs, pool_updates
from spectra.pairwise.ranks import EPSILON, RANKS
from spectra.pairwise.rows import EPSILONS, SIDES, MatrixRow, PairRow, read_records
from spectra.report.build import command_line, json_ready
from spectra.report.flags import Flag
from spectra.report.pairs.flags import find_flags
from spectra.report.pairs.maps import heat_maps
from spectra.report.pairs.verdict import verdict
from spectra.report.tables import HeatMap
from spectra.report.text import finite

SCHEMA = 1
DIGITS = 12


class GeometryLike(Protocol):
    """What the report needs of a `spectra.Geometry`."""

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """One row a tensor."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Inputs, settings, versions."""

    @property
    def labels(self) -> Sequence[str]:
        """Short names of the updates."""

    def save(self, directory: Any) -> Any:
        """Write ``geometry.parquet``."""


@dataclass(frozen=True)
class PairsData:
    """Everything that the page, the terminal and ``summary.json`` say about a geometry."""

    base: str
    refs: tuple[str, ...]
    labels: tuple[str, ...]
    about: tuple[str, ...]
    verdict: tuple[str, ...]
    flags: tuple[Flag, ...]
    statuses: Mapping[str, int]
    updates: tuple[PooledUpdate, ...]
    pairs: tuple[PooledPair, ...]
    maps: Mapping[tuple[int, int], tuple[HeatMap, ...]]
    by_role: Mapping[tuple[int, int], tuple[tuple[str, PooledPair], ...]]
    by_layer: Mapping[tuple[int, int], tuple[tuple[str, PooledPair], ...]]
    rows: tuple[MatrixRow, ...]
    info: Mapping[str, Any]
    command: str

    @property
    def failed(self) -> bool:
        """Whether a comparison was due that could not be given: the command then ends with 1."""
        return any(row.failed for row in self.rows)


def build_report(geometry: GeometryLike) -> PairsData:
    """Compute the content of the report on two or more updates.

    Parameters
    ----------
    geometry : Geometry
        `spectra.Geometry`: its `records`, `info` and `labels` are read.

    Returns
    -------
    PairsData
    """
    rows, info, labels = read_records(geometry.records), geometry.info, tuple(geometry.labels)
    updates, pairs = pool_updates(rows, labels), pool_pairs(rows, len(labels))
    said = verdict(rows, updates, pairs)
    base = str(info.get("base", {}).get("ref", "base"))
    refs = tuple(str(side.get("ref", label)) for side, label in zip(info.get("updates", ()), labels, strict=True))
    return PairsData(
        base=base,
        refs=refs,
        labels=labels,
        about=tuple(about for about, _ in said),
        verdict=tuple(sentence for _, sentence in said),
        flags=find_flags(rows, updates, pairs, info),
        statuses=dict(sorted(Counter(r.status for r in rows).items())),
        updates=updates,
        pairs=pairs,
        maps={(p.a, p.b): heat_maps(rows, p, labels) for p in pairs},
        by_role={(p.a, p.b): pool_groups(rows, p, lambda row: row.role) for p in pairs},
        by_layer={(p.a, p.b): pool_groups(_by_depth(rows), p, _layer) for p in pairs},
        rows=rows,
        info=info,
        command=command_line(refs[0], refs[1], info.get("settings", {}), more=_more(base, refs)),
    )


def summary(data: PairsData) -> dict[str, Any]:
    """Return what ``summary.json`` holds: JSON-able, NaN as null.

    Parameters
    ----------
    data : PairsData
        Content of the report.
    """
    return {
        "schema": SCHEMA,
        "base": data.base,
        "updates": [_update(update, ref) for update, ref in zip(data.updates, data.refs, strict=True)],
        "verdict": list(data.verdict),
        "flags": [
            {"level": f.level, "kind": f.kind, "text": f.text, "tensors": [data.rows[i].name for i in f.positions]}
            for f in data.flags
        ],
        "statuses": dict(data.statuses),
        "ranks": list(RANKS),
        "pairs": [_pair(pair, data.labels) for pair in data.pairs],
        "tensors": [_tensor(row, data.pairs, data.labels) for row in data.rows],
    }


def manifest(data: PairsData) -> dict[str, Any]:
    """Return what ``manifest.json`` holds: inputs by digest or commit, versions, seed, flags, matching, the command.

    Parameters
    ----------
    data : PairsData
        Content of the report.
    """
    return {"schema": SCHEMA, "command": data.command, **json_ready(dict(data.info))}


def pair_numbers(row: MatrixRow, pair: PooledPair) -> dict[str, float]:
    """Return what one matrix says of one pair, by the keys of the glossary.

    Parameters
    ----------
    row : MatrixRow
        An analysed matrix that both updates change.
    pair : PooledPair
        The two updates; its rank is the one at which shared directions are counted.
    """
    held, one, other = row.pairs[pair.a, pair.b], row.updates[pair.a], row.updates[pair.b]
    numbers = {
        "cosine": held.cosine,
        "deviations": held.deviations,
        "norm_ratio": held.norm_ratio,
        "captured_ab": capture_told("a_in_b", held, one, other)[1],
        "captured_ba": capture_told("b_in_a", held, other, one)[1],
        "resolved": float(min(one.resolved, other.resolved)),
    }
    for side in SIDES:
        numbers |= _side_numbers(row, held, pair.rank, side)
    return numbers


def _side_numbers(row: MatrixRow, held: PairRow, rank: int, side: str) -> dict[str, float]:
    sided = getattr(held, side)
    numbers = {f"chordal_{side}": sided.chordal, f"geodesic_{side}": sided.geodesic}
    if rank:
        place = RANKS.index(rank)
        numbers |= {
            f"overlap_{side}": float(sided.overlap[place, place]),
            f"shared_{side}": float(row.above_chance(held, side)[place, place]),
        }
    return numbers


def _by_depth(rows: Sequence[MatrixRow]) -> list[MatrixRow]:
    return sorted(rows, key=lambda row: (row.layer is None, row.layer or 0))


def _layer(row: MatrixRow) -> str:
    return "outside layers" if row.layer is None else str(row.layer)


def _more(base: str, refs: Sequence[str]) -> list[str]:
    """Options of the command after the two updates: their base, and the updates beyond two."""
    return ["--base", base, *(word for ref in refs[2:] for word in ("--also", ref))]


def _update(update: PooledUpdate, ref: str) -> dict[str, Any]:
    place = EPSILONS.index(EPSILON)
    return {
        "label": update.label,
        "ref": ref,
        "kind": "adapter" if update.factored else "dense",
        "rank_limits": list(update.limits),
        "matrices": update.matrices,
        "relative_frobenius": finite(update.relative, DIGITS),
        "resolved": finite(update.resolved, DIGITS),
        "resolved_nf4": finite(update.resolved_nf4, DIGITS),
        "intruders": finite(update.intruders[place], DIGITS) if update.intruders else None,
        "intruders_random": finite(update.chance[place], DIGITS) if update.chance else None,
    }


def _pair(pair: PooledPair, labels: Sequence[str]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "a": labels[pair.a],
        "b": labels[pair.b],
        "matrices": pair.matrices,
        "cosine": finite(pair.cosine, DIGITS),
        "cosine_std": finite(pair.cosine_std, DIGITS),
        "relative_frobenius": [finite(v, DIGITS) for v in pair.relative],
        "rank": pair.rank,
        "resolved_matrices": pair.resolved_matrices,
    }
    for side in SIDES:
        plain[f"overlap_{side}"] = finite(pair.shared(side), DIGITS)
        plain[f"overlap_{side}_random"] = finite(pair.chance[side], DIGITS)
        plain[f"above_chance_{side}"] = finite(pair.shared_above(side), DIGITS)
    for way, held in pair.captured.items():
        told = {"share": held.share, "best": held.best, "random": held.random}
        curves = {"both": held.both, "left": held.left, "right": held.right, "optimum": held.optimum}
        plain[way] = {"ranks": list(held.ranks)} | {k: finite(v, DIGITS) for k, v in told.items()}
        plain[way]["curves"] = {k: [finite(float(v), DIGITS) for v in curve] for k, curve in curves.items()}
    return plain


def _tensor(row: MatrixRow, pairs: Sequence[PooledPair], labels: Sequence[str]) -> dict[str, Any]:
    """One tensor of the summary: enough to follow the verdict; the rest is in ``geometry.parquet``."""
    plain: dict[str, Any] = {"name": row.name, "status": row.status, "reason": row.reason}
    plain["pairs"] = [
        {"a": labels[p.a], "b": labels[p.b]} | {k: finite(v, DIGITS) for k, v in pair_numbers(row, p).items()}
        for p in pairs
        if row.analysed and (p.a, p.b) in row.pairs
    ]
    return plain
