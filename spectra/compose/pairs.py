"""`interference`: every two updates of one model against each other, matrix by matrix and as a whole, beside chance."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectra.checkpoints.names import layer_and_role
from spectra.compose.interference import (
    cosine,
    expected_singular_task_interference,
    expected_square,
    input_interference,
    output_interference,
    singular_task_interference,
)
from spectra.compose.model import product_of
from spectra.compose.products import Product
from spectra.delta import AnyDelta, is_float, name_filter
from spectra.errors import MismatchError, UsageError
from spectra.inputs import progress_bar, side_info, versions
from spectra.pairwise.opening import open_updates

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
FILE = "interference.json"

MEASURES: dict[str, str] = {
    "cosine": "⟨Δᵢ, Δⱼ⟩/(‖Δᵢ‖‖Δⱼ‖)",
    "input": "‖ΔⱼΔᵢᵀ‖/(‖Δᵢ‖‖Δⱼ‖): what one reads of what the other reads",
    "output": "‖ΔⱼᵀΔᵢ‖/(‖Δᵢ‖‖Δⱼ‖): what one writes of what the other writes",
    "sti": "singular task interference over what it comes to by chance",
}
"""Every measure of a pair, with its formula."""


@dataclass(frozen=True)
class PairOfMatrix:
    """Two updates of one matrix.

    Attributes
    ----------
    name, role : str
    layer : int or None
    rows, cols : int
    i, j : int
        Positions of the updates.
    norm_i, norm_j : float
        ‖Δ‖_F.
    cosine, input, output : float
        As `MEASURES`; NaN where an update is zero.
    sti, sti_by_chance : float
        Singular task interference of the two, and about what updates turned at random come to.
    """

    name: str
    role: str
    layer: int | None
    rows: int
    cols: int
    i: int
    j: int
    norm_i: float
    norm_j: float
    cosine: float
    input: float
    output: float
    sti: float
    sti_by_chance: float


@dataclass(frozen=True)
class Interference:
    """All pairs of updates of one model.

    Attributes
    ----------
    labels : tuple of str
        Of the updates.
    rows : tuple of PairOfMatrix
    norms : tuple of float
        ‖Δ‖_F of every update over all matrices that it changes, shared or not.
    info : dict
        Inputs and versions.
    """

    labels: tuple[str, ...]
    rows: tuple[PairOfMatrix, ...]
    norms: tuple[float, ...]
    info: Mapping[str, Any]

    def matrix(self, measure: str) -> NDArray[np.float64]:
        """A measure over all matrices, (updates, updates), symmetric.

        The cosine is that of the whole updates. The others are over the matrices that both change: norms of products
        are root sums of squares, so that large matrices count as they do in the model.

        Raises
        ------
        UsageError
            If there is no such measure.
        """
        return self._pooled[_known(measure)][0]

    def chance(self, measure: str) -> NDArray[np.float64]:
        """What a measure comes to (root mean square; mean of "sti") where the updates are turned at random."""
        return self._pooled[_known(measure)][1]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a matrix and pair."""
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame([asdict(row) for row in self.rows])
        return frame

    @cached_property
    def _pooled(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        count = len(self.labels)
        found = {name: (np.eye(count) if name == "cosine" else np.full((count, count), np.nan),
                        np.full((count, count), np.nan)) for name in MEASURES}  # fmt: skip
        for i, j in itertools.combinations(range(count), 2):
            rows = [row for row in self.rows if (row.i, row.j) == (i, j) and row.norm_i > 0.0 < row.norm_j]
            for name, (values, chances) in found.items():
                values[i, j], chances[i, j] = _over_all(rows, name, self.norms[i] * self.norms[j])
                values[j, i], chances[j, i] = values[i, j], chances[i, j]
        return found

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``interference.json``, and give its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{k: _plain(v) for k, v in asdict(row).items()} for row in self.rows]
        content = {"schema": SCHEMA, "labels": list(self.labels), "norms": list(self.norms)}
        content |= {"info": dict(self.info), "rows": rows}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Interference:
        """Read what `save` wrote.

        Raises
        ------
        MismatchError
            If it is no such file, or another release's.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            held = json.loads(path.read_text("utf-8"))
            if held["schema"] != SCHEMA:
                raise MismatchError(f"{path}: schema {held['schema']}; this release reads {SCHEMA}")
            rows = tuple(map(_read_row, held["rows"]))
            return cls(tuple(held["labels"]), rows, tuple(held["norms"]), held["info"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise MismatchError(f"{path} holds no interference of this project: {error}") from error


def interference(
    updates: Sequence[Any],
    base: Any = None,
    *,
    include: str | None = None,
    exclude: str | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    progress: bool = True,
) -> Interference:
    """Compare every two updates of one model. Adapters are never multiplied out.

    Parameters
    ----------
    updates : sequence of path, hub id, Checkpoint or Adapter
        Two at least.
    base : path, hub id or Checkpoint, optional
        By default what the adapters name.
    include, exclude, trust_pickle, offline, allow_partial, progress
        As in `spectra.compare`.

    Returns
    -------
    Interference

    Raises
    ------
    CheckpointError, MismatchError
        If something cannot be opened, or does not fit.
    UsageError
        If there are fewer than two updates, or no matrix that two of them change.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, value in (("base", 0.0), ("a", 1.0), ("b", -2.0)):
    ...         save_file({"w": value * torch.eye(3)}, f"{folder}/{name}.safetensors")
    ...     found = interference([f"{folder}/a.safetensors", f"{folder}/b.safetensors"], f"{folder}/base.safetensors")
    >>> float(found.matrix("cosine")[0, 1].round(6)), float(found.matrix("input")[0, 1].round(4))
    (-1.0, 0.5774)
    """
    if len(updates) < 2:
        raise UsageError(f"{len(updates)} updates: interference is between two at least")
    wanted = name_filter(include, exclude)
    whole, sides, notes = open_updates(
        updates, base, trust_pickle=trust_pickle, offline=offline, allow_partial=allow_partial
    )
    by_name: dict[str, dict[int, AnyDelta]] = {}
    for position, side in enumerate(sides):
        for name, delta in side.deltas.items():
            if min(delta.shape) > 1 and is_float(delta.base_info.dtype) and wanted(name):
                by_name.setdefault(name, {})[position] = delta
    if not any(len(held) > 1 for held in by_name.values()):
        raise UsageError("no matrix is changed by two of the updates; nothing can interfere")
    work = {name: float(math.prod(next(iter(held.values())).shape)) for name, held in by_name.items()}
    rows: list[PairOfMatrix] = []
    squares = [0.0] * len(sides)
    with progress_bar(work, progress) as advance:
        for name, held in by_name.items():
            products = {position: product_of(delta) for position, delta in held.items()}
            for position, product in products.items():
                squares[position] += product.norm**2
            rows += [_pair(name, i, j, products) for i, j in itertools.combinations(sorted(products), 2)]
            advance(name)
    info = {
        "base": side_info(whole),
        "updates": [side_info(side.tuned) for side in sides],
        "notes": list(notes),
        "versions": versions(),
    }
    return Interference(tuple(side.label for side in sides), tuple(rows), tuple(map(math.sqrt, squares)), info)


def _pair(name: str, i: int, j: int, products: Mapping[int, Product]) -> PairOfMatrix:
    one, other = products[i], products[j]
    layer, role = layer_and_role(name)
    return PairOfMatrix(
        name=name,
        role=role,
        layer=layer,
        rows=one.shape[0],
        cols=one.shape[1],
        i=i,
        j=j,
        norm_i=one.norm,
        norm_j=other.norm,
        cosine=cosine(one, other),
        input=input_interference(other, one),
        output=output_interference(other, one),
        sti=singular_task_interference([one, other]),
        sti_by_chance=expected_singular_task_interference([one, other]),
    )


def _over_all(rows: Sequence[PairOfMatrix], measure: str, whole: float) -> tuple[float, float]:
    """A measure of whole updates, and by chance."""
    if not rows:
        return math.nan, math.nan
    norms = np.array([[row.norm_i, row.norm_j] for row in rows])
    products = norms.prod(axis=1)
    values = np.array([getattr(row, measure) for row in rows])
    sides = np.array([[row.rows, row.cols] for row in rows], dtype=float)
    if measure == "cosine":
        return float((values * products).sum()) / whole, math.sqrt(
            float((products**2 / sides.prod(axis=1)).sum())
        ) / whole
    if measure == "sti":
        by_chance = sum(row.sti_by_chance for row in rows)
        return (float(values.sum()) / by_chance if by_chance > 0.0 else math.nan), 1.0
    side = sides[:, 1 if measure == "input" else 0]
    total = float((products**2).sum())
    mean_square = float((products**2 * [expected_square(int(n)) for n in side]).sum()) / total
    return math.sqrt(float(((values * products) ** 2).sum()) / total), math.sqrt(mean_square)


def _known(measure: str) -> str:
    if measure not in MEASURES:
        raise UsageError(f"no measure is called {measure!r}; there are {', '.join(MEASURES)}")
    return measure


def _read_row(held: dict[str, Any]) -> PairOfMatrix:
    filled: dict[str, Any] = {
        key: math.nan if value is None and key != "layer" else value for key, value in held.items()
    }
    return PairOfMatrix(**filled)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
