"""Aggregates of a run: one line a role or layer, and the layer × role maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from spectra.report.rows import Interval, TensorRow, median, pooled
from spectra.report.text import counted, number, percent, significant


@dataclass(frozen=True)
class Group:
    """Matrices with a spectrum that share a role or a layer. Ranks and errors are medians, bounded where truncated."""

    label: str
    matrices: int
    parameters: int
    relative: float  # ‖Δ‖/‖W‖ of all of them together
    limit: Interval  # least and greatest min(rows, cols)
    entropy_rank: Interval
    signal_rank: Interval
    rank_90: Interval
    error_r8: Interval
    error_r16: Interval
    error_r64: Interval
    rounding: float  # share of ‖Δ‖_F that storage rounding explains, of all of them together
    mostly_rounding: int


@dataclass(frozen=True)
class Cell:
    """One cell of a map: what colours it, what it prints, and the row it opens."""

    value: float
    text: str
    small: str
    spoken: str
    position: int


@dataclass(frozen=True)
class HeatMap:
    """A layer × role map. `layers` holds None for tensors outside every layer.

    `kind` says how the ends of its scale are printed: ``"share"`` (as percentages) or ``"number"``. The scale goes from
    the least cell to the greatest, or `from_zero`.
    """

    key: str
    title: str
    unit: str
    caption: str
    roles: tuple[str, ...]
    layers: tuple[int | None, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    kind: str = "share"
    from_zero: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Values at the two ends of the colour scale."""
        values = [c.value for line in self.cells for c in line if c and math.isfinite(c.value)]
        return (0.0 if self.from_zero else min(values), max(values)) if values else (math.nan, math.nan)


class Placed(Protocol):
    """What a map needs of a row."""

    @property
    def role(self) -> str:
        """What the matrix does in its layer."""

    @property
    def layer(self) -> int | None:
        """None outside every layer."""


Row = TypeVar("Row", bound=Placed)


def group_rows(rows: Sequence[TensorRow], key: Callable[[TensorRow], str]) -> tuple[Group, ...]:
    """Aggregate the analysed matrices by a label, in the order in which labels first appear.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    key : callable
        Label of a row.
    """
    members: dict[str, list[TensorRow]] = {}
    for row in rows:
        if row.analysed:
            members.setdefault(key(row), []).append(row)
    return tuple(_group(label, held) for label, held in members.items())


def by_role(rows: Sequence[TensorRow]) -> tuple[Group, ...]:
    """Aggregate by role.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    """
    return group_rows(rows, lambda row: row.role)


def by_layer(rows: Sequence[TensorRow]) -> tuple[Group, ...]:
    """Aggregate by layer, in ascending order, tensors outside every layer last.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    """
    ordered = sorted(rows, key=lambda row: (row.layer is None, row.layer or 0))
    return group_rows(ordered, lambda row: "outside layers" if row.layer is None else str(row.layer))


def rounding_share(rows: Iterable[TensorRow]) -> float:
    """Return √Σ‖E‖² / √Σ‖Δ‖²: the share of the norm that storage rounding explains.

    Parameters
    ----------
    rows : iterable of TensorRow
        Rows whose rounding is unknown are left out.
    """
    known = [r for r in rows if not math.isnan(r.numbers["storage_frobenius"]) and r.numbers["frobenius"] > 0]
    whole = sum(r.numbers["frobenius"] ** 2 for r in known)
    return math.sqrt(sum(r.numbers["storage_frobenius"] ** 2 for r in known) / whole) if whole else math.nan


def heat_maps(rows: Sequence[TensorRow]) -> tuple[HeatMap, ...]:
    """Return the maps of relative change and of effective rank; empty without an analysed matrix.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    """
    held = [r for r in rows if r.analysed]
    if not held:
        return ()
    change = layer_role_map(
        held,
        "relative_change",
        "Relative change",
        "‖Δ‖ / ‖W‖",
        "How far each matrix moved: ‖Δ‖ / ‖W‖, Frobenius norms, W the base.",
        _change_cell,
    )
    rank = layer_role_map(
        held,
        "effective_rank",
        "Effective rank",
        "entropy rank / min(rows, cols)",
        "Entropy rank of each update as a share of the directions the matrix has (colour and first number). The "
        "small number counts the singular values above the storage floor: where the two disagree widely, the "
        "entropy rank is counting rounding.",
        _rank_cell,
    )
    return change, rank


def span(interval: Interval, digits: int = 3) -> str:
    """Return an interval as one number where its ends agree, else as a range.

    Parameters
    ----------
    interval : Interval
        Bounds.
    digits : int
        Significant digits.

    Examples
    --------
    >>> span(Interval(231, 231)), span(Interval(120.2, 180.9))
    ('231', '120–181')
    """
    low, high = (number(_whole(v), digits) for v in (interval.low, interval.high))
    return low if interval.exact or low == high or not interval.known else f"{low}–{high}"


def share_span(interval: Interval) -> str:
    r"""Return an interval of shares as percentages.

    Parameters
    ----------
    interval : Interval
        Bounds, 1.0 for all of it.

    Examples
    --------
    >>> share_span(Interval(0.62, 0.62)), share_span(Interval(0.5, 0.75))
    ('62\xa0%', '50–75\xa0%')
    """
    low, high = percent(interval.low), percent(interval.high)
    return low if interval.exact or low == high or not interval.known else f"{low[:-2]}–{high}"


def _whole(value: float) -> float:
    """Return a rank of a hundred or more without decimals: the tenth of a direction means nothing there."""
    return float(round(value)) if 100 <= value < 1e5 else value


def _group(label: str, rows: Sequence[TensorRow]) -> Group:
    limits = [r.limit for r in rows]

    def middle(measure: str) -> Interval:
        return median(r.measures[measure] for r in rows)

    return Group(
        label=label,
        matrices=len(rows),
        parameters=sum(r.parameters for r in rows),
        relative=pooled(rows),
        limit=Interval(min(limits), max(limits)),
        entropy_rank=middle("entropy_rank"),
        signal_rank=middle("signal_rank"),
        rank_90=middle("rank_90"),
        error_r8=middle("error_r8"),
        error_r16=middle("error_r16"),
        error_r64=middle("error_r64"),
        rounding=rounding_share(rows),
        mostly_rounding=sum(r.mostly_rounding for r in rows),
    )


def layer_role_map(
    rows: Sequence[Row],
    key: str,
    title: str,
    unit: str,
    caption: str,
    cell: Callable[[Sequence[Row]], Cell],
    *,
    kind: str = "share",
    from_zero: bool = False,
) -> HeatMap:
    """Lay rows out by role and layer.

    Parameters
    ----------
    rows : sequence of TensorRow or MatrixRow
        What the map shows; several of one place become one cell.
    key, title, unit, caption, kind, from_zero
        As in `HeatMap`.
    cell : callable
        Makes a cell of the rows of one place.
    """
    roles = tuple(dict.fromkeys(r.role for r in rows))
    layers = tuple(sorted({r.layer for r in rows}, key=lambda n: (n is None, n or 0)))
    members: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        members.setdefault((row.role, row.layer), []).append(row)
    cells = tuple(
        tuple(cell(members[role, layer]) if (role, layer) in members else None for layer in layers) for role in roles
    )
    return HeatMap(key, title, unit, caption, roles, layers, cells, kind, from_zero)


def _change_cell(rows: Sequence[TensorRow]) -> Cell:
    value = pooled(rows)
    most = max(rows, key=lambda r: r.numbers["relative_frobenius"])
    text = significant(100 * value, 2) if math.isfinite(value) else number(value)
    return Cell(value, text, "", f"{percent(value)} of its norm{together(rows)}", most.position)


def _rank_cell(rows: Sequence[TensorRow]) -> Cell:
    share = median(r.measures["entropy_rank"].over(max(r.limit, 1)) for r in rows)
    ranks = median(r.measures["entropy_rank"] for r in rows)
    signal = median(r.measures["signal_rank"] for r in rows)
    most = max(rows, key=lambda r: r.numbers["relative_frobenius"])
    spoken = (
        f"entropy rank {span(ranks)} of {most.limit}, {share_span(share)}; "
        f"{span(signal)} above the storage floor{together(rows)}"
    )
    return Cell(share.middle, span(ranks, 2), span(signal, 2), spoken, most.position)


def together(rows: Sequence[Placed]) -> str:
    """Say of a cell that it stands for several matrices, where it does.

    Parameters
    ----------
    rows : sequence of TensorRow or MatrixRow
        The rows of one cell.
    """
    return (
        f" ({counted(len(rows), 'matrix', 'matrices')} together; opens the one that moved most)"
        if len(rows) > 1
        else ""
    )
