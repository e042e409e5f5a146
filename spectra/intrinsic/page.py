"""What a search found as one HTML file and figures, of the same make as the report on weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spectra.intrinsic.plot import KEY, draw, metric_text
from spectra.intrinsic.result import IntrinsicDimension
from spectra.intrinsic.trial import Trial
from spectra.report.drawing import Drawing, inline
from spectra.report.files import figures_folder, write_atomically
from spectra.report.html import render, scoped, short, style_of
from spectra.report.text import counted, elide, grouped, number, visible

PAGE = "intrinsic.html"

STRUCTURES = {
    "did": "DID: θ₀ + P θ_d, one subspace for all parameters (Li et al. 2018, equation 2).",
    "said": "SAID: θ₀ + λ P θ_d with one trained λ for each layer, counted among the d numbers (Aghajanyan et al. "
    "2021, equation 3).",
}
_KINDS = {"full": "full fine-tuning", "head": "head alone", "pilot": "pilot", "subspace": "subspace"}
_MISSING = "–"


def write_page(found: IntrinsicDimension, out: str | os.PathLike[str]) -> list[Path]:
    """Write ``intrinsic.html`` and ``figures/intrinsic.svg`` and ``.png``.

    Parameters
    ----------
    found : IntrinsicDimension
        What a search found.
    out : path
        Folder to write to; made if it is not there.

    Returns
    -------
    list of Path
        What was written, the page first. The same result gives the same bytes.

    Raises
    ------
    JournalError
        If ``figures`` is a symbolic link: what it points to is not the caller's folder.
    OSError
        If a file cannot be written; whatever stood there before is whole.
    """
    folder = Path(out)
    figures = figures_folder(folder)
    drawing, bitmap = draw(found)
    return [
        write_atomically(folder / PAGE, render_page(found, drawing).encode()),
        write_atomically(figures / f"{KEY}.svg", drawing.svg),
        write_atomically(figures / f"{KEY}.png", bitmap),
    ]


def render_page(found: IntrinsicDimension, drawing: Drawing) -> str:
    """Return the page.

    Parameters
    ----------
    found : IntrinsicDimension
        What a search found.
    drawing : Drawing
        Its figure, as `draw` makes it.

    Returns
    -------
    str
        An HTML document that is complete without any other file and without a network.
    """
    config = found.config
    return render(
        "spectra.intrinsic:page.html",
        style=style_of(),
        script=scoped("shared/theme.js"),
        found=found,
        model=short(str(config.get("model", "a model"))),
        task=short(str(config.get("task", "a task"))),
        kind=_kind(config),
        sentences=sentences(found),
        drawing=drawing,
        picture=Markup(inline(drawing)),
        points=_points(found),
        trials=[_trial(trial) for trial in found.trials],
        cost=cost(found),
        glossary=_glossary(found),
        facts=_facts(found),
        search={key: _short(value) for key, value in config.get("search", {}).items()},
        training=config.get("training", {}),
        versions=config.get("versions", {}),
    )


def sentences(found: IntrinsicDimension) -> list[tuple[str, str]]:
    """Return what a reader wants first, each sentence under the word it is about.

    Parameters
    ----------
    found : IntrinsicDimension
        What a search found.
    """
    said = [("dimension", found.sentence())]
    total = found.config.get("total")
    if found.dimension is not None and total:
        said.append(
            ("size", f"That is {_share(found.dimension, total)} of the {grouped(int(total))} weights that move.")
        )
    if found.head is not None:
        said.append(
            ("head", f"The head alone, which trains freely beside the subspace, reaches {metric_text(found.head)}.")
        )
    said.append(("cost", cost(found)))
    return said


def cost(found: IntrinsicDimension) -> str:
    """Return what the search took.

    Parameters
    ----------
    found : IntrinsicDimension
        What a search found.
    """
    runs, seconds = float(found.config.get("runs", 0)), float(found.config.get("seconds", 0))
    given_up = sum(trial.stopped for trial in found.trials)
    told = f", {given_up} of them given up at three quarters" if given_up else ""
    return (
        f"{counted(len(found.trials), 'training')}{told}: the steps of {number(runs)} whole ones, {_duration(seconds)}."
    )


def _duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, then hours."""
    for unit, length, most in (("seconds", 1, 120), ("minutes", 60, 7200)):
        if seconds < most:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{number(seconds / 3600, 2)} hours"


def _short(value: Any) -> Any:
    """A setting as it is shown: the square root of two has more digits than anyone gave."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _kind(config: Mapping[str, Any]) -> str:
    structure, projection = str(config.get("structure", "")), str(config.get("projection", ""))
    return visible(f"{structure.upper()} with {projection}" if structure and projection else "by training in subspaces")


def _share(dimension: float, total: float) -> str:
    return f"{100 * dimension / total:.2g} %"


def _points(found: IntrinsicDimension) -> list[dict[str, str]]:
    total = found.config.get("total")
    return [
        {
            "dimension": grouped(point.dimension),
            "share": _share(point.dimension, total) if total else _MISSING,
            "mean": metric_text(point.mean),
            "interval": f"{metric_text(point.low)} – {metric_text(point.high)}" if point.high > point.low else _MISSING,
            "seeds": str(point.seeds),
            "rate": _rate(point.learning_rate),
        }
        for point in found.curve
    ]


def _trial(trial: Trial) -> dict[str, str]:
    ask = trial.ask
    return {
        "kind": _KINDS[ask.kind] + (", given up" if trial.stopped else ""),
        "dimension": _MISSING if ask.dimension is None else grouped(ask.dimension),
        "seed": str(ask.seed),
        "rate": _rate(ask.learning_rate),
        "steps": str(trial.steps),
        "metric": _MISSING if ask.kind == "pilot" else metric_text(trial.metric),
        "loss": metric_text(trial.loss),
        "seconds": number(trial.seconds),
    }


def _rate(rate: float | None) -> str:
    return _MISSING if rate is None else f"{rate:.3g}"


def _glossary(found: IntrinsicDimension) -> list[tuple[str, str]]:
    config = found.config
    structure = STRUCTURES.get(str(config.get("structure", "")), "")
    words = [
        (
            "Intrinsic dimension",
            "The fewest numbers d that training must find, where all weights move along d fixed directions, for the "
            f"held-out {found.metric_name} to reach a share of what training every weight reaches. It belongs to the "
            "model, the task, the directions and the training together, not to the task alone.",
        ),
        ("Structure", structure),
        (
            "Directions",
            "Columns of P, of expected norm 1, drawn from the seed and never stored; fastfood, sparse and dense are "
            "random in all weights at once, kronecker, lora and gradient in each matrix.",
        ),
        (
            "Target",
            f"{100 * found.share:.10g} % of "
            + ("what full fine-tuning adds to the baseline" if found.above_chance else "full fine-tuning's metric")
            + ", its mean over seeds.",
        ),
        (
            "Search",
            "From a first dimension by factors of four until one fails and one reaches the target, then by bisection "
            "in log d; the two that enclose the crossing get every seed. "
            + (
                "Short pilots choose the learning rate of each dimension by their training loss."
                if any(trial.ask.kind == "pilot" for trial in found.trials)
                else "All dimensions share one learning rate."
            ),
        ),
        (
            "Interval",
            "The crossing of a monotone fit in log d, drawn again and again from the spread over seeds of the "
            "subspaces and of the reference. It speaks of other seeds on the same held-out texts.",
        ),
        (
            "Learning rate",
            "Full fine-tuning's unit: each coordinate takes √(D/d) times it, so that a step is as long among the "
            "weights whatever d is.",
        ),
    ]
    return [(title, text) for title, text in words if text]


def _facts(found: IntrinsicDimension) -> list[tuple[str, str]]:
    config = found.config
    names = {
        "model": "Model",
        "task": "Task",
        "trained_on": "Texts to train on",
        "held_out": "Held-out texts",
        "structure": "Structure",
        "projection": "Projection",
        "head": "Head",
        "batch": "Texts a batch",
        "length": "Tokens a text",
        "steps": "Steps",
        "total": "Weights that move",
        "layers": "Layers with a scale",
        "learning_rate": "Learning rate of full fine-tuning",
    }
    held = {**config, "held_out": found.held_out}
    return [
        (label, elide(visible(grouped(held[key]) if isinstance(held[key], int) else str(held[key])), 120))
        for key, label in names.items()
        if held.get(key) not in (None, "")
    ]
