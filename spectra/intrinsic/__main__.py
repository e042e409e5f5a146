"""The command ``python -m spectra.intrinsic``: search for the fewest numbers that a task needs."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import printable, run, say
from spectra.report.text import grouped
from spectra.train.__main__ import parse_list

if TYPE_CHECKING:
    from spectra.intrinsic.objective import Objective
    from spectra.intrinsic.result import IntrinsicDimension
    from spectra.intrinsic.searching import SearchConfig

NAME = "python -m spectra.intrinsic"
KEPT = "kept.json"
_SEARCH = (
    "share", "above_chance", "seeds", "seed", "start", "largest", "ratio", "runs", "minutes", "steps", "learning_rate",
)  # fmt: skip


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Read numbers that commas part.

    Raises
    ------
    click.BadParameter
        If one is no number.

    Examples
    --------
    >>> parse_numbers(None, None, "0.25, 1,4")
    (0.25, 1.0, 4.0)
    """
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: write numbers with commas between, as 0.25,1,4") from error


@click.command(
    "intrinsic",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="How few numbers a task needs: the search for d90.",
)
@click.option("--model", "reference", default="minilm", show_default=True, metavar="REF", help="A folder, a .gguf file, an id of the Hugging Face hub, or an example: minilm, smollm2.")  # fmt: skip # noqa: E501
@click.option("--task", "task_name", required=True, metavar="REF", help="rotten-tomatoes, shakespeare; a .csv, .tsv or .jsonl file of labelled texts; a .txt file or a folder of them; or the id of a data set on the hub.")  # fmt: skip # noqa: E501
@click.option("--out", metavar="DIR", help="Folder of the result. Needed unless --dry-run.")
@click.option("--structure", type=click.Choice(["did", "said"]), default="did", show_default=True, help="One subspace for all weights, or a trained scale for each layer besides.")  # fmt: skip # noqa: E501
@click.option("--projection", type=click.Choice(["fastfood", "dense", "sparse", "kronecker", "lora", "gradient"]), default="fastfood", show_default=True, help="Which directions; told above.")  # fmt: skip # noqa: E501
@click.option("--head", type=click.Choice(["subspace", "free"]), default="subspace", show_default=True, help="A fresh head moves with the rest, or trains freely beside it.")  # fmt: skip # noqa: E501
@click.option("--share", type=float, default=0.9, show_default=True, metavar="X", help="Of full fine-tuning's metric, to be reached.")  # fmt: skip # noqa: E501
@click.option("--above-chance", is_flag=True, help="Reach that share of what full fine-tuning adds to the commonest label's accuracy. A language model's loss always counts so.")  # fmt: skip # noqa: E501
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Trainings of the reference and of the dimensions that decide.")  # fmt: skip # noqa: E501
@click.option("--start", type=int, metavar="D", help="First dimension tried.  [default: 256]")
@click.option("--largest", type=int, metavar="D", help="Try none above.  [default: all weights]")
@click.option("--ratio", type=float, default=2**0.5, show_default="1.414", metavar="X", help="Bisect until the two ends are no further apart.")  # fmt: skip # noqa: E501
@click.option("--dimensions", callback=parse_numbers, metavar="D,D,…", help="Train every seed at exactly these, and search for nothing.")  # fmt: skip # noqa: E501
@click.option("--rates", callback=parse_numbers, default="0.25,1,4", show_default=True, metavar="X,X,…", help="Factors of the learning rate that short pilots choose from; one alone needs none.")  # fmt: skip # noqa: E501
@click.option("--runs", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop after about so many whole trainings. The same command with more goes on.")  # fmt: skip # noqa: E501
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop after about so many minutes of training.")  # fmt: skip # noqa: E501
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, metavar="N", help="Updates a training.")  # fmt: skip # noqa: E501
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Texts a batch.")
@click.option("--length", type=click.IntRange(min=2), default=64, show_default=True, metavar="N", help="Tokens a text is cut at, or tokens a window.")  # fmt: skip # noqa: E501
@click.option("--learning-rate", "--lr", type=click.FloatRange(min=0, min_open=True), default=5e-5, show_default="5e-5", metavar="X", help="Of full fine-tuning; subspaces begin at 20 times it.")  # fmt: skip # noqa: E501
@click.option("--test", metavar="FILE", help="Labelled texts to test on.  [default: a fifth of TASK, 2000 at most]")
@click.option("--labels", callback=parse_list, metavar="A,B,…", help="Use the texts with these labels alone.")
@click.option("--text-column", metavar="NAME", help="Column of the texts, where its name is unusual.")
@click.option("--label-column", metavar="NAME", help="Column of the labels, where its name is unusual.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Train on N texts at most.")
@click.option("--held-out", type=click.IntRange(min=1), metavar="N", help="Test on N texts or windows of text at most.")
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1.  [default: the best there is]")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, metavar="S", help="The first seed; of head, projection, order of texts and dropout.")  # fmt: skip # noqa: E501
@click.option("--keep-model/--no-model", default=True, show_default=True, help="Leave the model of the smallest dimension that reached the target: one more training.")  # fmt: skip # noqa: E501
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier search in DIR stopped, or begin anew.")  # fmt: skip # noqa: E501
@click.option("--dry-run", is_flag=True, help="Say what would be searched and what it may cost; train and write nothing.")  # fmt: skip # noqa: E501
@click.option("--offline", is_flag=True, help="Never ask the hub or fetch an example.")
@click.option("--json", "as_json", metavar="-", help="With -, print intrinsic.json to stdout, all else to stderr.")
@click.option("--quiet", "-q", is_flag=True, help="Print the result alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log more, and say where in the program an error arose.")
def command(**flags: Any) -> int:
    """Find how few numbers must be trained to reach 90 % of full fine-tuning's accuracy: the intrinsic dimension.

    All weights move as theta_0 + P x, and only the d numbers x are trained. Full fine-tuning is trained first, then
    dimensions are tried, four times apart until they enclose the target, halved between, and with several seeds
    where it is decided. Learning rates are chosen by short pilots; what is hopeless after three quarters is given up.

    DIR then holds intrinsic.html, the same as figures/ and intrinsic.json, trials.csv with one line a training, and
    of the smallest dimension that reached the target the model (model/, for transformers and spectra.report) and
    its d numbers with their seed (subspace/); kept.json says of which training. Every finished training stands in a
    journal: give an interrupted command again, and it goes on.

    \b
    Directions:
      fastfood    random in all weights at once, by Walsh-Hadamard transforms
      dense       the same with every entry in memory: small models alone
      sparse      the same with one entry in the square root of all
      kronecker   every matrix moves by L X R', L and R random
      lora        every matrix moves by B C A, B and A random and orthonormal
      gradient    the same, B and A from the first gradient's singular vectors

    \b
    Examples:
      python -m spectra.intrinsic --task rotten-tomatoes --structure said --out d90/
      python -m spectra.intrinsic --task reviews.csv --model bert-base-uncased \\
          --head free --runs 20 --out d90-bert/
      python -m spectra.intrinsic --task rotten-tomatoes --projection lora \\
          --dimensions 64,256,1024,4096 --out curve/
      python -m spectra.report "$(python -m spectra.examples minilm)" d90/model/

    \b
    Exit codes:
      0   done, whether the target was reached or not
      1   training could not go on
      2   arguments that cannot work, or a file that cannot be read
      3   another model's weights, or another search's folder
      130 interrupted
    """  # noqa: D301
    if flags["out"] is None and not flags["dry_run"]:
        raise click.UsageError("--out DIR is needed: the folder of the result.")
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout): intrinsic.json is written to --out in any case.")
    if flags["as_json"] and flags["dry_run"]:
        raise click.UsageError("--dry-run trains nothing, so there is no result for --json to print.")
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)

    from tqdm.auto import tqdm

    from spectra.intrinsic.objective import Objective
    from spectra.intrinsic.searching import SearchConfig
    from spectra.train.config import TrainConfig
    from spectra.train.data import load_task

    def line(text: str) -> None:
        if not flags["quiet"]:
            with tqdm.external_write_mode():  # a bar steps aside
                say(printable(text), err=bool(flags["as_json"]))

    config = SearchConfig(
        **{name: flags[name] for name in _SEARCH},
        rates=flags["rates"],
        dimensions=None if flags["dimensions"] is None else tuple(map(_whole, flags["dimensions"])),
        free_head=flags["head"] == "free",
    )
    data = {key: flags[key] for key in ("test", "labels", "text_column", "label_column", "limit")}
    task = load_task(flags["task_name"], offline=flags["offline"], **data)
    for text in (task.describe(), *task.notes):
        line(text)
    objective = Objective(
        model=flags["reference"],
        task=task,
        config=TrainConfig(
            learning_rate=flags["learning_rate"], seed=flags["seed"], device=flags["device"], progress=False
        ),
        batch=flags["batch"],
        length=flags["length"],
        limit=flags["held_out"],
        structure=flags["structure"],
        projection=flags["projection"],
        head=flags["head"],
        offline=flags["offline"],
    )
    if flags["dry_run"]:
        say(printable(_forecast(objective, config)))
        return 0
    found = _search(objective, config, flags, line)
    _conclude(found, objective, flags, line)
    return 0


def _whole(number: float) -> int:
    if not number.is_integer():  # nor NaN, nor infinity
        raise click.UsageError(f"--dimensions: {number:g} is no whole number.")
    return int(number)


def _search(
    objective: Objective, config: SearchConfig, flags: dict[str, Any], line: Callable[[str], None]
) -> IntrinsicDimension:
    from spectra.intrinsic.searching import search

    return search(
        objective,
        config,
        rate_rule=objective.rate_rule,
        baseline=objective.baseline,
        held_out=objective.held_out,
        total=objective.total,
        smallest=objective.smallest,
        metric_name=objective.metric_name,
        told=objective.describe(),
        say=line,
        journal=flags["out"],
        resume=flags["resume"],
        progress=not flags["quiet"],
    )


def _forecast(objective: Objective, config: SearchConfig) -> str:
    told = objective.describe()
    reference = f"{config.seeds} of all weights" + (f", {config.seeds} of the head alone" if config.free_head else "")
    if config.dimensions is not None:
        wanted = f"{config.seeds * len(config.dimensions)} in {len(config.dimensions)} dimensions"
    else:
        wanted = f"some 10 to 20 in subspaces of {objective.smallest:,} to {objective.total:,} numbers"
    return "\n".join(
        [
            f"{told['model']} on {told['task']}: {objective.total:,} weights move, "
            f"{objective.metric_name} over {objective.held_out:,} held-out texts, {objective.baseline:.3f} untrained",
            f"trainings of {config.steps} steps: {reference}, then {wanted}, and pilots of "
            f"{round(config.pilot_share * config.steps)} steps",
        ]
    )


def _conclude(
    found: IntrinsicDimension, objective: Objective, flags: dict[str, Any], line: Callable[[str], None]
) -> None:
    from spectra.intrinsic.page import write_page

    out = Path(flags["out"])
    written = [found.save(out), out / "trials.csv", *write_page(found, out)]
    best = smallest_that_reached(found) if flags["keep_model"] else None
    if best is not None:
        written += _keep(objective, best, flags, line)
    err = bool(flags["as_json"])
    say(printable(found.sentence()), err=err)
    say(printable("\n".join(_table(found))), err=err)
    say(printable("\n".join(["written", *(f"  {path}" for path in written)])), err=err)
    if flags["as_json"]:
        say(json.dumps(json.loads(written[0].read_text("utf-8")), indent=1, ensure_ascii=False))


def _keep(
    objective: Objective, best: tuple[int, int, float], flags: dict[str, Any], line: Callable[[str], None]
) -> list[Path]:
    """Leave the model of a training in DIR, unless it is there already; the record of what it is comes last.

    Without that record a model in DIR is half written, or of a search that has gone on to another dimension since.
    """
    from spectra.report.files import write_atomically

    out, (dimension, seed, rate) = Path(flags["out"]), best
    record = out / KEPT
    wanted = {**objective.describe(), "dimension": dimension, "seed": seed, "learning_rate": rate}
    text = json.dumps({**wanted, "steps": flags["steps"]}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    folders = (out / "model", out / "subspace")
    before = record.read_text("utf-8") if record.exists() else None
    if before != text or not flags["resume"] or not folders[0].exists():
        if before is not None:  # then the folders are this command's own
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            record.unlink()
        line(f"training d = {grouped(dimension)}, seed {seed}, once more to keep its model")
        objective.save(dimension, seed=seed, learning_rate=rate, steps=flags["steps"], folder=out)
        write_atomically(record, text.encode())
    return [*(folder for folder in folders if folder.exists()), record]


def smallest_that_reached(found: IntrinsicDimension) -> tuple[int, int, float] | None:
    """Dimension, seed and learning rate of the training whose model is kept; None where none reached the target.

    The dimension is the smallest whose mean over seeds reached it: a single lucky seed of a smaller one would say that
    fewer numbers are enough than the curve does. The seed is the first that reached it there.

    Parameters
    ----------
    found : IntrinsicDimension
        What a search found.
    """
    enough = {point.dimension for point in found.curve if point.mean >= found.target}
    reached = [
        (trial.ask.dimension, trial.ask.seed, trial.ask.learning_rate)
        for trial in found.trials
        if trial.ask.kind == "subspace"
        and trial.ask.dimension in enough
        and trial.ask.learning_rate is not None
        and not trial.stopped
        and trial.metric >= found.target
    ]
    return min(reached, default=None)


def _table(found: IntrinsicDimension) -> list[str]:
    if not found.curve:
        return []
    rows = [
        (grouped(point.dimension), f"{point.mean:.3f}", str(point.seeds), f"{point.learning_rate or 0:.2g}")
        for point in found.curve
    ]
    head = ("d", found.metric_name, "seeds", "learning rate")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]


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
