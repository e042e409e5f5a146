"""What prompts and prefixes share: virtual tokens in front of a batch, put there by a hook on the model's own call.

Both find the model through its word embeddings. The hook stands at the outermost module, on the way from the root to
those embeddings, whose forward takes the argument that it needs; so ``model(...)`` and ``model.generate(...)`` are
called as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from spectra.errors import UsageError

# Tables of absolute positions, by the names that BERT's and GPT-2's relatives give them; rotary models have none.
_POSITION_TABLES = ("position_embeddings", "wpe")


class Cache(Protocol):
    """What is needed of transformers' caches of keys and values."""

    def get_seq_length(self) -> int:
        """Number of tokens that are in it."""
        ...

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Append keys and values, (batch, heads, tokens, head), to a layer's."""
        ...


def the_embedding(names: Sequence[str], method: str) -> str:
    """The one name in a list.

    Raises
    ------
    UsageError
        If there are several.
    """
    if len(names) > 1:
        raise UsageError(
            f"{method} needs the word embeddings alone, and the pattern matches {len(names)} embeddings "
            f"({', '.join(names[:4])}); end it with their name, {names[0].rpartition('.')[2]}$ for instance"
        )
    return names[0]


def owner_of(model: nn.Module, name: str, argument: str, method: str) -> nn.Module:
    """The outermost module on the way to a named one whose forward takes an argument.

    Raises
    ------
    UsageError
        If there is none.
    """
    segments = name.split(".")
    for depth in range(len(segments)):
        module = model.get_submodule(".".join(segments[:depth]))
        if argument in inspect.signature(type(module).forward).parameters:
            if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
                raise UsageError(f"{method} has no way into {type(module).__name__}, an encoder with a decoder")
            return module
    raise UsageError(f"{method} needs a model that takes {argument}; {type(model).__name__} does not around {name}")


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call to a module by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}


def batch_and_length(given: dict[str, Any]) -> tuple[int, int]:
    """(batch, tokens) of a call, whether it brings ids or embeddings.

    Raises
    ------
    UsageError
        If it brings neither.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise UsageError("the model was called with neither input_ids nor inputs_embeds")
    return int(tokens.shape[0]), int(tokens.shape[1])


def tokens_in(cache: Cache | None) -> int:
    """Number of tokens in a cache of keys and values.

    Raises
    ------
    UsageError
        If it is not one of transformers' cache objects.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UsageError(f"past_key_values is a {type(cache).__name__}; pass a transformers DynamicCache")
    return int(cache.get_seq_length())


def lengthen_mask(given: dict[str, Any], virtual: int, total: int) -> None:
    """Let every token attend to the virtual ones too, where the mask does not speak of them yet.

    Parameters
    ----------
    given : dict
        Arguments of the call; ``attention_mask`` is replaced.
    virtual : int
        Number of virtual tokens.
    total : int
        Number of tokens that will be attended to, virtual ones and those in a cache included.

    Raises
    ------
    UsageError
        If the mask is not (batch, tokens).
    """
    mask = given.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise UsageError(
            "virtual tokens need an attention mask of shape (batch, tokens); a static cache or a prepared mask of four "
            "dimensions leaves them no place: call with the padding mask, and generate with a dynamic cache"
        )
    if mask.shape[1] < total:
        given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], virtual), mask], dim=1)


def position_limit(owner: nn.Module) -> int | None:
    """Number of positions of a model with a table of them, or None."""
    for name, module in owner.named_modules():
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from after the padding's.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_positions(virtual: int, total: int, limit: int | None) -> None:
    """Raise `UsageError` where virtual and real tokens together pass the model's positions."""
    if limit is not None and total > limit:
        raise UsageError(
            f"{total - virtual} tokens behind {virtual} virtual ones pass the model's {limit} positions; "
            f"cut texts to {max(0, limit - virtual)} tokens"
        )
