"""`Run`: the result of a comparison as a table, spectra and plots; saved to and loaded from one Parquet file."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spectra.errors import UsageError
from spectra.notebook import inline_svg, new_axes
from spectra.parquet import read_table, write_table
from spectra.record import COLUMNS, INTEGER_COLUMNS, TEXT_COLUMNS, Record
from spectra.values import Certificate, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.pairwise.result import Geometry

PARQUET = "spectra.parquet"
_ARRAYS = ("singular_values", "singular_values_high")


@dataclass(frozen=True)
class Run:
    """Every tensor of two checkpoints, measured.

    Parameters
    ----------
    records : tuple of dict
        One row a tensor, in the base's stored order.
    info : dict
        Where the rows came from: inputs with their digests, matching, settings, versions; JSON-able.
    """

    records: tuple[Record, ...]
    info: dict[str, Any]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a tensor; columns as in `spectra.record.COLUMNS`, NaN where a measure does not apply."""
        data: dict[str, Any] = {}
        for column in COLUMNS:
            cells = [record.get(column) for record in self.records]
            if column in _ARRAYS:
                data[column] = pd.Series([np.empty(0) if c is None else np.asarray(c) for c in cells], dtype=object)
            elif column in TEXT_COLUMNS:
                data[column] = pd.Series(["" if c is None else c for c in cells], dtype=object)
            elif column in INTEGER_COLUMNS:
                data[column] = pd.Series([pd.NA if c is None else int(c) for c in cells], dtype="Int64")
            else:
                data[column] = pd.Series([math.nan if c is None else float(c) for c in cells], dtype="float64")
        frame: pd.DataFrame = pd.DataFrame(data)
        return frame

    @cached_property
    def _by_name(self) -> Mapping[str, Record]:
        return {record["name"]: record for record in self.records}

    def spectrum(self, name: str) -> Spectrum:
        """Spectrum of one tensor's update, with its certificate.

        Parameters
        ----------
        name : str
            As in ``frame.name``.

        Raises
        ------
        KeyError
            If no tensor has that name.
        UsageError
            If the tensor has no spectrum; the message says why.
        """
        record = self._by_name.get(name)
        if record is None:
            raise KeyError(f"no tensor is called {name!r}; run.frame.name lists them")
        values = record.get("singular_values")
        if values is None or not len(values):
            raise UsageError(f"{name} has no spectrum: {record['status']} {record.get('reason', '')}".rstrip())
        upper = record.get("singular_values_high")
        certificate = Certificate(
            method=record["route"],
            gap=record.get("gap", math.nan),
            tail_norm=record.get("tail_norm", math.inf),
            roundoff=record.get("roundoff", 0.0),
            storage_floor=record.get("storage_floor", math.nan),
            seed=self.info["settings"].get("seed"),
            upper=None if upper is None or not len(upper) else np.asarray(upper),
        )
        return Spectrum(np.asarray(values), (record["rows"], record["cols"]), record["frobenius"], certificate)

    @cached_property
    def groups(self) -> pd.DataFrame:
        """One row a role: how many matrices, how much they moved, how many directions, how much of it is rounding."""
        measured = self.frame[self.frame.spectral_norm.notna() | self.frame.spectral_norm_low.notna()]
        rows = []
        for role, part in measured.groupby("role", sort=False):
            energy, base_energy = (part.frobenius**2).sum(), (part.base_frobenius**2).sum()
            rows.append(
                {
                    "role": role,
                    "matrices": len(part),
                    "parameters": int((part.rows * part.cols).sum()),
                    "relative_frobenius": math.sqrt(energy / base_energy) if base_energy > 0 else math.nan,
                    "signal_rank": part.signal_rank.astype("float64").median(),
                    "entropy_rank": part.entropy_rank.median(),
                    "rank_90": part.rank_90.astype("float64").median(),
                    "rounding_share": math.sqrt((part.storage_frobenius**2).sum() / energy) if energy > 0 else math.nan,
                }
            )
        columns = ["role", "matrices", "parameters", "relative_frobenius", "signal_rank", "entropy_rank", "rank_90"]
        groups: pd.DataFrame = pd.DataFrame(rows, columns=[*columns, "rounding_share"])
        return groups

    @property
    def plot(self) -> RunPlots:
        """Plots of the run: ``run.plot.spectra()``, ``run.plot.truncation_error()``, ``run.plot.relative_change()``."""
        return RunPlots(self)

    def compare(self, other: Any, **flags: Any) -> Geometry:
        """Compare the update of this run with another of the same base.

        Parameters
        ----------
        other : Run, path, hub id, Checkpoint or Adapter
        **flags
            As in `spectra.geometry`; the base is this run's own, unless given.

        Raises
        ------
        SpectraError
            As `spectra.geometry`; a `MismatchError` too where files changed since the run.
        """
        from spectra.pairwise.plan import geometry

        return geometry(self, other, **flags)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``spectra.parquet`` into a folder, atomically; the same run gives the same bytes.

        Returns
        -------
        Path
            The file.
        """
        table = pa.Table.from_pandas(self.frame, schema=_schema(), preserve_index=False)
        return write_table(table, self.info, Path(folder) / PARQUET)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Read a run back from its folder, or from its Parquet file.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        UnsafeCheckpoint
            If the file was not written by `save`.
        """
        table, info = read_table(folder, PARQUET, kind="run")
        records = [
            {
                key: np.asarray(value, dtype=np.float64) if key in _ARRAYS else value
                for key, value in row.items()
                if value is not None and value == value and not (key in _ARRAYS and not value)
            }
            for row in table.to_pylist()
        ]
        return cls(tuple(records), info)

    def _repr_html_(self) -> str:
        """Give a card: what was compared, the roles as a table, spectra as a picture."""
        base, tuned = (html.escape(str(self.info[side]["ref"])) for side in ("base", "tuned"))
        statuses = ", ".join(f"{count} {status}" for status, count in self.frame.status.value_counts().items())
        table = self.groups.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
        figure = inline_svg(self.plot.spectra) if len(self.groups) else ""
        return f"<h4>{base} → {tuned}</h4><p>{html.escape(statuses)}</p>{table}{figure}"


@dataclass(frozen=True)
class RunPlots:
    """Axes-level plots of a run; each takes an optional ``ax`` and returns it."""

    run: Run

    def _names(self, names: Sequence[str] | None, most: int = 8) -> list[str]:
        if names is not None:
            return list(names)
        frame = self.run.frame
        found = frame[frame.singular_values.map(len) > 0].sort_values(
            "relative_frobenius", ascending=False, kind="stable"
        )
        return list(found.drop_duplicates("role").name[:most])

    def spectra(self, names: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
        """Singular values with the storage floor: by default of the most changed matrix of every role."""
        from spectra.plot import plot_spectrum

        ax = new_axes() if ax is None else ax
        for name in self._names(names):
            plot_spectrum(ax, self.run.spectrum(name), label=name)
        return ax

    def truncation_error(self, names: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
        """Error of the best rank-r approximation against r."""
        from spectra.plot import plot_truncation_error

        ax = new_axes() if ax is None else ax
        for name in self._names(names):
            plot_truncation_error(ax, self.run.spectrum(name), label=name)
        return ax

    def relative_change(self, *, ax: Axes | None = None) -> Axes:
        """‖Δ‖_F/‖W‖_F over layer and role."""
        from spectra.plot import plot_heatmap

        ax = new_axes() if ax is None else ax
        frame = self.run.frame
        found = frame[frame.singular_values.map(len) > 0]
        table = found.pivot_table(index="layer", columns="role", values="relative_frobenius", sort=False)
        layers, roles = [str(layer) for layer in table.index], [str(role) for role in table.columns]
        plot_heatmap(ax, table.to_numpy(), row_labels=layers, col_labels=roles, label="‖Δ‖ / ‖W‖")
        ax.tick_params(axis="x", rotation=90)
        return ax


def _schema() -> pa.Schema:
    def kind(column: str) -> pa.DataType:
        if column in _ARRAYS:
            return pa.list_(pa.float64())
        if column in TEXT_COLUMNS:
            return pa.string()
        return pa.int64() if column in INTEGER_COLUMNS else pa.float64()

    return pa.schema([(column, kind(column)) for column in COLUMNS])
