"""`compare`: spectra and measures of every update between two checkpoints, journalled, resumable, within memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.names import Pairing
from spectra.delta import AnyDelta, LowRankDelta, as_base, is_float, name_filter, opened, pair_checkpoints
from spectra.errors import MismatchError, OutOfMemory, UsageError
from spectra.inputs import (
    DEFAULT_RANK,
    EXACT_BELOW,
    LEAST_MATCH,
    check_device,
    check_folder,
    matching_info,
    mismatch_message,
    physical_memory,
    side_info,
    versions,
)
from spectra.linalg.route import Route, choose
from spectra.record import Question, Record, described
from spectra.requantized import requantized, scheme_of_base
from spectra.run import Run
from spectra.schedule import journalled, measure_all, resident_bytes


@dataclass(frozen=True)
class Plan:
    """What a comparison would do: which tensors are read, by which route each goes, what it costs.

    Parameters
    ----------
    base, tuned : Checkpoint or Adapter
    pairing : Pairing
    deltas : dict of str to delta
        Updates to measure, by name.
    records : tuple of dict
        One row a tensor, before measuring.
    question : Question
    exact : bool
        Whether every singular value is taken whatever the size.
    settings : dict
        Flags the result depends on.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    pairing: Pairing
    deltas: Mapping[str, AnyDelta]
    records: tuple[Record, ...]
    question: Question
    exact: bool
    settings: Mapping[str, Any]

    def route(self, name: str) -> Route | None:
        """Route that the matrix of a name is expected to take; None for vectors, adapters' factors and integers."""
        delta = self.deltas[name]
        rows, cols = delta.shape
        if isinstance(delta, LowRankDelta) or min(rows, cols) <= 1 or not is_float(delta.base_info.dtype):
            return None
        itemsize = 8 if "F64" in (delta.base_info.dtype, delta.tuned_info.dtype) else 4
        limit = self.question.max_bytes - resident_bytes(delta)
        return choose(rows, cols, rank=self.rank(delta), itemsize=itemsize, max_bytes=limit)

    def rank(self, delta: AnyDelta) -> int | None:
        """How many values are asked of one update."""
        if self.exact or self.question.rank is not None:
            return self.question.rank
        return None if min(delta.shape) <= EXACT_BELOW else DEFAULT_RANK

    @cached_property
    def bytes(self) -> int:
        """Bytes to read from both checkpoints."""
        return sum(delta.base_info.nbytes + delta.tuned_info.nbytes for delta in self.deltas.values())

    @property
    def _quantized(self) -> list[str]:
        name = self.settings["quantized"]
        return [] if name in (None, "no") else [f"the base stood in {name}: updates are taken from what it rounds to"]

    def lines(self) -> list[str]:
        """The plan in words, for a terminal."""
        said = [
            f"{self.pairing.matched} of {self.pairing.total} tensors match ({self.pairing.share:.1%})",
            *self.pairing.transforms,
            *self._quantized,
            f"{len(self.deltas)} updates to measure, {self.bytes / 1e6:,.0f} MB to read",
        ]
        groups: dict[str, list[str]] = {}
        for name, delta in self.deltas.items():
            try:
                route = self.route(name)
            except OutOfMemory as error:
                groups.setdefault(str(error), []).append(name)
                continue
            kind = (
                "adapter factors" if isinstance(delta, LowRankDelta) else "norms only" if route is None else route.name
            )
            reason = "" if route is None else f": {route.reason}"
            groups.setdefault(f"{kind}{reason}", []).append(name)
        return said + [f"  {len(names):5d} × {kind}" for kind, names in groups.items()]


def plan(
    base: Any,
    tuned: Any,
    *,
    rank: int | None = None,
    exact: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    device: str | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    quantized: str | None = None,
) -> Plan:
    """Open and pair two checkpoints, and say what comparing them would do; only headers are read.

    Parameters are those of `compare`. With ``quantized="auto"`` a few matrices are read, too.

    Returns
    -------
    Plan

    Raises
    ------
    CheckpointError, MismatchError, UsageError
        As `compare`.
    """
    if rank is not None and (exact or rank < 1):
        raise UsageError(f"rank = {rank} and exact = {exact}: give a positive rank, or exact, or neither")
    check_device(device)
    wanted = name_filter(include, exclude)
    opened_base = as_base(opened(base, trust_pickle=trust_pickle, offline=offline))
    opened_tuned = opened(tuned, trust_pickle=trust_pickle, offline=offline)
    pairing, found = pair_checkpoints(opened_base, opened_tuned)
    if pairing.share < LEAST_MATCH and not allow_partial:
        raise MismatchError(mismatch_message(opened_base, opened_tuned, pairing))
    pairs = [pair for pair in pairing.pairs if wanted(pair.name)]
    if not pairs:
        raise UsageError(f"no tensor is left by include = {include!r}, exclude = {exclude!r}")
    infos, tuned_infos = opened_base.infos(), opened_tuned.infos()
    records = tuple(
        described(pair, infos.get(pair.base or ""), _tuned_info(pair.name, pair.tuned, found, tuned_infos))
        for pair in pairs
    )
    settings = {
        "rank": rank,
        "exact": exact,
        "include": include,
        "exclude": exclude,
        "seed": seed,
        "device": device,
        "max_memory": max_memory,
        "allow_partial": allow_partial,
        "trust_pickle": trust_pickle,
        "route": "auto",
    }
    limit = physical_memory() // 2 if max_memory is None else max_memory
    names = {pair.name for pair in pairs}
    left = {name: delta for name, delta in found.items() if name in names}
    scheme = scheme_of_base(left, quantized)
    if scheme is not None:
        left = requantized(left, scheme)
    settings["quantized"] = scheme.name if scheme is not None else "no" if quantized == "no" else None
    return Plan(
        opened_base,
        opened_tuned,
        pairing,
        left,
        records,
        Question(rank=rank, seed=seed, max_bytes=limit, device=device),
        exact,
        settings,
    )


def compare(
    base: Any,
    tuned: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    exact: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    jobs: int | None = None,
    device: str | None = None,
    max_memory: int | None = None,
    resume: bool = True,
    seed: int = 0,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    quantized: str | None = None,
    progress: bool = True,
) -> Run:
    """Measure the update of every tensor between two checkpoints.

    Parameters
    ----------
    base, tuned : path, hub id ``org/name@revision``, Checkpoint or Adapter
        The tuned side may be a PEFT adapter folder of the base.
    out : path, optional
        Folder of the journal. With it an interrupted comparison goes on where it stopped.
    rank : int, optional
        How many of the largest singular values to certify; where all cost no more, all are taken. By default all
        up to a smaller dimension of 2048, and the top 64 beyond.
    exact : bool
        All singular values of every matrix.
    include, exclude : str, optional
        Regular expressions searched in the tensors' canonical names.
    jobs : int, optional
        Small matrices to measure at a time; by default one a core. The numbers do not depend on it.
    device : str, optional
        Where to compute, for instance ``"cuda"``.
    max_memory : int, optional
        Bytes allowed for matrices and their decompositions; by default half the machine's.
    resume : bool
        Take up the journal in `out`; otherwise begin anew.
    seed : int
        Seed of the randomized routes.
    trust_pickle : bool
        Read ``.bin``/``.pt`` files, with torch's restricted unpickler.
    offline : bool
        Never ask the hub.
    allow_partial : bool
        Go on where fewer than 95 % of the tensors match.
    quantized : str, optional
        What the base stood in while the update was trained, ``"nf4"`` for instance (`spectra.quantize.Scheme.parse`):
        the update is then taken from the quantized weights, and its lie to their error is told. ``"auto"`` looks
        whether the tuned weights betray one of bitsandbytes' formats, or a QLoRA folder of this project names its own;
        ``"no"`` and None do not look.
    progress : bool
        Show a bar for anything longer than two seconds.

    Returns
    -------
    Run

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be opened (`UnsafeCheckpoint` where it lies about itself).
    MismatchError
        If fewer than 95 % of the tensors match.
    UsageError
        If arguments contradict each other or leave nothing to do.
    JournalError
        If the folder is in use, or was begun with other inputs or flags.

    Examples
    --------
    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"w": torch.eye(4)}, f"{folder}/a.safetensors")
    ...     save_file({"w": torch.eye(4) + torch.ones(4, 4)}, f"{folder}/b.safetensors")
    ...     run = compare(f"{folder}/a.safetensors", f"{folder}/b.safetensors", progress=False)
    >>> run.frame.status[0], round(float(run.frame.spectral_norm[0]), 6), int(run.frame.rank_99[0])
    ('ok', 4.0, 1)
    """
    todo = plan(
        base,
        tuned,
        rank=rank,
        exact=exact,
        include=include,
        exclude=exclude,
        device=device,
        max_memory=max_memory,
        seed=seed,
        trust_pickle=trust_pickle,
        offline=offline,
        allow_partial=allow_partial,
        quantized=quantized,
    )
    return execute(todo, out=out, jobs=jobs, resume=resume, progress=progress)


def execute(
    todo: Plan,
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Run:
    """Carry out a plan; parameters, returns and errors are those of `compare`."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: at least one matrix must be measured at a time")
    if out is not None:
        check_folder((todo.base, todo.tuned), out)
    info = _info(todo)
    fingerprint = {key: info[key] for key in ("base", "tuned", "settings", "versions", "threads")}
    work = {name: _work(delta) for name, delta in todo.deltas.items()}
    rows = journalled(
        todo.records,
        work,
        lambda missing: measure_all(todo, missing, jobs or os.cpu_count() or 1),
        out=out,
        fingerprint=fingerprint,
        resume=resume,
        progress=progress,
    )
    return Run(rows, info)


def _work(delta: AnyDelta) -> float:
    rows, cols = delta.shape
    return float(rows * cols) * (64 + min(rows, cols))


def _tuned_info(name: str, tuned_name: str | None, found: Mapping[str, AnyDelta], infos: Mapping[str, Any]) -> Any:
    return found[name].tuned_info if name in found else infos.get(tuned_name or "")


def _info(todo: Plan) -> dict[str, Any]:
    """Where the rows of a run came from; the same inputs and flags give the same dictionary."""
    return {
        "base": side_info(todo.base),
        "tuned": side_info(todo.tuned),
        "matching": matching_info(todo.pairing),
        "settings": dict(todo.settings),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
