"""The command ``python -m spectra.train.moments``: second moments of what a model's linear maps read, over texts.

An extraction takes them (``python -m spectra.extract … --moments FILE``), so that an adapter loses least where the
inputs are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.command import interrupted_as, printable, run, say
from spectra.errors import UsageError

if TYPE_CHECKING:
    import torch

    from spectra.train.data import Task
    from spectra.train.models import LoadedModel

NAME = "python -m spectra.train.moments"
# Some thousand inputs of every map and more: ten for each entry of the inputs of a small model.
LIMIT = 512


@click.command(
    "moments",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    short_help="Second moments of what a model's linear maps read.",
)
@click.option("--model", "reference", required=True, metavar="REF", help="The base model: a folder, a .gguf file, an id of the Hugging Face hub, or an example: minilm, smollm2.")  # fmt: skip # noqa: E501
@click.option("--task", "task_name", required=True, metavar="TEXTS", help="Texts as in spectra.train: rotten-tomatoes, shakespeare; a .csv, .tsv or .jsonl file of labelled texts; a .txt file or a folder of them; or a data set's id on the hub.")  # fmt: skip # noqa: E501
@click.option("--out", required=True, metavar="FILE", help="Where the moments go, as safetensors.")
@click.option("--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, metavar="N", help="Run N texts, or windows of text, at most.")  # fmt: skip # noqa: E501
@click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, metavar="N", help="Tokens a text is cut at, or tokens a window.")  # fmt: skip # noqa: E501
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Texts at a time.")  # fmt: skip # noqa: E501
@click.option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1.  [default: cpu]")
@click.option("--offline", is_flag=True, help="Never ask the hub: local paths and its cache only.")
@click.option("--quiet", "-q", is_flag=True, help="Print the file alone, without progress.")
@click.option("--verbose", "-v", is_flag=True, help="Say where in the program an error arose.")
def command(reference: str, task_name: str, out: str, **flags: Any) -> int:
    """Run texts through a model and sum xxᵀ over the inputs x of every linear map.

    Texts are those that spectra.train would train on. Every map takes the square of its inputs' length in FILE and in
    memory, 8 bytes an entry. The head that a task adds to the model has no moments: it is drawn at random.

    \b
    Examples:
      python -m spectra.train.moments --model base/ --task texts.csv --out moments.safetensors
      python -m spectra.extract base/ tuned/ --out adapter/ --rank 16 --moments moments.safetensors

    \b
    Exit codes:
      0   done
      2   arguments that cannot work, or a model or texts that cannot be read
      3   the weights are those of another model
      130 interrupted
    """  # noqa: D301
    target = Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"--out {out}: name a file, in a folder that is there")

    from spectra.inputs import check_device
    from spectra.moments import save_moments
    from spectra.train.data import load_task
    from spectra.train.models import load_model

    check_device(flags["device"])
    task = load_task(task_name, offline=flags["offline"])
    loaded = load_model(reference, task, offline=flags["offline"])
    with interrupted_as("nothing was written; the same command begins anew"):
        found = moments_of(loaded, task, **{name: flags[name] for name in ("limit", "length", "batch", "device")},
                           progress=not flags["quiet"])  # fmt: skip
    inputs = max(one.count for one in found.values())
    size = sum(8 * one.total.numel() for one in found.values())
    if not flags["quiet"]:
        say(f"moments of {len(found)} linear maps over {inputs:,} inputs, {size / 1e6:,.1f} MB")
    save_moments(found, target)
    say(printable(f"written\n  {target}"))
    return 0


def moments_of(
    loaded: LoadedModel,
    task: Task,
    *,
    limit: int = LIMIT,
    length: int = 128,
    batch: int = 16,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Second moments of the inputs of every linear map of a model over a task's training texts.

    Parameters
    ----------
    loaded : LoadedModel
    task : Task
    limit : int
        Texts, or windows of text, at most: the first in their shuffled order.
    length : int
        Tokens a text is cut at, or tokens a window.
    batch : int
        Texts at a time. The sums do not depend on it but by rounding.
    device : str, optional
        Where to compute.
    progress : bool
        Show a bar for anything longer than two seconds.

    Returns
    -------
    dict of str to Moments
        By module. Maps that are never called, and heads that no checkpoint gave, are left out.

    Raises
    ------
    UsageError
        If the texts are too short for one batch, or the model calls no linear map.
    """
    from tqdm.auto import tqdm

    from spectra.moments import second_moments
    from spectra.train.batches import batches

    model = loaded.model if device is None else loaded.model.to(device)
    stream = batches(task, loaded.tokenizer, size=batch, length=length)
    first = next(iter(_firsts(stream.once(), limit)))
    names = [
        name
        for name in _called_maps(model, first)
        if not any(name == head or name.startswith(f"{head}.") for head in loaded.fresh)
    ]
    if not names:
        raise UsageError(f"{loaded.reference} calls no linear map on these texts: there is nothing to take moments of")
    with tqdm(delay=2.0, disable=not progress, leave=False, unit=" batches") as bar:
        return second_moments(model, _firsts(stream.once(), limit), names, progress=lambda _: bar.update())


def _firsts(stream: Iterable[dict[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first rows of a stream, without labels: a loss is of no use here."""
    left = limit
    for found in stream:
        if left <= 0:
            return
        yield {name: tensor[:left] for name, tensor in found.items() if name != "labels"}
        left -= len(found["input_ids"])


def _called_maps(model: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Modules with a weight matrix that read vectors in one pass: linear maps, Conv1D, and no embedding."""
    import torch

    called = set()
    device = next(model.parameters()).device

    def note(name: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = next(iter((*args, *kwargs.values())), None)
            if isinstance(read, torch.Tensor) and read.is_floating_point():
                called.add(name)

        return hook

    maps = {name: one for name, one in model.named_modules() if getattr(getattr(one, "weight", None), "ndim", 0) == 2}
    handles = [one.register_forward_pre_hook(note(name), with_kwargs=True) for name, one in maps.items()]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**{name: tensor[:1].to(device) for name, tensor in batch.items()})
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return [name for name in maps if name in called]


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
