"""From a quantized run to everything that page, terminal and JSON say, as plain values: no file and no HTML in here."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spectra.quantized.planning import RANKS
from spectra.quantized.pooled import Pooled, decibels, pool
from spectra.quantized.result import QuantizedRun
from spectra.quantized.verdict import failed, find_flags, leading
from spectra.report.build import json_ready
from spectra.report.flags import Flag

SCHEMA = 1
_CURVES = ("held", "held_noise", "curve")


@dataclass(frozen=True)
class Findings:
    """Everything that is said of a run.

    Attributes
    ----------
    run : QuantizedRun
    about, verdict : tuple of str
        Sentences, and the word that each is about.
    flags : tuple of Flag
    statuses : mapping of str to int
    pooled : tuple of Pooled
    lead : Pooled or None
        The scheme that sentences are about; None where no matrix was quantized.
    by_role : tuple of (str, tuple of Pooled)
        The matrices that do the same thing in each layer, together.
    info : mapping
    command : str
        Makes the same again.
    """

    run: QuantizedRun
    about: tuple[str, ...]
    verdict: tuple[str, ...]
    flags: tuple[Flag, ...]
    statuses: Mapping[str, int]
    pooled: tuple[Pooled, ...]
    lead: Pooled | None
    by_role: tuple[tuple[str, tuple[Pooled, ...]], ...]
    info: Mapping[str, Any]
    command: str

    @property
    def failed(self) -> bool:
        """Whether a matrix that was due could not be quantized."""
        return failed(self.run.records)


def findings(run: QuantizedRun) -> Findings:
    """Compute what is said of a run.

    Parameters
    ----------
    run : QuantizedRun
    """
    roles = dict.fromkeys(row["role"] for row in run.records if "schemes" in row)
    return Findings(
        run=run,
        about=tuple(about for about, _ in run.sentences),
        verdict=tuple(said for _, said in run.sentences),
        flags=find_flags(run),
        statuses=dict(sorted(Counter(row["status"] for row in run.records).items())),
        pooled=run.pooled,
        lead=leading(run.pooled) if run.pooled else None,
        by_role=tuple(
            (role, tuple(pool((row for row in run.records if row["role"] == role), run.ranks))) for role in roles
        ),
        info=run.info,
        command=command_line(run.info),
    )


def summary(found: Findings) -> dict[str, Any]:
    """Return what ``quantized.json`` holds: JSON-able, NaN as null; the curves stand in the Parquet file alone.

    Parameters
    ----------
    found : Findings
    """
    told: dict[str, Any] = json_ready(
        {
            "schema": SCHEMA,
            "model": found.info["model"]["ref"],
            "verdict": found.verdict,
            "flags": [
                {"level": f.level, "kind": f.kind, "text": f.text, "tensors": [_name(found, i) for i in f.positions]}
                for f in found.flags
            ],
            "statuses": found.statuses,
            "schemes": [_pooled(one) for one in found.pooled],
            "tensors": [_tensor(row) for row in found.run.records],
            "command": found.command,
            "info": found.info,
        }
    )
    return told


def command_line(info: Mapping[str, Any]) -> str:
    """Return the command that makes the same again, quoted for a POSIX shell.

    Parameters
    ----------
    info : mapping
        `QuantizedRun.info`.

    Examples
    --------
    >>> settings = {"formats": ["nf4", "int8"], "ranks": [8, 16, 64]}
    >>> command_line({"model": {"ref": "my model"}, "settings": settings, "other": None, "calibration": None})
    "python -m spectra.quantize 'my model' --formats nf4,int8"
    """
    settings, other, calibration = info["settings"], info["other"], info["calibration"]
    words = ["python", "-m", "spectra.quantize", info["model"]["ref"], "--formats", ",".join(settings["formats"])]
    if other is not None:
        words += [f"--{other['side']}", other["ref"]]
    if calibration is not None and calibration["file"] is not None:
        words += ["--calibration", calibration["file"]]
    if tuple(settings["ranks"]) != RANKS:
        words += ["--ranks", ",".join(map(str, settings["ranks"]))]
    for name in ("include", "exclude"):
        if settings.get(name) is not None:
            words += [f"--{name}", settings[name]]
    words += [f"--{name.replace('_', '-')}" for name in ("allow_partial", "trust_pickle") if settings.get(name)]
    return shlex.join(words)


def _pooled(found: Pooled) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(found).items() if key not in _CURVES}
    bounds = {key: getattr(found, key) for key in ("sqnr_db", "gaussian_db", "lloyd_max_db", "shannon_db")}
    return plain | bounds


def _tensor(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key != "schemes"}
    if "schemes" in row:
        kept["schemes"] = [
            {"sqnr_db": decibels(part.get("relative_mse", math.nan))}
            | {key: value for key, value in part.items() if key not in _CURVES}
            for part in row["schemes"]
        ]
    return kept


def _name(found: Findings, position: int) -> str:
    return str(found.run.records[position]["name"])
