"""Several methods side by side: a table as CSV, Markdown and JSON, and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "markdown", "rows_of", "write_comparison"]

COLUMNS = {
    "method": "method",
    "learning_rate": "learning rate",
    "trainable": "trainable",
    "share": "share",
    "result_bytes": "bytes to share",
    "model_bytes": "bytes held",
    "optimizer_bytes": "optimizer bytes",
    "step_seconds": "s a step",
    "training_loss": "training loss",
    "loss": "loss",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
}
"""Columns of the table: field, and what it is called."""

# Steps that a point of the loss curve is the mean of; single batches scatter more than methods differ.
_SMOOTH = 10
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")


def rows_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a finished run.

    Parameters
    ----------
    records : sequence of mapping
        What each ``training.json`` holds.

    Returns
    -------
    list of dict
        With the keys of `COLUMNS`; a metric that a task does not have is left out of all.
    """
    rows = []
    for record in records:
        found = {
            "method": record["method"],
            "learning_rate": record["asked"]["learning_rate"],
            "trainable": record["parameters"]["trainable"],
            "share": record["parameters"]["share"],
            "result_bytes": record["bytes"]["result"],
            "model_bytes": record["bytes"]["model"],
            "optimizer_bytes": record["bytes"]["optimizer"],
            "step_seconds": record["step_seconds"],
            "training_loss": record["training_loss"]["last"],
            **{name: record["metrics"].get(name) for name in ("loss", "accuracy", "perplexity")},
        }
        rows.append(found)
    used = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    return [{key: row[key] for key in used} for row in rows]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, numbers as a person reads them.

    Examples
    --------
    >>> print(markdown([{"method": "lora", "trainable": 664322, "accuracy": 0.79649}]))
    | method | trainable | accuracy |
    | :--- | ---: | ---: |
    | lora | 664,322 | 0.796 |
    """
    keys = list(rows[0]) if rows else ["method"]
    lines = [
        "| " + " | ".join(COLUMNS[key] for key in keys) + " |",
        "| " + " | ".join(":---" if key == "method" else "---:" for key in keys) + " |",
    ]
    lines += ["| " + " | ".join(_shown(key, row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def write_comparison(
    out: Path, records: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[float]]
) -> list[Path]:
    """Write ``comparison.csv``, ``.md``, ``.json`` and ``.svg``.

    Parameters
    ----------
    out : Path
        The folder.
    records : sequence of mapping
        What each ``training.json`` holds.
    curves : mapping of str to sequence of float
        Training loss by step, by method.

    Returns
    -------
    list of Path
        The files.
    """
    rows = rows_of(records)
    first = records[0]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    told = {
        "schema": 1,
        "base_model": first["base_model"],
        "task": first["task"],
        "seed": first["asked"]["seed"],
        "steps": first["asked"]["steps"],
        "rows": rows,
        "versions": first["versions"],
    }
    contents = {
        "comparison.csv": text.getvalue().encode(),
        "comparison.md": (_heading(first) + markdown(rows) + "\n").encode(),
        "comparison.json": (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode(),
        "comparison.svg": _plot(rows, curves, first),
    }
    written = []
    for name, content in contents.items():
        temporary = out / f".{name}.part"
        temporary.write_bytes(content)
        written.append(temporary.replace(out / name))
    return written


def _heading(record: Mapping[str, Any]) -> str:
    asked, task = record["asked"], record["task"]
    majority = f"; always the commonest label {task['majority']:.3f}" if task["majority"] is not None else ""
    return (
        f"{asked['model']} on {task['name']}: {asked['steps']} steps of {asked['batch']} texts of up to "
        f"{asked['length']} tokens, seed {asked['seed']}{majority}.\n\n"
    )


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "method":
        return str(value)
    if key == "share":
        return f"{value:.2%}"
    if key.endswith("bytes") or key == "trainable":
        return f"{value:,}"
    if key == "learning_rate":
        return f"{value:g}"
    return f"{value:.3f}"


def _plot(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[float]], record: Mapping[str, Any]) -> bytes:
    """What a method reaches against what it trains, beside its loss on the way."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    from spectra.plot import DASHES, SERIES, tidy

    metric = "accuracy" if "accuracy" in rows[0] else "perplexity" if "perplexity" in rows[0] else "loss"
    # Text stays text, and the same numbers give the same bytes.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "spectra", "font.size": 9.0, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        reached, way = figure.subplots(1, 2)
        keys = []
        for place, row in enumerate(rows):
            color = SERIES[place % len(SERIES)]
            # Shifted by a step each round of colours, so that no pair of colour and dashes comes twice.
            dash: Any = DASHES[(place + place // len(SERIES)) % len(DASHES)]
            mark = _MARKERS[place % len(_MARKERS)]
            reached.plot(
                row["trainable"], row[metric], marker=mark, markersize=7, linestyle="", color=color, alpha=0.85
            )
            losses = _smoothed(curves.get(row["method"], ()))
            way.plot(range(1, len(losses) + 1), losses, color=color, linestyle=dash, linewidth=1.3)
            keys.append(Line2D([], [], color=color, linestyle=dash, marker=mark, markersize=6, label=row["method"]))
        if record["task"]["majority"] is not None and metric == "accuracy":
            reached.axhline(record["task"]["majority"], color="#6b7280", linewidth=0.8, linestyle=(0, (2, 2)))
            keys.append(Line2D([], [], color="#6b7280", linewidth=0.8, linestyle=(0, (2, 2)), label="commonest label"))
        reached.set_xscale("log")
        reached.margins(x=0.1, y=0.1)
        reached.set_xlabel("parameters that train")
        reached.set_ylabel(f"{metric} on held-out texts")
        way.xaxis.set_major_locator(MaxNLocator(integer=True))
        way.set_xlabel("step")
        way.set_ylabel(f"training loss, mean of {_SMOOTH} steps")
        for axes in (reached, way):
            tidy(axes)
        figure.legend(handles=keys, loc="outside right upper", frameon=False, handlelength=3.0, fontsize=8.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and of up to nine before it."""
    return [
        sum(values[max(0, i + 1 - _SMOOTH) : i + 1]) / (i + 1 - max(0, i + 1 - _SMOOTH)) for i in range(len(values))
    ]
