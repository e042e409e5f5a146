"""Flags of a geometry: what a reader must know before believing that two updates agree, or that they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectra.pairwise.pooled import PooledPair, PooledUpdate
from spectra.pairwise.rows import FAILED, MatrixRow
from spectra.report.flags import Flag, flag_on, input_flags
from spectra.report.pairs.verdict import name
from spectra.report.text import counted, listed, percent, visible, whole_percent

# Fine-tuning moves a matrix by a few per cent; half of its norm is another model, or another base.
LARGE = 0.5
# Two LoRA runs of one seed, plain and quantized, share 93 % of the input side and 48 % of the output side; two of
# different seeds 2 % and 6 % (all-MiniLM-L6-v2, rank 8).
INPUT_SHARED, SIDES_APART = 0.5, 0.2
# More than half of the squared norm.
MOSTLY = 0.5
FAILURES = dict(
    zip(
        FAILED,
        (
            "with NaN or infinite entries, left out of every number",
            "of a dtype that cannot be read here",
            "that could not be analysed; the reason stands in the row",
        ),
        strict=True,
    )
)
MISSHAPEN = "shape_mismatch", "matched by name but not in shape"


def find_flags(
    rows: Sequence[MatrixRow],
    updates: Sequence[PooledUpdate],
    pairs: Sequence[PooledPair],
    info: Mapping[str, Any],
) -> tuple[Flag, ...]:
    """List the flags of a geometry, alarms first.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row.
    updates : sequence of PooledUpdate
        All of them.
    pairs : sequence of PooledPair
        Every two that change a matrix together.
    info : mapping
        `spectra.Geometry.info`.
    """
    found = [flag for status, said in FAILURES.items() for flag in _failure(rows, status, said)]
    found += [flag for update in updates for flag in _failed_alone(rows, update)]
    found += [flag for update in updates for flag in _of_update(rows, update)]
    found += _unresolved(rows, pairs, updates)
    found += [Flag("alarm", "inputs", _sentence(note)) for note in info.get("notes", ())]
    found += _same_files(updates, info)
    found += _nothing_moved(rows, updates)
    found += _same_start(pairs, updates)
    found += _left_out(rows, updates)
    sides = [("the base", info.get("base", {}))]
    sides += [(name(str(side.get("label", "update"))), side) for side in info.get("updates", ())]
    for said, side in sides:
        transforms = side.get("matching", {}).get("transforms", ())
        found += [Flag("note", "names", f"Names of {said}: {_plain(sentence)}.") for sentence in transforms]
    found += input_flags(sides, info)
    return tuple(sorted(found, key=lambda flag: flag.level != "alarm"))


def _failure(rows: Sequence[MatrixRow], status: str, said: str) -> list[Flag]:
    return flag_on(
        "alarm",
        status,
        (r for r in rows if r.status == status),
        lambda n, names: f"{counted(n, 'tensor')} {said}: {names}.",
    )


def _failed_alone(rows: Sequence[MatrixRow], update: PooledUpdate) -> list[Flag]:
    """Matrices that one update is left out of, while others are compared."""
    return [
        flag
        for status, said in (*FAILURES.items(), MISSHAPEN)
        for flag in flag_on(
            "alarm",
            status,
            (r for r in rows if r.analysed and r.updates[update.position].status == status),
            lambda n, names, said=said: f"{name(update.label)} has {counted(n, 'tensor')} {said}: {names}.",  # type: ignore[misc]
        )
    ]


def _of_update(rows: Sequence[MatrixRow], update: PooledUpdate) -> list[Flag]:
    place, called = update.position, name(update.label)
    mine = [(r, r.updates[place]) for r in rows if r.analysed and r.updates[place].changes]
    found = flag_on(
        "alarm",
        "drowned",
        (r for r, u in mine if u.drowned),
        lambda n, names: (
            f"In {counted(n, 'matrix', 'matrices')} the whole of {called} is no larger than storage rounding: its "
            f"directions there may be those of the rounding. {names}."
        ),
    )
    found += flag_on(
        "alarm",
        "mostly_rounding",
        (r for r, u in mine if u.frobenius > 0 and (u.storage_frobenius / u.frobenius) ** 2 > MOSTLY),
        lambda n, names: (
            f"In {counted(n, 'matrix', 'matrices')} more than half of the squared norm of {called} is storage "
            f"rounding: cosines and captured shares there are those of the rounding. {names}."
        ),
    )
    if update.relative >= LARGE:
        size = percent(update.relative)
        text = f"{called} is {size} as large as the base. Fine-tuning moves a few per cent: is this its base?"
        found.append(Flag("alarm", "large", text, tuple(r.position for r, _ in mine)))
    return found


def _unresolved(rows: Sequence[MatrixRow], pairs: Sequence[PooledPair], updates: Sequence[PooledUpdate]) -> list[Flag]:
    found = []
    for pair in pairs:
        a, b = (name(updates[i].label) for i in (pair.a, pair.b))
        held = [(r, r.updates[pair.a], r.updates[pair.b]) for r in rows if (pair.a, pair.b) in r.pairs and r.analysed]
        found += flag_on(
            "alarm",
            "unresolved",
            (r for r, x, y in held if min(x.held, y.held) >= pair.rank > min(x.resolved, y.resolved)),
            lambda n, names, a=a, b=b, rank=pair.rank: (  # type: ignore[misc]
                f"In {counted(n, 'matrix', 'matrices')} rounding or a small gap leaves the leading {rank} directions "
                f"of {a} or {b} unresolved (they may be turned by 30° or more): overlaps there say less. {names}."
            ),
        )
    return found


def _same_files(updates: Sequence[PooledUpdate], info: Mapping[str, Any]) -> list[Flag]:
    """Updates that are one file under two names: they agree, and say nothing by it."""
    groups: dict[str, list[str]] = {}
    for update, side in zip(updates, info.get("updates", ()), strict=True):
        held = [[each.get("sha256"), each.get("bytes")] for each in side.get("digests", ())]
        if held:
            groups.setdefault(repr(held), []).append(update.label)
    return [
        Flag("alarm", "same_files", f"{listed(labels, most=len(labels))} are the same files, by their digests.")
        for labels in groups.values()
        if len(labels) > 1
    ]


def _nothing_moved(rows: Sequence[MatrixRow], updates: Sequence[PooledUpdate]) -> list[Flag]:
    moved = {i for row in rows for i, update in enumerate(row.updates) if update.changes or update.status}
    return [
        Flag("alarm", "nothing_moved", f"{name(u.label)} leaves every matrix as it is: was it trained?")
        for u in updates
        if rows and u.position not in moved
    ]


def _same_start(pairs: Sequence[PooledPair], updates: Sequence[PooledUpdate]) -> list[Flag]:
    """Adapters that share their input side and not their output side: LoRA's A is drawn at random, and hardly moves."""
    found = []
    for pair in pairs:
        both = [updates[i] for i in (pair.a, pair.b)]
        left, right = (pair.shared_above(side) for side in ("left", "right"))
        if all(u.factored for u in both) and right > INPUT_SHARED and right > left + SIDES_APART:
            text = (
                f"{name(both[0].label)} and {name(both[1].label)} share {whole_percent(right)} of their leading input "
                f"directions and {whole_percent(left)} of the output ones, above chance. Adapters whose A was drawn "
                "from one seed keep most of it: this may be their start and not their task."
            )
            found.append(Flag("note", "same_start", text))
    return found


def _left_out(rows: Sequence[MatrixRow], updates: Sequence[PooledUpdate]) -> list[Flag]:
    found = flag_on(
        "note",
        "one_sided",
        (r for r in rows if r.status == "one_sided"),
        lambda n, names: (
            f"{counted(n, 'matrix', 'matrices')} changed by one update alone, compared with none: {names}."
        ),
    )
    if len(updates) > 2:
        found += flag_on(
            "note",
            "in_part",
            (r for r in rows if r.analysed and not all(u.changes or u.status for u in r.updates)),
            lambda n, names: f"{counted(n, 'matrix', 'matrices')} that some of the updates leave as they are: {names}.",
        )
    for level, status, said in (
        ("alarm", *MISSHAPEN),
        ("note", "base_only", "only in the base"),
        ("note", "tuned_only", "only in an update"),
    ):
        found += flag_on(
            level,
            status,
            (r for r in rows if r.status == status),
            lambda n, names, said=said: f"{counted(n, 'tensor')} {said}: {names}.",  # type: ignore[misc]
        )
    adapters = [u for u in updates if u.factored]
    if adapters:
        limits = listed([f"{u.label} ({_limit(u)})" for u in adapters], most=6)
        found.append(
            Flag(
                "note", "adapters", f"The rank of an adapter is a limit that its training set, not a finding: {limits}."
            )
        )
    return found


def _limit(update: PooledUpdate) -> str:
    low, high = update.limits
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _sentence(text: Any) -> str:
    held = _plain(text)
    return held[:1].upper() + held[1:] + "."


def _plain(text: Any) -> str:
    return visible(str(text)).rstrip(".")
