"""`QuantizedRun`: what quantizing a model lost, as a table, as totals and as sentences; one Parquet file keeps it."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from spectra.errors import CheckpointNotFound, UnsafeCheckpoint
from spectra.notebook import inline_svg
from spectra.parquet import read_table, write_table
from spectra.quantized.pooled import Pooled, decibels, lloyd_max_db, pool
from spectra.record import Record
from spectra.theory.quantization import rate_distortion

if TYPE_CHECKING:
    import pandas as pd

PARQUET = "quantized.parquet"
SCHEMA = 1

# Columns of a tensor, then of a scheme of it, in the file; a list's length is that of the ranks or of a curve.
_OF_TENSOR = {
    "name": pa.string(),
    "layer": pa.int64(),
    "role": pa.string(),
    "shape": pa.list_(pa.int64()),
    "rows": pa.int64(),
    "cols": pa.int64(),
    "turned": pa.bool_(),
    "dtype": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "norm": pa.float64(),
    "seen": pa.float64(),
    "update_norm": pa.float64(),
    "update_reason": pa.string(),
}
NUMBERS = (
    "bits",
    "relative_mse",
    "gaussian_mse",
    "edge",
    "edge_whitened",
    "distance",
    "distance_whitened",
    "outliers",
    "weighted_mse",
    "repaired",
    "cosine",
    "cosine_std",
)
BY_RANK = (
    "absorbed",
    "absorbed_noise",
    "weighted_optimal",
    "weighted_plain",
    "overlap_left",
    "overlap_left_chance",
    "overlap_right",
    "overlap_right_chance",
    "captured",
    "captured_chance",
)
_CURVES = ("held", "held_noise", "curve")
_OF_SCHEME = {
    "scheme": pa.string(),
    **dict.fromkeys(NUMBERS, pa.float64()),
    **dict.fromkeys((*BY_RANK, *_CURVES), pa.list_(pa.float64())),
}


@dataclass(frozen=True)
class QuantizedRun:
    """Every matrix of a checkpoint in every scheme.

    Parameters
    ----------
    records : tuple of dict
        One row a tensor, in stored order; of a measured one ``schemes`` holds a dict for every scheme.
    info : dict
        Where the rows came from: inputs with their digests, settings, versions; JSON-able.
    """

    records: tuple[Record, ...]
    info: Mapping[str, Any]

    @property
    def ranks(self) -> tuple[int, ...]:
        """At which the error's share in its leading directions is told."""
        return tuple(self.info["settings"]["ranks"])

    @cached_property
    def pooled(self) -> tuple[Pooled, ...]:
        """All matrices as one, for every scheme."""
        return tuple(pool(self.records, self.ranks))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a matrix and scheme (pandas), and one for every tensor that was left as it is.

        Columns that end in ``_r8`` are of that rank; ``absorbed`` is the share of ‖W − Ŵ‖² in the leading directions,
        ``absorbed_noise`` what noise of the shape would hold there. NaN where a number does not apply.
        """
        import pandas as pd

        lines = []
        for flat in _flat(self.records):
            line = {key: flat.get(key) for key in _OF_TENSOR if key != "shape"}
            line |= {"scheme": flat.get("scheme", ""), **{key: flat.get(key, math.nan) for key in NUMBERS}}
            line |= ladder_row(flat.get("bits", math.nan), flat.get("relative_mse", math.nan))
            for key in BY_RANK:
                line |= {f"{key}_r{rank}": _number(flat.get(key), i) for i, rank in enumerate(self.ranks)}
            lines.append(line)
        filled = pd.DataFrame(lines).fillna({"reason": "", "update_reason": ""})
        frame: pd.DataFrame = filled.astype({"layer": "Int64", **dict.fromkeys(_FLOATS, "float64")})
        return frame

    @cached_property
    def overall(self) -> pd.DataFrame:
        """One row a scheme (pandas), all matrices pooled by energy: what `spectra.quantized.pooled.Pooled` holds."""
        import pandas as pd

        overall: pd.DataFrame = pd.DataFrame([overall_row(found) for found in self.pooled])
        return overall

    @cached_property
    def sentences(self) -> tuple[tuple[str, str], ...]:
        """What was found in plain words, each sentence under the word it is about; the first says it all."""
        from spectra.quantized.verdict import verdict

        return verdict(self)

    def record(self, name: str) -> Record:
        """The row of one tensor.

        Raises
        ------
        KeyError
            If no tensor has that name.
        """
        for row in self.records:
            if row["name"] == name:
                return row
        raise KeyError(f"no tensor is called {name!r}; run.frame.name lists them")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``quantized.parquet`` into a folder, atomically; the same run gives the same bytes.

        Returns
        -------
        Path
            The file.
        """
        schema = pa.schema([*_OF_TENSOR.items(), *_OF_SCHEME.items()])
        table = pa.Table.from_pylist(list(_flat(self.records)), schema=schema)
        return write_table(table, {"schema": SCHEMA, **self.info}, Path(folder) / PARQUET)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> QuantizedRun:
        """Read a run back from its folder, or from its Parquet file.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        UnsafeCheckpoint
            If the file was not written by `save`.
        """
        path = Path(folder) / PARQUET if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise CheckpointNotFound(f"{path}: no quantized run is saved there; python -m spectra.quantize writes one")
        table, info = read_table(path, PARQUET, kind="quantized run")
        if (
            info.pop("schema", None) != SCHEMA
            or "settings" not in info
            or table.column_names != [*_OF_TENSOR, *_OF_SCHEME]
        ):
            raise UnsafeCheckpoint(f"{path} is no quantized run of this release: quantize again")
        rows: dict[str, Record] = {}
        for flat in table.to_pylist():
            known = {key: value for key, value in flat.items() if value is not None}
            row = rows.setdefault(known["name"], {key: known[key] for key in _OF_TENSOR if key in known})
            row.setdefault("layer", None)
            if "scheme" in known:
                row.setdefault("schemes", []).append({key: known[key] for key in _OF_SCHEME if key in known})
        return cls(tuple(rows.values()), info)

    def _repr_html_(self) -> str:
        """Give a card: the verdict, the totals as a table, the ladder as a picture."""
        from spectra.quantized.figures import ladder

        card = f"<h4>{html.escape(str(self.info['model']['ref']))}, quantized</h4>"
        if not self.pooled:
            return f"{card}<p>No matrix could be quantized.</p>"
        said = html.escape(self.sentences[0][1])
        table: str = self.overall.to_html(index=False, border=0, float_format="{:.4g}".format)
        return f"{card}<p>{said}</p>{table}{inline_svg(lambda ax: ladder(ax, self))}"


def ladder_row(bits: float, relative_mse: float) -> dict[str, float]:
    """Decibels that are kept in so many bits, and those that the two bounds of Gaussian weights allow."""
    known = math.isfinite(bits)
    return {
        "sqnr_db": decibels(relative_mse),
        "lloyd_max_db": lloyd_max_db(bits) if known else math.nan,
        "shannon_db": decibels(rate_distortion(bits)) if known else math.nan,
    }


def overall_row(found: Pooled) -> dict[str, Any]:
    """A pooled scheme as a flat row."""
    row: dict[str, Any] = {
        "scheme": found.scheme,
        "matrices": found.matrices,
        "weights": found.weights,
        "bits_per_weight": found.bits,
        "relative_mse": found.relative_mse,
        "sqnr_db": found.sqnr_db,
        "gaussian_db": found.gaussian_db,
        "lloyd_max_db": found.lloyd_max_db,
        "shannon_db": found.shannon_db,
        "noise_like": found.noise_like,
        "edge": found.edge,
        "edge_raw": found.raw_edge,
    }
    shares: Sequence[tuple[str, Mapping[int, float]]] = (
        ("absorbed", found.absorbed),
        ("absorbed_noise", found.noise),
        ("weighted_optimal", found.weighted_optimal),
        ("weighted_plain", found.weighted_plain),
        ("captured", found.captured),
        ("captured_chance", found.chance),
    )
    for key, by_rank in shares:
        row |= {f"{key}_r{rank}": share for rank, share in by_rank.items()}
    return row | {"weighted_mse": found.weighted, "repaired": found.repaired}


_FLOATS = ("norm", "seen", "update_norm", *NUMBERS)


def _flat(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a tensor and scheme."""
    lines: list[dict[str, Any]] = []
    for record in records:
        of_tensor = {key: value for key, value in record.items() if key != "schemes"}
        lines += [of_tensor | part for part in record.get("schemes", ())] or [of_tensor]
    return lines


def _number(values: Sequence[float] | None, place: int) -> float:
    value = values[place] if values is not None and place < len(values) else None
    return math.nan if value is None else float(value)
