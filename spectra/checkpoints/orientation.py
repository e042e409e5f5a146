"""Which linear maps store (in, out): transformers' Conv1D of GPT-2, told by the lengths of their biases.

Quantizers turn such a weight first, so that its blocks run along the inputs as everywhere else; so does this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectra.checkpoints import TensorInfo
from spectra.checkpoints.name_rules import layer_and_role

_MODELS = ("gpt2", "openai-gpt")  # whose square weights are Conv1D's too, where no other weight tells


def turned_names(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the weights that are stored (in, out).

    A weight that is not square is as long as its bias in one of two ways; a square one inside a layer goes with the
    others.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        Every tensor of a checkpoint.
    config : mapping
        Its ``config.json``.

    Examples
    --------
    >>> def info(name, *shape):
    ...     return TensorInfo(name, "F32", shape, "a.safetensors", 0)
    >>> held = {"h.0.up.weight": (4, 16), "h.0.up.bias": (16,), "h.0.mix.weight": (4, 4), "h.0.mix.bias": (4,)}
    >>> sorted(turned_names({name: info(name, *shape) for name, shape in held.items()}, {}))
    ['h.0.mix.weight', 'h.0.up.weight']
    """
    told = {name: _told(name, infos) for name in infos}
    layered = {name for name in infos if layer_and_role(name)[0] is not None}
    votes = {told[name] for name in layered} - {None}
    rest = votes == {True} or (not votes and config.get("model_type") in _MODELS)
    square = {name for name in layered if rest and told[name] is None and _bias(name, infos) is not None}
    return frozenset({name for name, turned in told.items() if turned} | square)


def _told(name: str, infos: Mapping[str, TensorInfo]) -> bool | None:
    shape, bias = infos[name].shape, _bias(name, infos)
    if bias is None or len(shape) != 2 or shape[0] == shape[1] or bias not in shape:
        return None
    return bias == shape[1]


def _bias(name: str, infos: Mapping[str, TensorInfo]) -> int | None:
    info = infos.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
    return info.shape[0] if info is not None and len(info.shape) == 1 else None
