"""Flags: what a reader must know before believing a number, each with the rows that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any, Protocol

from spectra.report.rows import TensorRow
from spectra.report.text import counted, listed, number, percent, visible

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


class Named(Protocol):
    """What a flag needs of a row."""

    @property
    def name(self) -> str:
        """As stored."""

    @property
    def position(self) -> int:
        """Place in the table."""


def _quantized(rows: Sequence[TensorRow], info: Mapping[str, Any]) -> list[Flag]:
    """What quantizing the base did beside what was trained."""
    scheme = info.get("settings", {}).get("quantized")
    held = [r for r in rows if r.analysed and r.numbers["quantization_frobenius"] > 0]
    if scheme in (None, "no") or not held:
        return []
    moved = median([r.numbers["quantization_frobenius"] / r.numbers["base_frobenius"] for r in held])
    ratio = median([r.numbers["quantization_frobenius"] / r.numbers["frobenius"] for r in held])
    undone = median([r.numbers["quantization_projection"] for r in held])
    chance = median([r.numbers["frobenius"] / r.numbers["quantization_frobenius"] / prod(r.shape) ** 0.5 for r in held])
    many = len(held) > 1
    text = (
        f"{counted(len(held), 'matrix', 'matrices')} stood in {scheme} while the update was trained, so Δ is taken "
        f"from the quantized weights: quantizing moved {'them' if many else 'it'} by {'a median of ' if many else ''}"
        f"{percent(moved)} of {'their' if many else 'its'} norm, {number(ratio)} times the update, which undoes "
        f"{percent(undone)} of that (chance: ± {percent(chance)})."
    )
    return [Flag("note", "quantized", text, tuple(r.position for r in held))]


def find_flags(rows: Sequence[TensorRow], info: Mapping[str, Any]) -> tuple[Flag, ...]:
    """List the flags of a run, alarms first.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.
    info : mapping
        `spectra.Run.info`.
    """
    found = [flag for rule in _RULES for flag in rule(rows)] + _quantized(rows, info)
    transforms = info.get("matching", {}).get("transforms", ())
    found += input_flags([(f"the {side}", info.get(side, {})) for side in ("base", "tuned")], info, transforms)
    return tuple(sorted(found, key=lambda flag: flag.level != "alarm"))


def flag_on(level: str, kind: str, rows: Iterable[Named], words: Callable[[int, str], str]) -> list[Flag]:
    """Return one flag on these rows, or none.

    Parameters
    ----------
    level, kind : str
        As in `Flag`.
    rows : iterable of TensorRow or MatrixRow
        What it is about.
    words : callable
        Gets their count and their names, and says what is to be known.
    """
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
        *flag_on(
            "alarm",
            "nonfinite",
            of("nonfinite"),
            lambda n, names: f"{counted(n, 'tensor')} with NaN or infinite entries, left out of every number: {names}.",
        ),
        *flag_on(
            "alarm",
            "unsupported_dtype",
            of("unsupported_dtype"),
            lambda n, names: f"{counted(n, 'tensor')} of a dtype that cannot be read here: {names}.",
        ),
        *flag_on(
            "alarm",
            "failed",
            of("failed"),
            lambda n, names: f"{counted(n, 'tensor')} failed to be analysed, the reason stands in the row: {names}.",
        ),
        *flag_on(
            "alarm",
            "shape_mismatch",
            of("shape_mismatch"),
            lambda n, names: f"{counted(n, 'tensor')} matched by name but not in shape: {names}.",
        ),
    ]


def _rounding(rows: Sequence[TensorRow]) -> list[Flag]:
    return [
        *flag_on(
            "alarm",
            "mostly_rounding",
            (r for r in rows if r.mostly_rounding),
            lambda n, names: (
                f"{counted(n, 'update')} {_plural(n, 'is', 'are')} mostly storage rounding (more than half of the "
                f"squared norm): effective ranks there count rounding; read the directions above the floor. {names}."
            ),
        ),
        *flag_on(
            "alarm",
            "no_signal",
            (r for r in rows if r.analysed and r.measures["signal_rank"].high == 0),
            lambda n, names: f"{counted(n, 'update')} without one direction above the storage floor: {names}.",
        ),
        *flag_on(
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
    return flag_on(
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
        *flag_on(
            "note",
            "base_only",
            (r for r in rows if r.status == "base_only"),
            lambda n, names: f"{counted(n, 'tensor')} only in the base: {names}.",
        ),
        *flag_on(
            "note",
            "tuned_only",
            (r for r in rows if r.status == "tuned_only"),
            lambda n, names: f"{counted(n, 'tensor')} only in the tuned checkpoint: {names}.",
        ),
        *flag_on(
            "note",
            "compared_in_part",
            (r for r in rows if r.analysed and r.reason),
            lambda n, names: (
                f"{counted(n, 'tensor')} not compared plainly entry for entry, how stands in the row: {names}."
            ),
        ),
        *flag_on(
            "note",
            "alias",
            (r for r in rows if r.status == "alias"),
            lambda n, names: f"{counted(n, 'name')} tied to another tensor, counted once: {names}.",
        ),
        *flag_on(
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
    return flag_on(
        "note",
        "truncated",
        (r for r in rows if r.truncated),
        lambda n, names: (
            f"{counted(n, 'spectrum is', 'spectra are')} truncated: whole-spectrum measures are given as certified "
            f"bounds. {names}."
        ),
    )


def input_flags(
    sides: Sequence[tuple[str, Mapping[str, Any]]], info: Mapping[str, Any], transforms: Iterable[str] = ()
) -> list[Flag]:
    """List what is to be known of the inputs: what was left out, taken on trust, renamed or hashed in part.

    Parameters
    ----------
    sides : sequence of (str, mapping)
        Each input's name in a sentence, and what is known of it.
    info : mapping
        Where ``settings`` stand.
    transforms : iterable of str
        What was done to names so that they match.
    """
    flags = []
    settings = info.get("settings", {})
    for key, said in (("include", "only names that match"), ("exclude", "no name that matches")):
        if settings.get(key):
            flags.append(Flag("note", key, f"Restricted by --{key}: {said} {visible(str(settings[key]))}."))
    if settings.get("trust_pickle"):
        flags.append(Flag("note", "trust_pickle", "Pickled weights were accepted (--trust-pickle), tensors only."))
    for sentence in transforms:
        flags.append(Flag("note", "names", f"Names: {visible(str(sentence)).rstrip('.')}."))
    for said, side in sides:
        for sentence in side.get("notes", ()):
            flags.append(Flag("note", "input", f"Of {said}: {visible(str(sentence)).rstrip('.')}."))
    sampled = [d["name"] for _, side in sides for d in side.get("digests", ()) if d.get("sampled")]
    if sampled:
        text = f"Digests of {counted(len(sampled), 'large file')} are of samples, not of every byte: {listed(sampled)}."
        flags.append(Flag("note", "sampled_digests", text))
    return flags


_RULES = (_failures, _rounding, _matching, _spectra)
