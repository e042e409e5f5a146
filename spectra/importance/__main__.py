"""The command ``python -m spectra.importance``: the ranks that a budget would have kept of a recorded training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import printable, run, say, tell
from spectra.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from spectra.importance import RankMap, Recorded, Stretches

NAME = "python -m spectra.importance"
_ENDINGS = (".json", ".parquet", ".svg", ".png", ".pdf")


def _explain_scores() -> str:
    from spectra.importance import SCORES

    return "\n".join(f"  {score.name:<12}{score.formula:<18}{score.about}" for score in SCORES.values())


class _WithScores(click.Command):
    """A command whose help ends with the table of scores, read from where they are defined."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n  Scores, of P's columns, λ and Q's rows (LoRA's B, 1 and A):\n{_explain_scores()}\n")


@click.command("importance", cls=_WithScores, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})  # fmt: skip # noqa: E501
@click.argument("source", metavar="RUN")
@click.option("--score", metavar="NAME", help="One of the scores below.  [default: the training's own, else adalora]")
@click.option("--schedule", "shape", type=click.Choice(["cubic", "linear", "step", "none"]), default="cubic", show_default=True, help="How the budget falls from all directions to the last ones.")  # fmt: skip # noqa: E501
@click.option("--rank", type=click.FloatRange(0, min_open=True), metavar="R", help="Directions a matrix at the end, on average.  [default: the training's own]")  # fmt: skip # noqa: E501
@click.option("--warmup", type=click.FloatRange(0, 1), metavar="X", help="Share of the steps before the budget falls.  [default: the training's own, else 0.1]")  # fmt: skip # noqa: E501
@click.option("--final", type=click.FloatRange(0, 1), metavar="X", help="Share of the steps with the last budget.  [default: the training's own, else 0.5]")  # fmt: skip # noqa: E501
@click.option("--against", multiple=True, metavar="DIR", help="Compare with: the report on a full fine-tuning (its singular values under the same budget), another recorded training under the same rule, or a rank map in .json; may be repeated.")  # fmt: skip # noqa: E501
@click.option("--out", multiple=True, metavar="FILE", help="Write the map: .json (the end, as PEFT's rank_pattern), .parquet (every step), .svg, .png or .pdf (layers by roles); may be repeated.")  # fmt: skip # noqa: E501
@click.option("--json", "as_json", metavar="-", help="With -, print the map to stdout as JSON, all else to stderr.")
@click.option("--verbose", "-v", is_flag=True, help="Log more, and say where in the program an error arose.")
def command(source: str, **flags: Any) -> int:
    """Say which ranks a budget would have kept of a training that recorded its importance.

    RUN is the folder of python -m spectra.train … --record-importance. The map is what the rule would have kept on the
    trajectory of that training, which itself went on under its own rule.

    \b
    Examples:
      python -m spectra.train --method adalora --task rotten-tomatoes \\
          --record-importance --out tuned/
      python -m spectra.importance tuned/ --score magnitude --rank 4
      python -m spectra.importance tuned/ --schedule linear --rank 2 \\
          --against report/ --out ranks.json --out ranks.svg

    \b
    Exit codes:
      0   done
      2   arguments that cannot work, or nothing recorded in RUN
      3   maps without a matrix in common
    """  # noqa: D301
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout); --out FILE.json writes a file.")
    if strangers := [name for name in flags["out"] if Path(name).suffix not in _ENDINGS]:
        raise click.UsageError(f"--out {strangers[0]}: a map is written as {', '.join(_ENDINGS)}.")
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    from spectra.importance import agreement, read_recorded

    found = _map(read_recorded(source), flags)

    def line(text: str) -> None:
        say(printable(text), err=bool(flags["as_json"]))

    line(found.table.to_string(na_rep="", float_format="{:.0f}".format))
    line(f"{found.total} directions in {len(found.modules)} matrices, {found.parameters:,} parameters")
    line(found.words)
    for other in flags["against"]:
        line(f"against {other}, {agreement(found, _other(other, found, flags))}")
    for file in flags["out"]:
        line(f"written: {_write(found, Path(file))}")
    if flags["as_json"]:
        say(found.to_json().rstrip())
    return 0


def _map(recorded: Recorded, flags: dict[str, Any]) -> RankMap:
    """The replay that the flags ask for, what is left open as the training had it."""
    from spectra.importance import replay

    own = recorded.info
    score = flags["score"] or ("magnitude" if own.get("score") == "magnitude" else "adalora")
    rank = own.get("rank") if flags["rank"] is None else flags["rank"]
    if rank is None:
        raise UsageError(f"{own['method']} has no budget of its own: give --rank R, the average rank at the end")
    kept = round(rank * len(recorded.matrices))
    return replay(recorded, score=score, kept=kept, schedule=_stretches(recorded, flags), shape=flags["shape"])


def _stretches(recorded: Recorded, flags: dict[str, Any]) -> Stretches | None:
    from spectra.importance import stretches

    if flags["warmup"] is None and flags["final"] is None:
        return None
    own, total = recorded.info, recorded.total
    shares = {"warmup": 0.1, "final": 0.5, "interval": 0.0}
    shares |= {key: own[key] / total for key in shares if key in own}
    shares |= {key: flags[key] for key in ("warmup", "final") if flags[key] is not None}
    return stretches(total, **shares)


def _other(place: str, found: RankMap, flags: dict[str, Any]) -> RankMap:
    """The map to compare with: of a file, of another training, or of a report's singular values."""
    from spectra.importance import RankMap, read_recorded, svd_rank_map
    from spectra.importance.journal import JOURNAL
    from spectra.importance.recorded import NAME as RECORD
    from spectra.run import Run

    path = Path(place)
    if path.suffix == ".json":
        return RankMap.from_json(path)
    if path.name == RECORD or (path / RECORD).is_file() or (path / JOURNAL).is_file():
        other = read_recorded(path)
        rule = {**flags, "score": found.rule["score"], "rank": found.total / len(found.modules)}
        return _map(other, rule)
    report = Run.load(path)
    names = [str(name) for name in report.frame.name[report.frame.singular_values.map(len) > 0]]
    places = {module: _named(module, names) for module in found.modules}
    spectra = {module: report.spectrum(name) for module, name in places.items() if name is not None}
    if not spectra:
        raise MismatchError(f"{place}: holds no spectrum of {found.modules[0]} or of any other matrix that was trained")
    shapes = {module: (spectrum.shape[0], spectrum.shape[1]) for module, spectrum in spectra.items()}
    kept = sum(found.final[module] for module in spectra)
    squares = {module: spectrum.values**2 for module, spectrum in spectra.items()}
    hindsight = svd_rank_map(squares, kept, shapes=shapes)
    if cut := [m for m, s in spectra.items() if not s.complete and hindsight.final[m] == len(s.values)]:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        tell(
            f"{place}: holds the first {len(spectra[cut[0]].values)} singular values of {cut[0]}{more}, and the map "
            "takes all of them; it may ask for more: make the report with --exact"
        )
    return hindsight


def _named(module: str, names: list[str]) -> str | None:
    """The tensor of a report that is a module's weight, wrappers in front of either name aside."""
    wanted = f"{module}.weight"
    if wanted in names:
        return wanted
    fit = [name for name in names if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]
    return fit[0] if len(fit) == 1 else None


def _write(found: RankMap, path: Path) -> Path:
    if path.suffix in (".json", ".parquet"):
        return found.save(path)
    from matplotlib.figure import Figure

    axes = found.plot()
    figure = axes.figure
    assert isinstance(figure, Figure)  # `RankMap.plot` made it
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


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
