"""The command ``python -m spectra.compose``: merges updates of one model, and says how far they interfere."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from spectra.command import interrupted_as, printable, run, say, tell

if TYPE_CHECKING:
    from spectra.compose.pairs import Interference

NAME = "python -m spectra.compose"


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Read numbers that stand between commas.

    Raises
    ------
    click.BadParameter
        If one is none.
    """
    try:
        return None if value is None else [float(text) for text in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: numbers between commas, as 1,0.5") from error


def _explain_methods() -> str:
    from spectra.compose.merging import METHODS

    return "\n".join(f"  {name:<12}{about}" for name, about in METHODS.items())


class _WithMethods(click.Command):
    """A command whose help ends with the table of methods, read from where they are defined."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n  Methods:\n{_explain_methods()}\n")


@click.command("compose", cls=_WithMethods, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})  # fmt: skip # noqa: E501
@click.argument("base", metavar="BASE")
@click.argument("updates", metavar="UPDATE…", nargs=-1, required=True)
@click.option("--out", metavar="DIR", help="Write the merged model here; without it, only interference is told.")
@click.option("--interference", "told", is_flag=True, help="With --out, tell interference too; it reads the updates once more.")  # fmt: skip # noqa: E501
@click.option("--method", default="sum", show_default=True, metavar="NAME", help="One of the methods below.")
@click.option("--coefficients", callback=parse_numbers, metavar="A,B,…", help="What each update is multiplied by.  [default: 1 each]")  # fmt: skip # noqa: E501
@click.option("--scale", type=float, default=1.0, show_default=True, metavar="X", help="What the merged update is multiplied by.")  # fmt: skip # noqa: E501
@click.option("--density", type=float, default=0.2, show_default=True, metavar="SHARE", help="Entries that ties, knots and dare keep.")  # fmt: skip # noqa: E501
@click.option("--rank", type=click.IntRange(min=1), metavar="K", help="Directions of the result (svd) or of each task (tsv).")  # fmt: skip # noqa: E501
@click.option("--side", type=click.Choice(["input", "output"]), default="input", show_default=True, help="On which orthogonal clears an update of those before it.")  # fmt: skip # noqa: E501
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Of dare's draws.")
@click.option("--include", metavar="RE", help="Only tensors whose name holds this regular expression; others stay BASE's.")  # fmt: skip # noqa: E501
@click.option("--exclude", metavar="RE", help="No tensor whose name holds this regular expression.")
@click.option("--allow-partial", is_flag=True, help="Go on where fewer than 95 % of the tensors match.")
@click.option("--offline", is_flag=True, help="Never ask the hub: local paths and its cache only.")
@click.option("--trust-pickle", is_flag=True, help="Read .bin and .pt files too, tensors only; they are refused otherwise.")  # fmt: skip # noqa: E501
@click.option("--quiet", "-q", is_flag=True, help="No table and no progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log every step, and say where in the program an error arose.")
def command(base: str, updates: tuple[str, ...], out: str | None, **flags: Any) -> int:
    """Merge updates of one model, and say how far they get into each other's way.

    BASE is the model that all of them were trained from; an UPDATE is a fine-tuned model or a PEFT adapter. The merged
    model has BASE's files and dtypes, and composition.json with what every tensor lost on storing. Interference is told
    of every pair of updates, beside what chance would give; with --interference its matrices are written, too.

    \b
    Examples:
      python -m spectra.compose base/ sentiment/ topics/
      python -m spectra.compose base/ sentiment/ topics/ --out merged/
      python -m spectra.compose base/ a/ b/ c/ --method ties --density 0.2 \\
          --coefficients 1,1,0.5 --out merged/

    \b
    Exit codes:
      0   done
      2   arguments that cannot work, or a checkpoint that cannot be opened
      3   names or shapes do not match
      4   a file that lies about itself, or could run code
      130 interrupted; nothing half is left
    """  # noqa: D301
    if out is None and len(updates) < 2:
        raise click.UsageError("one update interferes with nothing: give another, or --out DIR to write BASE with it.")
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    from spectra.compose.merging import Merge
    from spectra.compose.model import compose
    from spectra.compose.pairs import interference

    how = Merge(**{name: flags[name] for name in ("method", "density", "rank", "side", "scale", "seed")})
    shared = {name: flags[name] for name in ("include", "exclude", "trust_pickle", "offline", "allow_partial")}
    shared["progress"] = not flags["quiet"]
    merged = None
    if out is not None:
        with interrupted_as("nothing was merged; the same command begins anew"):
            merged = compose(base, updates, out=out, how=how, coefficients=flags["coefficients"], **shared)
    if len(updates) > 1 and (out is None or flags["told"]):
        found = interference(updates, base, **shared)
        if not flags["quiet"]:
            say(printable(table(found)))
        if merged is not None:
            found.save(merged.out)
    if merged is not None:
        say(printable(f"{merged!r}"))
        for label, names in merged.dropped.items():
            if names:
                tell(f"{label}: {len(names)} tensors have no place in the base and are left out, {names[0]} among them")
    return 0


def table(found: Interference) -> str:
    """Every pair as a line, each measure beside chance.

    Parameters
    ----------
    found : Interference
    """
    wide = max(len(f"{a} × {b}") for a in found.labels for b in found.labels)
    lines = [f"{'pair':<{wide}}     cosine (±chance)    input (chance)   output (chance)   STI/chance"]
    for i, one in enumerate(found.labels):
        for j in range(i + 1, len(found.labels)):
            cells = [
                f"{found.matrix(name)[i, j]:8.4f} ({found.chance(name)[i, j]:.4f})"
                for name in ("cosine", "input", "output")
            ]
            pair = f"{one} × {found.labels[j]}"
            lines.append(f"{pair:<{wide}}  {'  '.join(cells)}   {found.matrix('sti')[i, j]:10.3f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        The command line without the program's name.
    """
    return run(command, arguments, name=NAME)


if __name__ == "__main__":
    sys.exit(main())
