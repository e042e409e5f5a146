"""Adapter folders in Hugging Face PEFT's format: ``adapter_config.json`` beside ``adapter_model.safetensors``.

A folder of a method that PEFT has opens there; one of a method that it has not (GLoRA, Houlsby's adapters, full
fine-tuning) has the same shape, names the method in ``spectra_method``, and carries a ``peft_type`` that PEFT refuses.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from spectra.checkpoints.adapter_config import CONFIG_LIMIT
from spectra.checkpoints.checkpoint import listed
from spectra.checkpoints.folder import contained, untrusted
from spectra.checkpoints.safetensors import SafetensorsFile
from spectra.checkpoints.strict_json import read_object, shown
from spectra.errors import CheckpointError, MismatchError, UnsupportedFormat
from spectra.methods.injection import Injection, inject
from spectra.methods.peft_types import METHOD_FIELD, VIRTUAL_TOKENS, check_type, method_of, own_type
from spectra.methods.protocol import ActivationMethod, Method
from spectra.methods.subspace import NAME as SUBSPACE
from spectra.methods.subspace import SubspaceCore

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# PEFT wraps the model once more where parts stand inside it than where virtual tokens stand before it.
_INSIDE, _BEFORE = "base_model.model.", "base_model."

# Modules that PEFT adds to ``modules_to_save`` by itself, by task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_adapter(
    injection: Injection,
    folder: str | os.PathLike[str],
    *,
    base_model: str,
    task_type: str | None,
    fresh: Iterable[str] = (),
) -> Path:
    """Write what was trained as an adapter folder.

    Parameters
    ----------
    injection : Injection
        What `inject` returned; modules trained whole are written too, and the head that `task_type` names.
    folder : path
        Made if it is not there. An adapter that stands there is replaced: what is left by a run that is killed in
        between is either of the two, or no adapter (the configuration is missing), never a mixture.
    base_model : str
        Hub id or path of the base model.
    task_type : str or None
        As PEFT calls what the model at hand does: ``"SEQ_CLS"``, ``"CAUSAL_LM"``, …
    fresh : iterable of str
        Modules that the base model has not, drawn at random: where a subspace moves them, their start is stored too.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    CheckpointError
        If a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from spectra.methods import LoRA, inject
    >>> injection = inject(nn.Sequential(nn.Linear(6, 4)), "0", LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_adapter(injection, folder, base_model="base", task_type=None)
    ...     load_adapter(nn.Sequential(nn.Linear(6, 4)), path)
    LoRA at 1 modules matching '^(?:0)$': 0 of 48 parameters train (0.00%)
    """
    method = injection.method
    whole = [*injection.also, *_heads(injection, task_type)]
    config = {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
        "modules_to_save": whole or None,
        **method.peft_config(injection),
    }
    if method.peft_type is None:
        config.update({"peft_type": own_type(method), METHOD_FIELD: type(method).__name__})
    _write(Path(folder), config, {**_stored(injection, whole), **_starts(injection, tuple(fresh))})
    return Path(folder)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False, method: Method | None = None
) -> Injection:
    """Put an adapter from a folder into its base model.

    Parameters
    ----------
    model : Module
        The base model, as the adapter's was before it was trained; changed in place.
    folder : path
        A folder that `save_adapter` or PEFT wrote.
    trainable : bool
        Whether its parameters, and the modules that were trained whole, go on training.
    method : Method, optional
        What to put in where the configuration alone does not say: ``QLoRA(…)`` for LoRA on a base that is to be
        quantized. By default what the configuration names.

    Returns
    -------
    Injection

    Raises
    ------
    CheckpointNotFound, UnsafeCheckpoint
        If a file is missing, or lies about itself.
    UnsupportedFormat
        If the method, or a variant of it, has no part here.
    MismatchError
        If modules or shapes are not this model's: the adapter belongs to another one. The model has not been changed,
        unless it is shapes that differ: then load a fresh one.
    """
    root = Path(folder)
    config = read_object(contained(root, CONFIG), limit=CONFIG_LIMIT, unique=False)
    check_type(config, source=root / CONFIG)
    stored = _sorted_tensors(model, config, _tensors(root), source=root)
    wanted = method or method_of(config, stored.parts, source=root / CONFIG)
    for name, tensors in stored.replaced.items():
        _load_whole(model.get_submodule(name), tensors, name=name, source=root, strict=False)
    also = _exactly(stored.whole) if stored.whole else None
    injection = inject(model, _exactly(_places(config, stored)), wanted, also=also)
    for name, part in injection.parts.items():
        try:
            cast(ActivationMethod, part).load_state(stored.parts.get(name, {}))
        except MismatchError as error:
            raise MismatchError(f"{root}: {name}: {error}") from error
    core, moving = getattr(model, SUBSPACE, None), config.get("moved_parameters")
    if isinstance(core, SubspaceCore) and moving != core.total:
        raise MismatchError(
            f"{root}: its numbers move {shown(moving)} parameters, and {core.total:,} of this {type(model).__name__} "
            "would move: another model, or another vocabulary; load the one it was trained on"
        )
    for name, tensors in stored.whole.items():
        _load_whole(model.get_submodule(name), tensors, name=name, source=root)
    for parameter in () if trainable else model.parameters():
        parameter.requires_grad_(False)
    return injection


@dataclass
class _Stored:
    """Tensors of a file by module: of parts, of modules trained whole, and of base weights that replace the model's."""

    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))
    whole: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))


def _places(config: Mapping[str, Any], stored: _Stored) -> Iterable[str]:
    """Modules that get a part: those with tensors, and for a subspace, whose first module has them all, those named."""
    if config.get(METHOD_FIELD) != "Subspace":
        return stored.parts
    named = config.get("target_modules")
    return named if isinstance(named, list) and all(isinstance(name, str) for name in named) else stored.parts


def _heads(injection: Injection, task_type: str | None) -> list[str]:
    """Heads that PEFT counts as trained whole for a task, and will look for, though they were not trained here."""
    heads = _HEADS.get(task_type or "", ())
    taken = (*injection.also, *injection.parts)
    return [
        name
        for name, _ in injection.model.named_modules()
        if name.rpartition(".")[2] in heads
        and not any(f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.") for other in taken)
    ]


def _stored(injection: Injection, whole: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors by the names that PEFT gives them."""
    virtual = injection.method.peft_type in VIRTUAL_TOKENS
    tensors: dict[str, torch.Tensor] = {}
    for name, part in injection.parts.items():
        prefix = "" if virtual else f"{_INSIDE}{name}."
        tensors |= {prefix + suffix: tensor for suffix, tensor in cast(ActivationMethod, part).state().items()}
    for name in whole:
        prefix = f"{_BEFORE if virtual else _INSIDE}{name}."
        tensors |= {prefix + key: value for key, value in injection.model.get_submodule(name).state_dict().items()}
    # Cloned: the format stores no tensor that shares memory with another, and tied weights do.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _starts(injection: Injection, fresh: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Where a subspace's modules of these names, or inside of them, started."""
    core = getattr(injection.model, SUBSPACE, None)
    if not isinstance(core, SubspaceCore):
        return {}
    return {
        f"{_INSIDE}{name}.{key}": core.start(piece).detach().cpu().clone().contiguous()
        for piece, places in enumerate(core.places)
        for name, key in places
        if any(f"{name}.".startswith(f"{other}.") for other in fresh)
    }


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files beside their places; the old configuration goes first and the new one comes last."""
    final, partial = [folder / CONFIG, folder / TENSORS], [folder / f".{CONFIG}.part", folder / f".{TENSORS}.part"]
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"  # the order of patterns counts
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in partial:
            path.unlink(missing_ok=True)  # left by a run that was killed
        partial[0].write_text(text, "utf-8")
        save_file(tensors, partial[1], metadata={"format": "pt"})
        shutil.copymode(partial[0], partial[1])  # safetensors makes files that their owner alone may read
        for path in partial:
            _to_disk(path)
        final[0].unlink(missing_ok=True)
        partial[1].replace(final[1])
        partial[0].replace(final[0])
    except OSError as error:
        raise CheckpointError(f"the adapter cannot be written to {folder}: {error.strerror or error}") from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _tensors(root: Path) -> dict[str, torch.Tensor]:
    if not (root / TENSORS).exists() and (root / "adapter_model.bin").exists():
        raise untrusted(str(root / "adapter_model.bin"))
    file = SafetensorsFile(contained(root, TENSORS))
    return {name: file.read(name) for name in file.infos}


def _sorted_tensors(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, source: Path
) -> _Stored:
    """Find the module that each stored tensor belongs to: the longest path in its name that the model has."""
    modules = dict(model.named_modules())
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise UnsupportedFormat(f"{source / CONFIG}: modules_to_save is {shown(saved)}, not a list of names")
    stored, strangers = _Stored(), []
    for key, tensor in tensors.items():
        if "." not in key:
            stored.parts[_word_embeddings(model, key, source)][key] = tensor
            continue
        bare = key.removeprefix(_INSIDE).removeprefix(_BEFORE)
        whole = _named_whole(bare, saved, modules)
        name = whole or _longest(bare, modules)
        suffix = bare.removeprefix(f"{name}.").removeprefix("base_layer.")
        if name is None:
            strangers.append(bare)
        elif whole:
            stored.whole[name][suffix] = tensor
        elif config.get(METHOD_FIELD) in (None, "Subspace") and suffix in modules[name].state_dict():
            # PEFT stores the embeddings of a vocabulary that was resized, and a subspace a fresh head's start.
            stored.replaced[name][suffix] = tensor
        else:
            stored.parts[name][suffix] = tensor
    if strangers or not stored.parts:
        made_for = config.get("base_model_name_or_path")
        what = f"{listed(strangers)} have no place in" if strangers else "it holds nothing to put into"
        raise MismatchError(
            f"{source}: {what} this {type(model).__name__}; the adapter was made for {shown(made_for)}: load that model"
        )
    return stored


def _named_whole(bare: str, saved: Iterable[str], modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost module on the way to a tensor that a name in ``modules_to_save`` ends like, as PEFT looks it up."""
    segments = bare.split(".")
    paths = [".".join(segments[:depth]) for depth in range(1, len(segments))]
    return next((path for path in paths if path in modules and any(path.endswith(name) for name in saved)), None)


def _longest(bare: str, modules: Mapping[str, nn.Module]) -> str | None:
    segments = bare.split(".")
    paths = (".".join(segments[:depth]) for depth in range(len(segments) - 1, 0, -1))
    return next((path for path in paths if path in modules), None)


def _word_embeddings(model: nn.Module, key: str, source: Path) -> str:
    """Name of the word embeddings: tensors of virtual tokens carry no module's name."""
    find = getattr(model, "get_input_embeddings", None)
    embeddings = None if find is None else find()
    names: list[str] = [name for name, module in model.named_modules() if module is embeddings]
    if not names:
        raise UnsupportedFormat(
            f"{source}: {shown(key)} belongs to the word embeddings, and {type(model).__name__} does not say which "
            "they are; give it a get_input_embeddings"
        )
    return names[0]


def _load_whole(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], *, name: str, source: Path, strict: bool = True
) -> None:
    try:
        module.load_state_dict(tensors, strict=strict)
    except RuntimeError as error:  # torch's word for names and shapes that differ; it lists them
        raise MismatchError(f"{source}: {name}, stored whole, is not this model's: {error}") from error


def _exactly(names: Iterable[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, names))})$"
