"""`Recorded`: the scores of every direction of a training, step by step, and the Parquet file that holds them.

One row is one direction at one step: the i-th column of B and row of A of LoRA, a triplet of AdaLoRA. What is trained
without directions (the weights of full fine-tuning, a head, IA3's vectors) has one row a tensor, with no direction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectra.errors import CheckpointNotFound, UnsafeCheckpoint, UsageError
from spectra.importance.scores import SCORES, score_of

if TYPE_CHECKING:
    import pandas as pd

NAME = "importance.parquet"
_INFO_KEY = b"spectra"
_KIND = "importance"
# Rows of a group of the file: some tens of MB while it is written, and few groups.
_GROUP = 1_000_000


@dataclass(frozen=True)
class Tracked:
    """What is scored: a matrix by its directions, or a tensor as a whole.

    Attributes
    ----------
    name : str
        Of the module that carries a low-rank update; of the parameter itself where there are no directions.
    directions : int or None
        Their number r; None for a tensor as a whole.
    shape : tuple of int
        (out, in) of the update, or the parameter's shape.
    """

    name: str
    directions: int | None
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows a step."""
        return 1 if self.directions is None else self.directions


@dataclass(frozen=True)
class Layout:
    """What one recorded step holds.

    Attributes
    ----------
    tracked : tuple of Tracked
        In the order of rows.
    info : dict
        Of the training, JSON-able: ``method``, ``total`` (its steps), ``every``, ``beta1``, ``beta2``, ``gradient``;
        and, where the method has a budget of its own, ``rank``, ``score``, ``warmup``, ``final``, ``interval``.
    """

    tracked: tuple[Tracked, ...]
    info: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows a step."""
        return sum(entry.rows for entry in self.tracked)

    @property
    def dtype(self) -> np.dtype[Any]:
        """One step as numpy keeps it: number, factor of clipping, (rows, scores)."""
        return np.dtype([("step", "<i4"), ("clip", "<f8"), ("scores", "<f4", (self.rows, len(SCORES)))])

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        tracked = [asdict(entry) for entry in self.tracked]
        return json.dumps({"kind": _KIND, "scores": list(SCORES), "tracked": tracked, "info": self.info})

    @classmethod
    def from_json(cls, text: str | bytes, *, source: object) -> Layout:
        """Read what `to_json` wrote.

        Raises
        ------
        UnsafeCheckpoint
            If it is something else, or another version's.
        """
        try:
            told = json.loads(text)
            if told["kind"] != _KIND or told["scores"] != list(SCORES):
                raise ValueError("other scores than this version's")
            tracked = tuple(
                Tracked(str(e["name"]), None if e["directions"] is None else int(e["directions"]), tuple(e["shape"]))
                for e in told["tracked"]
            )
            return cls(tracked, dict(told["info"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UnsafeCheckpoint(f"{source} is no record of importance that this version wrote: {error}") from error


@dataclass(frozen=True, eq=False)
class Recorded:
    """Scores of a training's directions over its steps.

    Parameters
    ----------
    layout : Layout
        What the rows are.
    steps : int array of shape (steps,)
        Numbers of the recorded steps, from 1, rising.
    clip : float array of shape (steps,)
        Factor by which clipping shortened each step's gradient; 1 where it did not. Scores are of the shortened one.
    values : float32 array of shape (steps, rows, scores)
        In the order of `Layout.tracked` and `SCORES`.
    """

    layout: Layout
    steps: NDArray[np.int64]
    clip: NDArray[np.float64]
    values: NDArray[np.float32]

    @property
    def info(self) -> dict[str, Any]:
        """What `Layout.info` says of the training."""
        return self.layout.info

    @property
    def total(self) -> int:
        """Steps of the whole training, recorded or not."""
        return int(self.info["total"])

    @cached_property
    def matrices(self) -> tuple[Tracked, ...]:
        """What has directions."""
        return tuple(entry for entry in self.layout.tracked if entry.directions is not None)

    def of(self, score: str) -> dict[str, NDArray[np.float32]]:
        """One score by name of matrix or tensor, each (steps, directions), or (steps, 1) of a tensor as a whole.

        Raises
        ------
        UsageError
            If no score is called so.
        """
        score_of(score)
        column = self.values[:, :, list(SCORES).index(score)]
        ends = np.cumsum([entry.rows for entry in self.layout.tracked])
        return {e.name: column[:, end - e.rows : end] for e, end in zip(self.layout.tracked, ends, strict=True)}

    def directions(self, score: str) -> dict[str, NDArray[np.float32]]:
        """One score of everything that has directions, (steps, directions) each.

        Raises
        ------
        UsageError
            If the score is unknown or not defined for this training, or nothing has directions.
        """
        if not self.matrices:
            raise UsageError(
                f"{self.info['method'] or 'this training'} has no directions to rank: what was recorded is one score a "
                "tensor. Record a training of lora, qlora or adalora"
            )
        found = self.of(score)
        chosen = {entry.name: found[entry.name] for entry in self.matrices}
        if any(np.isnan(values).any() for values in chosen.values()):
            defined = [name for name in SCORES if not any(np.isnan(self.of(name)[m]).any() for m in chosen)]
            raise UsageError(
                f"{score!r} ({SCORES[score].formula}) is not defined for {self.info['method']}, which has no λ; "
                f"there are {', '.join(defined)}"
            )
        return chosen

    @property
    def frame(self) -> pd.DataFrame:
        """One row a step and direction: step, module, direction (missing for a tensor as a whole), clip, scores."""
        import pandas as pd

        columns: dict[str, Any] = _columns(self.layout, self.steps, self.clip, self.values)
        names = np.array([entry.name for entry in self.layout.tracked], dtype=object)
        columns["module"] = names[columns["module"]]
        direction = columns["direction"]
        columns["direction"] = pd.array(np.maximum(direction, 0), dtype="Int32")
        frame: pd.DataFrame = pd.DataFrame(columns)
        frame.loc[direction < 0, "direction"] = pd.NA
        return frame


def _columns(
    layout: Layout, steps: NDArray[Any], clip: NDArray[Any], values: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Columns of the file; modules by their number, direction −1 for a tensor as a whole."""
    module = np.repeat(np.arange(len(layout.tracked), dtype=np.int32), [entry.rows for entry in layout.tracked])
    direction = np.concatenate(
        [np.arange(e.rows, dtype=np.int32) if e.directions is not None else [-1] for e in layout.tracked]
    )
    count, rows = len(steps), layout.rows
    columns: dict[str, NDArray[Any]] = {
        "step": np.repeat(steps.astype(np.int32), rows),
        "module": np.tile(module, count),
        "direction": np.tile(direction.astype(np.int32), count),
        "clip": np.repeat(clip, rows),
    }
    flat = values.reshape(count * rows, len(SCORES))
    return columns | {name: flat[:, i] for i, name in enumerate(SCORES)}


def write_recorded(layout: Layout, records: NDArray[Any], path: Path) -> Path:
    """Write recorded steps as Parquet, whole or not at all; the same steps give the same bytes.

    Parameters
    ----------
    layout : Layout
    records : array of shape (steps,) and type ``layout.dtype``
        A memory map serves: some steps are taken at a time.
    path : Path
        Of the file; its folder is there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"step": pa.int32(), "module": pa.dictionary(pa.int32(), pa.string()), "direction": pa.int32()}
    fields = [*kinds.items(), ("clip", pa.float64()), *((name, pa.float32()) for name in SCORES)]
    schema = pa.schema(fields, metadata={_INFO_KEY: layout.to_json().encode()})
    names = pa.array([entry.name for entry in layout.tracked], pa.string())
    temporary = path.with_name(f".{path.name}.part")
    chunk = max(1, _GROUP // max(1, layout.rows))
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for first in range(0, len(records), chunk):
                part = records[first : first + chunk]
                columns: dict[str, Any] = dict(_columns(layout, part["step"], part["clip"], part["scores"]))
                columns["module"] = pa.DictionaryArray.from_arrays(pa.array(columns["module"]), names)
                direction = columns["direction"]
                columns["direction"] = pa.array(direction, mask=direction < 0)
                writer.write_table(pa.table(columns, schema=schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_recorded(source: str | os.PathLike[str]) -> Recorded:
    """Read what ``python -m spectra.train … --record-importance`` left.

    Parameters
    ----------
    source : path
        The training's folder, or the Parquet file. A folder whose training was killed is read too, up to its last
        whole step.

    Raises
    ------
    CheckpointNotFound
        If nothing was recorded there.
    UnsafeCheckpoint
        If the file is another one.
    """
    from spectra.importance.journal import JOURNAL, read_journal

    path = Path(source)
    if path.is_dir() and (path / JOURNAL).is_file():  # a training that has not ended: its journal is never behind
        layout, records = read_journal(path / JOURNAL)
        return _recorded(layout, records["step"], records["clip"], records["scores"])
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointNotFound(
            f"{path}: no importance was recorded there; python -m spectra.train … --record-importance records it"
        )
    return _from_parquet(path)


def _from_parquet(path: Path) -> Recorded:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
        if _INFO_KEY not in metadata:
            raise ValueError("it does not say what its rows are")
        layout = Layout.from_json(metadata[_INFO_KEY], source=path)
        if layout.rows == 0 or table.num_rows % layout.rows:
            raise ValueError(f"{table.num_rows} rows are no whole steps of {layout.rows}")
        count = table.num_rows // layout.rows
        values = np.stack([table.column(name).to_numpy() for name in SCORES], axis=1)
        steps, clip = (table.column(name).to_numpy().reshape(count, layout.rows)[:, 0] for name in ("step", "clip"))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UnsafeCheckpoint(f"{path} is no record of importance: {error}") from error
    return _recorded(layout, steps, clip, values.reshape(count, layout.rows, len(SCORES)))


def _recorded(layout: Layout, steps: NDArray[Any], clip: NDArray[Any], values: NDArray[Any]) -> Recorded:
    return Recorded(layout, steps.astype(np.int64), clip.astype(np.float64), np.asarray(values, dtype=np.float32))
