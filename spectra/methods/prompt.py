r"""Prompt tuning: trained vectors in front of the input's word embeddings, everything else frozen.

[P; E(x)] ∈ R^{(p+n)×d} runs through the model in place of E(x) (Lester et al. [1]_, section 2). What the model gives
per token is p tokens longer for it, as in PEFT: logits of a language model are (batch, p + n, vocabulary), and labels
get p ignored entries in front, so that the last virtual token learns to predict the text's first one. A classifier that
pools the first token pools the first virtual one.

Positions run on from the virtual tokens. Where a call brings ``position_ids`` of its own (as ``generate`` does for
texts padded on the left) they are moved up by p, so that padding changes nothing; PEFT drops them.

References
----------
.. [1] B. Lester, R. Al-Rfou and N. Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.injection import replace_module
from spectra.methods.parts import adapter_dtype, take
from spectra.methods.virtual_tokens import (
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

_IGNORED = -100  # torch's cross entropy takes no notice of this label


@dataclass(frozen=True)
class Prompt:
    r"""Trained vectors in front of the word embeddings; `inject`'s pattern names those, ``word_embeddings$`` in BERT.

    Parameters
    ----------
    tokens : int
        p, the number of virtual tokens; the paper sweeps 1 to 150 and finds little gain past 20.
    start : {"vocabulary", "uniform"}
        The embeddings of tokens drawn from the vocabulary, or entries uniform on ±0.5 ([1]_, section 3.2).

    Raises
    ------
    UsageError
        If a field is out of range.
    """

    name: ClassVar[str] = "prompt tuning"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    tokens: int = 20
    start: str = "vocabulary"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"prompt tuning needs at least one virtual token, not {self.tokens}")
        if self.start not in ("vocabulary", "uniform"):
            raise UsageError(f'a prompt starts from the "vocabulary" or "uniform", not {self.start!r}')

    def accepts(self, module: nn.Module) -> bool:
        """Embedding: the word embeddings."""
        return isinstance(module, nn.Embedding)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap the word embeddings and hook the model; see `Method.attach`.

        Raises
        ------
        UsageError
            If several embeddings are named, or no module around them takes ``inputs_embeds``.
        """
        name = the_embedding(names, self.name)
        owner = owner_of(model, name, "inputs_embeds", self.name)
        embedding = cast(nn.Embedding, model.get_submodule(name))
        part = VirtualPrompt(embedding, self._start(embedding, generator), position_limit(owner))
        owner.register_forward_pre_hook(part.before_model, with_kwargs=True)
        replace_module(model, name, part)
        return {name: part}

    def _start(self, embedding: nn.Embedding, generator: torch.Generator) -> torch.Tensor:
        shape = (self.tokens, embedding.embedding_dim)
        if self.start == "uniform":
            return torch.rand(shape, generator=generator) - 0.5
        ids = torch.randint(embedding.num_embeddings, shape[:1], generator=generator)
        return embedding.weight.detach()[ids.to(embedding.weight.device)].clone()

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's PromptTuningConfig."""
        (part,) = injection.parts.values()
        config = getattr(injection.model, "config", None)
        return {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.tokens,
            "token_dim": cast(VirtualPrompt, part).prompt_embeddings.shape[1],
            "num_transformer_submodules": 1,
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "prompt_tuning_init": "SAMPLE_VOCAB" if self.start == "vocabulary" else "RANDOM",
        }


class VirtualPrompt(nn.Module):
    """Word embeddings with a trained prompt; `before_model` puts it in front of every batch.

    Parameters
    ----------
    base : Embedding
        The frozen word embeddings.
    start : Tensor of shape (p, d)
        Where the prompt starts.
    limit : int or None
        Number of positions the model has.

    Attributes
    ----------
    prompt_embeddings : Parameter of shape (p, d)
        In the base's dtype, in float32 where that is narrower.
    """

    def __init__(self, base: nn.Embedding, start: torch.Tensor, limit: int | None) -> None:
        super().__init__()
        self.base = base
        self.limit = limit
        self.prompt_embeddings = nn.Parameter(start.to(dtype=adapter_dtype(base), device=base.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings of ids, without the prompt."""
        return cast(torch.Tensor, self.base(ids))

    def before_model(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the prompt in front of what the model is called with, unless its cache holds it by now."""
        given = call_arguments(owner, args, kwargs)
        virtual = len(self.prompt_embeddings)
        (batch, length), cached = batch_and_length(given), tokens_in(given.get("past_key_values"))
        total = cached + length + (0 if cached else virtual)
        check_positions(virtual, total, self.limit)
        lengthen_mask(given, virtual, total)
        given.pop("cache_position", None)  # counted without the prompt; the model counts again from its cache
        positions = given.get("position_ids")
        if positions is not None:
            given["position_ids"] = positions + virtual
        if not cached:
            self._put_in_front(given, batch, length)
        return (), given

    def _put_in_front(self, given: dict[str, Any], batch: int, length: int) -> None:
        virtual, width = self.prompt_embeddings.shape
        ids, embeds = given.pop("input_ids", None), given.get("inputs_embeds")
        embeds = self(ids) if embeds is None else embeds  # (batch, n, d)
        prompt = self.prompt_embeddings.to(embeds.dtype).expand(batch, virtual, width)
        given["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)  # (batch, p + n, d)
        types, labels, positions = (given.get(name) for name in ("token_type_ids", "labels", "position_ids"))
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(batch, virtual), types], dim=1)
        if positions is not None:
            first = torch.arange(virtual, device=positions.device, dtype=positions.dtype)
            given["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], virtual), positions], dim=-1)
        # A label for every token, not a class for every text.
        if labels is not None and labels.shape == (batch, length) and not labels.is_floating_point():
            given["labels"] = torch.cat([labels.new_full((batch, virtual), _IGNORED), labels], dim=1)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The prompt."""
        yield self.prompt_embeddings

    def state(self) -> dict[str, torch.Tensor]:
        """PEFT's name, which stands without a module's: ``prompt_embeddings``."""
        return {"prompt_embeddings": self.prompt_embeddings.detach()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the prompt; see `ActivationMethod.load_state`."""
        take(self.state(), tensors, part=f"a prompt of {len(self.prompt_embeddings)} tokens")

    def extra_repr(self) -> str:
        """Size of the prompt."""
        return f"{len(self.prompt_embeddings)} virtual tokens"
