"""The model card of an extracted adapter: ``README.md`` with the front matter that Hugging Face's hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectra.command import printable

if TYPE_CHECKING:
    from spectra.extract.extraction import Extraction

_LARGEST = 10  # rows of the table of errors
_MOST_LISTED = 50

# PEFT's class that loads an adapter with its base in one call, by task.
_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def model_card(found: Extraction) -> str:
    """Return the text of ``README.md``.

    Parameters
    ----------
    found : Extraction
        What was extracted; its verdict, command and errors stand in the text.
    """
    config, info = found.config, found.info
    blocks = [
        _front_matter(config),
        f"# LoRA extracted from {_text(info['tuned']['ref'])}",
        f"What fine-tuning did to {_text(config['base_model_name_or_path'])}, as the best adapter of its ranks"
        f"{_how(found)} Errors below were measured from the stored factors.",
        _loading(config),
        "## What it keeps\n\n" + "\n".join(f"- {_text(sentence)}" for sentence in found.verdict),
        "## Made by\n\n```\n" + printable(info["command"]).replace("```", "` ` `") + "\n```",
        _errors(found.tensors),
        _left_out(found.tensors),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _how(found: Extraction) -> str:
    if "weighted_norm" not in found.totals:
        return ": every matrix's update is truncated to its leading singular directions."
    inputs = found.info["moments"]["inputs"]
    return (
        f" on the inputs of its linear maps, as {inputs:,} of them were: each update is truncated to the directions "
        "that do most to them, and an update whose inputs are not known to its leading singular directions."
    )


def _front_matter(config: dict[str, Any]) -> str:
    base = json.dumps(config["base_model_name_or_path"], ensure_ascii=False)  # a JSON string is a YAML one
    return f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- lora\n- peft\n- svd\n- spectra\n---"


def _loading(config: dict[str, Any]) -> str:
    loader = _LOADERS.get(config["task_type"] or "")
    if loader is None:
        lines = [
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "PATH OF THIS FOLDER")',
        ]
    else:
        lines = [f"from peft import {loader}", "", f'model = {loader}.from_pretrained("PATH OF THIS FOLDER")']
    return "```python\n" + "\n".join(lines) + "\n```"


def _errors(tensors: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in tensors if row["treatment"] in ("factors", "dropped") and row["error"] is not None]
    rows = sorted(rows, key=lambda row: (-row["error"], row["name"]))[:_LARGEST]
    if not rows:
        return ""
    more = "weighted_norm" in rows[0]
    head = "| matrix | shape | rank | ‖Δ‖ | error | relative | best possible |" + (" on its inputs |" if more else "")
    head += "\n|---|---|---|---|---|---|---|" + ("---|" if more else "")
    lines = [
        f"| {_text(row['name'])} | {row['rows']} × {row['cols']} | {row['rank']} | {row['norm']:.4g} "
        f"| {row['error']:.4g} | {100 * row['relative_error']:.2f}\xa0% | {row['optimum']:.4g} |"
        + (_seen(row) if more else "")
        for row in rows
    ]
    return "\n".join([f"## The {len(rows)} largest errors\n", head, *lines])


def _seen(row: dict[str, Any]) -> str:
    """The cell of what a matrix leaves of its update's effect on its inputs."""
    return f" {100 * row['weighted_error'] / row['weighted_norm']:.2f}\xa0% |" if row["weighted_norm"] else " – |"


def _left_out(tensors: Sequence[dict[str, Any]]) -> str:
    """Tensors that are not in the adapter, with how far they moved."""
    rows = [row for row in tensors if row["treatment"] in ("listed", "nonfinite", "failed")]
    if not rows:
        return ""
    lines = [
        f"- {_text(row['name'])} (‖Δ‖ = {_norm(row['norm'])}): {_text(row['reason'])}" for row in rows[:_MOST_LISTED]
    ]
    more = [f"- … and {len(rows) - _MOST_LISTED} more, in extraction.json"] if len(rows) > _MOST_LISTED else []
    return "\n".join(["## Not in the adapter\n", *lines, *more])


def _norm(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.4g}"


def _text(text: str) -> str:
    """A name or a sentence that moves no cursor and opens neither a table's cell, a link nor a tag."""
    shown = printable(str(text)).replace("\n", " ")
    for mark in ("\\", "|", "<", "[", "`", "*", "_"):
        shown = shown.replace(mark, f"\\{mark}") if mark != "<" else shown.replace(mark, "&lt;")
    return shown
