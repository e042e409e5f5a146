"""The command ``python -m spectra.train``: fine-tune a model by one method, or by several side by side."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import printable, run, say, tell
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.train.data import Task
    from spectra.train.experiment import Plan
    from spectra.train.models import LoadedModel

NAME = "python -m spectra.train"
_REPORTED = ("full", "lora", "rslora", "lora-plus")  # what the report reads as it lies
_SHORT = ("rank", "alpha", "dropout")  # settings that have a flag of their own


def parse_list(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Read names that commas part.

    Examples
    --------
    >>> parse_list(None, None, "full, lora")
    ['full', 'lora']
    """
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def parse_pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """Read NAME=VALUE pairs.

    Raises
    ------
    click.BadParameter
        If one has no ``=``.

    Examples
    --------
    >>> parse_pairs(None, None, ("lora.rank=4",))
    [('lora.rank', '4')]
    """
    pairs = []
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not name.strip() or not text.strip():
            raise click.BadParameter(f"{value!r}: write NAME=VALUE")
        pairs.append((name.strip(), text.strip()))
    return pairs


def parse_rates(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Read learning rates: a number for every method, or METHOD=NUMBER for one.

    Raises
    ------
    click.BadParameter
        If one is no number above 0.

    Examples
    --------
    >>> parse_rates(None, None, ("1e-3", "full=5e-5"))
    {'': 0.001, 'full': 5e-05}
    """
    rates = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            rates[name.strip()] = float(text)
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: write 1e-3, or lora=1e-3 for one method of several") from error
        if not 0 < rates[name.strip()] < float("inf"):
            raise click.BadParameter(f"{value!r}: a learning rate is above 0")
    return rates


@click.command(
    "train",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="Fine-tune a model by one method or several.",
)
@click.option("--method", metavar="NAME", help="full, lora, rslora, lora-plus, qlora, adalora, glora, ia3, houlsby, prefix, prompt or subspace.")  # fmt: skip # noqa: E501
@click.option("--methods", callback=parse_list, metavar="A,B,…", help="Train by each of these from one start and seed, into folders of DIR, and compare them.")  # fmt: skip # noqa: E501
@click.option("--model", "reference", default="minilm", show_default=True, metavar="REF", help="A folder, a .gguf file, an id of the Hugging Face hub, or an example: minilm, smollm2.")  # fmt: skip # noqa: E501
@click.option("--task", "task_name", required=True, metavar="REF", help="rotten-tomatoes, shakespeare; a .csv, .tsv or .jsonl file of labelled texts; a .txt file or a folder of them, to model; or the id of a data set on the hub.")  # fmt: skip # noqa: E501
@click.option("--out", metavar="DIR", help="Folder of the result. Needed unless --dry-run.")
@click.option("--test", metavar="FILE", help="Labelled texts to test on.  [default: a fifth of TASK, 2000 at most]")
@click.option("--labels", callback=parse_list, metavar="A,B,…", help="Use the texts with these labels alone.")
@click.option("--text-column", metavar="NAME", help="Column of the texts, where its name is unusual.")
@click.option("--label-column", metavar="NAME", help="Column of the labels, where its name is unusual.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Train on N texts at most.")
@click.option("--held-out", type=click.IntRange(min=1), metavar="N", help="Test on N texts or windows of text at most.  [default: all texts, 200 windows]")  # fmt: skip # noqa: E501
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, metavar="N", help="Updates of the parameters.")  # fmt: skip # noqa: E501
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Texts a batch.")
@click.option("--length", type=click.IntRange(min=2), default=64, show_default=True, metavar="N", help="Tokens a text is cut at, or tokens a window.")  # fmt: skip # noqa: E501
@click.option("--learning-rate", "--lr", "rates", multiple=True, callback=parse_rates, metavar="[METHOD=]X", help="At the top of the schedule; may be repeated.  [default: the method's own, told above]")  # fmt: skip # noqa: E501
@click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), default="linear", show_default=True, help="What follows the warm-up.")  # fmt: skip # noqa: E501
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.06, show_default=True, metavar="X", help="Share of the steps over which the learning rate rises.")  # fmt: skip # noqa: E501
@click.option("--optimizer", type=click.Choice(["adamw", "sgd", "paged_adamw"]), default="adamw", show_default=True, help="paged_adamw needs CUDA and bitsandbytes.")  # fmt: skip # noqa: E501
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True, metavar="X", help="Of matrices; vectors have none.")  # fmt: skip # noqa: E501
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Batches an update.")  # fmt: skip # noqa: E501
@click.option("--clip", type=click.FloatRange(min=0), default=1.0, show_default=True, metavar="X", help="Largest norm of the gradient; 0 leaves it.")  # fmt: skip # noqa: E501
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Of the forward pass.")  # fmt: skip # noqa: E501
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute activations instead of keeping them: less memory, more time.")  # fmt: skip # noqa: E501
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1.  [default: the best there is]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="S", help="Of the head, the method's start, the order of texts and dropout.")  # fmt: skip # noqa: E501
@click.option("--rank", metavar="R", help="Rank of low-rank methods; AdaLoRA's average.")
@click.option("--alpha", metavar="X", help="Numerator of their scale.")
@click.option("--dropout", metavar="X", help="Of the input of their factors.")
@click.option("--set", "given", multiple=True, callback=parse_pairs, metavar="NAME=VALUE", help="Set any other field of a method, of one among several as lora.rank=4; may be repeated.")  # fmt: skip # noqa: E501
@click.option("--target", metavar="RE", help="Modules that get the method.  [default: the method's own for the architecture]")  # fmt: skip # noqa: E501
@click.option("--also", metavar="RE", help="More modules to train whole; a fresh head always is.")
@click.option("--merged", is_flag=True, help="Save the merged model too, in DIR/merged, where the method has one.")
@click.option("--evaluate-every", type=click.IntRange(min=1), metavar="N", help="Steps from one test to the next.  [default: at the end only]")  # fmt: skip # noqa: E501
@click.option("--save-every", type=click.IntRange(min=1), metavar="N", help="Steps from one checkpoint to the next.  [default: on interruption only]")  # fmt: skip # noqa: E501
@click.option("--record-importance", type=click.IntRange(min=1), is_flag=False, flag_value=1, metavar="[EVERY]", help="Record how important every direction is, every step or every so many, in importance.parquet; see python -m spectra.importance.")  # fmt: skip # noqa: E501
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run in DIR stopped, or begin anew.")  # fmt: skip # noqa: E501
@click.option("--dry-run", is_flag=True, help="Say what would train and what it costs; train and write nothing.")
@click.option("--offline", is_flag=True, help="Never ask the hub or fetch an example.")
@click.option("--json", "as_json", metavar="-", help="With -, print the record or the comparison to stdout as JSON, all else to stderr.")  # fmt: skip # noqa: E501
@click.option("--quiet", "-q", is_flag=True, help="Print the results alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log more, and say where in the program an error arose.")
def command(**flags: Any) -> int:
    """Fine-tune a model on texts by one method, or by several from the same start, and test it on texts held out.

    DIR is then a folder that others open: transformers' from_pretrained after full, peft's PeftModel after the
    rest (GLoRA and Houlsby adapters, which peft does not have, are for spectra; GLoRA leaves a merged model in
    DIR/merged), and python -m spectra.report MODEL DIR says what training did to the weights. Beside the weights
    stand training.json (what was asked, parameters, bytes, metrics, versions) and metrics.jsonl, one line a step.
    With --methods each has its folder in DIR, beside comparison.csv, .md, .json and .svg.

    An interrupted run goes on from its last checkpoint, to the same losses, when the same command is given again.
    Several GPUs or processes: accelerate launch -m spectra.train with the same flags.

    \b
    Examples:
      python -m spectra.train --method lora --task rotten-tomatoes --out tuned/
      python -m spectra.report "$(python -m spectra.examples minilm)" tuned/
      python -m spectra.train --methods full,lora,adalora --task reviews.csv \\
          --model bert-base-uncased --steps 1000 --seed 1 --out compared/
      python -m spectra.train --method qlora --model smollm2 --task shakespeare \\
          --rank 16 --batch 4 --length 128 --out bard/

    \b
    Methods, where they go, and their learning rates:
      full        every weight                                     5e-5
      lora        every matrix of the layers                       1e-3
      rslora      the same, scaled by 1/sqrt(rank)                 1e-3
      lora-plus   the same, B at 16 times A's rate                 2e-4
      qlora       the same, on a base in 4 bits                    2e-3
      adalora     the same, ranks by importance                    2e-3
      glora       the same, weight, bias and input moved           1e-3
      ia3         keys, values, the feed-forward's inside          1e-2
      houlsby     behind attention and feed-forward                1e-3
      prefix      keys and values in front, in every layer         1e-2
      prompt      input vectors in front                           3e-2
      subspace    every weight, by d random directions             1e-3

    \b
    Exit codes:
      0   done
      1   training could not go on (a loss that is NaN, a full disk, …)
      2   arguments that cannot work, or a file that cannot be read
      3   another model's weights, or another training's folder
      130 interrupted
    """  # noqa: D301
    names = _check(flags)
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    plans = _plans(names, flags)

    from tqdm.auto import tqdm

    from spectra.train.data import load_task
    from spectra.train.models import load_model
    from spectra.train.output import is_first_process

    def line(text: str) -> None:
        if not flags["quiet"] and is_first_process():
            with tqdm.external_write_mode():  # a bar steps aside
                say(printable(text), err=bool(flags["as_json"]))

    task = load_task(flags["task_name"], offline=flags["offline"], **plans[0].data)
    loaded = load_model(flags["reference"], task, seed=flags["seed"], offline=flags["offline"])
    for text in (task.describe(), *task.notes, f"{loaded.reference}: {type(loaded.model).__name__}", *loaded.notes):
        line(text)
    if flags["dry_run"]:
        for plan in plans:
            say(printable(_forecast(plan, _copied(loaded, plans), task)))
        return 0
    with ExitStack() as locks:
        _claim(plans, flags, locks)
        records = [_one(plan, loaded, plans, task, line) for plan in plans]
    if is_first_process():
        _conclude(plans, records, flags)
    return 0


def _check(flags: dict[str, Any]) -> list[str]:
    """The methods that were asked for, once the flags can work together."""
    if bool(flags["method"]) == bool(flags["methods"]):
        raise click.UsageError("Give --method NAME, or --methods A,B,… to compare several.")
    if flags["out"] is None and not flags["dry_run"]:
        raise click.UsageError("--out DIR is needed: the folder of the result.")
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout): training.json is written to --out in any case.")
    if flags["as_json"] and flags["dry_run"]:
        raise click.UsageError("--dry-run trains nothing, so there is no record for --json to print.")
    names: list[str] = flags["methods"] or [flags["method"]]
    if len(set(names)) < len(names):
        raise click.UsageError("--methods names a method twice.")
    if strangers := [name for name in flags["rates"] if name and name not in names]:
        raise click.UsageError(f"--learning-rate {strangers[0]}=…: {strangers[0]!r} is not among the methods.")
    return names


def _plans(names: list[str], flags: dict[str, Any]) -> list[Plan]:
    from spectra.train.config import TrainConfig
    from spectra.train.experiment import Plan
    from spectra.train.methods import build_method, settings_of, spec_of

    rates = {name: flags["rates"].get(name, flags["rates"].get("", spec_of(name).learning_rate)) for name in names}
    short = [(key, flags[key]) for key in _SHORT if flags[key] is not None]
    settings = settings_of(names, [*short, *flags["given"]])
    for name in names:
        build_method(name, settings[name])  # a setting out of range is told before anything is loaded
    data = {key: flags[key] for key in ("test", "labels", "text_column", "label_column", "limit")}
    root = None if flags["out"] is None else Path(flags["out"])
    plans = []
    for name in names:
        config = TrainConfig(
            learning_rate=rates[name],
            clip=flags["clip"] or None,
            out=root / name if root is not None and flags["methods"] else root,
            resume=root is not None,
            progress=not flags["quiet"],
            save_every=flags["save_every"] if root is not None else None,
            record_importance=flags["record_importance"] if root is not None else None,
            **{key: flags[key] for key in _CONFIG_FLAGS},
        )
        plans.append(
            Plan(
                method=name,
                settings=settings[name],
                model=flags["reference"],
                task=flags["task_name"],
                config=config,
                data=data,
                **{key: flags[key] for key in ("batch", "length", "held_out", "target", "also", "merged")},
            )
        )
    return plans


_CONFIG_FLAGS = (
    "steps",
    "optimizer",
    "weight_decay",
    "warmup",
    "schedule",
    "accumulation",
    "precision",
    "gradient_checkpointing",
    "seed",
    "device",
    "evaluate_every",
)


def _claim(plans: list[Plan], flags: dict[str, Any], locks: ExitStack) -> None:
    from spectra.train.experiment import owned

    for plan in plans:
        assert plan.config.out is not None  # _check saw to it
        locks.enter_context(owned(plan.config.out, anew=not flags["resume"]))


def _copied(loaded: LoadedModel, plans: list[Plan]) -> LoadedModel:
    """The model to train: a copy where others follow, so that all begin from the same weights."""
    return loaded if len(plans) == 1 else replace(loaded, model=copy.deepcopy(loaded.model))


def _one(
    plan: Plan, loaded: LoadedModel, plans: list[Plan], task: Task, line: Callable[[str], None]
) -> Mapping[str, Any]:
    from spectra.train.experiment import finished, run_plan

    before = finished(plan)
    if before is not None:
        line(f"{plan.method}: finished before, in {plan.config.out}")
        return before
    return run_plan(plan, _copied(loaded, plans), task, line)


def _forecast(plan: Plan, loaded: LoadedModel, task: Task) -> str:
    """What a plan would train, and the memory of a step."""
    from spectra.theory.counts import OPTIMIZER_BYTES
    from spectra.train.experiment import predicted_activations, put_method
    from spectra.train.output import held_bytes

    injection = put_method(plan, loaded)
    kept = predicted_activations(plan, loaded, task)
    parts = {
        "weights": held_bytes(loaded.model),
        "gradients": 4 * injection.trainable,
        "optimizer": OPTIMIZER_BYTES[plan.config.optimizer] * injection.trainable,
        **({} if kept is None else {"activations at most": kept}),
    }
    told = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())
    where = "" if plan.config.out is None else f"; the result would go to {plan.config.out}"
    return f"{injection!r}\n  learning rate {plan.config.learning_rate:g}; memory of a step: {told}{where}"


def _conclude(plans: list[Plan], records: list[Mapping[str, Any]], flags: dict[str, Any]) -> None:
    """Print the results, and for several methods write the comparison."""
    from spectra.train.table import markdown, rows_of, write_comparison

    rows = rows_of(records)
    err = bool(flags["as_json"])
    say(printable(markdown(rows)), err=err)
    majority = records[0]["task"]["majority"]
    if majority is not None:
        say(f"always the commonest label: accuracy {majority:.3f}", err=err)
    out = Path(flags["out"])
    told: Any = records[0]
    if flags["methods"]:
        curves = {plan.method: _losses(plan) for plan in plans}
        written = write_comparison(out, records, curves)
        told = {"rows": rows}
    else:
        written = sorted(path for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
    say(printable("\n".join(["written", *(f"  {path}" for path in written)])), err=err)
    if flags["as_json"]:
        say(json.dumps(told, indent=1, ensure_ascii=False))
    if records[0]["method"] in _REPORTED and not flags["quiet"] and not flags["methods"]:
        tell(f'see what it did to the weights: python -m spectra.report "{records[0]["base_model"]}" "{out}"')


def _losses(plan: Plan) -> list[float]:
    from spectra.train.metrics import NAME as METRICS

    if plan.config.out is None:
        raise UsageError("a run without a folder leaves no metrics")
    lines = (plan.config.out / METRICS).read_text().splitlines()
    return [value for value in (json.loads(line)["loss"] for line in lines) if value is not None]


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
