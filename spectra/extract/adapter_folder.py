"""The adapter as PEFT stores it: configuration and tensors from measured factors, and a folder that is never half."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from spectra.checkpoints.checkpoint import listed
from spectra.errors import CheckpointError, UsageError
from spectra.extract.patterns import rank_patterns, saved_modules, target_modules
from spectra.extract.places import Place

if TYPE_CHECKING:
    from spectra.extract.planning import Plan

CONFIG, TENSORS, CARD, RECORD = "adapter_config.json", "adapter_model.safetensors", "README.md", "extraction.json"
_FILES = (RECORD, CARD, TENSORS, CONFIG)  # the order in which they take their places: the configuration last
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Piece:
    """What was found for one place, ready to be stored.

    Parameters
    ----------
    norm : float
        ‖Δ‖_F.
    b, a : Tensor of shape (rows, r) and (r, cols), or None
        Factors as the base stores its matrix, in the dtype to be stored.
    shift : Tensor of shape (n,), or None
        Update of a bias.
    """

    norm: float
    b: torch.Tensor | None = None
    a: torch.Tensor | None = None
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Contents:
    """An adapter before it is written.

    Parameters
    ----------
    config : dict
        Of ``adapter_config.json``.
    tensors : dict of str to Tensor
        Of ``adapter_model.safetensors``.
    treatment : dict of str to tuple of str
        By name of a tensor: what was done with it (``"factors"``, ``"whole"``, ``"bias"``, ``"listed"``), and why.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    treatment: dict[str, tuple[str, str]] = field(default_factory=dict)


def assemble(todo: Plan, pieces: Mapping[str, Piece], *, dtype: torch.dtype) -> Contents:
    """Lay out an adapter.

    Parameters
    ----------
    todo : Plan
    pieces : mapping of str to Piece
        What was found, by name; places that failed are not there.
    dtype : torch.dtype
        Of the factors, and of shifts of biases. Tensors saved whole keep their own.

    Raises
    ------
    UsageError
        If no matrix kept a direction.
    """
    found = {place.name: (place, pieces[place.name]) for place in todo.places if place.name in pieces}
    factored = {place.module: (place, piece) for place, piece in found.values() if piece.b is not None}
    if not factored:
        moved = [place.name for place, piece in found.values() if piece.norm > 0]
        told = f"; what changed: {listed(moved)}" if moved else ": every tensor is equal on both sides"
        raise UsageError(
            f"there is nothing to extract between {todo.base.ref} and {todo.tuned.ref} by {todo.rule}, no matrix keeps "
            f"a direction{told}"
        )
    contents = Contents({}, {})
    for module, (place, piece) in factored.items():
        contents.tensors.update(_stored_factors(module, place, piece))
        contents.treatment[place.name] = ("factors", place.reason)
    saved = _save_modules(todo, found, list(factored), contents)
    bias = _store_biases(todo, found, factored, contents, dtype)
    contents.config.update(_config(todo, factored, saved, bias))
    return contents


def _stored_factors(module: str, place: Place, piece: Piece) -> dict[str, torch.Tensor]:
    """Factors under PEFT's names, turned as the module multiplies."""
    assert piece.b is not None
    assert piece.a is not None
    assert place.delta is not None
    b, a = (piece.a.T, piece.b.T) if place.transposed else (piece.b, piece.a)  # (out, r), (r, in)
    if place.kind == "embedding":
        return {
            f"{_PREFIX}{module}.lora_embedding_A": a.contiguous(),
            f"{_PREFIX}{module}.lora_embedding_B": b.contiguous(),
        }
    if place.kind == "convolution":
        kernel = place.delta.base_info.shape[1:]
        a, b = a.reshape(a.shape[0], *kernel), b.reshape(*b.shape, *(1 for _ in kernel[1:]))
    return {f"{_PREFIX}{module}.lora_A.weight": a.contiguous(), f"{_PREFIX}{module}.lora_B.weight": b.contiguous()}


def _save_modules(
    todo: Plan, found: Mapping[str, tuple[Place, Piece]], targets: list[str], contents: Contents
) -> list[str]:
    """Store modules whole: those that changed, and those that PEFT will look for."""
    model = todo.model
    changed = {place.name: place for place, piece in found.values() if place.kind == "whole" and piece.norm != 0.0}
    # A module of which a tensor cannot be told is not half saved.
    broken = {place.module for place in todo.places if place.kind == "whole" and place.name not in found}
    wanted = {place.module for place in changed.values()} - broken
    shared = model.tied in wanted
    if shared and model.tied_head is None:
        wanted.remove(model.tied or "")
    names, wrapped, refused = saved_modules(wanted, model.saved, model.modules, targets)
    for module, held in model.tensors.items():
        if any(module == path or module.startswith(f"{path}.") for path in wrapped):
            for parameter, stored in held.items():
                contents.tensors[f"{_PREFIX}{module}.{parameter}"] = todo.tuned[stored]
    if shared and model.tied in names and model.tied_head is not None:
        # Saved apart from each other, or the head would keep the base's.
        names.append(model.tied_head)
        words = model.tensors[model.tied or ""]["weight"]
        contents.tensors[f"{_PREFIX}{model.tied_head}.weight"] = todo.tuned[words]
    for name, place in changed.items():
        if shared and place.module == model.tied and model.tied_head is None:
            contents.treatment[name] = ("listed", "saved whole, the head tied to it would keep the base's")
        elif place.module in refused:
            contents.treatment[name] = ("listed", refused[place.module])
        elif place.module in broken and place.module not in wrapped:
            contents.treatment[name] = ("listed", f"another tensor of {place.module} could not be read")
        else:
            contents.treatment[name] = ("whole", place.reason)
    return names


def _store_biases(
    todo: Plan,
    found: Mapping[str, tuple[Place, Piece]],
    factored: Mapping[str, tuple[Place, Piece]],
    contents: Contents,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Store changed biases of linear maps as shifts where PEFT allows it, else as they are; fields that say so."""
    changed = {place.module: (place, piece) for place, piece in found.values() if place.kind == "bias" and piece.norm}
    if not changed:
        return {"bias": "none"}
    shifted = set(changed) <= set(factored) and all(
        place.kind == "linear" and {"bias", "lora_B.bias"} & set(todo.model.tensors.get(module, ()))
        for module, (place, _) in factored.items()
    )
    for module, (place, piece) in changed.items():
        contents.treatment[place.name] = ("bias", "as a shift" if shifted else "as it is")
        if not shifted:
            inner = "base_layer." if module in factored else ""
            contents.tensors[f"{_PREFIX}{module}.{inner}bias"] = _new_bias(place, piece)
    if not shifted:
        return {"bias": "lora_only" if set(changed) <= set(factored) else "all"}
    for module in factored:
        shift = changed[module][1].shift if module in changed else None
        outputs = contents.tensors[f"{_PREFIX}{module}.lora_B.weight"].shape[0]
        contents.tensors[f"{_PREFIX}{module}.lora_B.bias"] = (
            torch.zeros(outputs, dtype=dtype) if shift is None else shift.to(dtype)
        )
    return {"bias": "none", "lora_bias": True}


def _new_bias(place: Place, piece: Piece) -> torch.Tensor:
    """Bias of the fine-tune, as it stores it, or as the base would hold it after an adapter's shift."""
    delta = place.delta
    assert delta is not None
    assert piece.shift is not None
    stored = getattr(delta, "tuned_name", None)
    if stored is not None:
        return delta.tuned[stored]
    base = delta.base[delta.base_info.name]
    return (base.double() + piece.shift.double().reshape(base.shape)).to(base.dtype)


def _config(
    todo: Plan, factored: Mapping[str, tuple[Place, Piece]], saved: list[str], bias: Mapping[str, Any]
) -> dict[str, Any]:
    ranks = {module: piece.b.shape[1] for module, (_, piece) in factored.items() if piece.b is not None}
    rank, pattern = rank_patterns(ranks)
    return {
        "peft_type": "LORA",
        "task_type": todo.model.task_type,
        "base_model_name_or_path": todo.base_name,
        **({"revision": todo.base_revision} if todo.base_revision else {}),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": target_modules(ranks, todo.model.modules | set(ranks)),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(place.transposed and place.kind == "linear" for place, _ in factored.values()),
        **bias,
    }


def check_folder(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier extraction.

    Parameters
    ----------
    out : Path
        Where the adapter is to go.

    Raises
    ------
    UsageError
        If it is a file, or holds something that no extraction wrote.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; give the adapter a folder of its own")
    held = {path.name for path in out.iterdir()}
    strangers = sorted(held - set(_FILES) - {_part(name) for name in _FILES})
    if strangers:
        raise UsageError(
            f"{out} holds {listed(strangers)}, which no extraction wrote; give the adapter a folder of its own"
        )
    if held & set(_FILES) and RECORD not in held:
        raise UsageError(
            f"{out} holds {listed(sorted(held))} without an {RECORD}: an adapter that no extraction wrote; give this "
            "one a folder of its own"
        )


def write_folder(out: Path, contents: Contents, *, record: Mapping[str, Any], card: str) -> list[Path]:
    """Write an adapter's four files beside their places, then put them there.

    An earlier extraction's configuration goes first and the new one comes last: what a run that was killed in between
    leaves is either of the two, or no adapter at all, never a mixture.

    Parameters
    ----------
    out : Path
        Folder, made if it is not there.
    contents : Contents
    record : mapping
        Of ``extraction.json``.
    card : str
        Of ``README.md``.

    Raises
    ------
    CheckpointError
        If a file cannot be written.
    """
    texts = {
        CONFIG: json.dumps(contents.config, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        RECORD: json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        CARD: card,
    }
    parts = {name: out / _part(name) for name in _FILES}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in parts.values():
            path.unlink(missing_ok=True)  # left by a run that was killed
        for name, text in texts.items():
            parts[name].write_text(text, "utf-8")
        save_file(contents.tensors, parts[TENSORS], metadata={"format": "pt"})
        shutil.copymode(parts[CONFIG], parts[TENSORS])  # safetensors makes files that their owner alone may read
        for path in parts.values():
            _to_disk(path)
        (out / CONFIG).unlink(missing_ok=True)
        for name in _FILES:
            parts[name].replace(out / name)
    except OSError as error:
        raise CheckpointError(f"the adapter cannot be written to {out}: {error.strerror or error}") from error
    finally:
        for path in parts.values():
            path.unlink(missing_ok=True)
    return [out / name for name in reversed(_FILES)]


def _part(name: str) -> str:
    return f".{name}.part"


def _to_disk(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
