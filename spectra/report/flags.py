"""Flags: what a reader must know before believing a number, each with the rows that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectra.report.rows import TensorRow
from spectra.report.text import counted, listed, percent, visible

# Half of the entries not moved at all: the update is below the stored grid, and rounding is a dead zone, not noise.
DEAD_ZONE = 0.5
# A tenth of the update lost on merging is what a reader would want to know before shipping the merged weights.
MERGE_LOSS = 0.1


@dataclass(frozen=True)
class Flag:
    """One thing to know: `level` is ``"alarm"`` (numbers missing or misleading) or ``"note"``."""

    level: str
    kind: str
    text: str
    positions: tuple[int, ...] = ()


def find_flags(rows: Sequence[TensorRow], info: Mapping[str, Any]) -> tuple[Flag, ...]:
    """List the flags of a run, alarms first.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    info : mapping
        `spectra.Run.info`.
    """
    found = [flag for rule in _RULES for flag in rule(rows)]
    found += _input_flags(info)
    return tuple(sorted(found, key=lambda flag: flag.level != "alarm"))


def _flag(level: str, kind: str, rows: Iterable[TensorRow], words: Callable[[int, str], str]) -> list[Flag]:
    """Return one flag on these rows, or none; `words` gets their count and their names."""
    held = list(rows)
    if not held:
        return []
    text = words(len(held), listed([r.name for r in held]))
    return [Flag(level, kind, text, tuple(r.position for r in held))]


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _failures(rows: Sequence[TensorRow]) -> list[Flag]:
    def of(status: str) -> list[TensorRow]:
        return [r for r in rows if r.status == status]

    return [
        *_flag(
            "alarm",
            "nonfinite",
            of("nonfinite"),
            lambda n, names: f"{counted(n, 'tensor')} with NaN or infinite entries, left out of every number: {names}.",
        ),
        *_flag(
            "alarm",
            "unsupported_dtype",
            of("unsupported_dtype"),
            lambda n, names: f"{counted(n, 'tensor')} of a dtype that cannot be read here: {names}.",
        ),
        *_flag(
            "alarm",
            "failed",
            of("failed"),
            lambda n, names: f"{counted(n, 'tensor')} failed to be analysed, the reason stands in the row: {names}.",
        ),
        *_flag(
            "alarm",
            "shape_mismatch",
            of("shape_mismatch"),
            lambda n, names: f"{counted(n, 'tensor')} matched by name but not in shape: {names}.",
        ),
    ]


def _rounding(rows: Sequence[TensorRow]) -> list[Flag]:
    return [
        *_flag(
            "alarm",
            "mostly_rounding",
            (r for r in rows if r.mostly_rounding),
            lambda n, names: (
                f"{counted(n, 'update')} {_plural(n, 'is', 'are')} mostly storage rounding (more than half of the "
                f"squared norm): effective ranks there count rounding; read the directions above the floor. {names}."
            ),
        ),
        *_flag(
            "alarm",
            "no_signal",
            (r for r in rows if r.analysed and r.measures["signal_rank"].high == 0),
            lambda n, names: f"{counted(n, 'update')} without one direction above the storage floor: {names}.",
        ),
        *_flag(
            "alarm",
            "dead_zone",
            (r for r in rows if r.analysed and r.numbers["zero_fraction"] > DEAD_ZONE and not r.factored),
            lambda n, names: (
                f"In {counted(n, 'matrix', 'matrices')} more than half of the entries did not move at all: the update "
                f"is sparse, or finer than the stored grid, and then the floor overstates the rounding. {names}."
            ),
        ),
        *_merge_loss([r for r in rows if r.numbers["merge_loss"] > MERGE_LOSS]),
    ]


def _merge_loss(rows: Sequence[TensorRow]) -> list[Flag]:
    worst = percent(max((r.numbers["merge_loss"] for r in rows), default=0.0))
    return _flag(
        "note",
        "merge_loss",
        rows,
        lambda n, names: (
            f"Merging into the stored dtype would lose up to {worst} of the update to rounding in "
            f"{counted(n, 'matrix', 'matrices')}: {names}."
        ),
    )


def _matching(rows: Sequence[TensorRow]) -> list[Flag]:
    return [
        *_flag(
            "note",
            "base_only",
            (r for r in rows if r.status == "base_only"),
            lambda n, names: f"{counted(n, 'tensor')} only in the base: {names}.",
        ),
        *_flag(
            "note",
            "tuned_only",
            (r for r in rows if r.status == "tuned_only"),
            lambda n, names: f"{counted(n, 'tensor')} only in the tuned checkpoint: {names}.",
        ),
        *_flag(
            "note",
            "compared_in_part",
            (r for r in rows if r.analysed and r.reason),
            lambda n, names: (
                f"{counted(n, 'tensor')} not compared plainly entry for entry, how stands in the row: {names}."
            ),
        ),
        *_flag(
            "note",
            "alias",
            (r for r in rows if r.status == "alias"),
            lambda n, names: f"{counted(n, 'name')} tied to another tensor, counted once: {names}.",
        ),
        *_flag(
            "note",
            "dtype_changed",
            (r for r in rows if r.analysed and r.dtype_base and r.dtype_tuned and r.dtype_base != r.dtype_tuned),
            lambda n, names: (
                f"{counted(n, 'matrix', 'matrices')} stored in different dtypes: the coarser one’s rounding is part of "
                f"the update. {names}."
            ),
        ),
    ]


def _spectra(rows: Sequence[TensorRow]) -> list[Flag]:
    return _flag(
        "note",
        "truncated",
        (r for r in rows if r.truncated),
        lambda n, names: (
            f"{counted(n, 'spectrum is', 'spectra are')} truncated: whole-spectrum measures are given as certified "
            f"bounds. {names}."
        ),
    )


def _input_flags(info: Mapping[str, Any]) -> list[Flag]:
    flags = []
    settings = info.get("settings", {})
    for key, said in (("include", "only names that match"), ("exclude", "no name that matches")):
        if settings.get(key):
            flags.append(Flag("note", key, f"Restricted by --{key}: {said} {visible(str(settings[key]))}."))
    if settings.get("trust_pickle"):
        flags.append(Flag("note", "trust_pickle", "Pickled weights were accepted (--trust-pickle), tensors only."))
    for sentence in info.get("matching", {}).get("transforms", ()):
        flags.append(Flag("note", "names", f"Names: {visible(str(sentence)).rstrip('.')}."))
    for side in ("base", "tuned"):
        for sentence in info.get(side, {}).get("notes", ()):
            flags.append(Flag("note", "input", f"Of the {side}: {visible(str(sentence)).rstrip('.')}."))
    sampled = [
        d["name"] for side in ("base", "tuned") for d in info.get(side, {}).get("digests", ()) if d.get("sampled")
    ]
    if sampled:
        text = f"Digests of {counted(len(sampled), 'large file')} are of samples, not of every byte: {listed(sampled)}."
        flags.append(Flag("note", "sampled_digests", text))
    return flags


_RULES = (_failures, _rounding, _matching, _spectra)
