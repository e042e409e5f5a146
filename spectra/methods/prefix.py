r"""Prefix tuning: trained keys and values in front of every layer's own, everything else frozen.

Every attention head attends to [P_K; K] and [P_V; V] in place of K and V (Li and Liang [1]_, section 4). The prefix
travels in the model's cache of keys and values, as in PEFT, so that any architecture of transformers that takes one has
it, BERT's encoders included, and ``generate`` reads on from it. Outputs keep their length; positions start behind the
prefix.

The authors train the prefix through an MLP for stability (section 4.3) and drop that afterwards: what `state` gives,
and what a folder holds, is the MLP's output, and what is loaded trains directly.

References
----------
.. [1] X. L. Li and P. Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.injection import replace_module
from spectra.methods.parts import adapter_dtype, take
from spectra.methods.virtual_tokens import (
    Cache,
    batch_and_length,
    call_arguments,
    check_positions,
    lengthen_mask,
    owner_of,
    position_limit,
    the_embedding,
    tokens_in,
)

if TYPE_CHECKING:
    from spectra.methods.injection import Injection


@dataclass(frozen=True)
class Prefix:
    r"""Trained keys and values in every layer; `inject`'s pattern names the word embeddings (``word_embeddings$``).

    Parameters
    ----------
    tokens : int
        p, the length of the prefix.
    mlp : bool
        Train it through an MLP of two layers, one vector a token: P = W₂ tanh(W₁ E + b₁) + b₂.
    hidden : int, optional
        Width of the MLP; by default that of a layer's keys.
    start : {"vocabulary", "normal"}, optional
        The keys and values that the frozen model gives tokens drawn from its vocabulary (with few data the better start
        of the two, [1]_, section 7.4), or standard normal ones as in PEFT. By default "vocabulary"; an MLP starts
        "normal", its vectors standard normal and its weights as torch starts linear maps.

    Raises
    ------
    UsageError
        If a field is out of range, or two do not go together.
    """

    name: ClassVar[str] = "prefix tuning"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    tokens: int = 20
    mlp: bool = False
    hidden: int | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"prefix tuning needs at least one virtual token, not {self.tokens}")
        if self.start not in (None, "vocabulary", "normal"):
            raise UsageError(f'a prefix starts from the "vocabulary" or "normal", not {self.start!r}')
        if self.mlp and self.start == "vocabulary":
            raise UsageError("a prefix behind an MLP has no vectors that give the vocabulary's keys; start it normal")
        if self.hidden is not None and (not self.mlp or self.hidden < 1):
            raise UsageError(f"hidden={self.hidden} is the width of a prefix's MLP: positive, with mlp=True")

    def accepts(self, module: nn.Module) -> bool:
        """Embedding: the word embeddings of the model whose layers get the prefix."""
        return isinstance(module, nn.Embedding)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap the word embeddings and hook the model; see `Method.attach`.

        Raises
        ------
        UsageError
            If several embeddings are named, no module around them takes ``past_key_values``, or its layers differ.
        """
        name = the_embedding(names, self.name)
        owner = owner_of(model, name, "past_key_values", self.name)
        embedding = cast(nn.Embedding, model.get_submodule(name))
        limit = position_limit(owner)
        check_positions(self.tokens, self.tokens, limit)
        ids = torch.randint(embedding.num_embeddings, (1, self.tokens), generator=generator)
        start = _keys_and_values(owner, ids.to(embedding.weight.device))  # (p, 2·layers, heads, head)
        if self.mlp or self.start == "normal":
            start = torch.randn(start.shape, generator=generator)
        part = VirtualPrefix(embedding, start, limit)
        if self.mlp:
            part.reparametrise(self.hidden or start[0, 0].numel(), generator)
        owner.register_forward_pre_hook(part.before_model, with_kwargs=True)
        owner.register_forward_hook(_without_unasked_cache, with_kwargs=True)
        replace_module(model, name, part)
        return {name: part}

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's PrefixTuningConfig; what is stored is behind the MLP, so that PEFT needs none."""
        (part,) = injection.parts.values()
        _, twice_layers, heads, head = cast(VirtualPrefix, part).shape
        return {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.tokens,
            "token_dim": heads * head,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": twice_layers // 2,
            "encoder_hidden_size": heads * head,
            "prefix_projection": False,
        }


class VirtualPrefix(nn.Module):
    """Word embeddings that carry the prefix of a model's layers; `before_model` puts it in the cache of every batch.

    Parameters
    ----------
    base : Embedding
        The frozen word embeddings.
    start : Tensor of shape (p, 2·layers, heads, head)
        Where the prefix starts: key and value of the first layer, of the second, and so on.
    limit : int or None
        Number of positions the model has.

    Attributes
    ----------
    prompt_embeddings : Parameter of shape (p, 2·layers·heads·head)
        The prefix as PEFT lays it out, or, with an MLP, one vector a token of shape (p, heads·head). In the base's
        dtype, in float32 where that is narrower.
    shape : tuple of int
        (p, 2·layers, heads, head).
    mlp : Sequential or None
        The MLP the prefix is trained through.
    """

    def __init__(self, base: nn.Embedding, start: torch.Tensor, limit: int | None) -> None:
        super().__init__()
        tokens, twice_layers, heads, head = start.shape
        self.base = base
        self.limit = limit
        self.shape = (tokens, twice_layers, heads, head)
        flat = start.reshape(tokens, -1).to(dtype=adapter_dtype(base), device=base.weight.device)
        self.prompt_embeddings = nn.Parameter(flat)
        self.mlp: nn.Sequential | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return self.base.weight

    def reparametrise(self, hidden: int, generator: torch.Generator) -> None:
        """Put an MLP of this width in front, and one standard normal vector a token before it."""
        tokens, twice_layers, heads, head = self.shape
        width, like = heads * head, self.prompt_embeddings.detach()
        self.prompt_embeddings = nn.Parameter(torch.randn(tokens, width, generator=generator).to(like))
        maps = (_linear(width, hidden, generator), _linear(hidden, twice_layers * width, generator))
        self.mlp = nn.Sequential(maps[0], nn.Tanh(), maps[1]).to(dtype=like.dtype, device=like.device)

    def table(self) -> torch.Tensor:
        """The prefix, (p, 2·layers·heads·head), behind the MLP if there is one."""
        return self.prompt_embeddings if self.mlp is None else cast(torch.Tensor, self.mlp(self.prompt_embeddings))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings of ids."""
        return cast(torch.Tensor, self.base(ids))

    def before_model(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the prefix in the cache that the model is called with, unless it holds it by now."""
        given = call_arguments(owner, args, kwargs)
        _refuse_checkpointing(owner)
        cache, virtual = given.get("past_key_values"), self.shape[0]
        (batch, length), cached = batch_and_length(given), tokens_in(cache)
        total = (cached or virtual) + length
        check_positions(virtual, total, self.limit)
        lengthen_mask(given, virtual, total)
        given.pop("cache_position", None)  # counted without the prefix; the model counts again from its cache
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + virtual
        if not cached:
            given["past_key_values"] = self._filled(_new_cache() if cache is None else cache, batch)
        return (), given

    def _filled(self, cache: Cache, batch: int) -> Cache:
        layers = self.table().view(self.shape).permute(1, 2, 0, 3)  # (2·layers, heads, p, head)
        # The cache joins the prefix to keys that autocast made narrow; a wide one would widen them all.
        kind = layers.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.weight.dtype
        layers = layers.to(dtype).unsqueeze(1).expand(-1, batch, -1, -1, -1)
        for number, (keys, values) in enumerate(zip(layers[0::2], layers[1::2], strict=True)):
            cache.update(keys, values, number)
        return cache

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The prefix; with an MLP its vectors and the MLP's weights."""
        yield self.prompt_embeddings
        if self.mlp is not None:
            yield from self.mlp.parameters()

    def state(self) -> dict[str, torch.Tensor]:
        """PEFT's name, which stands without a module's: ``prompt_embeddings``, behind the MLP."""
        return {"prompt_embeddings": self.table().detach()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the prefix, which no MLP stands before from then on; see `ActivationMethod.load_state`."""
        table = self.table().detach().clone()
        take({"prompt_embeddings": table}, tensors, part=f"a prefix of {self.shape[0]} tokens")
        if self.mlp is None:
            with torch.no_grad():
                self.prompt_embeddings.copy_(table)
        else:
            self.prompt_embeddings, self.mlp = nn.Parameter(table), None

    def extra_repr(self) -> str:
        """Size of the prefix."""
        tokens, twice_layers, heads, head = self.shape
        return f"{tokens} virtual tokens in {twice_layers // 2} layers of {heads} heads of {head}"


def _keys_and_values(owner: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Keys and values that a model gives tokens (1, p) in its layers, (p, 2·layers, heads, head)."""
    cache = _new_cache()
    active = [module for module in owner.modules() if module.training]
    owner.eval()
    with torch.no_grad():
        owner(input_ids=ids, past_key_values=cache)
    for module in active:
        module.training = True
    found = [tensor for layer in cache for tensor in layer[:2]]  # each (1, heads, p, head)
    if not found or any(tensor is None or tensor.shape != found[0].shape for tensor in found):
        raise UsageError(
            f"prefix tuning needs layers that all keep keys and values of one shape; those of {type(owner).__name__} "
            "differ, or keep none"
        )
    return torch.cat(found).permute(2, 0, 1, 3).contiguous()


def _new_cache() -> Any:
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise UsageError("prefix tuning needs transformers: pip install 'spectra-weights[train]'") from error
    return DynamicCache()


def _without_unasked_cache(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output of a call that wants no cache without the one that brought the prefix.

    ``generate(use_cache=False)`` would otherwise hand it to the next call, beside the whole text again.
    """
    if kwargs.get("use_cache") is False and isinstance(output, dict) and "past_key_values" in output:
        return type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
    return output


def _refuse_checkpointing(owner: nn.Module) -> None:
    if owner.training and any(getattr(module, "gradient_checkpointing", False) for module in owner.modules()):
        raise UsageError(
            "prefix tuning keeps its keys and values in the cache, which gradient checkpointing switches off: "
            "train without it (model.gradient_checkpointing_disable())"
        )


def _linear(cols: int, rows: int, generator: torch.Generator) -> nn.Linear:
    """A linear map as torch starts it, uniform on ±1/√cols, drawn from a generator."""
    linear = nn.Linear(cols, rows, device="meta").to_empty(device="cpu")  # no draw from the global generator
    bound = 1.0 / math.sqrt(cols)
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            parameter.uniform_(-bound, bound, generator=generator)
    return linear
