"""`Geometry`: two or more updates of one base, compared, as tables and plots; one Parquet file keeps it."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from spectra.errors import UnsafeCheckpoint, UsageError
from spectra.notebook import inline_svg, new_axes
from spectra.pairwise.pooled import WAYS, PooledPair, PooledUpdate, pool_pairs, pool_updates
from spectra.pairwise.ranks import EPSILON, RANKS
from spectra.pairwise.rows import EPSILONS, SHARED, SIDES, MatrixRow, PairRow, read_records
from spectra.parquet import read_table, write_table
from spectra.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARQUET = "geometry.parquet"

_TEXT = ("name", "role", "status", "reason", "a", "b")
_INTEGERS = (
    "layer",
    "rows",
    "cols",
    "resolved_a",
    "resolved_b",
    "intruders_a",
    "intruders_b",
    "determined_a",
    "determined_b",
    "common_rank",
)
# Ranks at which one number stands for a table or a curve.
_SHOWN = (SHARED, RANKS[-1])
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
    "determined_a",
    "determined_b",
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
    ``determined_a``
        Of the same ten, those that are directions at all: no known error can have turned them by 30°.
    """

    records: tuple[Record, ...]
    info: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the updates, in order."""
        return tuple(update["label"] for update in self.info["updates"])

    @cached_property
    def _matrices(self) -> tuple[MatrixRow, ...]:
        return read_records(self.records)

    @cached_property
    def _pooled(self) -> tuple[PooledPair, ...]:
        return pool_pairs(self._matrices, len(self.labels))

    @cached_property
    def _updates(self) -> tuple[PooledUpdate, ...]:
        return pool_updates(self._matrices, self.labels)

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
        both = zip(self.records, self._matrices, strict=True)
        rows = [row for record, matrix in both for row in self._rows(record, matrix)]
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

    def _rows(self, record: Record, matrix: MatrixRow) -> Iterator[Record]:
        known = {key: record.get(key) for key in (*COLUMNS[:7], "base_frobenius")}
        for pair in matrix.pairs.values():
            yield known | _flat(matrix, pair, self.labels)
        if not matrix.pairs:
            yield known

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row a pair of updates, pooled over the matrices that both change: the numbers of the report.

        Cosine and captured shares are weighted by energy; ``above_chance_…`` are medians of the overlap of the leading
        ``rank`` directions, eight or as many as most matrices have of both. ``capture_a_in_b`` and its like are told at
        the rank of an adapter, else at the largest that is known, and again at 8 and at 64; ``optimum_…`` is the most
        that so many directions can hold, ``…_chance`` what random ones would. ``intruders_…`` count among ``matched_…``
        leading directions of all compared matrices that an update changes, of which ``determined_…`` are directions at
        all.
        """
        frame: pd.DataFrame = pd.DataFrame([self._pair(pair) for pair in self._pooled])
        return frame

    def _pair(self, pair: PooledPair) -> Record:
        row: Record = {
            "a": self.labels[pair.a],
            "b": self.labels[pair.b],
            "matrices": pair.matrices,
            "relative_frobenius_a": pair.relative[0],
            "relative_frobenius_b": pair.relative[1],
            "norm_ratio": pair.relative[1] / pair.relative[0] if pair.relative[0] > 0 else math.nan,
            "cosine": pair.cosine,
            "cosine_std": pair.cosine_std,
            "rank": pair.rank,
        }
        row |= {f"above_chance_{side}": pair.shared_above(side) for side in SIDES}
        for way, own in zip(WAYS, "ab", strict=True):
            held = pair.captured[way]
            row |= {f"capture_{way}": held.share, f"capture_{way}_chance": held.random, f"optimum_{own}": held.best}
            for rank in _SHOWN:
                at = RANKS.index(rank)
                row[f"capture_{way}_{rank}"] = float(held.both[at])
                row[f"capture_{way}_{rank}_chance"] = float(held.chance[at])
                row[f"optimum_{own}_{rank}"] = float(held.optimum[at])
        for own, place in (("a", pair.a), ("b", pair.b)):
            update = self._updates[place]
            row |= {
                f"intruders_{own}": update.count(EPSILON),
                f"matched_{own}": update.directions,
                f"determined_{own}": update.clear,
            }
        return row

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
        figure = inline_svg(self.plot.capture) if self._pooled else ""
        return f"<h4>{labels}</h4><p>updates of {base}</p>{table}{figure}"


def _flat(row: MatrixRow, pair: PairRow, labels: tuple[str, ...]) -> Record:
    """What the frame shows of one tensor and pair."""
    places = [i for i in range(len(RANKS)) if math.isfinite(pair.left.overlap[i, i])]
    common = places[-1] if places else None
    flat: Record = {
        "a": labels[pair.a],
        "b": labels[pair.b],
        "norm_ratio": pair.norm_ratio,
        "cosine": pair.cosine,
        "cosine_std": pair.cosine_std,
        "common_rank": None if common is None else RANKS[common],
    }
    for own, position in (("a", pair.a), ("b", pair.b)):
        update = row.updates[position]
        flat |= {
            f"frobenius_{own}": update.frobenius,
            f"relative_frobenius_{own}": update.relative,
            f"resolved_{own}": update.resolved,
        }
        if update.cosines:
            flat |= {f"intruders_{own}": update.intruders(EPSILON), f"determined_{own}": sum(update.clear)}
        flat |= {f"optimum_{own}_{rank}": update.optimum_at(rank) for rank in _SHOWN}
    for side in SIDES:
        raw, above = getattr(pair, side).overlap, row.above_chance(pair, side)
        for at, suffix in ((RANKS.index(SHARED), SHARED), (common, "common")):
            if at is not None:
                flat |= {f"overlap_{side}_{suffix}": raw[at, at], f"above_chance_{side}_{suffix}": above[at, at]}
    for way in WAYS:
        flat |= {f"capture_{way}_{rank}": pair.captured[way]["both"][RANKS.index(rank)] for rank in _SHOWN}
    return flat


@dataclass(frozen=True)
class GeometryPlots:
    """Axes-level plots of a geometry; each takes an optional ``ax`` and returns it. Updates are given by position."""

    geometry: Geometry

    @property
    def _labels(self) -> list[str]:
        """Names of the updates with no formula in them, which matplotlib sees between two dollars."""
        return [label.replace("$", r"\$") for label in self.geometry.labels]

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
        row = next(row for row in self.geometry._matrices if row.name == name)
        pair = row.pairs.get((min(a, b), max(a, b)))
        if pair is None or side not in SIDES:
            raise UsageError(
                f"{name} has no {side!r} overlap of updates {a} and {b}: {record['status']} {record.get('reason', '')}"
            )
        table, labels = getattr(pair, side).overlap, self._labels
        ax = new_axes() if ax is None else ax
        plot_overlap(
            ax,
            table if a < b else table.T,
            RANKS,
            RANKS,
            names=(labels[a], labels[b]),
            resolved=(row.updates[a].resolved, row.updates[b].resolved),
        )
        return ax

    def capture(self, a: int = 0, b: int = 1, *, ax: Axes | None = None) -> Axes:
        """Share of update a inside the leading directions of update b, between chance and optimum, all matrices.

        Raises
        ------
        UsageError
            If no matrix is changed by both.
        """
        from spectra.plot import plot_capture

        pair = next((p for p in self.geometry._pooled if (p.a, p.b) == (min(a, b), max(a, b))), None)
        if pair is None:
            raise UsageError(f"no matrix is changed by both updates {a} and {b}: geometry.pairs lists what is compared")
        held, labels = pair.captured["a_in_b" if a < b else "b_in_a"], self._labels
        ax = new_axes() if ax is None else ax
        plot_capture(
            ax, RANKS, held.both, optimum=held.optimum, chance=held.chance, label=f"{labels[a]} in {labels[b]}"
        )
        ax.legend(frameon=False)
        return ax

    def intruders(self, *, ax: Axes | None = None) -> Axes:
        """Directions of each tuned model that resemble none of the base's, against the threshold; a mean a matrix."""
        from spectra.plot import plot_intruders

        ax = new_axes() if ax is None else ax
        for update in self.geometry._updates:
            if update.intruders:
                plot_intruders(ax, EPSILONS, update.intruders, label=self._labels[update.position])
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

        if name is not None:
            self.geometry.record(name)
        ax = new_axes() if ax is None else ax
        rows = [row for row in self.geometry._matrices if name in (None, row.name)]
        chosen = max(rows, key=lambda row: max((u.relative for u in row.updates if u.changes), default=-1.0))
        for label, update in zip(self._labels, chosen.updates, strict=False):
            if update.changes:
                floor = update.storage_floor if update.storage_floor > 0 else None
                plot_spectrum(ax, update.values, floor=floor, label=label)
        return ax


def _schema() -> pa.Schema:
    def kind(column: str) -> pa.DataType:
        if column in _TEXT:
            return pa.string()
        return pa.int64() if column in _INTEGERS else pa.float64()

    return pa.schema([*((column, kind(column)) for column in COLUMNS), ("record", pa.string())])
