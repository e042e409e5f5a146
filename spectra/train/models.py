"""`load_model`: a transformers model for a task, from a folder, an example, a hub id or a GGUF file.

The task's head is drawn from the seed, so that every method that is compared begins with the same one; whatever else
a checkpoint lacks is an error, not a random start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra import examples
from spectra.errors import CheckpointError, CheckpointNotFound, MismatchError, UnsupportedFormat, UsageError
from spectra.train.data import Task

__all__ = ["LoadedModel", "load_model", "quietly", "resolve"]

# What transformers calls the module on top that maps features to labels.
_HEADS = ("classifier", "score", "pre_classifier", "classification_head")
# Modules between the encoder and the head that language-model checkpoints lack: trained whole like the head.
_POOLERS = re.compile(r"(^|\.)pooler(\.|$)")
_EXAMPLE_MODELS = ("minilm", "minilm-sre", "smollm2")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model to train, and what must be known to save it again.

    Attributes
    ----------
    model : Module
        Of transformers, in float32.
    tokenizer : transformers tokenizer
        Its own.
    reference : str
        What an adapter names as its base: the folder, file or hub id.
    family : str
        ``model_type`` of its configuration: ``"bert"``, ``"llama"``, …
    fresh : tuple of str
        Modules that no checkpoint gave, drawn from the seed; every method trains them whole.
    notes : tuple of str
        What is worth knowing about where it came from.
    """

    model: nn.Module
    tokenizer: Any
    reference: str
    family: str
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def task_type(self) -> str:
        """PEFT's name of the kind of model."""
        return "SEQ_CLS" if "SequenceClassification" in type(self.model).__name__ else "CAUSAL_LM"


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder or hub id, and the one file in it, where that is a GGUF."""

    where: str
    revision: str | None = None
    gguf: str | None = None
    local: bool = True

    @property
    def reference(self) -> str:
        """One string for it, absolute where it is a path."""
        if not self.local:
            return self.where if self.revision is None else f"{self.where}@{self.revision}"
        return str(Path(self.where) / self.gguf) if self.gguf else self.where


def resolve(reference: str, *, offline: bool = False) -> Source:
    """Find a model: a path first, then an example, then an id of the hub.

    Parameters
    ----------
    reference : str
        A folder with ``config.json``, a ``.gguf`` file, ``"minilm"``, ``"minilm-sre"``, ``"smollm2"``, or
        ``"org/name@revision"``.
    offline : bool
        Fetch nothing.

    Raises
    ------
    CheckpointNotFound, UnsupportedFormat
        If nothing has this name, or it is no model that can be trained.
    """
    path = Path(reference).expanduser()
    if not path.exists() and reference in _EXAMPLE_MODELS:
        path = examples.fetch(reference, offline=offline)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedFormat(
                f"{reference}: training needs the model's folder, with config.json and tokenizer, or a .gguf file"
            )
        return Source(str(path.parent.resolve()), gguf=path.name)
    if path.is_dir():
        _check_folder(path, reference)
        return Source(str(path.resolve()))
    if reference in examples.EXAMPLES:
        raise UnsupportedFormat(f"example {reference!r} is no model that can be trained: {', '.join(_EXAMPLE_MODELS)}")
    name, _, revision = reference.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointNotFound(f"{reference}: no such folder; the examples are {', '.join(_EXAMPLE_MODELS)}")
    return Source(name, revision or None, local=False)


def load_model(reference: str, task: Task, *, seed: int = 0, offline: bool = False) -> LoadedModel:
    """Load a model for a task, in float32 and ready to train.

    Parameters
    ----------
    reference : str
        As `resolve`.
    task : Task
        A classification task gets a fresh head for its labels; a language task the checkpoint's own.
    seed : int
        Seed of the head, and of a pooler that the checkpoint lacks.
    offline : bool
        Fetch nothing.

    Returns
    -------
    LoadedModel

    Raises
    ------
    CheckpointNotFound, CheckpointError, UnsupportedFormat
        If it cannot be found or read.
    MismatchError
        If the weights are those of another model than the configuration describes.
    """
    source = resolve(reference, offline=offline)
    transformers = _transformers()
    notes = []
    if source.gguf:
        notes.append(f"the weights of {source.gguf} are dequantized: what is trained is a rounded model")
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common = _arguments(source, offline)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.where, **common)
            model, report = _open(transformers, source, task, common)
        except MismatchError:
            raise
        except Exception as error:  # transformers raises whatever its readers meet
            raise _unreadable(reference, source, error) from error
    fresh = _fresh_modules(model, report, task, reference)
    if task.kind == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    model.config.use_cache = False  # keys and values of earlier tokens are of no use in training
    return LoadedModel(model, tokenizer, source.reference, str(model.config.model_type), fresh, tuple(notes))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError("training needs the package transformers: pip install 'spectra-weights[train]'") from error
    return transformers


def _arguments(source: Source, offline: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"local_files_only": source.local or offline}
    if source.revision:
        arguments["revision"] = source.revision
    if source.gguf:
        arguments["gguf_file"] = source.gguf
    return arguments


def _open(transformers: Any, source: Source, task: Task, common: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    kind = transformers.AutoModelForCausalLM
    extra: dict[str, Any] = {}
    if task.kind == "classification":
        kind = transformers.AutoModelForSequenceClassification
        names = dict(enumerate(task.label_names))
        extra = {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "ignore_mismatched_sizes": True,  # a head of another task; everything else is refused below
        }
    if not source.gguf:
        extra["use_safetensors"] = True  # a pickle can run code
    model, report = kind.from_pretrained(source.where, dtype=torch.float32, output_loading_info=True, **extra, **common)
    return model, report


def _fresh_modules(model: nn.Module, report: Mapping[str, Any], task: Task, reference: str) -> tuple[str, ...]:
    """Outermost modules that were drawn, all of which must be a head or a pooler; the head first trained whole."""
    absent = [str(name) for name in report["missing_keys"]]
    misshapen = [str(key[0] if isinstance(key, (tuple, list)) else key) for key in report["mismatched_keys"]]
    children = [name for name, _ in model.named_children()]
    heads = [name for name in children if name in _HEADS] if task.kind == "classification" else []
    fresh = list(heads)
    wrong = []
    for name in [*absent, *misshapen]:
        holder = name.rpartition(".")[0]
        if name.split(".", 1)[0] in heads:
            continue
        if name in absent and _POOLERS.search(holder):
            pooler = holder[: _POOLERS.search(holder).end()].rstrip(".")  # type: ignore[union-attr]
            fresh += [pooler] if pooler not in fresh else []
        else:
            wrong.append(name)
    if wrong:
        raise MismatchError(
            f"{reference}: the weights are not those of the {type(model).__name__} that its configuration describes: "
            f"{len(wrong)} tensors are missing or of another shape, {', '.join(sorted(wrong)[:3])} among them"
        )
    return tuple(fresh)


def _check_folder(path: Path, reference: str) -> None:
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UnsupportedFormat(f"{reference}: an adapter, not a model; give the folder of its base model")
    config = path / "config.json"
    if not config.exists():
        raise CheckpointNotFound(f"{reference}: the folder holds no config.json, so it is no transformers model")
    try:
        fields = json.loads(config.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CheckpointError(f"{config}: names no model_type, so its architecture is unknown")
    if not any(path.glob("*.safetensors")):
        raise UnsupportedFormat(
            f"{reference}: no .safetensors file; load the model with transformers and save it again to get one"
        )


def _unreadable(reference: str, source: Source, error: Exception) -> CheckpointError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if not source.local:
        return CheckpointNotFound(
            f"{reference}: no such folder, no example ({', '.join(_EXAMPLE_MODELS)}), and the hub gave no model "
            f"that can be trained: {said}"
        )
    return CheckpointError(f"{reference}: cannot be loaded: {said}")


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars, and its tables about a head that is meant to be fresh, for the time of a block."""
    from transformers.utils import logging

    theirs: Any = logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
