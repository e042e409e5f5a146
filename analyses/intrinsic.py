"""How many dimensions does a task need? d90 of MiniLM by random subspaces of several kinds, searched for with seeds.

Every training is kept in a journal below the folder of runs, so that an interrupted analysis goes on where it stopped;
full fine-tuning is trained once a task and seed, whatever the number of structures. All dimensions share one learning
rate: where pilots of 20 steps chose among three on subjectivity, they took four times this one, at which one of two
seeds diverged.

    python -m analyses.intrinsic --task rotten-tomatoes --task subjectivity.tsv

The second task is B. Pang and L. Lee's Subjectivity Dataset v1.0 (2004), as a table with the columns label and text.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from spectra.intrinsic.config import SearchConfig
from spectra.intrinsic.objective import Objective
from spectra.intrinsic.result import IntrinsicDimension
from spectra.intrinsic.searching import search
from spectra.intrinsic.trial import Ask, Trial
from spectra.train.config import TrainConfig
from spectra.train.data import load_task

RESULTS = Path(__file__).parent / "results" / "intrinsic"
KINDS = ("did/fastfood", "said/fastfood", "did/lora", "did/gradient")


def searched(
    task_name: str, kind: str, runs: Path, references: dict[Ask, Trial], flags: dict[str, Any]
) -> tuple[str, IntrinsicDimension]:
    """One search, and what it is called."""
    structure, projection = kind.split("/")
    task = load_task(task_name)
    objective = Objective(
        model="minilm",
        task=task,
        config=TrainConfig(learning_rate=5e-5, progress=False),
        length=flags["length"],
        limit=flags["held_out"],
        structure=structure,
        projection=projection,
    )

    def run(ask: Ask) -> Trial:
        if ask.kind != "full":
            return objective(ask)
        if ask not in references:
            references[ask] = objective(ask)
        return references[ask]

    name = Path(task_name).stem
    found = search(
        run,
        SearchConfig(steps=flags["steps"], seeds=flags["seeds"], rates=(1.0,)),
        rate_rule=objective.rate_rule,
        baseline=objective.baseline,
        held_out=objective.held_out,
        total=objective.total,
        smallest=objective.smallest,
        metric_name=objective.metric_name,
        told={**objective.describe(), "model": "all-MiniLM-L6-v2", "task": name},
        say=click.echo,
        journal=runs / f"{name}-{structure}-{projection}",
    )
    for trial in found.trials:
        if trial.ask.kind == "full":
            references[trial.ask] = trial
    click.echo(found.sentence())
    return f"{name}-{structure}-{projection}", found


@click.command()
@click.option("--task", "tasks", multiple=True, required=True, help="A task of the trainer; may be repeated.")
@click.option("--kind", "kinds", multiple=True, default=KINDS[:2], show_default=True, type=click.Choice(KINDS))
@click.option("--runs", type=click.Path(path_type=Path), default=Path("intrinsic-runs"), show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--length", default=32, show_default=True)
@click.option("--held-out", default=1000, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="Folder of results.")
def main(tasks: tuple[str, ...], kinds: tuple[str, ...], runs: Path, out: Path, **flags: Any) -> None:
    """Search every task by every kind of subspace, a result each."""
    for task in tasks:
        references: dict[Ask, Trial] = {}
        for kind in kinds:
            name, found = searched(task, kind, runs, references, flags)
            with tempfile.TemporaryDirectory() as folder:
                out.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found.save(folder), out / f"{name}.json")


if __name__ == "__main__":
    main()
