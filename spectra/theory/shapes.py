"""`Architecture`: the shapes of a transformer, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra.errors import UsageError


@dataclass(frozen=True)
class Linear:
    """One linear map of a layer: its role, its shape (out, in) = (d, k), and what it reads.

    ``reads`` is ``"attention"``, ``"context"``, ``"feed-forward"`` or ``"inner"``: maps that read the same activation
    share the one copy of it that the backward pass keeps.
    """

    role: str
    out: int
    into: int
    bias: bool
    reads: str

    @property
    def parameters(self) -> int:
        """Scalars of weight and bias."""
        return self.out * self.into + self.out * self.bias


@dataclass(frozen=True)
class Architecture:
    """The shapes of a transformer.

    Attributes
    ----------
    family : {"bert", "llama", "gpt2"}
        Which of three layouts; Mistral's is Llama's.
    layers, hidden, intermediate : int
        Layers, and widths of the residual stream and of the feed-forward's inside.
    heads, kv_heads, head_width : int
        Heads of queries, heads of keys and values, and the width of one.
    vocabulary, positions, token_types : int
        Rows of the embedding tables.
    dropout : float
        Probability in attention and after each half of a layer.
    tied : bool
        Whether the output map is the embedding table.
    bias : bool
        Whether attention's maps have biases.
    gelu_steps : int
        Copies of the inner activation that its nonlinearity keeps: 1 where it is one kernel, 4 for GPT-2's formula
        in separate steps.

    Examples
    --------
    >>> minilm = Architecture.from_config({"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384,
    ...     "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 30522,
    ...     "max_position_embeddings": 512, "type_vocab_size": 2})
    >>> minilm.encoder_parameters
    22713216
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    positions: int
    token_types: int = 0
    dropout: float = 0.0
    tied: bool = True
    bias: bool = True
    gelu_steps: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read the fields of a transformers ``config.json``.

        Raises
        ------
        UsageError
            For another family than BERT, Llama, Mistral or GPT-2, or where a field is missing.
        """
        family = config.get("model_type")
        reader = {"bert": _bert, "llama": _llama, "mistral": _llama, "gpt2": _gpt2}.get(str(family))
        if reader is None:
            raise UsageError(f"no shapes are known of a {family!r} model: there are bert, llama, mistral and gpt2")
        try:
            return reader(config)
        except KeyError as error:
            raise UsageError(f"the configuration of a {family} model lacks {error.args[0]!r}") from error

    def linears(self) -> tuple[Linear, ...]:
        """Linear maps of one layer, in the order of the forward pass."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_width, self.kv_heads * self.head_width
        if self.family == "gpt2":
            return (
                Linear("qkv", 3 * h, h, True, "attention"),
                Linear("attention.output", h, h, True, "context"),
                Linear("up", i, h, True, "feed-forward"),
                Linear("down", h, i, True, "inner"),
            )
        attention = (
            Linear("query", q, h, self.bias, "attention"),
            Linear("key", kv, h, self.bias, "attention"),
            Linear("value", kv, h, self.bias, "attention"),
            Linear("attention.output", h, q, self.bias, "context"),
        )
        if self.family == "llama":
            return (
                *attention,
                Linear("gate", i, h, False, "feed-forward"),
                Linear("up", i, h, False, "feed-forward"),
                Linear("down", h, i, False, "inner"),
            )
        return (*attention, Linear("up", i, h, True, "feed-forward"), Linear("down", h, i, True, "inner"))

    @property
    def norm_parameters(self) -> int:
        """Scalars of one normalization."""
        return self.hidden if self.family == "llama" else 2 * self.hidden

    @property
    def encoder_parameters(self) -> int:
        """Scalars of embeddings and layers: all but the head, BERT's pooler counted."""
        tables = self.vocabulary + self.token_types + (0 if self.family == "llama" else self.positions)
        pooler = self.hidden * self.hidden + self.hidden if self.family == "bert" else 0
        inside = sum(linear.parameters for linear in self.linears()) + 2 * self.norm_parameters
        return tables * self.hidden + self.norm_parameters + self.layers * inside + pooler

    def head_parameters(self, labels: int | None = None) -> int:
        """Scalars of the head: for so many labels, or, without a number, of a language model."""
        if labels is None:
            if self.family == "bert":
                raise UsageError("BERT is counted with a classifier on top: give the number of labels")
            return 0 if self.tied else self.vocabulary * self.hidden
        return labels * self.hidden + labels * (self.family == "bert")


def _bert(config: Mapping[str, Any]) -> Architecture:
    return Architecture(
        family="bert",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_width=config["hidden_size"] // config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        token_types=config.get("type_vocab_size", 2),
        dropout=config.get("hidden_dropout_prob", 0.1),
    )


def _llama(config: Mapping[str, Any]) -> Architecture:
    heads = config["num_attention_heads"]
    return Architecture(
        family="llama",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        positions=config.get("max_position_embeddings", 0),
        tied=bool(config.get("tie_word_embeddings", False)),
        bias=bool(config.get("attention_bias", False)),
        gelu_steps=3,  # the gate before and after its SiLU, and the factor beside it
    )


def _gpt2(config: Mapping[str, Any]) -> Architecture:
    return Architecture(
        family="gpt2",
        layers=config["n_layer"],
        hidden=config["n_embd"],
        intermediate=config.get("n_inner") or 4 * config["n_embd"],
        heads=config["n_head"],
        kv_heads=config["n_head"],
        head_width=config["n_embd"] // config["n_head"],
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
        dropout=config.get("resid_pdrop", 0.1),
        gelu_steps=4 if config.get("activation_function", "gelu_new") == "gelu_new" else 1,
    )
