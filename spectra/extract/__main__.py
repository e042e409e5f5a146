"""The command ``python -m spectra.extract``: write what fine-tuning did to the weights as a LoRA adapter."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from spectra.command import interrupted_as, printable, run, say, tell

if TYPE_CHECKING:
    from spectra.extract.extraction import Extraction

NAME = "python -m spectra.extract"
CRITERIA = ("signal", "gavish-donoho", "marchenko-pastur", "entropy", "stable", "elbow")


@click.command(
    "extract",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="A fine-tune as a LoRA adapter of PEFT.",
)
@click.argument("base")
@click.argument("tuned")
@click.option("--out", required=True, metavar="ADAPTER", help="Folder of the adapter: new, empty, or of an earlier extraction.")  # fmt: skip # noqa: E501
@click.option("--rank", type=int, metavar="K", help="Keep K directions of every matrix.")
@click.option("--energy", type=float, metavar="SHARE", help="Keep this share of every matrix's squared norm, 0.9 for instance; with --global of the whole model's.")  # fmt: skip # noqa: E501
@click.option("--parameters", type=int, metavar="N", help="Spend at most N parameters on factors, where they help most.")  # fmt: skip # noqa: E501
@click.option("--criterion", metavar="NAME", help=f"Ranks that each spectrum advises: {', '.join(CRITERIA)}.")
@click.option("--uniform", "allocation", flag_value="uniform", help="Each matrix by itself, or one rank for all.  [default, but for --parameters]")  # fmt: skip # noqa: E501
@click.option("--global", "allocation", flag_value="global", help="Directions where the whole model gains most by them.")  # fmt: skip # noqa: E501
@click.option("--include", metavar="RE", help="Only tensors whose name holds this regular expression.")  # fmt: skip
@click.option("--exclude", metavar="RE", help="No tensor whose name holds this regular expression.")  # fmt: skip
@click.option("--embeddings", type=click.Choice(["lora", "save", "list"]), default="lora", show_default=True, help="Embeddings as factors, saved whole, or only listed.")  # fmt: skip # noqa: E501
@click.option("--rest", type=click.Choice(["save", "list"]), default="save", show_default=True, help="Norms, biases and heads that changed: in the adapter, or only listed.")  # fmt: skip # noqa: E501
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="What factors are stored in.")  # fmt: skip # noqa: E501
@click.option("--moments", metavar="FILE", help="Second moments of what linear maps read (python -m spectra.train.moments): their factors lose least on such inputs, and errors are told both ways.")  # fmt: skip # noqa: E501
@click.option("--allow-partial", is_flag=True, help="Go on where fewer than 95 % of the tensors match.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; read no tensor and write nothing.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Small matrices at a time. The bytes do not depend on it.  [default: one a core]")  # fmt: skip # noqa: E501
@click.option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1.  [default: cpu]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Seed of the sketches of very large matrices.")  # fmt: skip # noqa: E501
@click.option("--offline", is_flag=True, help="Never ask the hub: local paths and its cache only.")
@click.option("--trust-pickle", is_flag=True, help="Read .bin and .pt files too, tensors only; they are refused otherwise.")  # fmt: skip # noqa: E501
@click.option("--json", "as_json", metavar="-", help="With -, print extraction.json to stdout and everything else to stderr.")  # fmt: skip # noqa: E501
@click.option("--quiet", "-q", is_flag=True, help="Print the verdict and the files alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Log every step, and say where in the program an error arose.")
def command(base: str, tuned: str, **flags: Any) -> int:
    """Write what fine-tuning did to BASE as a LoRA adapter that PEFT loads: every matrix of TUNED − BASE truncated to
    its leading singular directions, the best factors of that rank there are.

    BASE and TUNED are folders or files of safetensors, or ids on the Hugging Face hub (org/name@revision). TUNED may
    be an adapter of BASE: then it is re-ranked from its factors. Norms, biases and heads that changed are saved beside
    the factors. ADAPTER gets adapter_config.json, adapter_model.safetensors, README.md (a model card with the measured
    errors) and extraction.json (every tensor).

    \b
    Examples:
      python -m spectra.extract base/ tuned/ --out adapter/ --rank 16
      python -m spectra.extract base/ tuned/ --out adapter/ --energy 0.9 --global
      python -m spectra.extract base/ adapter-r64/ --out adapter-r16/ --rank 16
      python -m spectra.extract base/ tuned/ --out adapter/ --rank 16 --moments moments.safetensors

    \b
    Exit codes:
      0   done
      1   done, but some tensors could not be extracted (NaN, …)
      2   arguments that cannot work, or a checkpoint that cannot be opened
      3   names or shapes do not match
      4   a file that lies about itself, or could run code
      130 interrupted
    """  # noqa: D301
    if flags["as_json"] not in (None, "-"):
        raise click.UsageError("--json takes only - (stdout): extraction.json is written to --out in any case.")
    if flags["as_json"] and flags["dry_run"]:
        raise click.UsageError("--dry-run computes nothing, so there is no record for --json to print.")
    if flags["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)

    with _loading():
        from spectra.extract import execute, plan

    todo = plan(base, tuned, **{name: flags[name] for name in _PLANNED})
    if flags["dry_run"]:
        say(printable("\n".join(todo.lines())))
        return 0
    if not flags["quiet"]:
        say(printable("\n".join(["plan", *(f"  {line}" for line in todo.lines()), ""])), err=bool(flags["as_json"]))
    with interrupted_as("an adapter is written whole or not at all; the same command begins anew"):
        found = execute(todo, jobs=flags["jobs"], progress=not flags["quiet"])
    _conclude(found, as_json=bool(flags["as_json"]))
    return 1 if found.failed else 0


_PLANNED = (
    "out",
    "rank",
    "energy",
    "parameters",
    "criterion",
    "allocation",
    "include",
    "exclude",
    "embeddings",
    "rest",
    "dtype",
    "moments",
    "seed",
    "device",
    "trust_pickle",
    "offline",
    "allow_partial",
)


@contextmanager
def _loading() -> Iterator[None]:
    """Load modules without looking for garbage among them, neither now nor when the process ends.

    Modules make hundreds of thousands of objects that stay, and a process that does little more than load torch spent
    1.9 s of a core with these searches and 1.4 s without. A program that has torch already is left as it is.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _conclude(found: Extraction, *, as_json: bool) -> None:
    say(printable("\n".join(found.verdict)), err=as_json)
    say(printable("\n".join(["written", *(f"  {path}" for path in found.files)])), err=as_json)
    if as_json:
        say(json.dumps(found.record, indent=1))
    for row in found.failed:
        tell(f"error: {row['reason']}")


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
