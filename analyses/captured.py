"""What of a full fine-tune's update do d dimensions hold, random ones and structured ones?

Beside the share that a subspace of each kind holds stands chance, d/D, and the share of the best subspace of the same
structure: singular vectors of the update itself, with a core of as many numbers.

    python -m spectra.train --method full --task rotten-tomatoes --out full/
    python -m analyses.captured --full full/
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForSequenceClassification

from spectra.intrinsic import Objective, captured
from spectra.train.config import TrainConfig
from spectra.train.data import load_task
from spectra.train.models import load_model, quietly

RESULT = Path(__file__).parent / "results" / "captured.json"
DIMENSIONS = (64, 256, 1024, 4096)
RANDOM = ("fastfood", "kronecker", "lora")


@click.command()
@click.option("--full", type=click.Path(exists=True, path_type=Path), required=True, help="A full fine-tune.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True, help="The result.")
def main(full: Path, seeds: int, out: Path) -> None:
    """Project the update on subspaces of every kind and dimension and write the shares."""
    asked = json.loads((full / "training.json").read_text("utf-8"))["asked"]
    task = load_task(asked["task"])
    base = load_model("minilm", task, seed=asked["seed"])
    with quietly():
        tuned = AutoModelForSequenceClassification.from_pretrained(full)
    start, moved = dict(base.model.named_parameters()), dict(tuned.named_parameters())
    update = {name: (moved[name] - start[name]).detach() for name in start}
    objective = Objective(model="minilm", task=task, config=TrainConfig(progress=False), length=asked["length"])
    gradients = objective.first_gradients(base, seed=asked["seed"])
    rows: list[dict[str, Any]] = []

    def add(kind: str, projection: str, dimension: int, seed: int, of: dict[str, torch.Tensor] | None = None) -> None:
        found = captured(update, dimension=dimension, projection=projection, seed=seed, gradients=of)
        rows.append({"kind": kind, "seed": seed, **asdict(found)})
        click.echo(f"{kind:10} d = {dimension:6} seed {seed}: {found.share:.3e}, {found.times_chance:.3g} times chance")

    for dimension in DIMENSIONS:
        for kind in RANDOM:
            for seed in range(seeds):
                add(kind, kind, dimension, seed)
        add("gradient", "gradient", dimension, 0, gradients)
        add("best", "gradient", dimension, 0, update)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"task": task.name, "steps": asked["steps"], "seed": asked["seed"], "shares": rows}
    out.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
