"""Is a trained LoRA better than the best LoRA of the fine-tuned model? Accuracy and error at every budget, both ways.

A full fine-tune is extracted at a ladder of ranks, the same rank everywhere and by one budget for the whole model;
every adapter is opened in PEFT and tested on the texts that training held out. Beside it stand LoRA trained at the same
rank and the error that an AdaLoRA run's rank map would leave of the full update. What a result of the same fine-tune
holds already is not computed again.

    python -m spectra.train --method full --task rotten-tomatoes --out full/
    python -m spectra.train --method lora --rank 8 --task rotten-tomatoes --out lora-r8/
    python -m spectra.train --method adalora --task rotten-tomatoes --out adalora/ --record-importance
    python -m analyses.extraction --full full/ --lora lora-r8/ --adalora adalora/
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spectra
from spectra.extract import extract
from spectra.importance import agreement, read_recorded, replay, svd_rank_map
from spectra.train.batches import held_out
from spectra.train.data import load_task
from spectra.train.evaluate import evaluate
from spectra.train.models import quietly

RANKS = (1, 2, 4, 8, 16, 32, 64)
RESULT = Path(__file__).parent / "results" / "extraction.json"


def accuracy_of(model: torch.nn.Module, task: Any, tokenizer: Any) -> float:
    """Accuracy on the held-out texts, cut as training cut them."""
    return evaluate(model, held_out(task, tokenizer, size=32, length=64).once())["accuracy"]


def trained(folder: Path) -> dict[str, Any]:
    """What a training left: its method, rank, accuracy and size."""
    record = json.loads((folder / "training.json").read_text("utf-8"))
    return {
        "method": record["method"],
        "rank": record["settings"].get("rank"),
        "seed": record["asked"]["seed"],
        "accuracy": record["metrics"]["accuracy"],
        "trainable": record["parameters"]["trainable"],
    }


def extracted(base: str, full: Path, task: Any, **rule: int) -> dict[str, Any]:
    """Extract by one rule, open in PEFT, test. Embeddings are left out: LoRA does not train them here either."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        found = extract(base, full, out=out, embeddings="list", progress=False, **rule)
        with quietly():
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
            opened = PeftModel.from_pretrained(model, str(out))
        accuracy = accuracy_of(opened, task, AutoTokenizer.from_pretrained(full))
    return {
        "rank": rule.get("rank"),
        "allocation": "uniform" if "rank" in rule else "global",
        "parameters": found.totals["factor_parameters"],
        "error": found.totals["matrices_error"] / found.totals["matrices_norm"],
        "optimum": found.totals["matrices_optimum"] / found.totals["matrices_norm"],
        "accuracy": accuracy,
    }


def rank_maps(base: str, full: Path, adalora: Path) -> list[dict[str, Any]]:
    """Error that each map of one budget leaves of the full update: AdaLoRA's, equal ranks, and the one of hindsight."""
    recorded = read_recorded(adalora)
    record = json.loads((adalora / "training.json").read_text("utf-8"))
    kept = replay(recorded, kept=record["settings"]["rank"] * record["modules"])
    run = spectra.compare(base, full, progress=False)
    values = {
        name: run.spectrum(match).values
        for name in kept.final
        for match in run.frame.name
        if match.endswith(f"{name.removeprefix('bert.')}.weight")
    }
    shapes = {name: (int(row.rows), int(row.cols)) for name, row in _rows(run, values)}
    squares = {name: v**2 for name, v in values.items()}
    best = svd_rank_map(squares, kept.total, shapes=shapes)
    even = {name: kept.total // len(squares) for name in squares}
    total = sum(float(v.sum()) for v in squares.values())

    def error(ranks: dict[str, int]) -> float:
        return math.sqrt(sum(float(squares[name][rank:].sum()) for name, rank in ranks.items()) / total)

    told = agreement(kept, best)
    return [
        {"map": "AdaLoRA's", "directions": kept.total, "error": error(kept.final), "spearman": told.spearman},
        {"map": "equal ranks", "directions": sum(even.values()), "error": error(even)},
        {"map": "of the full update", "directions": best.total, "error": error(best.final)},
    ]


def _rows(run: spectra.Run, values: dict[str, np.ndarray]) -> list[tuple[str, Any]]:
    return [
        (name, row)
        for name in values
        for row in run.frame.itertuples()
        if row.name.endswith(f"{name.removeprefix('bert.')}.weight")
    ]


@click.command()
@click.option("--full", type=click.Path(exists=True, path_type=Path), required=True, help="A full fine-tune.")
@click.option("--lora", type=click.Path(exists=True, path_type=Path), multiple=True, help="A trained LoRA; repeated.")
@click.option("--adalora", type=click.Path(exists=True, path_type=Path), help="AdaLoRA with its importance recorded.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True, help="The result.")
def main(full: Path, lora: tuple[Path, ...], adalora: Path | None, out: Path) -> None:
    """Compare extraction from a full fine-tune with LoRA trained at the same ranks."""
    base = json.loads((full / "training.json").read_text("utf-8"))["base_model"]
    task = load_task("rotten-tomatoes")
    result: dict[str, Any] = {"task": task.name, "texts": len(task.test.texts), "full": trained(full), "extracted": []}
    before = json.loads(out.read_text("utf-8")) if out.exists() else {}
    if before.get("full") == result["full"]:
        result = before
    rows = result["extracted"]
    for rank in RANKS[len(rows) // 2 :]:
        uniform = extracted(base, full, task, rank=rank)
        rows += [uniform, extracted(base, full, task, parameters=uniform["parameters"])]
        click.echo("\n".join(map(json.dumps, rows[-2:])))
        write(result, out)
    result["trained"] = [trained(folder) for folder in lora]
    if adalora:
        result["rank_maps"] = rank_maps(base, full, adalora)
        click.echo("\n".join(map(json.dumps, result["rank_maps"])))
    write(result, out)


def write(result: dict[str, Any], out: Path) -> None:
    """Leave the result, whole at every moment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
    partial.replace(out)


if __name__ == "__main__":
    main()
