"""`RankMap`: how many directions each matrix keeps, at the end and over the steps of a training; saved and drawn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectra.errors import CheckpointNotFound, UnsafeCheckpoint, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_KIND = "rank map"


@dataclass(frozen=True, eq=False)
class RankMap:
    """Ranks by matrix.

    Parameters
    ----------
    modules : tuple of str
        The matrices.
    ranks : int array of shape (steps, matrices)
        Directions that stay after each step; the last row is the map.
    shapes : tuple of (int, int)
        (out, in) of each matrix.
    steps : int array of shape (steps,)
        Numbers of the steps, from 1. A map that no training made, of singular values for instance, has one: 0.
    kept : tuple of bool array of shape (directions,), or None
        Which directions stay at the end; None where the map does not come from directions.
    rule : dict
        Where the map comes from; JSON-able.

    Raises
    ------
    UsageError
        If the parts do not fit each other.

    Examples
    --------
    >>> ranks = RankMap.of({"layer.0.query": 3, "layer.1.query": 0}, shapes={"layer.0.query": (8, 8)})
    >>> ranks.total, ranks.rank_pattern, ranks.dropped
    (3, {'layer.0.query': 3}, ('layer.1.query',))
    """

    modules: tuple[str, ...]
    ranks: NDArray[np.int64]
    shapes: tuple[tuple[int, int], ...]
    steps: NDArray[np.int64]
    kept: tuple[NDArray[np.bool_], ...] | None = None
    rule: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ranks.shape != (len(self.steps), len(self.modules)) or not len(self.steps) or not self.modules:
            raise UsageError(
                f"ranks of shape {self.ranks.shape} for {len(self.steps)} steps and {len(self.modules)} matrices: a "
                "map has a row a step, one at least, and a column a matrix"
            )

    @classmethod
    def of(
        cls,
        ranks: Mapping[str, int],
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        rule: Mapping[str, Any] | None = None,
    ) -> RankMap:
        """A map of ranks that are known, without a history.

        Parameters
        ----------
        ranks : mapping of str to int
        shapes : mapping of str to (int, int), optional
            (0, 0) where one is not told.
        rule : mapping, optional
            Where they come from.
        """
        known = {} if shapes is None else shapes
        return cls(
            modules=tuple(ranks),
            ranks=np.array([list(ranks.values())], dtype=np.int64),
            shapes=tuple(known.get(name, (0, 0)) for name in ranks),
            steps=np.zeros(1, dtype=np.int64),
            rule=dict(rule or {}),
        )

    @property
    def final(self) -> dict[str, int]:
        """Rank of every matrix at the end, 0 where nothing is left."""
        return {name: int(rank) for name, rank in zip(self.modules, self.ranks[-1], strict=True)}

    @property
    def total(self) -> int:
        """Directions of all matrices together at the end."""
        return int(self.ranks[-1].sum())

    @property
    def parameters(self) -> int:
        """What they cost as the two factors of LoRA: Σ r·(out + in)."""
        return int(sum(rank * sum(shape) for rank, shape in zip(self.ranks[-1], self.shapes, strict=True)))

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's ``rank_pattern``: matrices that keep something, by their full names.

        PEFT takes the first pattern that fits a name's end, so that longer names stand first.
        """
        kept = [(name, rank) for name, rank in self.final.items() if rank]
        return dict(sorted(kept, key=lambda entry: -entry[0].count(".")))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Matrices that keep nothing: an adapter leaves them out of its ``target_modules``."""
        return tuple(name for name, rank in self.final.items() if not rank)

    @property
    def words(self) -> str:
        """Where the map comes from, in a sentence."""
        rule = self.rule
        if "score" not in rule:
            return str(rule.get("source", "ranks as given"))
        last, total = int(self.steps[-1]), int(rule["total"])
        cut = "" if last == total else f" up to its step {last} of {total}"
        return (
            f"what {rule['score']} under a {rule['schedule']} budget from {rule['start']} to {rule['budget']} "
            f"directions would have kept on the trajectory of this training ({rule['method']}){cut}; the training "
            "itself went on under its own rule"
        )

    @property
    def frame(self) -> pd.DataFrame:
        """One row a step and matrix: step, module, layer, role, rank."""
        import pandas as pd

        places = [layer_and_role(name) for name in self.modules]
        count = len(self.steps)
        frame: pd.DataFrame = pd.DataFrame(
            {
                "step": np.repeat(self.steps, len(self.modules)),
                "module": list(self.modules) * count,
                "layer": [layer for layer, _ in places] * count,
                "role": [role for _, role in places] * count,
                "rank": self.ranks.reshape(-1),
            }
        )
        return frame

    @property
    def table(self) -> pd.DataFrame:
        """Final ranks, layers by roles; where several matrices share both, their sum. Missing where there is none."""
        last = self.frame[-len(self.modules) :]
        table: pd.DataFrame = last.pivot_table(index="layer", columns="role", values="rank", aggfunc="sum", sort=False)
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Final ranks as a heat map, layers by roles.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Axes to draw on; new ones by default.
        """
        from matplotlib.figure import Figure

        from spectra.plot import plot_heatmap

        table = self.table
        if ax is None:
            size = (2.5 + 0.55 * table.shape[1], 2.5 + 0.3 * table.shape[0])
            ax = Figure(figsize=size, layout="constrained").subplots()
        texts = [["" if cell != cell else f"{cell:.0f}" for cell in row] for row in table.to_numpy()]
        labels = [str(layer) for layer in table.index], [str(role) for role in table.columns]
        plot_heatmap(ax, table.to_numpy(), row_labels=labels[0], col_labels=labels[1], label="rank", texts=texts)
        ax.tick_params(axis="x", rotation=90)
        return ax

    def to_json(self) -> str:
        """The map at the end, as an adapter's configuration takes it, and where it comes from.

        ``rank_pattern`` and ``exclude_modules`` are PEFT's words; `RankMap.from_json` reads it back, without history.
        """
        told = {
            "kind": _KIND,
            "rank_pattern": self.rank_pattern,
            "exclude_modules": list(self.dropped),
            "ranks": self.final,
            "shapes": {name: list(shape) for name, shape in zip(self.modules, self.shapes, strict=True)},
            "kept": None
            if self.kept is None
            else {name: np.flatnonzero(mask).tolist() for name, mask in zip(self.modules, self.kept, strict=True)},
            "directions": None
            if self.kept is None
            else {name: len(mask) for name, mask in zip(self.modules, self.kept, strict=True)},
            "total": self.total,
            "parameters": self.parameters,
            "rule": self.rule,
            "words": self.words,
        }
        return json.dumps(told, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the map at the end as JSON, or the ranks over all steps as Parquet, by the name's ending.

        Raises
        ------
        UsageError
            If the name ends otherwise.
        """
        path = Path(path)
        if path.suffix not in (".json", ".parquet"):
            raise UsageError(f"{path}: a rank map is written as .json (the end) or .parquet (every step)")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            if path.suffix == ".json":
                temporary.write_text(self.to_json(), "utf-8")
            else:
                self.frame.to_parquet(temporary, index=False)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RankMap:
        """Read a map that `save` wrote as JSON.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        UnsafeCheckpoint
            If the file is another one.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointNotFound(f"{path}: no rank map is saved there")
        try:
            told = json.loads(path.read_text("utf-8"))
            if told["kind"] != _KIND:
                raise ValueError(f"it is a {told['kind']!r}")
            shapes = {name: (int(rows), int(cols)) for name, (rows, cols) in told["shapes"].items()}
            plain = cls.of({name: int(rank) for name, rank in told["ranks"].items()}, shapes=shapes, rule=told["rule"])
            last = int(told["rule"].get("total", 0))
            kept = told["kept"] and tuple(
                np.isin(np.arange(told["directions"][name]), told["kept"][name]) for name in plain.modules
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsafeCheckpoint(f"{path} is no rank map: {error}") from error
        return cls(plain.modules, plain.ranks, plain.shapes, np.array([last]), kept or None, plain.rule)


def layer_and_role(module: str) -> tuple[str, str]:
    """Layer and role of a module, from its name alone: its first number, and what follows.

    Examples
    --------
    >>> layer_and_role("bert.encoder.layer.11.attention.self.query"), layer_and_role("pooler.dense")
    (('11', 'attention.self.query'), ('', 'pooler.dense'))
    """
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    return (found[1], found[2]) if found else ("", module)
