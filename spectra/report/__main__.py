"""The command ``python -m spectra.report``: compare checkpoints, print what was found, write the report."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import printable, run, say, tell
from spectra.errors import SpectraError, UsageError

if TYPE_CHECKING:
    from spectra.comparison import Plan as Comparison
    from spectra.extract import Plan as Extraction

NAME = "python -m spectra.report"
MANY_FIGURES = 12  # named one by one up to so many
_UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read an amount of memory: 4GB, 500MiB, 1.5G or a plain number of bytes.

    Parameters
    ----------
    ctx, param
        click's, unused.
    value : str or None
        What was given.

    Raises
    ------
    click.BadParameter
        If it is no amount.

    Examples
    --------
    >>> [parse_bytes(None, None, given) for given in ("4GB", "500MiB", "1.5k", "77")]
    [4000000000, 524288000, 1500, 77]
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS or (amount := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise click.BadParameter(f"{value!r} is no amount of memory: write 4GB, 500MiB or a number of bytes")
    return amount


def parse_pattern(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check that a regular expression compiles.

    Parameters
    ----------
    ctx, param
        click's, unused.
    value : str or None
        What was given.

    Raises
    ------
    click.BadParameter
        If it does not.
    """
    try:
        re.compile(value or "")
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from error
    return value


@click.command(
    "report",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="What fine-tuning did to the weights.",
    options_metavar="[OPTIONS]",
)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option("--base", "update_base", metavar="REF", help="The model that both are updates of: compares them with each other.")  # fmt: skip # noqa: E501
@click.option("--also", multiple=True, metavar="REF", help="One more update of the same model; may be given again.")
@click.option("--out", metavar="DIR", help="Folder of the report.  [default: spectra-NAME, NAME being TUNED's]")
@click.option("--rank", type=click.IntRange(min=1), metavar="K", help="Certify the K largest singular values of a matrix, where finding all of them costs more. Of two updates, compare K directions.  [default of two: 64]")  # fmt: skip # noqa: E501
@click.option("--exact", is_flag=True, help="Find every singular value of every matrix, whatever it costs.")
@click.option(
    "--include", callback=parse_pattern, metavar="RE", help="Only tensors whose name holds this regular expression."
)
@click.option(
    "--exclude", callback=parse_pattern, metavar="RE", help="No tensor whose name holds this regular expression."
)
@click.option("--quantized", default="auto", show_default=True, metavar="FORMAT", help="What BASE stood in while TUNED was trained, nf4 or int8/row/fp32 for instance: the update is told apart from the quantization error. auto sees whether the weights or a run's record betray it; no does not look.")  # fmt: skip # noqa: E501
@click.option("--export-lora", metavar="DIR", help="Write the update as a LoRA adapter of PEFT too, in a folder of its own: the best one of its ranks, directions where they help the whole model most.")  # fmt: skip # noqa: E501
@click.option("--energy", type=float, metavar="SHARE", help="The adapter keeps this share of the update's squared norm with the fewest parameters.  [default: 0.9]")  # fmt: skip # noqa: E501
@click.option("--export-rank", type=click.IntRange(min=1), metavar="K", help="The adapter keeps K directions of every matrix.")  # fmt: skip # noqa: E501
@click.option("--parameters", type=click.IntRange(min=1), metavar="N", help="The adapter's factors take at most N parameters.")  # fmt: skip # noqa: E501
@click.option("--allow-partial", is_flag=True, help="Go on where fewer than 95 % of the tensors match.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it costs; compute and write nothing.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Small matrices to measure at a time. The numbers do not depend on it.  [default: one a core]")  # fmt: skip # noqa: E501
@click.option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1.  [default: cpu]")
@click.option("--max-memory", callback=parse_bytes, metavar="BYTES", help="Memory for matrices and their decompositions: 4GB, 500MiB.  [default: half of the machine's]")  # fmt: skip # noqa: E501
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Seed of the randomized routes.")  # fmt: skip # noqa: E501
@click.option("--no-resume", is_flag=True, help="Begin anew, even where DIR holds the start of the same comparison.")
@click.option("--offline", is_flag=True, help="Never ask the hub: local paths and its cache only.")
@click.option("--trust-pickle", is_flag=True, help="Read .bin and .pt files too, tensors only; they are refused otherwise.")  # fmt: skip # noqa: E501
@click.option("--json", "as_json", metavar="-", help="With -, print summary.json to stdout and everything else to stderr.")  # fmt: skip # noqa: E501
@click.option("--quiet", "-q", is_flag=True, help="Print the verdict and the files alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log every step, and say where in the program an error arose.")
def command(base: str, tuned: str, **flags: Any) -> int:
    """Say what fine-tuning did to the weights.

    \b
    BASE TUNED       One update: how far every matrix moved, how many
                     directions carry it, how much of it is rounding in
                     the stored dtype.
    A B --base BASE  Two updates of one model, side by side: what one holds
                     of the other, which directions they share, which the
                     model did not have; each number beside chance. Two
                     adapters name their base themselves.

    Each is a folder or file of safetensors, or an id on the Hugging Face hub (org/name@revision); an update may be
    a PEFT adapter. The report goes to DIR: report.html, one page that needs no network, beside spectra.parquet
    (geometry.parquet of two updates) with every number, summary.json, manifest.json and figures/*.svg. An
    interrupted run goes on where it stopped when the same command is given again.

    \b
    Examples:
      python -m spectra.report base/ tuned/
      python -m spectra.report bert-base-uncased org/my-bert@main --out report/
      python -m spectra.report base/ adapter/ --include attention --dry-run
      python -m spectra.report base/ tuned/ --export-lora adapter/ --energy 0.8
      python -m spectra.report tuned/ adapter/ --base base/
      python -m spectra.report adapter/ adapter-2/ --also adapter-3/

    \b
    Exit codes:
      0   done
      1   done, but some tensors could not be analysed (NaN, unknown dtype, …)
      2   arguments that cannot work, or a checkpoint that cannot be opened
      3   names or shapes do not match
      4   a file that lies about itself, or could run code
      130 interrupted
    """  # noqa: D301
    _check(flags)
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    work = _planned(base, tuned, flags)
    out = Path(flags["out"] or work.folder)
    adapter = None
    if flags["export_lora"] is not None:
        adapter = _planned_export(work, flags, out)
    if flags["dry_run"]:
        told = [] if adapter is None else [f"the adapter would go to {adapter.out}: {adapter.rule}"]
        say(printable("\n".join([*work.lines, f"the report would go to {out}", *told])))
        return 0
    if not flags["quiet"]:
        say(printable("\n".join(["plan", *(f"  {line}" for line in work.lines), ""])), err=bool(flags["as_json"]))
    found = work.carry_out(out)
    _print_report(found, quiet=flags["quiet"], as_json=bool(flags["as_json"]))
    if adapter is None:
        return 1 if found.failed else 0
    from spectra.report.export import export

    return 1 if export(adapter, flags).failed or found.failed else 0


def _planned_export(work: _Work, flags: Mapping[str, Any], out: Path) -> Extraction:
    from spectra.report.export import check_flags, plan_export

    check_flags(flags, several=work.comparison is None)
    assert work.comparison is not None
    return plan_export(work.comparison, flags, report=out)


@dataclass(frozen=True)
class _Found:
    """What the terminal gets of a report that is written."""

    verdict: Sequence[str]
    text: Callable[[Any], str]  # of a painter
    summary: Mapping[str, Any]
    written: Sequence[Path]
    failed: bool


@dataclass(frozen=True)
class _Work:
    """A planned comparison: what it would do in words, its folder without ``--out``, and how to carry it out.

    `comparison` is its plan where it is of one update.
    """

    lines: Sequence[str]
    folder: str
    carry_out: Callable[[Path], _Found]
    comparison: Comparison | None = None


def _planned(base: str, tuned: str, flags: Mapping[str, Any]) -> _Work:
    if flags["update_base"] is not None or flags["also"]:
        return _several(base, tuned, flags)
    try:
        return _one(base, tuned, flags)
    except UsageError as error:
        adapters = [_is_adapter(ref, flags) for ref in (base, tuned)]
        if all(adapters):  # they name their base themselves
            return _several(base, tuned, flags)
        if adapters[0]:
            raise UsageError(f"{error}. To compare two updates with each other, say of what: --base REF") from error
        raise


def _one(base: str, tuned: str, flags: Mapping[str, Any]) -> _Work:
    """One update: a base and what became of it."""
    from spectra.comparison import execute, plan

    quantized = flags["quantized"]
    if flags["dry_run"] and quantized == "auto":  # to look takes a few matrices, and a dry run reads headers alone
        quantized = None
    todo = plan(base, tuned, rank=flags["rank"], quantized=quantized, **_asked(flags))

    def carry_out(out: Path) -> _Found:
        run = execute(todo, out=out, **_running(flags))

        from spectra.report.build import build_report, summary
        from spectra.report.files import write_report
        from spectra.report.terminal import render

        data = build_report(run)
        written = write_report(run, out, data=data)
        return _Found(
            data.verdict, lambda paint: render(data, paint=paint), summary(data), written, bool(data.failed)
        )  # fmt: skip

    return _Work(todo.lines(), default_out(tuned), carry_out, todo)


def _several(a: str, b: str, flags: Mapping[str, Any]) -> _Work:
    """Two or more updates of one base."""
    from spectra.pairwise import execute_geometry, plan_geometry

    rank = {} if flags["rank"] is None else {"rank": flags["rank"]}
    todo = plan_geometry(a, b, flags["update_base"], also=flags["also"], **rank, **_asked(flags))

    def carry_out(out: Path) -> _Found:
        geometry = execute_geometry(todo, out=out, **_running(flags))

        from spectra.report.pairs.build import build_report, summary
        from spectra.report.pairs.files import write_report
        from spectra.report.pairs.terminal import render

        data = build_report(geometry)
        written = write_report(geometry, out, data=data)
        return _Found(
            data.verdict, lambda paint: render(data, paint=paint), summary(data), written, bool(data.failed)
        )  # fmt: skip

    folder = "-and-".join([default_out(a), *(default_out(ref).removeprefix("spectra-") for ref in (b, *flags["also"]))])
    return _Work(todo.lines(), folder[:120], carry_out)


def _asked(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that change what is measured or read."""
    names = ("exact", "include", "exclude", "device", "max_memory", "seed", "trust_pickle", "offline", "allow_partial")
    return {name: flags[name] for name in names}


def _running(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that change how a plan is carried out."""
    return {"jobs": flags["jobs"], "resume": not flags["no_resume"], "progress": not flags["quiet"]}


def _is_adapter(ref: str, flags: Mapping[str, Any]) -> bool:
    from spectra.checkpoints import Adapter, open_checkpoint

    try:
        return isinstance(
            open_checkpoint(ref, trust_pickle=flags["trust_pickle"], offline=flags["offline"]), Adapter
        )  # fmt: skip
    except SpectraError:
        return False


def default_out(tuned: str) -> str:
    """Return the folder a report goes to without ``--out``: ``spectra-`` and the last part of the reference.

    Parameters
    ----------
    tuned : str
        A path or a hub id, as given.

    Examples
    --------
    >>> default_out("models/my-bert/"), default_out("org/name@main"), default_out("a/model.safetensors")
    ('spectra-my-bert', 'spectra-name', 'spectra-model')
    """
    path = Path(tuned)
    last = path.resolve().name if path.exists() else tuned.rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    for suffix in (".safetensors", ".index.json", ".bin", ".pt", ".gguf"):
        last = last.removesuffix(suffix)
    return "spectra-" + (re.sub(r"[^\w.-]+", "_", last, flags=re.ASCII).strip("._-")[:80] or "report")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        The command line without the program's name.
    """
    return run(command, arguments, name=NAME)


def _check(flags: dict[str, Any]) -> None:
    """Refuse what cannot work together, before anything is opened."""
    from spectra.report.export import check_flags

    several = bool(flags["update_base"] is not None or flags["also"])
    check_flags(flags, several=several)
    # --rank and --exact ask for different things of several updates.
    if flags["rank"] is not None and flags["exact"] and not several:
        raise click.UsageError("--rank K asks for part of the spectrum and --exact for all of it: give one of them.")
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout): the file summary.json is written to --out in any case.")
    if flags["as_json"] and flags["dry_run"]:
        raise click.UsageError("--dry-run computes nothing, so there is no summary for --json to print.")


def _print_report(found: _Found, *, quiet: bool, as_json: bool) -> None:
    from spectra.report.terminal import ansi, plain
    from spectra.report.text import dump

    paint = ansi if _coloured(sys.stderr if as_json else sys.stdout) else plain
    text = "".join(f"{sentence}\n" for sentence in found.verdict) if quiet else found.text(paint)
    say(text, err=as_json, color=True)
    say(printable("\n".join(["written", *(f"  {line}" for line in _in_few_lines(found.written))])), err=as_json)
    if as_json:
        say(dump(found.summary, indent=1))
    if found.failed:
        tell("error: some tensors could not be analysed; the flags above and their rows say why")


def _in_few_lines(paths: Sequence[Path]) -> list[str]:
    """The files written, more than a dozen figures as their folder: several updates leave five for every pair."""
    figures = [path for path in paths if path.parent.name == "figures"]
    if len(figures) <= MANY_FIGURES:
        return [str(path) for path in paths]
    rest = [str(path) for path in paths if path not in figures]
    return [*rest, f"{figures[0].parent}{os.sep} ({len(figures)} files)"]


def _coloured(stream: Any) -> bool:
    """Colour only where a person looks, and never where NO_COLOR is set (no-color.org)."""
    return (
        stream is not None and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


if __name__ == "__main__":
    sys.exit(main())
