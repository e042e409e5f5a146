"""`Geometry`: two or more updates of one base, compared, as tables and plots; one Parquet file keeps it."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spectra.errors import UnsafeCheckpoint, UsageError
from spectra.notebook import inline_svg, new_axes
from spectra.pairwise import pooled
from spectra.pairwise.ranks import EPSILON, RANKS, TOP
from spectra.parquet import read_table, write_table
from spectra.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARQUET = "geometry.parquet"

_TEXT = ("name", "role", "status", "reason", "a", "b")
_INTEGERS = ("layer", "rows", "cols", "resolved_a", "resolved_b", "intruders_a", "intruders_b", "common_rank")
_SIDES = ("left", "right")
# Rank at which one number stands for a table: LoRA's usual one.
_SHOWN = 8
COLUMNS = (
    "name",
    "layer",
    "role",
    "rows",
    "cols",
    "status",
    "reason",
    "a",
    "b",
    "base_frobenius",
    "frobenius_a",
    "frobenius_b",
    "relative_frobenius_a",
    "relative_frobenius_b",
    "norm_ratio",
    "cosine",
    "cosine_std",
    "overlap_left_8",
    "overlap_right_8",
    "above_chance_left_8",
    "above_chance_right_8",
    "common_rank",
    "overlap_left_common",
    "overlap_right_common",
    "above_chance_left_common",
    "above_chance_right_common",
    "capture_a_in_b_8",
    "capture_b_in_a_8",
    "capture_a_in_b_64",
    "capture_b_in_a_64",
    "optimum_a_8",
    "optimum_b_8",
    "optimum_a_64",
    "optimum_b_64",
    "resolved_a",
    "resolved_b",
    "intruders_a",
    "intruders_b",
)


@dataclass(frozen=True)
class Geometry:
    """Every matrix that two or more updates of one base change, compared.

    Parameters
    ----------
    records : tuple of dict
        One a tensor of the base, in stored order; JSON-able.
    info : dict
        Where they came from: base and updates with their digests, matching, settings, versions; JSON-able.

    Notes
    -----
    ``frame`` has one row a tensor and pair of updates that both change it, and one row (``a`` and ``b`` empty) for
    every other tensor. Its columns:

    ``cosine``, ``cosine_std``
        ⟨Δ_a, Δ_b⟩/(‖Δ_a‖‖Δ_b‖), and its standard deviation for updates of random directions.
    ``norm_ratio``
        ‖Δ_b‖/‖Δ_a‖.
    ``overlap_left_8``, ``above_chance_left_8``
        φ(8, 8) of the left singular subspaces, and the same where chance is 0 and equality 1; ``…_common``: at
        ``common_rank``, the largest tabulated rank that is known of both.
    ``capture_a_in_b_8``, ``optimum_a_8``
        Share of ‖Δ_a‖² inside the leading 8 row and column directions of Δ_b, and the most any 8 can hold.
    ``resolved_a``
        Leading directions of Δ_a that its errors (storage rounding, floating point) cannot have turned by 30°.
    ``intruders_a``
        Of the ten leading directions of W + Δ_a, those with |cos| < 0.5 to every direction of W.
    """

    records: tuple[Record, ...]
    info: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the updates, in order."""
        return tuple(update["label"] for update in self.info["updates"])

    @cached_property
    def _by_name(self) -> Mapping[str, Record]:
        return {record["name"]: record for record in self.records}

    def record(self, name: str) -> Record:
        """Everything known of one tensor.

        Raises
        ------
        KeyError
            If no tensor has that name.
        """
        found = self._by_name.get(name)
        if found is None:
            raise KeyError(f"no tensor is called {name!r}; geometry.frame.name lists them")
        return found

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a tensor and pair; NaN where a number does not apply. Columns: see the class."""
        rows = [row for record in self.records for row in self._rows(record)]
        data: dict[str, Any] = {}
        for column in COLUMNS:
            cells = [row.get(column) for row in rows]
            if column in _TEXT:
                data[column] = pd.Series(["" if cell is None else cell for cell in cells], dtype=object)
            elif column in _INTEGERS:
                data[column] = pd.Series([pd.NA if cell is None else int(cell) for cell in cells], dtype="Int64")
            else:
                data[column] = pd.Series([math.nan if cell is None else float(cell) for cell in cells], dtype="float64")
        frame: pd.DataFrame = pd.DataFrame(data)
        return frame

    def _rows(self, record: Record) -> Iterator[Record]:
        known = {key: record.get(key) for key in (*COLUMNS[:7], "base_frobenius")}
        pairs = record.get("pairs") or ()
        for pair in pairs:
            yield known | _flat(record, pair, self.labels)
        if not pairs:
            yield known

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row a pair of updates, pooled over the matrices that both change.

        Cosine and captured shares are weighted by energy; ``above_chance_…`` are medians of the overlap of the leading
        eight directions, or as many as both have; intruders are counted. ``…_chance`` is what random directions would
        give, ``optimum_…`` the most that so many directions can hold.
        """
        rows = []
        for a, b in combinations(range(len(self.labels)), 2):
            found = list(pooled.pairs_of(self.records, a, b))
            size = [math.sqrt(sum(r["updates"][i]["frobenius"] ** 2 for r, _ in found)) for i in (a, b)]
            cosine, deviation = pooled.cosine(self.records, a, b)
            row: Record = {
                "a": self.labels[a],
                "b": self.labels[b],
                "matrices": len(found),
                "frobenius_a": size[0],
                "frobenius_b": size[1],
                "norm_ratio": size[1] / size[0] if size[0] > 0 else math.nan,
                "cosine": cosine,
                "cosine_std": deviation,
            }
            for side in _SIDES:
                values = [
                    pooled.overlap_above(record, pair, min(_SHOWN, common), min(_SHOWN, common), side)
                    for record, pair in found
                    if (common := _common_rank(pair)) is not None
                ]
                row[f"above_chance_{side}"] = float(np.nanmedian(values)) if values else math.nan
            for way, (x, y), own in (("a_in_b", (a, b), "a"), ("b_in_a", (b, a), "b")):
                curve = pooled.capture(self.records, x, y)
                for rank in (_SHOWN, RANKS[-1]):
                    at = RANKS.index(rank)
                    row[f"capture_{way}_{rank}"] = float(curve.share[at])
                    row[f"capture_{way}_{rank}_chance"] = float(curve.chance[at])
                    row[f"optimum_{own}_{rank}"] = float(curve.optimum[at])
            for own, i in (("a", a), ("b", b)):
                row[f"intruders_{own}"], row[f"matched_{own}"] = pooled.intruders(self.records, i)
            rows.append(row)
        frame: pd.DataFrame = pd.DataFrame(rows)
        return frame

    @property
    def plot(self) -> GeometryPlots:
        """Plots: ``plot.overlap(name)``, ``plot.capture()``, ``plot.intruders()``, ``plot.spectra()``."""
        return GeometryPlots(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``geometry.parquet`` into a folder, atomically; the same geometry gives the same bytes.

        The columns are those of `frame`, and ``record``: all that is known of a tensor, as JSON, in its first row.

        Returns
        -------
        Path
            The file.
        """
        texts: list[str | None] = []
        for record in self.records:
            texts += [json.dumps(record, allow_nan=False)] + [None] * (max(1, len(record.get("pairs") or ())) - 1)
        table = pa.Table.from_pandas(
            self.frame.assign(record=pd.Series(texts, dtype=object)), schema=_schema(), preserve_index=False
        )
        return write_table(table, self.info, Path(folder) / PARQUET)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Geometry:
        """Read a geometry back from its folder, or from its Parquet file.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        UnsafeCheckpoint
            If the file was not written by `save`.
        """
        table, info = read_table(folder, PARQUET, kind="geometry")
        if "record" not in table.column_names:
            raise UnsafeCheckpoint(f"{folder} is no geometry: it has no column of records")
        texts = table.column("record").to_pylist()
        return cls(tuple(json.loads(text) for text in texts if text is not None), info)

    def _repr_html_(self) -> str:
        """Give a card: what was compared, the pairs as a table, captured shares as a picture."""
        labels = " · ".join(html.escape(label) for label in self.labels)
        base = html.escape(str(self.info["base"]["ref"]))
        table = self.pairs.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
        figure = inline_svg(self.plot.capture) if self.pairs.matrices.sum() else ""
        return f"<h4>{labels}</h4><p>updates of {base}</p>{table}{figure}"


def _common_rank(pair: Mapping[str, Any]) -> int | None:
    """Give the largest tabulated rank that is known of both updates."""
    common = [rank for i, rank in enumerate(RANKS) if pair["overlap_left"][i][i] is not None]
    return common[-1] if common else None


def _flat(record: Record, pair: Record, labels: tuple[str, ...]) -> Record:
    """What the frame shows of one tensor and pair."""
    a, b = pair["a"], pair["b"]
    row: Record = {
        "a": labels[a],
        "b": labels[b],
        "norm_ratio": pair["norm_ratio"],
        "cosine": pair["cosine"],
        "cosine_std": pair["cosine_std"],
    }
    for own, position in (("a", a), ("b", b)):
        update = record["updates"][position]
        row |= {f"{key}_{own}": update.get(key) for key in ("frobenius", "relative_frobenius")}
        row[f"resolved_{own}"] = update["resolved"]
        if "intruder_cosines" in update:
            row[f"intruders_{own}"] = sum(value < EPSILON for value in update["intruder_cosines"])
        for rank in (_SHOWN, RANKS[-1]):
            row[f"optimum_{own}_{rank}"] = update["optimum"][RANKS.index(rank)]
    row["common_rank"] = _common_rank(pair)
    for side in _SIDES:
        for rank, suffix in ((_SHOWN, "8"), (row["common_rank"], "common")):
            if rank is not None:
                at = RANKS.index(rank)
                row[f"overlap_{side}_{suffix}"] = pair[f"overlap_{side}"][at][at]
                row[f"above_chance_{side}_{suffix}"] = pooled.overlap_above(record, pair, rank, rank, side)
    for way, (x, y) in (("a_in_b", (a, b)), ("b_in_a", (b, a))):
        curve = pooled.shares(record, pair, x, y)
        for rank in (_SHOWN, RANKS[-1]):
            row[f"capture_{way}_{rank}"] = curve[RANKS.index(rank)]
    return row


@dataclass(frozen=True)
class GeometryPlots:
    """Axes-level plots of a geometry; each takes an optional ``ax`` and returns it. Updates are given by position."""

    geometry: Geometry

    def overlap(self, name: str, a: int = 0, b: int = 1, *, side: str = "left", ax: Axes | None = None) -> Axes:
        """Overlap φ(i, j) of one matrix' left (or right) directions; what is beyond resolution is hatched.

        Raises
        ------
        KeyError
            If no tensor has that name.
        UsageError
            If it was not compared, or there is no such side.
        """
        from spectra.plot import plot_overlap

        record = self.geometry.record(name)
        found = next(pooled.pairs_of([record], a, b), None)
        if found is None or side not in _SIDES:
            raise UsageError(
                f"{name} has no {side!r} overlap of updates {a} and {b}: {record['status']} {record.get('reason', '')}"
            )
        table = np.array(found[1][f"overlap_{side}"], dtype=np.float64)
        updates, labels = record["updates"], self.geometry.labels
        ax = new_axes() if ax is None else ax
        plot_overlap(
            ax,
            table if found[1]["a"] == a else table.T,
            RANKS,
            RANKS,
            names=(labels[a], labels[b]),
            resolved=(updates[a]["resolved"], updates[b]["resolved"]),
        )
        return ax

    def capture(self, a: int = 0, b: int = 1, *, ax: Axes | None = None) -> Axes:
        """Share of update a inside the leading directions of update b, between chance and optimum, all matrices."""
        from spectra.plot import plot_capture

        found, labels = pooled.capture(self.geometry.records, a, b), self.geometry.labels
        ax = new_axes() if ax is None else ax
        plot_capture(
            ax,
            found.ranks,
            found.share,
            optimum=found.optimum,
            chance=found.chance,
            label=f"{labels[a]} in {labels[b]}",
        )
        ax.legend(frameon=False)
        return ax

    def intruders(self, *, ax: Axes | None = None) -> Axes:
        """Directions of each tuned model that resemble none of the base's, against the threshold; a mean a matrix."""
        from spectra.plot import plot_intruders

        ax = new_axes() if ax is None else ax
        epsilons = np.linspace(0.05, 0.95, 19)
        for i, label in enumerate(self.geometry.labels):
            counted = [pooled.intruders(self.geometry.records, i, epsilon=float(epsilon)) for epsilon in epsilons]
            if counted[0][1]:
                plot_intruders(ax, epsilons, [TOP * count / matched for count, matched in counted], label=label)
        if ax.lines:
            ax.legend(frameon=False)
        return ax

    def spectra(self, name: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Leading singular values of every update of one matrix: by default of the one that is changed most.

        Raises
        ------
        KeyError
            If no tensor has that name.
        """
        from spectra.plot import plot_spectrum

        ax = new_axes() if ax is None else ax
        for label, update in zip(self.geometry.labels, self._chosen(name).get("updates", ()), strict=False):
            if update["kind"] != "none":
                plot_spectrum(ax, update["values"], floor=update.get("storage_floor"), label=label)
        return ax

    def _chosen(self, name: str | None) -> Record:
        if name is not None:
            return self.geometry.record(name)

        def moved(record: Record) -> float:
            return max((update.get("relative_frobenius", 0.0) for update in record.get("updates", ())), default=-1.0)

        return max(self.geometry.records, key=moved)


def _schema() -> pa.Schema:
    def kind(column: str) -> pa.DataType:
        if column in _TEXT:
            return pa.string()
        return pa.int64() if column in _INTEGERS else pa.float64()

    return pa.schema([*((column, kind(column)) for column in COLUMNS), ("record", pa.string())])
