"""`geometry`: two or more updates of one base compared tensor by tensor, journalled, resumable, within memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.names import Pair, layer_and_role
from spectra.delta import AnyDelta, is_float, name_filter
from spectra.errors import MismatchError, OutOfMemory, UsageError
from spectra.inputs import check_device, check_folder, matching_info, physical_memory, side_info, versions
from spectra.pairwise.opening import Opened, open_updates
from spectra.pairwise.ranks import RANKS
from spectra.pairwise.result import Geometry
from spectra.pairwise.row import measured
from spectra.pairwise.unit import Asked, Unit
from spectra.record import Record, described
from spectra.schedule import Load, in_lanes, journalled

# Shown of a list in a message.
_LISTED = 5


@dataclass(frozen=True)
class GeometryPlan:
    """What a geometry would do: which tensors are read, by which route each goes, what it costs.

    Parameters
    ----------
    base : Checkpoint
    updates : tuple of Opened
        In the order given.
    units : tuple of Unit
        One a tensor of the base, and one a new tensor, in stored order.
    asked : Asked
    settings : dict
        Flags the result depends on.
    notes : tuple of str
        What a reader should know of the inputs.
    """

    base: Checkpoint
    updates: tuple[Opened, ...]
    units: tuple[Unit, ...]
    asked: Asked
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[Record, ...]:
        """One a unit, before measuring."""
        return tuple(unit.record for unit in self.units)

    @property
    def measurable(self) -> tuple[Unit, ...]:
        """Units that an update changes."""
        return tuple(unit for unit in self.units if any(delta is not None for delta in unit.deltas))

    @property
    def bytes(self) -> int:
        """Bytes to read from all checkpoints."""
        return sum(
            delta.base_info.nbytes + delta.tuned_info.nbytes
            for unit in self.measurable
            for delta in unit.deltas
            if delta is not None
        )

    def lines(self) -> list[str]:
        """The plan in words, for a terminal."""
        said = []
        for update in self.updates:
            said.append(
                f"{update.label}: {update.pairing.matched} of {update.pairing.total} tensors match "
                f"({update.pairing.share:.1%}) {self.base.ref}"
            )
            said += update.pairing.transforms
        groups: dict[str, int] = {}
        for unit in self.measurable:
            kind = self._route(unit)
            groups[kind] = groups.get(kind, 0) + 1
        return [
            *said,
            *self.notes,
            f"{len(self.measurable)} tensors to compare, {self.bytes / 1e6:,.0f} MB to read",
            *(f"  {count:5d} × {kind}" for kind, count in groups.items()),
        ]

    def _route(self, unit: Unit) -> str:
        if min(unit.shape) <= 1 or not all(is_float(delta.base_info.dtype) for delta in unit.present):
            return "not a matrix: named only"
        try:
            whole = self.asked.whole(unit)
        except OutOfMemory as error:
            return str(error)
        routes = ["adapter factors"] if len(unit.dense) < len(unit.present) else []
        if unit.dense:
            routes.append("every singular value" if whole else f"leading {self.asked.rank}, certified")
        return " and ".join(routes) + (", intruders" if whole else ", no intruders (too large; exact asks for them)")


def plan_geometry(
    a: Any,
    b: Any,
    base: Any = None,
    *,
    also: Sequence[Any] = (),
    rank: int = RANKS[-1],
    exact: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    device: str | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
) -> GeometryPlan:
    """Open and pair all updates, and say what comparing them would do; only headers are read.

    Parameters and errors are those of `geometry`.
    """
    if rank < 1:
        raise UsageError(f"rank = {rank}: at least one direction must be compared")
    check_device(device)
    wanted = name_filter(include, exclude)
    whole, updates, notes = open_updates(
        (a, b, *also), base, trust_pickle=trust_pickle, offline=offline, allow_partial=allow_partial
    )
    units = tuple(unit for unit in _units(whole, updates) if wanted(unit.record["name"]))
    if not units:
        raise UsageError(f"no tensor is left by include = {include!r}, exclude = {exclude!r}")
    if not any(sum(delta is not None for delta in unit.deltas) > 1 for unit in units):
        raise MismatchError(_nothing_shared(updates, units))
    limit = physical_memory() // 2 if max_memory is None else max_memory
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
    }
    labels = tuple(update.label for update in updates)
    asked = Asked(labels, rank=rank, exact=exact, seed=seed, max_bytes=limit, device=device)
    return GeometryPlan(whole, updates, units, asked, settings, notes)


def geometry(
    a: Any,
    b: Any,
    base: Any = None,
    *,
    also: Sequence[Any] = (),
    out: str | os.PathLike[str] | None = None,
    rank: int = RANKS[-1],
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
    progress: bool = True,
) -> Geometry:
    """Compare two or more updates of one base: shared directions, captured energy, intruders, each beside chance.

    Parameters
    ----------
    a, b : path, hub id ``org/name@revision``, Checkpoint, Adapter or Run
        Fine-tuned models or PEFT adapters. A run stands for its tuned side.
    base : path, hub id or Checkpoint, optional
        What both are updates of. Adapters and runs name it themselves.
    also : sequence
        Further updates.
    out : path, optional
        Folder of the journal. With it an interrupted comparison goes on where it stopped.
    rank : int
        Leading directions to compare.
    exact : bool
        Every singular value of every matrix, and intruders, whatever the size; by default up to a smaller dimension
        of 2048, and certified leading directions beyond.
    include, exclude : str, optional
        Regular expressions searched in the tensors' names.
    jobs : int, optional
        Small matrices to measure at a time; by default one a core. The numbers do not depend on it.
    device : str, optional
        Where dense updates are decomposed, for instance ``"cuda"``.
    max_memory : int, optional
        Bytes allowed for matrices and their decompositions; by default half the machine's. A tensor needs n + 4 times
        its base in float32 for n dense updates, and where intruders are looked for four times more and three of its
        smaller Gram matrix in float64.
    resume : bool
        Take up the journal in `out`; otherwise begin anew.
    seed : int
        Seed of the randomized routes.
    trust_pickle : bool
        Read ``.bin``/``.pt`` files, with torch's restricted unpickler.
    offline : bool
        Never ask the hub.
    allow_partial : bool
        Go on where fewer than 95 % of an update's tensors match.
    progress : bool
        Show a bar for anything longer than two seconds.

    Returns
    -------
    Geometry

    Raises
    ------
    CheckpointError
        If something cannot be opened (`UnsafeCheckpoint` where it lies about itself).
    MismatchError
        If an update does not fit the base, or no tensor is changed by two of them.
    UsageError
        If the base is not known, or arguments leave nothing to do.
    JournalError
        If the folder is in use, or was begun with other inputs or flags.

    Examples
    --------
    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> step = torch.zeros(4, 4); step[0, 1] = 1.0
    >>> with TemporaryDirectory() as folder:
    ...     for name, w in (("base", torch.eye(4)), ("one", torch.eye(4) + step), ("two", torch.eye(4) - 2 * step)):
    ...         save_file({"w": w}, f"{folder}/{name}.safetensors")
    ...     files = [f"{folder}/{name}.safetensors" for name in ("one", "two", "base")]
    ...     found = geometry(*files, progress=False)
    >>> row = found.frame.iloc[0]
    >>> round(float(row.cosine), 9), float(row.norm_ratio)
    (-1.0, 2.0)
    """
    todo = plan_geometry(
        a,
        b,
        base,
        also=also,
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
    )
    return execute_geometry(todo, out=out, jobs=jobs, resume=resume, progress=progress)


def execute_geometry(
    todo: GeometryPlan,
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Geometry:
    """Carry out a plan; parameters, returns and errors are those of `geometry`."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: at least one matrix must be measured at a time")
    if out is not None:
        check_folder((todo.base, *(update.tuned for update in todo.updates)), out)
    info = _info(todo)
    units = {unit.record["name"]: unit for unit in todo.measurable}
    loads = {name: Load(unit.shape, todo.asked.peak_bytes(unit)) for name, unit in units.items()}
    rows = journalled(
        todo.records,
        {name: todo.asked.work(unit) for name, unit in units.items()},
        lambda missing: in_lanes(
            lambda record: measured(units[record["name"]], todo.asked),
            missing,
            loads,
            jobs=jobs or os.cpu_count() or 1,
            max_bytes=todo.asked.max_bytes,
            device=todo.asked.device,
        ),
        out=out,
        fingerprint={key: info[key] for key in ("kind", "base", "updates", "settings", "versions", "threads")},
        resume=resume,
        progress=progress,
    )
    return Geometry(rows, info)


def _units(base: Checkpoint, updates: Sequence[Opened]) -> list[Unit]:
    """One unit a tensor: of the base in its stored order (an expert of a stack for itself), then what is new."""
    order = {name: i for i, name in enumerate(base)}
    found: dict[tuple[str, ...], list[tuple[Pair, AnyDelta | None] | None]] = {}
    for i, update in enumerate(updates):
        for pair in update.pairing.pairs:
            # An adapter's deltas go by the name that the base stores.
            delta = update.deltas.get(pair.name) or update.deltas.get(pair.base or "")
            found.setdefault(_place(pair), [None] * len(updates))[i] = pair, delta
    return [
        _unit(found[place], updates, base) for place in sorted(found, key=lambda place: order.get(place[0], len(order)))
    ]


def _unit(entries: Sequence[tuple[Pair, AnyDelta | None] | None], updates: Sequence[Opened], base: Checkpoint) -> Unit:
    pairs = [(entry[0], update.tuned) for entry, update in zip(entries, updates, strict=True) if entry is not None]
    # What can be compared is said first; then what went wrong; that nothing changed comes last.
    pair, tuned = min(pairs, key=lambda known: {"ok": 0, "unchanged": 2}.get(known[0].status, 1))
    record = described(pair, base.infos().get(pair.base or ""), tuned.infos().get(pair.tuned or ""))
    deltas = tuple(None if entry is None else entry[1] for entry in entries)
    refused = tuple(entry[0].reason if entry and entry[0].status == "shape_mismatch" else "" for entry in entries)
    present = [delta for delta in deltas if delta is not None]
    if present:
        shape, _ = Counter(delta.shape for delta in present).most_common(1)[0]
        record |= dict(zip(("rows", "cols"), shape, strict=True))
    # A checkpoint's pairs go by their canonical name, an adapter's as the base stores them: as the checkpoint's.
    name = next((pair.name for pair, side in pairs if not isinstance(side, Adapter)), pair.name)
    layer, role = layer_and_role(name)
    del record["dtype_tuned"]
    return Unit({**record, "name": name, "layer": layer, "role": role}, deltas, refused)


def _place(pair: Pair) -> tuple[str, ...]:
    """What tells a tensor of the base, or an expert of a stacked one; a new tensor goes by its own name."""
    if pair.base is None:
        return ("", pair.name)
    experts = [step for step in pair.view.split("|") if step.startswith("expert:") and not step.endswith(":tuned")]
    return (pair.base, *experts)


def _nothing_shared(updates: Sequence[Opened], units: Sequence[Unit]) -> str:
    said = []
    for i, update in enumerate(updates):
        names = [unit.record["name"] for unit in units if unit.deltas[i] is not None]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        said.append(f"  {update.label}: {', '.join(names[:_LISTED]) or 'nothing'}{more}")
    return "\n".join(["no tensor is changed by two of the updates, so there is nothing to compare:", *said])


def _info(todo: GeometryPlan) -> dict[str, Any]:
    """Where the records came from; the same inputs and flags give the same dictionary."""
    return {
        "kind": "geometry",
        "base": side_info(todo.base),
        "updates": [
            {"label": update.label, **side_info(update.tuned), "matching": matching_info(update.pairing)}
            for update in todo.updates
        ],
        "notes": list(todo.notes),
        "settings": dict(todo.settings),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
