r"""Does a LoRA trained on quantized weights repair what quantizing took away?

Every QLoRA is trained beside a LoRA of the same seed, rank and task on the weights in full precision, which never saw
the quantization error E = W − Ŵ and so says what chance and the task alone bring. Of every trained update ΔW = γBA:

- its projection on E, ⟨ΔW, E⟩/‖E‖² (1: all of E is made up for; the control's is chance), and the cosine between both;
- the share of ‖E‖² between its own row and column spaces, beside the best that any rank r can hold;
- four test losses: (a) LoRA on W; (b) the same LoRA on Ŵ, put there after training; (c) QLoRA on Ŵ; (d) the same QLoRA
  on W. Training under quantization recovers (b − c)/(b − a) of what quantizing costs; where it made up for E, taking
  E away again hurts: d > c.

Ranks are compared at equal r/n, as the share of a random E that rank r can hold depends on that alone: r = 6 of
MiniLM's 384 is r = 64 of 4096. Each finished training is kept, so that an interrupted analysis goes on.

    python -m analyses.compensation --task rotten-tomatoes --task subjectivity.tsv
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from spectra.methods import Injection
from spectra.train.batches import batches, held_out
from spectra.train.config import TrainConfig
from spectra.train.data import Task, load_task
from spectra.train.evaluate import evaluate
from spectra.train.experiment import Plan, put_method
from spectra.train.loop import train
from spectra.train.methods import spec_of
from spectra.train.models import LoadedModel, load_model

RESULT = Path(__file__).parent / "results" / "compensation.json"

# Settings of QLoRA beside the rank: one thing is changed at a time from the first.
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4, plain scales": {"format": "nf4", "double": False},
    "nf4, LoftQ": {"format": "nf4", "start": "loftq"},
    "nf4, α = 2r": {"format": "nf4", "alpha": 2.0},
    "int4": {"format": "int4"},
    "nf2": {"format": "nf2"},
    "nf2, LoftQ": {"format": "nf2", "start": "loftq"},
}


@dataclass(frozen=True)
class Trained:
    """What a training left: by module the base in float32 and the update; what trained whole; how well it does."""

    base: dict[str, torch.Tensor]
    update: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]
    metrics: Mapping[str, float]
    seconds: float


class Bench:
    """Trains and tests on one task."""

    def __init__(self, reference: str, task: Task, flags: Mapping[str, Any]) -> None:
        self._reference, self._task, self._flags = reference, task, flags

    def trained(self, method: str, settings: Mapping[str, Any], seed: int) -> Trained:
        """One training."""
        loaded, flags = self._loaded(seed), self._flags
        config = TrainConfig(
            steps=flags["steps"], learning_rate=spec_of(method).learning_rate, seed=seed, progress=False
        )
        plan = Plan(method, settings, self._reference, self._task.name, config)
        injection = put_method(plan, loaded)
        began = time.perf_counter()
        stream = batches(self._task, loaded.tokenizer, size=32, length=flags["length"], seed=seed)
        for _ in train(loaded.model, stream, config):
            pass
        seconds = time.perf_counter() - began
        return Trained(*_parts(injection), self._tested(loaded), round(seconds, 1))

    def metrics(self, seed: int, base: Mapping[str, torch.Tensor], adapter: Trained) -> Mapping[str, float]:
        """Test an adapter's update, and what it trained whole, on other base weights."""
        loaded = self._loaded(seed)
        with torch.no_grad():
            for name, weight in base.items():
                loaded.model.get_submodule(name).weight.copy_(weight + adapter.update[name])
            for name, tensor in adapter.whole.items():
                loaded.model.get_parameter(name).copy_(tensor)
        return self._tested(loaded)

    def _loaded(self, seed: int) -> LoadedModel:
        return load_model(self._reference, self._task, seed=seed)

    def _tested(self, loaded: LoadedModel) -> Mapping[str, float]:
        tests = held_out(
            self._task, loaded.tokenizer, size=32, length=self._flags["length"], limit=self._flags["held_out"]
        )
        return evaluate(loaded.model, tests.once())


def _parts(injection: Injection) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base, update = {}, {}
    for name, part in injection.weight_parts().items():
        held: Any = part
        quantized = getattr(held.base, "quantized", None)
        base[name] = (held.base.weight.detach() if quantized is None else quantized.dequantize(torch.float32)).clone()
        update[name] = part.delta_weight().detach().clone()
    whole = {
        f"{name}.{key}": tensor.detach().clone()
        for name in injection.also
        for key, tensor in injection.model.get_submodule(name).named_parameters()
    }
    return base, update, whole


def compensation(exact: Mapping[str, torch.Tensor], found: Trained, rank: int) -> dict[str, float]:
    """How an update lies to the error of its own base, over all modules together."""
    sums: dict[str, float] = dict.fromkeys(("error", "update", "inner", "between", "best", "left", "entries"), 0.0)
    for name, update in found.update.items():
        error, moved = (exact[name] - found.base[name]).double(), update.double()
        u, s, vh = torch.linalg.svd(moved, full_matrices=False)
        kept = s > s[0] * 1e-6  # the update has rank r; the rest is rounding
        sums["error"] += float(error.square().sum())
        sums["update"] += float(moved.square().sum())
        sums["inner"] += float((error * moved).sum())
        sums["between"] += float((u[:, kept].t() @ error @ vh[kept].t()).square().sum())
        sums["best"] += float(torch.linalg.svdvals(error)[:rank].square().sum())
        sums["left"] += float((error - moved).square().sum())
        sums["entries"] += moved.numel()
    norms = math.sqrt(sums["error"] * sums["update"])
    return {
        "projection": sums["inner"] / sums["error"],
        "cosine": sums["inner"] / norms,
        "cosine_by_chance": sums["entries"] ** -0.5,
        "between_its_spaces": sums["between"] / sums["error"],
        "best_of_rank": sums["best"] / sums["error"],
        "error_left": sums["left"] / sums["error"],
        "update_to_error": math.sqrt(sums["update"] / sums["error"]),
    }


def compared(bench: Bench, control: Trained, variant: str, seed: int, rank: int) -> dict[str, Any]:
    """One QLoRA, and its control put on the same quantized weights."""
    settings = {"alpha": 1.0} | VARIANTS[variant]
    settings |= {"rank": rank, "alpha": rank * settings["alpha"]}
    exact = control.base
    found = bench.trained("qlora", settings, seed)
    moved = bench.metrics(seed, found.base, control)
    back = bench.metrics(seed, exact, found)
    shifted = Trained(found.base, control.update, control.whole, moved, 0.0)
    cost = moved["loss"] - control.metrics["loss"]
    return {
        "settings": settings,
        "lora_on_full": control.metrics,
        "lora_on_quantized": moved,
        "qlora_on_quantized": found.metrics,
        "qlora_on_full": back,
        "recovered": (moved["loss"] - found.metrics["loss"]) / cost if cost else None,
        "qlora": compensation(exact, found, rank),
        "control": compensation(exact, shifted, rank),
        "seconds": found.seconds,
    }


def _told(row: Mapping[str, Any]) -> str:
    full, moved, found = (row[key]["accuracy"] for key in ("lora_on_full", "lora_on_quantized", "qlora_on_quantized"))
    return (
        f"LoRA {full:.3f}, on Ŵ {moved:.3f}, QLoRA {found:.3f}; projection on E {row['qlora']['projection']:.2e} "
        f"(control {row['control']['projection']:.2e})"
    )


@contextmanager
def kept(path: Path, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a result so far; those of another question are not taken up."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    yield before if before.get("asked") == asked else {"asked": asked, "rows": []}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Leave the result, whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
    partial.replace(path)


@click.command()
@click.option("--task", "tasks", multiple=True, required=True, help="A task of the trainer; may be repeated.")
@click.option("--model", default="minilm", show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS))
@click.option("--seeds", default=3, show_default=True)
@click.option("--rank", default=6, show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--length", default=64, show_default=True)
@click.option("--held-out", default=2000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
def main(tasks: tuple[str, ...], model: str, variants: tuple[str, ...], seeds: int, out: Path, **flags: Any) -> None:
    """Train every variant with every seed on every task, and compare it with LoRA on the weights in full."""
    asked = {"model": model, **flags}
    with kept(out, asked) as result:
        rows = result["rows"]
        for seed in range(seeds):
            for task_name in tasks:
                task = load_task(task_name)
                name = Path(task_name).stem
                done = {row["variant"] for row in rows if (row["task"], row["seed"]) == (name, seed)}
                wanted = [variant for variant in variants if variant not in done]
                if not wanted:
                    continue
                bench = Bench(model, task, flags)
                control = bench.trained("lora", {"rank": flags["rank"], "alpha": flags["rank"]}, seed)
                for variant in wanted:
                    row = compared(bench, control, variant, seed, flags["rank"])
                    rows.append({"task": name, "seed": seed, "variant": variant, **row})
                    write(result, out)
                    click.echo(f"{name}, seed {seed}, {variant}: {_told(row)}")


if __name__ == "__main__":
    main()
