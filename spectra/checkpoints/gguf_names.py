"""GGUF's names and row order undone: transformers' names, and query and key rows as transformers' models keep them.

llama.cpp rotates neighbouring entries of a head, transformers' Llama the entry i and the entry i + d/2 of its d. Its
converter therefore moves the rows of each head: row (half, i) of the query and key weights and biases becomes row
(i, half), half = 0, 1 and i = 0 … d/2 − 1. It does so for the architecture ``llama``, which is also that of Mistral,
Mixtral and SmolLM2, and not for ``qwen2`` and ``qwen3``, which llama.cpp rotates as transformers does.

References
----------
``LlamaModel.permute`` and ``modify_tensors``: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

_PERMUTED = ("llama",)
_PLAIN = ("qwen2", "qwen3")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<module>[a-z_]+)\.(?P<leaf>weight|bias)")
_AT_TOP = re.compile(r"(?P<module>[a-z_]+)\.(?P<leaf>weight|bias)")
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


class Naming(NamedTuple):
    """How a file's tensors are called here, which of them have rows to move back, and a sentence on both.

    Attributes
    ----------
    names : mapping of str to str
        The file's name to the one used here; its own where it has no other.
    heads : mapping of str to int
        The file's names of query and key tensors whose rows were moved, with their number of heads.
    note : str
    """

    names: Mapping[str, str]
    heads: Mapping[str, int]
    note: str


def naming(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, object]) -> Naming:
    """Names, and rows to move back, of a file's tensors.

    Nothing is guessed: where the architecture is not one of those known here, or the number of heads is not given or
    does not divide the rows, names and rows stay the file's own, and the note says so.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        By the file's names.
    metadata : mapping of str to value
        The file's.

    Examples
    --------
    >>> heads = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    >>> found = naming({"blk.0.attn_k.weight": (16, 32)}, {"general.architecture": "llama", **heads})
    >>> found.names, found.heads
    ({'blk.0.attn_k.weight': 'model.layers.0.self_attn.k_proj.weight'}, {'blk.0.attn_k.weight': 2})
    """
    architecture = metadata.get("general.architecture")
    kept = {name: name for name in shapes}
    if architecture not in (*_PERMUTED, *_PLAIN):
        return Naming(kept, {}, f"its architecture is {architecture!r}: names and order of rows are the file's own")
    names = {name: _renamed(name) for name in shapes}
    if architecture in _PLAIN:
        return Naming(names, {}, f"tensors are called as in transformers ({architecture})")
    heads = {name: _heads(name, metadata) for name in shapes if _module(name) in _HEADS}
    if not all(count and shapes[name] and shapes[name][0] % (2 * count) == 0 for name, count in heads.items()):
        return Naming(
            kept, {}, "it does not say how many heads its rows belong to: names and order of rows are the file's own"
        )
    return Naming(names, heads, "tensors are called, and query and key rows ordered, as in transformers (llama)")


def in_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Move the rows (heads·d, …) of whole heads back: of each head row (i, half) becomes row (half, i).

    Examples
    --------
    >>> in_order(torch.tensor([0, 3, 1, 4, 2, 5]), 1)
    tensor([0, 1, 2, 3, 4, 5])
    """
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])  # (heads, d/2, 2, …)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _module(name: str) -> str:
    found = _IN_LAYER.fullmatch(name)
    return found["module"] if found else ""


def _heads(name: str, metadata: Mapping[str, object]) -> int:
    """Heads of a query or key tensor; 0 where the file does not say. Without key heads there are as many as queries."""
    count = metadata.get(f"llama.{_HEADS[_module(name)]}", metadata.get("llama.attention.head_count"))
    return count if type(count) is int and count > 0 else 0


def _renamed(name: str) -> str:
    if (found := _IN_LAYER.fullmatch(name)) and found["module"] in _LAYER:
        return f"model.layers.{found['layer']}.{_LAYER[found['module']]}.{found['leaf']}"
    if (found := _AT_TOP.fullmatch(name)) and found["module"] in _TOP:
        return f"{_TOP[found['module']]}.{found['leaf']}"
    return name
