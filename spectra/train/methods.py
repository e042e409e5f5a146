"""The methods by the names that the command knows, with what each needs to be put into an architecture.

The matrices that a method goes to are its paper's, for the architectures whose names are known; elsewhere a low-rank
method goes to every linear map of the layers, and the others ask for a pattern.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import nn

import spectra.methods
from spectra.errors import UsageError
from spectra.methods.injection import is_linear
from spectra.methods.protocol import Method

__all__ = ["METHODS", "MethodSpec", "build_method", "settings_of", "target_pattern"]

# Where things are: by family, one expression for each of five places. Names are matched from a layer's number on.
_LAYER = {
    "bert": {
        "linear": r"attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense",
        "keys": r"attention\.self\.(key|value)|output\.dense",
        "ends": r"attention\.output\.dense|output\.dense",
    },
    "distilbert": {
        "linear": r"attention\.(q_lin|k_lin|v_lin|out_lin)|ffn\.lin[12]",
        "keys": r"attention\.(k_lin|v_lin)|ffn\.lin2",
        "ends": r"attention\.out_lin|ffn\.lin2",
    },
    "llama": {
        "linear": r"self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj",
        "keys": r"self_attn\.(k|v)_proj|mlp\.down_proj",
        "ends": r"self_attn\.o_proj|mlp\.down_proj",
    },
    "gpt2": {
        "linear": r"attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj",
        "keys": r"attn\.c_attn|mlp\.c_proj",
        "ends": r"attn\.c_proj|mlp\.c_proj",
    },
}
_EMBEDDING = {
    "bert": r"word_embeddings$",
    "distilbert": r"word_embeddings$",
    "llama": r"embed_tokens$",
    "gpt2": r"wte$",
}
_RELATIVES = {
    "roberta": "bert",
    "xlm-roberta": "bert",
    "electra": "bert",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma": "llama",
    "smollm3": "llama",
}


@dataclass(frozen=True)
class MethodSpec:
    """One method of the command.

    Attributes
    ----------
    name : str
        What the command calls it.
    kind : str
        Its class in `spectra.methods`.
    place : str
        ``"linear"``, ``"keys"`` (keys, values and the feed-forward's inside), ``"ends"`` (of a layer's two halves),
        ``"embedding"`` or ``"everything"``.
    learning_rate : float
        At the top of the schedule, unless another is given.
    summary : str
        One line of help.
    fixed : mapping
        Fields that make it a variant of its class.
    """

    name: str
    kind: str
    place: str
    learning_rate: float
    summary: str
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def fields(self) -> dict[str, Any]:
        """Fields that can be set, with their defaults; mappings by module name are not among them."""
        known = {}
        for entry in fields(getattr(spectra.methods, self.kind)):
            if entry.default is not MISSING:
                known[entry.name] = self.fixed.get(entry.name, entry.default)
        return known


_ALL = (
    MethodSpec("full", "FullFineTune", "everything", 5e-5, "every weight"),
    MethodSpec("lora", "LoRA", "linear", 1e-3, "low-rank factors (Hu 2022)"),
    MethodSpec("rslora", "LoRA", "linear", 1e-3, "LoRA scaled by 1/√r (Kalajdzievski 2023)", {"rslora": True}),
    MethodSpec("lora-plus", "LoRA", "linear", 2e-4, "LoRA, B at 16 times A's rate (Hayou 2024)", {"plus_ratio": 16.0}),
    MethodSpec("qlora", "QLoRA", "linear", 2e-3, "LoRA on a base in 4 bits (Dettmers 2023)"),
    MethodSpec("adalora", "AdaLoRA", "linear", 2e-3, "ranks by importance (Zhang 2023)"),
    MethodSpec("glora", "GLoRA", "linear", 1e-3, "weight, bias and input moved (Chavan 2023)"),
    MethodSpec("ia3", "IA3", "keys", 1e-2, "rescaling vectors (Liu 2022)"),
    MethodSpec("houlsby", "Houlsby", "ends", 1e-3, "bottleneck adapters (Houlsby 2019)"),
    MethodSpec("prefix", "Prefix", "embedding", 1e-2, "keys and values in front (Li and Liang 2021)"),
    MethodSpec("prompt", "Prompt", "embedding", 3e-2, "input vectors in front (Lester 2021)"),
    MethodSpec("subspace", "Subspace", "everything", 1e-3, "d numbers that move every weight (Li 2018)"),
)

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in _ALL}
"""Every method of the command by name."""


def spec_of(name: str) -> MethodSpec:
    """The method of a name.

    Raises
    ------
    UsageError
        If there is none; near names are told.

    Examples
    --------
    >>> spec_of("lora").learning_rate
    0.001
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UsageError(f"no method is called {name!r}; {hint}There are: {', '.join(METHODS)}")


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Make a method.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    settings : mapping
        Its fields, as `settings_of` gives them.

    Raises
    ------
    UsageError
        If a field is out of range.
    """
    spec = spec_of(name)
    method: Method = getattr(spectra.methods, spec.kind)(**{**spec.fixed, **settings})
    return method


def settings_of(names: Iterable[str], given: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Read settings for one or several methods.

    Parameters
    ----------
    names : iterable of str
        The methods that will run.
    given : iterable of (str, str)
        Field and value as text; ``lora.rank`` sets one method's field, ``rank`` every method's that has it.

    Returns
    -------
    dict of str to dict
        Fields by method.

    Raises
    ------
    UsageError
        If a field belongs to none of the methods, or a value is not of its kind.

    Examples
    --------
    >>> settings_of(["lora", "ia3"], [("rank", "4")])
    {'lora': {'rank': 4}, 'ia3': {}}
    """
    names = list(names)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    known = {name: spec_of(name).fields() for name in names}
    for key, text in given:
        scope, _, entry = key.rpartition(".")
        if scope and scope not in known:
            raise UsageError(f"{key}={text}: {scope!r} is not among the methods {', '.join(names)}")
        takers = [name for name in names if (not scope or name == scope) and entry in known[name]]
        if not takers:
            told = "; ".join(f"{name} has {', '.join(known[name]) or 'none'}" for name in ([scope] if scope else names))
            raise UsageError(f"no setting is called {entry!r}: {told}")
        for name in takers:
            found[name][entry] = _value(text, known[name][entry], key)
    return found


def _value(text: str, default: Any, key: str) -> Any:
    """Text as a value of the default's kind; of a whole number where the default is None."""
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if isinstance(default, float):
            return float(text)
        if isinstance(default, int):
            return int(text)
        if default is None:
            return int(text) if re.fullmatch(r"-?[0-9]+", text) else text
    except (KeyError, ValueError) as error:
        wanted = {bool: "true or false", float: "a number", int: "a whole number"}[type(default)]
        raise UsageError(f"{key}={text}: {wanted} is needed") from error
    return text


def target_pattern(name: str, family: str, model: nn.Module) -> str:
    """Where a method goes by default.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    family : str
        ``model_type`` of the model's configuration.
    model : Module
        The model, whose names are looked through where the family is unknown.

    Returns
    -------
    str
        A regular expression to search in module names.

    Raises
    ------
    UsageError
        If it cannot be told.
    """
    place = spec_of(name).place
    if place == "everything":
        return "."
    known = _RELATIVES.get(family, family)
    if place == "embedding" and known in _EMBEDDING:
        return _EMBEDDING[known]
    if place != "embedding" and known in _LAYER:
        return rf"\.\d+\.({_LAYER[known][place]})$"
    if place == "linear":
        return _every_linear_map(family, model)
    raise UsageError(
        f"where {name} goes in a {family!r} model is not known here: give --target, a regular expression on module "
        "names (a low-rank method goes to every linear map of the layers without one)"
    )


def _every_linear_map(family: str, model: nn.Module) -> str:
    inside = {
        re.split(r"\.\d+\.", f".{module_name}", maxsplit=1)[1]
        for module_name, module in model.named_modules()
        if is_linear(module) and re.search(r"\.\d+\.", f".{module_name}")
    }
    if not inside:
        raise UsageError(f"the {family!r} model has no numbered layers with linear maps: give --target")
    return rf"\.\d+\.({'|'.join(re.escape(ending) for ending in sorted(inside))})$"
