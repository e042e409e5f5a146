"""The updates of a geometry and the base they share: opened, named shortly, and checked to be of one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.names import Pairing
from spectra.delta import AnyDelta, as_base, opened, pair_checkpoints
from spectra.errors import MismatchError, UsageError
from spectra.inputs import LEAST_MATCH, mismatch_message, side_info


@dataclass(frozen=True)
class Opened:
    """One update of a base.

    Parameters
    ----------
    label : str
        Short name, unlike the others'.
    tuned : Checkpoint or Adapter
    pairing : Pairing
        Every tensor of both, with its status.
    deltas : dict of str to delta
        What can be subtracted, by the pairing's names.
    """

    label: str
    tuned: Checkpoint | Adapter
    pairing: Pairing
    deltas: dict[str, AnyDelta]


@dataclass(frozen=True)
class _Named:
    """A base by what names it: `ref` as written, `source` to open, equal for two names of one folder."""

    ref: str
    source: str | Path


def open_updates(
    given: Sequence[Any], base: Any, *, trust_pickle: bool = False, offline: bool = False, allow_partial: bool = False
) -> tuple[Checkpoint, tuple[Opened, ...], tuple[str, ...]]:
    """Open all updates and their base, and pair each with it; only headers are read.

    Parameters
    ----------
    given : sequence of path, hub id, Checkpoint, Adapter or Run
        Two at least. A Run stands for its tuned side.
    base : path, hub id, Checkpoint or None
        None: the base that all of them name, which only adapters and runs do.
    trust_pickle, offline, allow_partial : bool
        As in `spectra.compare`.

    Returns
    -------
    base : Checkpoint
    updates : tuple of Opened
    notes : tuple of str
        What a reader should know: an adapter that names another base, for instance.

    Raises
    ------
    CheckpointError
        If something cannot be opened.
    UsageError
        If the base is not named, named differently, or an adapter.
    MismatchError
        If an update does not fit the base, or files of a run changed since.
    """
    options = {"trust_pickle": trust_pickle, "offline": offline}
    runs = [info for info in map(_info_of, given) if info is not None]
    sides = [opened(_tuned_of(update), **options) for update in given]
    for update, side in zip(given, sides, strict=True):
        _check_unchanged(_info_of(update), "tuned", side)
    named = [_named_base(side) for side in sides]
    if base is None:
        chosen = _of_runs(runs) if runs else _of_adapters(sides, named)
    whole = as_base(opened(chosen if base is None else base, **options))
    for info in runs if base is None else ():
        _check_unchanged(info, "base", whole)
    notes = _notes(sides, named, whole) if runs or base is not None else []
    updates = []
    for label, side in zip(short_labels([str(side.ref) for side in sides]), sides, strict=True):
        pairing, found = _paired(whole, side)
        if pairing.share < LEAST_MATCH and not allow_partial:
            raise MismatchError(mismatch_message(whole, side, pairing))
        updates.append(Opened(label, side, pairing, found))
    return whole, tuple(updates), tuple(notes)


def short_labels(refs: Sequence[str]) -> tuple[str, ...]:
    """Shortest endings of paths or ids that tell the updates apart; numbered where nothing does.

    Examples
    --------
    >>> short_labels(["runs/one/lora", "runs/two/lora", "org/full@main", "org/full@main"])
    ('one/lora', 'two/lora', 'full@main', 'full@main (2)')
    """
    parts = [[part for part in ref.replace(os.sep, "/").split("/") if part not in ("", ".")] or [ref] for ref in refs]
    labels = []
    for ref, own in zip(refs, parts, strict=True):
        others = [other for other, name in zip(parts, refs, strict=True) if name != ref]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        labels.append("/".join(own[-count:]))
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            labels[i] = f"{label} ({seen[label]})"
    return tuple(labels)


def _paired(base: Checkpoint, side: Checkpoint | Adapter) -> tuple[Pairing, dict[str, AnyDelta]]:
    try:
        return pair_checkpoints(base, side)
    except MismatchError as error:
        raise MismatchError(f"{side.ref} does not fit {base.ref}: {error}") from error


def _info_of(update: Any) -> dict[str, Any] | None:
    """Where a run came from; None for anything else."""
    info = getattr(update, "info", None)
    return info if isinstance(info, dict) and {"base", "tuned"} <= info.keys() else None


def _tuned_of(update: Any) -> Any:
    info = _info_of(update)
    return update if info is None else info["tuned"]["ref"]


def _check_unchanged(info: dict[str, Any] | None, name: str, side: Checkpoint | Adapter) -> None:
    """Refuse files that are no longer those a run measured."""
    if info is not None and info[name]["digests"] != side_info(side)["digests"]:
        raise MismatchError(
            f"{side.ref} changed since the run on it was measured: compare again, or give paths in place of the run"
        )


def _of_runs(runs: Sequence[dict[str, Any]]) -> str:
    """Say which base all runs were measured against."""
    first = runs[0]["base"]
    for info in runs:
        if info["base"]["digests"] != first["digests"]:
            raise UsageError(
                f"the runs have different bases, {first['ref']} and {info['base']['ref']}: only updates of one base "
                "can be compared"
            )
    return str(first["ref"])


def _named_base(side: Checkpoint | Adapter) -> _Named | None:
    """Which base an adapter_config.json names, if any: a folder beside the adapter or here, else a hub id."""
    if not isinstance(side, Adapter) or not side.config.base_model:
        return None
    ref = side.config.base_model
    for path in (side.root / ref, Path(ref).expanduser()):
        if path.exists():
            return _Named(ref, path.resolve())
    revision = side.config.base_revision
    return _Named(ref, f"{ref}@{revision}" if revision and "@" not in ref else ref)


def _of_adapters(sides: Sequence[Checkpoint | Adapter], named: Sequence[_Named | None]) -> str | Path:
    """Say which base all updates name."""
    for side, name in zip(sides, named, strict=True):
        if name is None:
            raise UsageError(
                f"{side.ref} does not say which base it is an update of: give it with --base REF (base=REF)"
            )
    names = [name for name in named if name is not None]
    for side, name in zip(sides, names, strict=True):
        if name.source != names[0].source:
            raise UsageError(
                f"{sides[0].ref} is an update of {names[0].ref}, {side.ref} of {name.ref}: only updates of one base "
                "can be compared. If these are two names of one model, give it with --base REF (base=REF)"
            )
    return names[0].source


def _notes(sides: Sequence[Checkpoint | Adapter], named: Sequence[_Named | None], base: Checkpoint) -> list[str]:
    """Updates that name another base than the one that was given."""
    here = {str(base.ref), str(base.root.resolve()), f"{base.ref}".partition("@")[0]}
    return [
        f"{side.ref} names {name.ref} as its base; it is compared as an update of {base.ref}, which was given"
        for side, name in zip(sides, named, strict=True)
        if name is not None and not here & {str(name.source), name.ref}
    ]
