"""Which method an ``adapter_config.json`` describes: PEFT's types, and those of methods that PEFT has not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, cast

import torch

import spectra.methods
from spectra.checkpoints.strict_json import shown
from spectra.errors import UnsafeCheckpoint, UnsupportedFormat, UsageError
from spectra.methods.protocol import Method

METHOD_FIELD = "spectra_method"

# Methods that put tokens before the model: their tensors carry no module's name.
VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING")

_OURS = ("FullFineTune", "GLoRA", "Houlsby", "Subspace")

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


def own_type(method: Method) -> str:
    """``peft_type`` of a method that PEFT has not; PEFT looks it up, finds none, and names it in its error."""
    return f"SPECTRA_{type(method).__name__.upper()}"


def check_type(config: Mapping[str, Any], *, source: Path) -> None:
    """Raise `UnsupportedFormat` where an ``adapter_config.json`` is of a method that has no part here."""
    own, kind = config.get(METHOD_FIELD), config.get("peft_type")
    if own not in _OURS if METHOD_FIELD in config else kind not in list(_READERS):
        raise UnsupportedFormat(
            f"{source}: adapters of type {shown(own or kind)} have no part here; merge it with the tool that wrote it"
        )


def method_of(config: Mapping[str, Any], tensors: Tensors, *, source: Path) -> Method:
    """The method that a configuration of a known type and its tensors, by module and suffix, describe.

    Parameters
    ----------
    config : mapping
        Content of ``adapter_config.json``.
    tensors : mapping
        Stored tensors of the parts.
    source : Path
        The file, for messages.

    Raises
    ------
    UnsupportedFormat
        If it is a variant of the method that has no part here.
    UnsafeCheckpoint
        If a field is missing, malformed or out of range.
    """
    try:
        if METHOD_FIELD in config:
            return _ours(config, tensors)
        return _READERS[config["peft_type"]](config, tensors)
    except (UsageError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsafeCheckpoint(f"{source} describes no adapter that could be: {error!r}") from error


def _ours(config: Mapping[str, Any], tensors: Tensors) -> Method:
    """A method that reads its own fields; where it has none to translate they go by the names of its settings."""
    cls = getattr(spectra.methods, config[METHOD_FIELD])
    if "dimension" in config:
        stored = sum(tensor.numel() for held in tensors.values() for tensor in held.values())
        if config["dimension"] != stored:
            raise ValueError(f"it speaks of {shown(config['dimension'])} dimensions where {stored} numbers are stored")
    if hasattr(cls, "from_peft_config"):
        return cast(Method, cls.from_peft_config(config))
    if "bottleneck" in config:
        _check_size(config["bottleneck"], "adapter_down.weight", tensors)
    return cast(Method, cls(**{field.name: config[field.name] for field in fields_of(cls) if field.name in config}))


def _lora(config: Mapping[str, Any], tensors: Tensors) -> Method:
    from spectra.methods.lora import LoRA

    return LoRA.from_peft_config(config)


def _adalora(config: Mapping[str, Any], tensors: Tensors) -> Method:
    from spectra.methods.adalora import AdaLoRA

    return AdaLoRA.from_peft_config(config)


def _ia3(config: Mapping[str, Any], tensors: Tensors) -> Method:
    """A vector of shape (1, in) rescales a module's input: the tensors say which, whatever the patterns are."""
    from spectra.methods.ia3 import IA3

    columns = [re.escape(name) for name, held in tensors.items() if held["ia3_l"].shape[0] == 1]
    return IA3(feedforward=f"^(?:{'|'.join(columns)})$" if columns else "(?!)")


def _prefix(config: Mapping[str, Any], tensors: Tensors) -> Method:
    """What is stored stands behind the MLP, if there was one."""
    from spectra.methods.prefix import Prefix

    _check_size(config["num_virtual_tokens"], "prompt_embeddings", tensors)
    return Prefix(tokens=int(config["num_virtual_tokens"]))


def _prompt(config: Mapping[str, Any], tensors: Tensors) -> Method:
    from spectra.methods.prompt import Prompt

    _check_size(config["num_virtual_tokens"], "prompt_embeddings", tensors)
    return Prompt(tokens=int(config["num_virtual_tokens"]))


def _check_size(claimed: Any, name: str, tensors: Tensors) -> None:
    """Raise `ValueError` where a size is not that of the stored tensors: parts are made from it."""
    for module, held in tensors.items():
        if claimed != held[name].shape[0]:
            raise ValueError(f"it speaks of {shown(claimed)} where {name} of {module} has {held[name].shape[0]}")


_READERS: dict[Any, Callable[[Mapping[str, Any], Tensors], Method]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _prompt,
}
