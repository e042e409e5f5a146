"""From a run to everything the report says, as plain values: no file, no HTML and no figure in here."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectra.report.directions import Budget, Directions, Share, bands, find_directions
from spectra.report.flags import Flag, find_flags
from spectra.report.rows import FAILURES, Interval, RunLike, TensorRow, pooled, read_rows
from spectra.report.tables import Group, HeatMap, by_layer, by_role, heat_maps, rounding_share
from spectra.report.text import finite, number, percent
from spectra.report.verdict import Verdict, verdict

SCHEMA = 1
# Settings that change what a report says, and the option that gives each; the others only change how it is reached.
_OPTIONS = ("rank", "quantized", "include", "exclude", "seed", "device", "max_memory")
_SWITCHES = ("exact", "trust_pickle", "allow_partial")


@dataclass(frozen=True)
class ReportData:
    """Everything that the page, the terminal and ``summary.json`` say about a run."""

    base: str
    tuned: str
    verdict: Verdict
    flags: tuple[Flag, ...]
    statuses: Mapping[str, int]
    totals: Mapping[str, float]
    by_role: tuple[Group, ...]
    by_layer: tuple[Group, ...]
    maps: tuple[HeatMap, ...]
    directions: Directions | None
    rows: tuple[TensorRow, ...]
    info: Mapping[str, Any]
    command: str

    @property
    def failed(self) -> bool:
        """Whether a spectrum was due that could not be given: the command then ends with 1."""
        return any(self.statuses.get(status) for status in FAILURES)


def build_report(run: RunLike) -> ReportData:
    """Compute the content of the report on a run.

    Parameters
    ----------
    run : Run
        `spectra.Run`: its `frame`, its spectra and its `info` are read.

    Returns
    -------
    ReportData
    """
    rows, info = read_rows(run.frame), run.info
    base, tuned = (str(info.get(side, {}).get("ref", side)) for side in ("base", "tuned"))
    return ReportData(
        base=base,
        tuned=tuned,
        verdict=verdict(rows),
        flags=find_flags(rows, info),
        statuses=dict(sorted(Counter(r.status for r in rows).items())),
        totals=_totals(rows),
        by_role=by_role(rows),
        by_layer=by_layer(rows),
        maps=heat_maps(rows),
        directions=find_directions(run, rows),
        rows=rows,
        info=info,
        command=command_line(base, tuned, info.get("settings", {})),
    )


def summary(data: ReportData) -> dict[str, Any]:
    """Return what ``summary.json`` holds: JSON-able, NaN as null, certified bounds as ``[low, high]``.

    Parameters
    ----------
    data : ReportData
        Content of the report.
    """
    return {
        "schema": SCHEMA,
        "base": data.base,
        "tuned": data.tuned,
        "verdict": list(data.verdict),
        "flags": [
            {"level": f.level, "kind": f.kind, "text": f.text, "tensors": [data.rows[i].name for i in f.positions]}
            for f in data.flags
        ],
        "statuses": dict(data.statuses),
        "totals": {name: finite(value, 12) for name, value in data.totals.items()},
        "by_role": [_group(group, "role") for group in data.by_role],
        "by_layer": [_group(group, "layer") for group in data.by_layer],
        "directions": None if data.directions is None else _directions(data.directions),
        "tensors": [_tensor(row, data.directions) for row in data.rows],
    }


def manifest(data: ReportData) -> dict[str, Any]:
    """Return what ``manifest.json`` holds: inputs by digest or commit, versions, seed, flags, matching, the command.

    Parameters
    ----------
    data : ReportData
        Content of the report.
    """
    return {"schema": SCHEMA, "command": data.command, **json_ready(dict(data.info))}


def command_line(base: str, tuned: str, settings: Mapping[str, Any], *, more: Sequence[str] = ()) -> str:
    """Return the command that makes the same report, quoted for a POSIX shell.

    Parameters
    ----------
    base, tuned : str
        The checkpoints, as they were given.
    settings : mapping
        ``Run.info["settings"]``; what stands at its default or is not an option is left out.
    more : sequence of str
        Words of the command after the two.

    Examples
    --------
    >>> command_line("a", "b c", {"rank": 64, "seed": 0, "include": None})
    "python -m spectra.report a 'b c' --rank 64 --seed 0"
    """
    words = ["python", "-m", "spectra.report", base, tuned, *more]
    for name in _OPTIONS:
        if settings.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    words += [f"--{name.replace('_', '-')}" for name in _SWITCHES if settings.get(name)]
    return shlex.join(words)


def certificate_words(row: TensorRow) -> str:
    """Say in words how far the values of one spectrum may be from the truth.

    Parameters
    ----------
    row : TensorRow
        A row with a spectrum.
    """
    numbers, top = row.numbers, row.measures["spectral_norm"].high
    route = f"Route: {row.route}. " if row.route else ""
    if row.truncated:
        text = (
            f"{route}The leading {row.count} of {row.limit} singular values were computed; each is a lower bound, and "
            f"the shaded band reaches up to its certified upper bound. What they leave out has norm "
            f"{number(numbers['gap'])} ({percent(_over(numbers['gap'], numbers['frobenius']))} of ‖Δ‖), known exactly"
        )
        if math.isfinite(numbers["tail_norm"]) and numbers["tail_norm"] > 0:
            text += f", and no value beyond them exceeds {number(numbers['tail_norm'])}"
        text += ". "
    elif row.factored:
        text = f"{route}Exact from the two factors: the update has {row.count} singular values and the rest are zero. "
    else:
        zeros = f", {row.limit - row.count} of them zero" if row.count < row.limit else ""
        text = f"{route}All {row.limit} singular values were computed{zeros}. "
    if math.isfinite(numbers["roundoff"]):
        text += f"Floating point may have moved a value by {number(numbers['roundoff'])}"
        text += f" ({number(_over(numbers['roundoff'], top))} of σ₁). " if top > 0 else ". "
    if math.isnan(numbers["storage_floor"]):
        return text + "The storage floor is unknown here, so no rank can be held against it."
    stored = " and ".join(dict.fromkeys(d for d in (row.dtype_base, row.dtype_tuned) if d))
    return (
        f"{text}Storage in {stored} puts the floor at {number(numbers['storage_floor'])} "
        f"({percent(_over(numbers['storage_floor'], top))} of σ₁): values beneath it cannot be told from rounding."
    )


def _over(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _totals(rows: Sequence[TensorRow]) -> dict[str, float]:
    analysed = [r for r in rows if r.analysed]
    changed = [r for r in rows if r.numbers["frobenius"] > 0]
    return {
        "tensors": len(rows),
        "matrices_analysed": len(analysed),
        "matrices_truncated": sum(r.truncated for r in analysed),
        "matrices_mostly_rounding": sum(r.mostly_rounding for r in analysed),
        "parameters_analysed": sum(r.parameters for r in analysed),
        "tensors_changed": len(changed),
        "frobenius": math.sqrt(sum(r.numbers["frobenius"] ** 2 for r in changed)),
        "relative_frobenius": pooled(rows),
        "rounding_share": rounding_share(analysed),
    }


def _group(group: Group, name: str) -> dict[str, Any]:
    held = {key: _bounds(v) if isinstance(v, Interval) else v for key, v in vars(group).items() if key != "label"}
    held |= {key: finite(held[key], 12) for key in ("relative", "rounding")}
    return {name: group.label, **held}


def _directions(found: Directions) -> dict[str, Any]:
    return {
        "said": list(found.said),
        "matrices": len(found.matrices),
        "matrix_parameters": found.parameters,
        "budgets": [_budget(budget) for budget in found.budgets],
        "shares": [_share(share) for share in found.shares],
    }


def _budget(budget: Budget) -> dict[str, Any]:
    return {
        "uniform_rank": budget.rank,
        "parameters": budget.parameters,
        "uniform_error": _bounds(budget.uniform),
        "global_error": _bounds(budget.allocated),
        "uniform_energy": _bounds(budget.uniform_energy),
        "global_energy": _bounds(budget.allocated_energy),
    }


def _share(share: Share) -> dict[str, Any]:
    """What a share takes; an upper end that is not known is null."""
    return {
        "share": share.share,
        "uniform_rank": _bounds(share.rank),
        "uniform_parameters": _bounds(share.uniform),
        "global_parameters": _bounds(share.allocated),
    }


def _tensor(row: TensorRow, directions: Directions | None) -> dict[str, Any]:
    """One tensor of the summary: enough to follow the verdict; every column is in ``spectra.parquet``."""
    kept = ("signal_rank", "entropy_rank", "rank_90", "error_r8", "error_r16", "error_r64")
    held: dict[str, Any] = {"name": row.name, "status": row.status, "reason": row.reason}
    if row.analysed:
        held |= {name: _bounds(row.measures[name]) for name in kept}
        held["rounding"] = finite(row.rounding, 12)
    held["relative_frobenius"] = finite(row.numbers["relative_frobenius"], 12)
    if directions is not None and row.position in directions.matrices:
        advice = directions.matrices[row.position]
        held["advice"] = {name: _bounds(band) for name, band in bands(advice).items()}
        held["advice"]["said"] = advice.verdict
    return held


def _bounds(interval: Interval) -> Any:
    """Return one number where the interval is a point, ``[low, high]`` where it is not, null where nothing is known."""
    if not interval.known:
        return None
    if interval.low == interval.high:
        return finite(interval.low, 12)
    return [finite(interval.low, 12), finite(interval.high, 12)]


def json_ready(value: Any) -> Any:
    """Return a copy with nothing that JSON lacks: numpy scalars, tuples, paths, NaN.

    Parameters
    ----------
    value : object
        Anything made of mappings, sequences and scalars.
    """
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return json_ready(value.item()) if hasattr(value, "item") else str(value)
