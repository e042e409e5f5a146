"""The command ``spectra``: the same verbs as ``python -m spectra.<verb>``, each loaded only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from spectra.command import run
from spectra.version import __version__

# verb: module, attribute, one line of help (so that listing the verbs loads none of them)
VERBS = {
    "report": ("spectra.report.__main__", "command", "What fine-tuning did to the weights, as a report."),
    "extract": ("spectra.extract.__main__", "command", "A fine-tune as a LoRA adapter of PEFT."),
    "compose": ("spectra.compose.__main__", "command", "Updates of one model merged, and how far they interfere."),
    "importance": ("spectra.importance.__main__", "command", "Which directions a training's gradients would keep."),
    "train": ("spectra.train.__main__", "command", "Fine-tune a model on texts, by one method or several."),
    "intrinsic": ("spectra.intrinsic.__main__", "command", "How few numbers a task needs: the search for d90."),
    "quantize": ("spectra.quantized.command", "command", "What quantizing a model's matrices loses."),
    "examples": ("spectra.examples", "main", "Print the local path of a real checkpoint or text."),
}


class Verbs(click.Group):
    """A group that imports a verb's module only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return one verb, None where there is no such verb."""
        if name not in VERBS:
            return None
        module, attribute, _ = VERBS[name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, told) for verb, (_, _, told) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spectra", message="%(prog)s %(version)s")
def group() -> None:
    """What fine-tuning did to the weights, and how few directions would have been enough.

    ``spectra VERB --help`` explains a verb.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        The command line without the program's name.
    """
    return run(group, arguments, name="spectra")


if __name__ == "__main__":
    sys.exit(main())
