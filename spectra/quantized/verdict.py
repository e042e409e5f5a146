"""The sentences that a quantized run comes down to, and what must be known before its numbers are believed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectra.quantized.pooled import Pooled, decibels
from spectra.report.flags import Flag, input_flags
from spectra.report.text import counted, elide, listed, number, percent, visible

if TYPE_CHECKING:
    from spectra.quantized.result import QuantizedRun

_NAMED = 6  # schemes spelled out in a sentence
_FACTOR_BITS = 16  # of an entry of low-rank factors: they are trained and kept in half precision
_MOSTLY = 0.9  # share of the matrices from which on all are spoken of
_CHANCE = 4.0  # standard deviations: beyond, an update and an error know of each other
_BIT_TAKES = 0.75  # of the squared error: a bit is a factor of two in the step

_ALARMS = {
    "nonfinite": "with NaN or infinite entries, left out of every number",
    "unsupported_dtype": "of an element type that cannot be read here",
    "failed": "failed to be quantized, the reason stands in the row",
}


def verdict(run: QuantizedRun) -> tuple[tuple[str, str], ...]:
    """Return sentences on a run, each under the word that it is about; the first says all in one.

    Parameters
    ----------
    run : QuantizedRun
    """
    if not run.pooled:
        return (("verdict", "No matrix could be quantized: every row says why."),)
    lead = leading(run.pooled)
    said = [("verdict", _whole(run.pooled, lead)), ("low rank", _low_rank(run, lead))]
    said += [
        (about, text)
        for about, text in (("Gaussian weights", _gaussian(run, lead)), ("where", _where(run, lead)))
        if text
    ]
    said += [("update", text) for text in [_update(run, lead)] if text]
    said += [("on inputs", text) for text in [_on_inputs(run, lead)] if text]
    return tuple(said)


def leading(pooled: Sequence[Pooled]) -> Pooled:
    """The scheme that sentences are about: of the bits that most schemes have, the one that keeps most.

    Parameters
    ----------
    pooled : sequence of Pooled
        Not empty.
    """
    groups: dict[int, list[Pooled]] = defaultdict(list)
    for found in pooled:
        groups[round(found.bits)].append(found)
    best = [max(group, key=lambda found: found.sqnr_db) for group in groups.values()]
    return min(best, key=lambda found: (-len(groups[round(found.bits)]), found.short_of_shannon))


def find_flags(run: QuantizedRun) -> tuple[Flag, ...]:
    """List what a reader must know, alarms first.

    Parameters
    ----------
    run : QuantizedRun
    """
    places: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(run.records):
        places[row["status"]].append(position)

    def flag(level: str, kind: str, text: str, positions: Sequence[int]) -> Flag:
        names = listed([run.records[i]["name"] for i in positions])
        return Flag(level, kind, f"{counted(len(positions), 'tensor')} {text}: {names}.", tuple(positions))

    found = [flag("alarm", kind, text, places[kind]) for kind, text in _ALARMS.items() if places[kind]]
    if places["zero"]:
        found.append(flag("note", "zero", "with no entry but 0, which every scheme keeps", places["zero"]))
    exact = [i for i, row in enumerate(run.records) if any(p["relative_mse"] == 0.0 for p in row.get("schemes", ()))]
    if exact:
        found.append(flag("note", "exact", "that a scheme keeps exactly, as if they had been through it before", exact))
    silent = [i for i, row in enumerate(run.records) if "update_reason" in row]
    if silent:
        found.append(flag("alarm", "update", "whose update cannot be read, and is left out", silent))
    sides = [("the model", run.info["model"]), ("the other model", run.info["other"] or {})]
    found += input_flags(sides, run.info, (run.info["matching"] or {}).get("transforms", ()))
    return tuple(sorted(found, key=lambda one: one.level != "alarm"))


def failed(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a matrix that was due could not be quantized: the command then ends with 1."""
    return any(row["status"] in _ALARMS for row in records)


def db(value: float) -> str:
    r"""Decibels with one digit.

    Examples
    --------
    >>> db(20.63), db(float("inf"))
    ('20.6\xa0dB', '∞\xa0dB')
    """
    return f"{number(value)}\xa0dB" if not math.isfinite(value) else f"{value:.1f}\xa0dB".replace("-", "−")


def _whole(pooled: Sequence[Pooled], lead: Pooled) -> str:
    return f"{_losses(pooled)}; {_name(lead)} {_bounds(lead)}, and its error {_noise(lead)}{_taken(lead)}."


def _losses(pooled: Sequence[Pooled]) -> str:
    """Signal over error of each scheme, the best first among those of as many bits."""
    groups: dict[str, list[Pooled]] = defaultdict(list)
    for found in sorted(pooled, key=lambda found: (round(found.bits), -found.sqnr_db)):
        groups[f"{found.bits:.2f}"].append(found)
    if len(pooled) > _NAMED:
        groups = {bits: group[:1] for bits, group in groups.items()}
    told: list[str] = []
    for bits, group in groups.items():
        names = [
            f"{_name(found)}{'' if told or at else ' keeps'} {db(found.sqnr_db)}" for at, found in enumerate(group)
        ]
        told.append(f"{_joined(names)} in {bits}" + ("" if told else "\xa0bits a weight"))
    return ", ".join(told)


def _bounds(lead: Pooled) -> str:
    if math.isinf(lead.sqnr_db):
        return "loses nothing of these weights"
    above = lead.sqnr_db - lead.lloyd_max_db
    scalar = (
        ""
        if math.isnan(above)
        else f" and {db(abs(above))} {'above' if above >= 0.0 else 'below'} the best scalar quantizer (Lloyd–Max)"
    )
    short = lead.short_of_shannon
    bound = f"{db(abs(short))} {'short of' if short >= 0.0 else 'beyond'} the rate–distortion bound"
    return f"is {bound}{scalar} of Gaussian weights in as many bits"


def _noise(lead: Pooled) -> str:
    if math.isnan(lead.edge):
        return "has no spectrum to compare with noise"
    profile = "once rows and columns are divided by their sizes"
    if lead.noise_like >= _MOSTLY * lead.matrices:
        every = lead.noise_like == lead.matrices
        where = "every matrix" if every else f"{lead.noise_like} of {lead.matrices} matrices"
        return f"looks like noise in {where} {profile} (Marchenko–Pastur)"
    return (
        f"stands out of noise in {lead.matrices - lead.noise_like} of {lead.matrices} matrices even {profile} "
        "(Marchenko–Pastur)"
    )


def _taken(lead: Pooled) -> str:
    known = [(rank, share) for rank, share in lead.absorbed.items() if math.isfinite(share)]
    if not known:
        return ""
    rank, share = known[-1]
    noise = lead.noise.get(rank, math.nan)
    return f": the best rank {rank} takes back {percent(share)} of it" + (
        f", of noise {percent(noise)}" if math.isfinite(noise) else ""
    )


def _low_rank(run: QuantizedRun, lead: Pooled) -> str:
    known = {rank: share for rank, share in lead.absorbed.items() if math.isfinite(share)}
    if not known:
        return f"{_name(lead)} leaves no error that low rank could take back."
    told = _joined([f"{percent(share)} at rank {rank}" for rank, share in known.items()])
    rank = max(known)
    shapes = [(row["rows"], row["cols"]) for row in run.records if "schemes" in row]
    spent = _FACTOR_BITS * sum(min(rank, *shape) * sum(shape) for shape in shapes) / sum(a * b for a, b in shapes)
    gained = decibels(1.0 - known[rank]) if known[rank] < 1.0 else math.inf
    return (
        f"Of {_name(lead)}’s error low rank holds {told}. Rank {rank} is {db(gained)} and in 16-bit factors costs "
        f"{spent:.2g}\xa0bits a weight; one bit more a code takes {percent(_BIT_TAKES)} of the error, 6.0\xa0dB."
    )


def _gaussian(run: QuantizedRun, lead: Pooled) -> str:
    if not math.isfinite(lead.gaussian_db) or not math.isfinite(lead.sqnr_db):
        return ""
    gap = lead.gaussian_db - lead.sqnr_db
    lost = "as much as these do" if abs(gap) < 0.05 else f"{db(abs(gap))} {'more' if gap > 0 else 'less'} than these do"
    return f"Independent Gaussian weights would keep {db(lead.gaussian_db)} in {_name(lead)}, {lost}."


def _where(run: QuantizedRun, lead: Pooled) -> str:
    found = [
        (decibels(part["relative_mse"]), position, row["norm"] ** 2 * part["relative_mse"], row)
        for position, row in enumerate(run.records)
        for part in row.get("schemes", ())
        if part["scheme"] == lead.scheme
    ]
    if len(found) < 2:
        return ""
    kept = sorted(found, key=lambda one: one[:2])
    total = sum(one[2] for one in found)
    largest = max(found, key=lambda one: one[2])
    worst, best = kept[0], kept[-1]
    said = (
        f"{_name(lead)} keeps least in {_short(worst[3])}, {db(worst[0])}, and most in {_short(best[3])}, {db(best[0])}"
    )
    if not total > 0.0:
        return f"{said}."
    return f"{said}; {percent(largest[2] / total)} of all squared error lies in {_short(largest[3])}."


def _update(run: QuantizedRun, lead: Pooled) -> str:
    known = {rank: share for rank, share in lead.captured.items() if math.isfinite(share)}
    if not known or not math.isfinite(lead.over_update):
        return ""
    rank, beyond = max(known), abs(lead.repaired) > _CHANCE * lead.repaired_std
    if run.info["other"]["side"] == "base":  # the update is part of what was quantized
        undone = f"quantizing takes {_signed(lead.repaired * lead.over_update**2)} of the update back"
    else:
        undone = f"the update makes up for {_signed(lead.repaired)} of the error"
    undone += "" if beyond else ", no more than chance"
    return (
        f"{_name(lead)}’s error is {number(lead.over_update, 2)} times the update; its leading {rank} directions on "
        f"either side hold {percent(known[rank])} of it, by chance {percent(lead.chance[rank])}, and {undone}."
    )


def _signed(share: float) -> str:
    return ("−" if share < 0.0 else "") + percent(abs(share))


def _on_inputs(run: QuantizedRun, lead: Pooled) -> str:
    if not math.isfinite(lead.weighted):
        return ""
    ranks = [rank for rank, share in lead.weighted_optimal.items() if math.isfinite(share)]
    said = f"On the inputs that calibration saw, {_name(lead)} keeps {db(decibels(lead.weighted))}"
    if not ranks:
        return f"{said}."
    rank = ranks[-1]
    plain = lead.weighted_plain.get(rank, math.nan)
    beside = f"; those of the plain SVD take {percent(plain)}" if math.isfinite(plain) else ""
    best = percent(lead.weighted_optimal[rank])
    return f"{said}: rank {rank} chosen for them takes back {best} of the error there{beside}."


def _short(row: Mapping[str, Any]) -> str:
    return elide(visible(row["name"].removesuffix(".weight")), 60)


def _name(found: Pooled) -> str:
    return visible(found.scheme)


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
