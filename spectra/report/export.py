"""The adapter that ``--export-lora`` leaves beside a report: what is asked for, planned before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import interrupted_as, printable, say, tell
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.comparison import Plan as Comparison
    from spectra.extract import Extraction, Plan

# Share of the energy of the whole model that is kept unless something else is asked for.
ENERGY = 0.9
# The command's flags and what `spectra.extract` calls them.
_RULES = {"energy": "energy", "export_rank": "rank", "parameters": "parameters"}
_SHARED = ("include", "exclude", "device", "seed", "trust_pickle", "offline", "allow_partial")


def check_flags(flags: Mapping[str, Any], *, several: bool) -> None:
    """Refuse flags of an export that ask for nothing, for two things, or for an adapter of several updates.

    Parameters
    ----------
    flags : mapping
        The command's options.
    several : bool
        Whether more than one update was given.

    Raises
    ------
    click.UsageError
        If they cannot work.
    """
    given = [f"--{name.replace('_', '-')}" for name in _RULES if flags[name] is not None]
    if flags["export_lora"] is None and given:
        raise click.UsageError(
            f"{given[0]} says how large the adapter of --export-lora DIR is to be, and there is none."
        )
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} both say how large the adapter is to be: give one of them.")
    if flags["export_lora"] is not None and several:
        raise click.UsageError(
            "--export-lora writes the one update of BASE TUNED as an adapter, and this compares two or more with each "
            "other: export each by a report of its own, or by python -m spectra.extract."
        )


def plan_export(comparison: Comparison, flags: Mapping[str, Any], *, report: Path) -> Plan:
    """Plan the extraction of a comparison's update; nothing is read but headers.

    Parameters
    ----------
    comparison : Plan
        Of the report: its checkpoints are open already.
    flags : mapping
        The command's options.
    report : Path
        Folder of the report.

    Raises
    ------
    SpectraError
        As `spectra.extract.plan`; a `UsageError` too where the report would stand inside the adapter's folder.
    """
    from spectra.extract import plan

    out = Path(flags["export_lora"])
    if out.resolve() in (report.resolve(), *report.resolve().parents):
        raise UsageError(f"the report goes to {report}, inside {out}: give the adapter a folder of its own")
    rule = {called: flags[name] for name, called in _RULES.items() if flags[name] is not None} or {"energy": ENERGY}
    if "energy" in rule:
        rule["allocation"] = "global"
    return plan(comparison.base, comparison.tuned, out=out, **rule, **{name: flags[name] for name in _SHARED})


def export(todo: Plan, flags: Mapping[str, Any]) -> Extraction:
    """Write the adapter, and say so.

    Parameters
    ----------
    todo : Plan
    flags : mapping
        The command's options.
    """
    from spectra.extract import execute

    with interrupted_as("the report is whole; the adapter was not written, and begins anew with the same command"):
        found = execute(todo, jobs=flags["jobs"], progress=not flags["quiet"])
    err = bool(flags["as_json"])
    say(printable("\n".join([f"adapter: {todo.rule}", *(f"  {line}" for line in found.verdict)])), err=err)
    say(printable("\n".join(["written", *(f"  {path}" for path in found.files)])), err=err)
    for row in found.failed:
        tell(f"error: {row['reason']}")
    return found
