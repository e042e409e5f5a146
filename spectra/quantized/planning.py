"""`plan`: which matrices of a checkpoint go through which schemes, beside which updates and inputs."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spectra.checkpoints import Adapter, Checkpoint, TensorInfo
from spectra.checkpoints.checkpoint import listed
from spectra.checkpoints.digests import digest_files
from spectra.checkpoints.names import layer_and_role
from spectra.checkpoints.orientation import turned_names
from spectra.delta import AnyDelta, as_base, is_float, name_filter, opened, pair_checkpoints
from spectra.errors import MismatchError, UsageError
from spectra.examples import EXAMPLES, fetch
from spectra.extract.weighting import aligned
from spectra.inputs import LEAST_MATCH, matching_info, mismatch_message, physical_memory, side_info, versions
from spectra.moments import Moments, load_moments
from spectra.quantize.scheme import Scheme
from spectra.record import Record
from spectra.schedule import Load

RANKS = (8, 16, 64)
# Multiply-adds of both eigenproblems of an error as multiples of p³, by the time they take beside matrix products.
_EIGEN = 16.0
SCHEMES = ("nf4",)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run would do.

    Attributes
    ----------
    model : Checkpoint
        Whose matrices are quantized.
    schemes : tuple of Scheme
    ranks : tuple of int
        At which the error's share in low rank is told.
    records : tuple of dict
        One row a tensor, before measuring; those to be measured have the status ``"planned"``.
    updates : mapping of str to delta
        The update of each matrix, by its name, where another model was given.
    moments : mapping of str to str
        The name of each matrix's moments, where some were given.
    inputs : mapping of str to Moments
        Those moments, read when they are asked for.
    max_bytes : int
        Memory that matrices measured at a time may need together.
    info : dict
        Inputs with their digests, settings and versions; JSON-able.
    """

    model: Checkpoint
    schemes: tuple[Scheme, ...]
    ranks: tuple[int, ...]
    records: tuple[Record, ...]
    updates: Mapping[str, AnyDelta]
    moments: Mapping[str, str]
    inputs: Mapping[str, Moments]
    max_bytes: int
    info: Mapping[str, Any]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {key: value for key, value in self.info.items() if key != "notes"}

    @cached_property
    def planned(self) -> tuple[Record, ...]:
        """Rows of the matrices that will be measured."""
        return tuple(record for record in self.records if record["status"] == "planned")

    def load(self, record: Record) -> Load:
        """What measuring one matrix asks of the machine."""
        rows, cols = record["rows"], record["cols"]
        wide = (
            4 * (2 + (record["name"] in self.updates)) + 8 * 3
        )  # the weight, its like, an update; the error in float64
        size = 8 * cols**2 if record["name"] in self.moments else 0
        return Load((rows, cols), wide * rows * cols + 4 * 8 * min(rows, cols) ** 2 + 3 * size)

    def work(self, record: Record) -> float:
        """Multiply-adds of one matrix, about."""
        rows, cols = float(record["rows"]), float(record["cols"])
        seen = 1.0 if record["name"] not in self.moments else 3.0
        short = min(rows, cols)
        return len(self.schemes) * seen * short * (rows * cols + _EIGEN * short**2)

    def lines(self) -> list[str]:
        """The plan in words, for a terminal."""
        entries = sum(record["rows"] * record["cols"] for record in self.planned)
        kept = Counter(record["reason"] for record in self.records if record["status"] != "planned")
        peak = max((self.load(record).peak_bytes for record in self.planned), default=0)
        said = [
            f"{len(self.planned)} matrices of {entries:,} weights, each in {', '.join(s.name for s in self.schemes)}",
            *(f"  {count:5d} × left as it is: {reason}" for reason, count in sorted(kept.items())),
            f"about {peak / 1e6:,.0f} MB of memory for the largest",
        ]
        if self.info["other"] is not None:
            said.append(f"{len(self.updates)} of them beside their update, by {self.info['other']['ref']}")
        if self.moments:
            said.append(f"{len(self.moments)} of them on the second moments of their inputs")
        return said


def plan(
    model: Any,
    schemes: Sequence[str | Scheme] = SCHEMES,
    *,
    tuned: Any = None,
    base: Any = None,
    calibration: str | os.PathLike[str] | Mapping[str, Moments] | None = None,
    ranks: Sequence[int] = RANKS,
    include: str | None = None,
    exclude: str | None = None,
    max_memory: int | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
) -> Plan:
    """Open a checkpoint and say what quantizing its matrices would take; parameters are those of `quantization`.

    Returns
    -------
    Plan

    Raises
    ------
    CheckpointError, MismatchError, UsageError
        As `quantization`.
    """
    if tuned is not None and base is not None:
        raise UsageError("tuned and base are both given: one update is looked at, the model's own or what it became")
    chosen = {scheme.name: scheme for scheme in map(_as_scheme, schemes)}
    if not chosen:
        raise UsageError("no scheme is given; nf4 is the usual one")
    if not ranks or any(type(rank) is not int or rank < 1 for rank in ranks):
        raise UsageError(f"ranks = {list(ranks)}: give positive whole numbers, 8, 16, 64 for instance")
    options = {"trust_pickle": trust_pickle, "offline": offline}
    wanted = name_filter(include, exclude)
    checkpoint = as_base(_opened(model, **options))
    turned = turned_names(checkpoint.infos(), checkpoint.config)
    records = tuple(_described(checkpoint, info, info.name in turned, wanted) for info in checkpoint.infos().values())
    planned = {record["name"]: record for record in records if record["status"] == "planned"}
    if not planned:
        raise UsageError(
            f"{checkpoint.ref} has no matrix to quantize"
            + (
                f" among the names that include = {include!r}, exclude = {exclude!r} leave"
                if include or exclude
                else ""
            )
        )
    other, updates, matching = _updates(checkpoint, tuned, base, allow_partial=allow_partial, **options)
    moments, inputs, calibrated = _moments(calibration, planned)
    info = {
        "model": side_info(checkpoint),
        "other": None if other is None else {**side_info(other), "side": "tuned" if base is None else "base"},
        "matching": matching,
        "calibration": calibrated,
        "settings": {
            "formats": list(chosen),
            "ranks": sorted(set(ranks)),
            "include": include,
            "exclude": exclude,
            "allow_partial": allow_partial,
            "trust_pickle": trust_pickle,
        },
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    return Plan(
        checkpoint,
        tuple(chosen.values()),
        tuple(sorted(set(ranks))),
        records,
        {name: delta for name, delta in updates.items() if name in planned},
        moments,
        inputs,
        physical_memory() // 2 if max_memory is None else max_memory,
        info,
    )


def _as_scheme(scheme: str | Scheme) -> Scheme:
    return scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)


def _opened(ref: Any, *, trust_pickle: bool, offline: bool) -> Checkpoint | Adapter:
    """A checkpoint, or what names one: an example too, where no path of that name is there."""
    if isinstance(ref, str) and ref in EXAMPLES and not Path(ref).exists():
        ref = str(fetch(ref, offline=offline))
    return opened(ref, trust_pickle=trust_pickle, offline=offline)


def _described(checkpoint: Checkpoint, info: TensorInfo, turned: bool, wanted: Any) -> Record:
    layer, role = layer_and_role(info.name)
    rows, cols = (info.shape[::-1] if turned else info.shape) if len(info.shape) == 2 else (0, 0)
    record = {
        "name": info.name,
        "layer": layer,
        "role": role,
        "shape": list(info.shape),
        "rows": rows,
        "cols": cols,
        "turned": turned,
        "dtype": info.dtype if info.quantization is None else str(info.quantization),
    }
    reason = _reason_to_keep(checkpoint, info, wanted)
    return {**record, "status": "kept" if reason else "planned", "reason": reason}


def _reason_to_keep(checkpoint: Checkpoint, info: TensorInfo, wanted: Any) -> str:
    if len(info.shape) != 2:
        return "no matrix"
    if min(info.shape) < 2:
        return "no matrix but a vector"
    if not is_float(info.dtype):
        return f"stored as {info.dtype}"
    if info.name in checkpoint.aliases:
        return "a second name of another tensor"
    return "" if wanted(info.name) else "not among the names asked for"


def _updates(
    checkpoint: Checkpoint, tuned: Any, base: Any, *, allow_partial: bool, **options: bool
) -> tuple[Checkpoint | Adapter | None, dict[str, AnyDelta], dict[str, Any] | None]:
    """The other model, the update of each of this one's matrices by the name stored here, and how many matched."""
    if tuned is None and base is None:
        return None, {}, None
    other = _opened(tuned if base is None else base, **options)
    if base is not None:
        other = as_base(other)
    first, second = (checkpoint, other) if base is None else (as_base(other), checkpoint)
    pairing, found = pair_checkpoints(first, second)
    if pairing.share < LEAST_MATCH and not allow_partial:
        raise MismatchError(mismatch_message(first, second, pairing))
    named = {pair.name: pair.base if base is None else pair.tuned for pair in pairing.pairs}
    updates = {
        stored: delta
        for name, delta in found.items()
        if (stored := named[name]) is not None and delta.shape == checkpoint.info(stored).shape
    }
    if not updates:
        raise MismatchError(f"{other.ref} changes no matrix of {checkpoint.ref} that has its shape there")
    return other, updates, matching_info(pairing)


def _moments(
    given: str | os.PathLike[str] | Mapping[str, Moments] | None, planned: Mapping[str, Record]
) -> tuple[dict[str, str], Mapping[str, Moments], dict[str, Any] | None]:
    """Which moments belong to which matrix, the moments, and what the result remembers of them."""
    if given is None:
        return {}, {}, None
    found = given if isinstance(given, Mapping) else load_moments(given)
    modules = {name.removesuffix(".weight"): name for name in planned}
    names = {modules[module]: known for module, known in aligned(found, modules).items()}
    if not names:
        raise UsageError(
            f"none of the moments of {listed(sorted(found))} belongs to a matrix here, {listed(sorted(modules))} "
            "among them: they were taken of another model"
        )
    for name, known in names.items():
        size, inputs = len(found[known].total), planned[name]["cols"]
        if size != inputs:
            raise UsageError(
                f"the moments of {known} are of {size} inputs and {name} reads {inputs}: "
                "they were taken of another model"
            )
    told: dict[str, Any] = {"file": None, "maps": len(found), "matrices": len(names)}
    if not isinstance(given, Mapping):
        digest = digest_files([(Path(given).name, Path(given), 0)])[0]
        told |= {"file": str(given), "sha256": digest.sha256, "sampled": digest.sampled}
    told["inputs"] = max(found[known].count for known in names.values())
    return names, found, told


def entries(record: Mapping[str, Any]) -> int:
    """Number of weights of a row's matrix."""
    return math.prod((record["rows"], record["cols"]))
