"""`quantization`: every matrix of a checkpoint through every scheme, a matrix at a time, finished rows in a journal."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spectra.delta import Delta, as_rows
from spectra.errors import SpectraError, UsageError
from spectra.inputs import check_folder
from spectra.linalg.matrix import sum_of_squares
from spectra.moments import Moments
from spectra.quantize.analysis import QuantizationError, quantization_error
from spectra.quantize.meeting import UpdateMeeting
from spectra.quantize.qera import weighted
from spectra.quantize.scheme import Scheme
from spectra.quantized.planning import RANKS, SCHEMES, Plan, plan
from spectra.quantized.result import QuantizedRun
from spectra.record import Record, failing_into, refuse_scaled, without_gaps
from spectra.schedule import in_lanes, journalled
from spectra.theory.quantization import best_rank_share

# Where the share of the error in its leading directions is kept: r/p from 1/256 by steps of √2, then all.
FRACTIONS = tuple(2.0 ** (-k / 2.0) for k in range(16, -1, -1))

# Singular values of each error that are kept, evenly spread: what a curve on a page can show.
_KEPT = 65


def quantization(
    model: Any,
    schemes: Sequence[str | Scheme] = SCHEMES,
    *,
    tuned: Any = None,
    base: Any = None,
    calibration: str | os.PathLike[str] | Mapping[str, Moments] | None = None,
    ranks: Sequence[int] = RANKS,
    out: str | os.PathLike[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    jobs: int | None = None,
    max_memory: int | None = None,
    resume: bool = True,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    progress: bool = True,
) -> QuantizedRun:
    """Quantize every matrix of a checkpoint in every scheme, and measure what each loses.

    Parameters
    ----------
    model : path, hub id ``org/name@revision``, name of an example, or Checkpoint
        Its two-dimensional weights are quantized; all else is left as it is, and listed so. GPT-2's Conv1D weights are
        turned to (out, in) first, as quantizers do.
    schemes : sequence of str or Scheme
        ``"nf4"``, ``"int4/128"``, ``"int8/row/fp32"``, …: `spectra.quantize.scheme.Scheme.parse`.
    tuned, base : path, hub id, Checkpoint or Adapter, optional
        One of them: what the model became, or what it was. The error of each matrix is then held against its update.
    calibration : path or mapping of str to Moments, optional
        Second moments of what linear maps read (`spectra.moments`): errors are then told where the inputs are, too.
    ranks : sequence of int
        At which the error's share in its leading directions is told.
    out : path, optional
        Folder of the journal. With it an interrupted run goes on where it stopped.
    include, exclude : str, optional
        Regular expressions searched in the tensors' names.
    jobs : int, optional
        Small matrices to measure at a time; by default one a core. The numbers do not depend on it.
    max_memory : int, optional
        Bytes that matrices measured at a time may need together; by default half the machine's. One alone always goes.
    resume : bool
        Take up the journal in `out`; otherwise begin anew.
    trust_pickle, offline : bool
        As in `spectra.open_checkpoint`.
    allow_partial : bool
        Go on where fewer than 95 % of the tensors match the other model's.
    progress : bool
        Show a bar for anything longer than two seconds.

    Returns
    -------
    QuantizedRun

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be opened (`UnsafeCheckpoint` where it lies about itself).
    MismatchError
        If the other model is of another architecture.
    UsageError
        If a scheme is unknown, arguments contradict each other, or nothing is left to quantize.
    JournalError
        If the folder is in use, or was begun with other inputs or flags.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"w": weight}, f"{folder}/model.safetensors")
    ...     run = quantization(folder, ["nf4", "int4"], progress=False)
    >>> [(scheme, round(db)) for scheme, db in zip(run.overall.scheme, run.overall.sqnr_db)]
    [('nf4', 21), ('int4', 19)]
    """
    todo = plan(
        model,
        schemes,
        tuned=tuned,
        base=base,
        calibration=calibration,
        ranks=ranks,
        include=include,
        exclude=exclude,
        max_memory=max_memory,
        trust_pickle=trust_pickle,
        offline=offline,
        allow_partial=allow_partial,
    )
    return execute(todo, out=out, jobs=jobs, resume=resume, progress=progress)


def execute(
    todo: Plan,
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> QuantizedRun:
    """Carry out a plan; parameters, returns and errors are those of `quantization`."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: at least one matrix must be measured at a time")
    if out is not None:
        check_folder((todo.model,), out)
    loads = {record["name"]: todo.load(record) for record in todo.planned}

    def measure(missing: list[Record]) -> Iterator[Record]:
        return in_lanes(
            lambda record: measured(todo, record),
            missing,
            loads,
            jobs=jobs or os.cpu_count() or 1,
            max_bytes=todo.max_bytes,
        )

    rows = journalled(
        todo.records,
        {record["name"]: todo.work(record) for record in todo.planned},
        measure,
        out=out,
        fingerprint=todo.info,
        resume=resume,
        progress=progress,
    )
    return QuantizedRun(rows, dict(todo.info))


def measured(todo: Plan, record: Record) -> Record:
    """Complete a row: read the matrix, quantize it in every scheme, measure. No deliberate error leaves it.

    Parameters
    ----------
    todo : Plan
    record : dict
        The row as planned.

    Returns
    -------
    dict
        JSON-able. ``schemes`` holds a dict for every scheme, in the plan's order.
    """
    name = record["name"]
    row: Record = {**record, "status": "ok"}
    with failing_into(row):
        stored = Delta(name, todo.model, todo.model, name, name)
        refuse_scaled(stored)
        weight = _turned(stored.weights(), row)
        row["norm"] = math.sqrt(sum_of_squares(weight))
        if row["norm"] == 0.0:
            return {**row, "status": "zero", "reason": "every entry is 0"}
        moments = todo.inputs[todo.moments[name]] if name in todo.moments else None
        if moments is not None:
            row["seen"] = float(torch.linalg.norm(weighted(_wide(weight), moments))) ** 2
        update = _update(todo, row)
        row["schemes"] = [
            scheme_row(quantization_error(weight, scheme, ranks=todo.ranks, moments=moments, update=update), todo.ranks)
            for scheme in todo.schemes
        ]
    return without_gaps(row)


def _turned(matrix: torch.Tensor, row: Record) -> torch.Tensor:
    matrix = as_rows(matrix)
    return matrix.T.contiguous() if row["turned"] else matrix


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _update(todo: Plan, row: Record) -> torch.Tensor | None:
    """The update of a row's matrix; None where none is known, or it moves nothing."""
    delta = todo.updates.get(row["name"])
    if delta is None:
        return None
    try:
        update = _turned(delta.dense(), row)
    except SpectraError as error:  # the other model's fault, which leaves this one's error to be told
        row["update_reason"] = str(error)
        return None
    row["update_norm"] = math.sqrt(sum_of_squares(update))
    return update if row["update_norm"] > 0.0 else None


def scheme_row(error: QuantizationError, ranks: Sequence[int]) -> Record:
    """One scheme of one matrix as plain numbers, without those that are not there.

    Parameters
    ----------
    error : QuantizationError
    ranks : sequence of int
        Of the plan.
    """
    row: Record = {
        "scheme": error.scheme,
        "bits": error.bits_per_weight,
        "relative_mse": error.relative_mse,
        "gaussian_mse": math.nan if error.gaussian_mse is None else error.gaussian_mse,
        "edge": error.raw.edge_ratio,
        "edge_whitened": error.whitened.edge_ratio,
        "distance": error.raw.distance,
        "distance_whitened": error.whitened.distance,
        "outliers": float(error.whitened.outliers),  # as every number of a row
        "absorbed_noise": [error.absorbed_mp[rank] for rank in ranks],
        "held_noise": [best_rank_share(min(error.shape) / max(error.shape), fraction) for fraction in FRACTIONS],
    }
    if error.status == "ok":
        row |= {
            "absorbed": [error.absorbed[rank] for rank in ranks],
            "held": [error.absorbed_at(fraction) for fraction in FRACTIONS],
            "curve": [float(value) for value in error.spectrum.values[kept_places(min(error.shape))]],
        }
    if error.weighted is not None:
        row["weighted_mse"] = error.weighted.relative
        for key, shares in (("optimal", error.weighted.optimal), ("plain", error.weighted.plain)):
            row[f"weighted_{key}"] = _numbers(shares[rank] for rank in ranks)
    if error.meeting is not None:
        row |= _meeting(error.meeting, ranks)
    return without_gaps(row)


def kept_places(count: int) -> list[int]:
    """Which of so many singular values a row keeps: evenly spread, both ends among them."""
    return [int(i) for i in np.unique(np.rint(np.linspace(0, count - 1, min(count, _KEPT))))]


def _meeting(found: UpdateMeeting, ranks: Sequence[int]) -> Record:
    row: Record = {"repaired": found.repaired, "cosine": found.cosine, "cosine_std": found.cosine_std}
    sides = {"overlap_left": found.left, "overlap_right": found.right, "captured": found.held}
    for key, shares in sides.items():
        row[key] = _numbers(shares[rank].value for rank in ranks)
        row[f"{key}_chance"] = _numbers(shares[rank].chance for rank in ranks)
    return row


def _numbers(values: Iterable[float]) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [value if math.isfinite(value) else None for value in values]
