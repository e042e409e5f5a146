"""What a finished training leaves: a folder that transformers, peft and ``spectra.report`` open, and ``training.json``.

A full model is saved as transformers saves it. An adapter is saved in PEFT's format with the modules trained whole;
where PEFT has no such method but the update can be merged, ``merged/`` holds the whole model too.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.folder import save_adapter
from spectra.methods.full import FullFineTune
from spectra.methods.injection import Injection, replace_module
from spectra.methods.subspace import NAME as SUBSPACE
from spectra.train.models import LoadedModel, quietly
from spectra.version import __version__

RECORD = "training.json"
MERGED = "merged"
_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")


def save_result(loaded: LoadedModel, injection: Injection, out: Path, *, merged: bool) -> int:
    """Write the trained model, or its adapter.

    Parameters
    ----------
    loaded : LoadedModel
        What was trained.
    injection : Injection
        How.
    out : Path
        The folder.
    merged : bool
        Write the whole model into ``merged/`` beside an adapter.

    Returns
    -------
    int
        Bytes of the weights that somebody who has the base model must be given.

    Raises
    ------
    UsageError
        If the method has nothing to merge.
    """
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(injection.method, FullFineTune):
        with plain_modules(injection):
            _save_model(loaded, out)
        return _bytes_of(out)
    if merged and not can_merge(injection):
        raise UsageError(f"{injection.method.name} cannot be merged into the weights: leave --merged away")
    save_adapter(injection, out, base_model=loaded.reference, task_type=loaded.task_type, fresh=loaded.fresh)
    loaded.tokenizer.save_pretrained(out)
    size = _bytes_of(out)
    if merged or (injection.method.peft_type is None and can_merge(injection)):
        was_merged = [part.merged for part in injection.weight_parts().values()]
        injection.merge()
        try:
            with plain_modules(injection):
                _save_model(loaded, out / MERGED)
        finally:
            if not any(was_merged):
                injection.unmerge()
    return size


def can_merge(injection: Injection) -> bool:
    """Whether every part can be merged into a weight that a file of the model can hold."""
    if hasattr(injection.model, SUBSPACE):
        return True
    bases = [getattr(part, "base", None) for part in injection.parts.values()]
    return len(injection.weight_parts()) == len(injection.parts) and all(
        isinstance(getattr(base, "weight", None), nn.Parameter) for base in bases
    )


@contextmanager
def plain_modules(injection: Injection) -> Iterator[None]:
    """The model with the modules that stood there before in the places of the parts that wrap them."""
    model = injection.model
    core = getattr(model, SUBSPACE, None)
    if core is not None:
        with core.plain():
            yield
        return
    wrapping = {
        name: part
        for name, part in injection.parts.items()
        if model.get_submodule(name) is part and isinstance(getattr(part, "base", None), nn.Module)
    }
    for name, part in wrapping.items():
        replace_module(model, name, part.get_submodule("base"))
    try:
        yield
    finally:
        for name, part in wrapping.items():
            replace_module(model, name, part)


def _save_model(loaded: LoadedModel, folder: Path) -> None:
    """Save as transformers does, beside the place and then moved there file by file: no file is ever half written."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model: Any = loaded.model
    before = model.config.use_cache
    model.config.use_cache = True  # switched off for training alone
    try:
        with quietly():
            model.save_pretrained(partial)
            loaded.tokenizer.save_pretrained(partial)
    finally:
        model.config.use_cache = before
    for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):  # it marks the folder complete
        shutil.copymode(partial / "config.json", file)  # safetensors makes files that their owner alone may read
        file.replace(folder / file.name)
    partial.rmdir()


def write_record(out: Path, record: Mapping[str, Any]) -> Path:
    """Write ``training.json``, the last file of a run: where it stands, the run is finished.

    Parameters
    ----------
    out : Path
        The folder.
    record : mapping
        Plain values; a number that JSON does not know becomes null.
    """
    path = out / RECORD
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)
    return path


def read_record(out: Path) -> dict[str, Any] | None:
    """What ``training.json`` of a finished run says; None where there is none.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    path = out / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: damaged ({error}); remove the folder and train again") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}: not what this version writes; name another folder")
    return record


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the machine's kind."""
    found = {"spectra": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_first_process() -> bool:
    """Whether this process is the one that writes, among those that ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each counted once."""
    seen: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
