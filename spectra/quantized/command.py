"""The command ``python -m spectra.quantize``: what quantizing a model's matrices loses, told and left as a page."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import printable, run, say, tell
from spectra.report.__main__ import default_out, parse_bytes, parse_pattern

if TYPE_CHECKING:
    from spectra.quantized.build import Findings

NAME = "python -m spectra.quantize"


class _WithFormats(click.Command):
    """A command whose help ends with the formats there are, read from where they are defined."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from spectra.quantize import FORMATS

        with formatter.section("Formats"):
            formatter.write_text(", ".join(FORMATS))


def parse_names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Read names that commas part.

    Examples
    --------
    >>> parse_names(None, None, "nf4, int4/128")
    ('nf4', 'int4/128')
    """
    return tuple(part.strip() for part in value.split(",") if part.strip())


def parse_ranks(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Read positive whole numbers that commas part.

    Raises
    ------
    click.BadParameter
        If one is none.

    Examples
    --------
    >>> parse_ranks(None, None, "8,16, 64")
    (8, 16, 64)
    """
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: write positive whole numbers with commas between, as 8,16,64")
    return tuple(map(int, parts))


@click.command(
    "quantize",
    cls=_WithFormats,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="What quantizing a model's matrices loses.",
)
@click.argument("model", metavar="MODEL")
@click.option("--formats", callback=parse_names, default="nf4", show_default=True, metavar="F,F,…", help="Schemes, each FORMAT, FORMAT/BLOCK or FORMAT/BLOCK/SCALES; told above.")  # fmt: skip # noqa: E501
@click.option("--tuned", metavar="REF", help="What the model became, a checkpoint or a PEFT adapter: its update is held against the error.")  # fmt: skip # noqa: E501
@click.option("--base", metavar="REF", help="What the model was: how much of its update the error takes back.")
@click.option("--calibration", metavar="FILE", help="Second moments of what linear maps read (python -m spectra.train.moments): errors are told on such inputs too.")  # fmt: skip # noqa: E501
@click.option("--ranks", callback=parse_ranks, default="8,16,64", show_default=True, metavar="R,R,…", help="Ranks whose share of the error is told.")  # fmt: skip # noqa: E501
@click.option("--out", metavar="DIR", help="Folder of the result.  [default: spectra-NAME-quantized]")
@click.option("--include", callback=parse_pattern, metavar="RE", help="Only tensors whose name holds this regular expression.")  # fmt: skip # noqa: E501
@click.option("--exclude", callback=parse_pattern, metavar="RE", help="No tensor whose name holds this regular expression.")  # fmt: skip # noqa: E501
@click.option("--allow-partial", is_flag=True, help="Go on where fewer than 95 % of the tensors match the other model's.")  # fmt: skip # noqa: E501
@click.option("--dry-run", is_flag=True, help="Say what would be done; read no weights and write nothing.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Small matrices to measure at a time. The numbers do not depend on it.  [default: one a core]")  # fmt: skip # noqa: E501
@click.option("--max-memory", callback=parse_bytes, metavar="BYTES", help="Memory for matrices measured at a time: 4GB, 500MiB.  [default: half of the machine's]")  # fmt: skip # noqa: E501
@click.option("--no-resume", is_flag=True, help="Begin anew, even where DIR holds the start of the same run.")
@click.option("--offline", is_flag=True, help="Never ask the hub or fetch an example.")
@click.option("--trust-pickle", is_flag=True, help="Read .bin and .pt files too, tensors only; they are refused otherwise.")  # fmt: skip # noqa: E501
@click.option("--json", "as_json", metavar="-", help="With -, print quantized.json to stdout and everything else to stderr.")  # fmt: skip # noqa: E501
@click.option("--quiet", "-q", is_flag=True, help="Print the verdict and the files alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log every step, and say where in the program an error arose.")
def command(model: str, **flags: Any) -> int:
    """Say what quantizing a model's matrices loses, and what low rank could take back.

    Every matrix of MODEL is quantized in every scheme and read back: how many decibels the weights stand over the
    error, how far that is from the best scalar quantizer (Lloyd-Max) and from the rate-distortion bound at as many
    bits, whether the error looks like noise, and what share of it rank r holds. The model is not run, and not changed.

    MODEL is a folder or file of safetensors, an id on the Hugging Face hub (org/name@revision), or an example: minilm,
    smollm2. DIR gets quantized.html, one page that needs no network, beside quantized.parquet with every number,
    quantized.json and figures/*.svg. An interrupted run goes on where it stopped when the same command is given again.

    \b
    Schemes:
      nf4            blocks of 64 entries, scales quantized again
      int4/128       blocks of 128
      int8/row/fp32  a scale a row, kept in float32; or double, bf16

    \b
    Examples:
      python -m spectra.quantize minilm --formats nf4,fp4,int4,int8
      python -m spectra.quantize org/model --exclude embed --formats nf3,nf4,nf4/32
      python -m spectra.quantize base/ --tuned adapter/ --ranks 16
      python -m spectra.quantize base/ --calibration moments.safetensors --json -

    \b
    Exit codes:
      0   done
      1   done, but some matrices could not be quantized (NaN, unknown dtype, …)
      2   arguments that cannot work, or a checkpoint that cannot be opened
      3   names or shapes of the other model do not match
      4   a file that lies about itself, or could run code
      130 interrupted
    """  # noqa: D301
    _check(flags)
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    from spectra.quantized.planning import plan
    from spectra.quantized.running import execute

    asked = ("tuned", "base", "calibration", "ranks", "include", "exclude", "max_memory", "trust_pickle", "offline")
    todo = plan(
        model, flags["formats"], allow_partial=flags["allow_partial"], **{name: flags[name] for name in asked}
    )  # fmt: skip
    out = Path(flags["out"] or f"{default_out(model)}-quantized")
    if flags["dry_run"]:
        say(printable("\n".join([*todo.lines(), f"the result would go to {out}"])))
        return 0
    if not flags["quiet"]:
        lines = ["plan", *(f"  {line}" for line in todo.lines()), ""]
        say(printable("\n".join(lines)), err=bool(flags["as_json"]))
    result = execute(
        todo, out=out, jobs=flags["jobs"], resume=not flags["no_resume"], progress=not flags["quiet"]
    )  # fmt: skip

    from spectra.quantized.build import findings
    from spectra.quantized.page import write_page

    found = findings(result)
    _print(found, write_page(result, out, found=found), flags)
    return 1 if found.failed else 0


def _check(flags: Mapping[str, Any]) -> None:
    """Refuse what cannot work together, before anything is opened."""
    if flags["tuned"] is not None and flags["base"] is not None:
        raise click.UsageError("--tuned is what MODEL became and --base what it was: give one of them.")
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout): quantized.json is written to --out in any case.")
    if flags["as_json"] and flags["dry_run"]:
        raise click.UsageError("--dry-run measures nothing, so there is no result for --json to print.")


def _print(found: Findings, written: Sequence[Path], flags: Mapping[str, Any]) -> None:
    from spectra.quantized.build import summary
    from spectra.quantized.terminal import render
    from spectra.report.terminal import ansi, plain
    from spectra.report.text import dump

    err = bool(flags["as_json"])
    paint = ansi if _coloured(sys.stderr if err else sys.stdout) else plain
    text = "".join(f"{said}\n" for said in found.verdict) if flags["quiet"] else render(found, paint=paint)
    say(text, err=err, color=True)
    say(printable("\n".join(["written", *(f"  {path}" for path in written)])), err=err)
    if err:
        say(dump(summary(found), indent=1))
    if found.failed:
        tell("error: some matrices could not be quantized; the flags above and their rows say why")


def _coloured(stream: Any) -> bool:
    """Colour only where a person looks, and never where NO_COLOR is set (no-color.org)."""
    return (
        stream is not None and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        The command line without the program's name.
    """
    return run(command, arguments, name=NAME)
