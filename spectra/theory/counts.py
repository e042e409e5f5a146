"""What each method trains, and what training costs in memory, from a model's shapes alone: no model is built.

`Architecture` reads a configuration (BERT, Llama or Mistral, GPT-2). Counts are of scalars and exact. Memory is in
bytes, of what a step holds at its peak: weights, their quantization constants, gradients, optimizer states, and the
activations that the backward pass waits for, as torch and transformers keep them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from spectra.errors import UsageError
from spectra.theory.shapes import Architecture, Linear

__all__ = [
    "OPTIMIZER_BYTES",
    "Architecture",
    "Linear",
    "Memory",
    "activations",
    "adalora",
    "bits_per_weight",
    "glora",
    "houlsby",
    "ia3",
    "layer_activations",
    "low_rank",
    "memory",
    "prefix",
    "prompt",
]

# States an optimizer keeps of every trained scalar, in bytes: two float32 moments, none, two 32-bit moments paged.
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0, "sgd_momentum": 4, "paged_adamw": 8}

_FLOAT = 4
# A block of 256 absolute maxima shares one float32 scale, and the whole tensor one float32 mean (Dettmers et al.,
# "QLoRA", 2023, section 3).
_SECOND_BLOCK = 256


def low_rank(linears: Iterable[Linear], rank: int) -> int:
    """Scalars of LoRA and QLoRA: Σ r (d + k).

    Examples
    --------
    >>> low_rank([Linear("query", 6, 4, True, "attention")], rank=2)
    20
    """
    return sum(rank * (linear.out + linear.into) for linear in linears)


def adalora(linears: Iterable[Linear], init_rank: int) -> int:
    """Scalars of AdaLoRA before anything is pruned: Σ r (d + k + 1), for P, Q and the diagonal Λ.

    Examples
    --------
    >>> adalora([Linear("query", 6, 4, True, "attention")], init_rank=2)
    22
    """
    return sum(init_rank * (linear.out + linear.into + 1) for linear in linears)


def ia3(linears: Iterable[Linear], rescaled_inputs: Collection[str] = ("down",)) -> int:
    """Scalars of IA3: one vector a map, as long as its output, or as its input for the named roles.

    Examples
    --------
    >>> ia3([Linear("key", 6, 4, True, "attention"), Linear("down", 4, 16, True, "inner")])
    22
    """
    return sum(linear.into if linear.role in rescaled_inputs else linear.out for linear in linears)


def glora(
    linears: Iterable[Linear],
    rank: int,
    *,
    a: str = "lora",
    b: str = "lora",
    c: str = "lora",
    d: str = "vector",
    e: str = "vector",
) -> int:
    """Scalars of GLoRA, its five support tensors as `spectra.methods.GLoRA` names them.

    A and B are r (d + k), d, 1 or 0 scalars, c is r (k + 1), k or 0, and D, where there is a bias, and E are d, 1 or 0.

    Examples
    --------
    >>> glora([Linear("query", 10, 20, True, "attention")], rank=2, a="vector", c="none", d="none")
    80
    """
    total = 0
    for linear in linears:
        low = rank * (linear.out + linear.into)
        weight = {"lora": low, "vector": linear.out, "scalar": 1, "none": 0}
        total += weight[a] + weight[b] + {"lora": rank * (linear.into + 1), "vector": linear.into, "none": 0}[c]
        total += weight[e] + (weight[d] if linear.bias else 0)
    return total


def houlsby(architecture: Architecture, bottleneck: int) -> int:
    """Scalars of Houlsby adapters: two a layer, each down to the bottleneck and up, with biases."""
    each = 2 * architecture.hidden * bottleneck + bottleneck + architecture.hidden
    return 2 * architecture.layers * each


def prefix(architecture: Architecture, tokens: int) -> int:
    """Scalars of prefix tuning without its reparametrising network: keys and values of every layer."""
    return tokens * 2 * architecture.layers * architecture.kv_heads * architecture.head_width


def prompt(architecture: Architecture, tokens: int) -> int:
    """Scalars of prompt tuning: one input embedding a virtual token."""
    return tokens * architecture.hidden


def bits_per_weight(bits: int, *, block: int = 64, double: bool = False) -> float:
    """Bits of storage a quantized weight takes, its share of the constants included.

    Parameters
    ----------
    bits : int
        Bits of a code.
    block : int
        Weights that share one absolute maximum.
    double : bool
        Keep the maxima in 8 bits, with a float32 scale for each 256 of them.

    Examples
    --------
    >>> bits_per_weight(4), bits_per_weight(4, double=True)
    (4.5, 4.126953125)
    """
    constant = 8 + 32 / _SECOND_BLOCK if double else 32
    return bits + constant / block


@dataclass(frozen=True)
class Memory:
    """Bytes a training step holds at its peak, by what they are for.

    Attributes
    ----------
    weights : int
        Parameters, quantized ones as codes.
    constants : int
        Scales of quantized weights.
    gradients, optimizer : int
        Of what is trained, and of nothing else.
    activations : int
        What the backward pass waits for.
    """

    weights: int
    constants: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.constants + self.gradients + self.optimizer + self.activations


def memory(
    architecture: Architecture,
    *,
    trainable: int,
    batch: int,
    length: int,
    labels: int | None = None,
    added: int = 0,
    rank: int = 0,
    trained: Collection[str] = (),
    whole: bool = False,
    optimizer: str = "adamw",
    bits: int | None = None,
    block: int = 64,
    double: bool = True,
    checkpointing: bool = False,
) -> Memory:
    """Memory of a training step in float32.

    Parameters
    ----------
    architecture : Architecture
        The model.
    trainable : int
        Scalars that train, the head's included.
    batch, length : int
        Rows of a batch and tokens of a row.
    labels : int, optional
        Labels of the classifier; None for a language model.
    added : int
        Scalars that the method adds to the model.
    rank, trained, whole, checkpointing
        As `activations`.
    optimizer : {"adamw", "sgd", "sgd_momentum", "paged_adamw"}
        Whose states are kept.
    bits : int, optional
        Bits of a code where the layers' matrices are quantized, in blocks of `block` and with `double`
        quantization.

    Raises
    ------
    UsageError
        If the optimizer is unknown.

    References
    ----------
    S. Rajbhandari et al., "ZeRO", SC 2020, section 3.1: what a trained scalar costs beside itself.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise UsageError(f"optimizer {optimizer!r} is none of {', '.join(OPTIMIZER_BYTES)}")
    scalars = architecture.encoder_parameters + architecture.head_parameters(labels) + added
    weights, constants = scalars * _FLOAT, 0
    if bits is not None:
        sizes = [linear.out * linear.into for linear in architecture.linears()]
        weights += architecture.layers * sum(-(-size * bits // 8) - size * _FLOAT for size in sizes)
        constants = architecture.layers * sum(_constants(size, block, double) for size in sizes)
    return Memory(
        weights=weights,
        constants=constants,
        gradients=trainable * _FLOAT,
        optimizer=trainable * OPTIMIZER_BYTES[optimizer],
        activations=activations(
            architecture,
            batch=batch,
            length=length,
            language=labels is None,
            rank=rank,
            trained=trained,
            whole=whole,
            checkpointing=checkpointing,
        ),
    )


def _constants(size: int, block: int, double: bool) -> int:
    blocks = -(-size // block)
    if not double:
        return blocks * _FLOAT
    return blocks + -(-blocks // _SECOND_BLOCK) * _FLOAT + _FLOAT  # and the mean that was taken off


def activations(
    architecture: Architecture,
    *,
    batch: int,
    length: int,
    language: bool = False,
    rank: int = 0,
    trained: Collection[str] = (),
    whole: bool = False,
    checkpointing: bool = False,
) -> int:
    """Bytes of float32 activations that the backward pass waits for.

    With checkpointing every layer keeps its input alone, and the one whose turn it is the rest too (Chen et al. [1]_).

    Parameters
    ----------
    architecture : Architecture
        The model.
    batch, length : int
        Rows of a batch and tokens of a row.
    language : bool
        Count the log-probabilities of every token over the vocabulary.
    rank : int
        Rank of the factors beside each trained map; 0 where there are none.
    trained : collection of str
        Roles of maps whose weight, or factors, get a gradient: each needs its input. All roles when `whole`.
    whole : bool
        Full fine-tuning: norms and embeddings train too.
    checkpointing : bool
        Recompute each layer in the backward pass.

    References
    ----------
    .. [1] T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    .. [2] V. Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys 2023, section 4
       counts a layer in 16-bit training alike.
    """
    tokens = batch * length
    layer = layer_activations(architecture, batch=batch, length=length, rank=rank, trained=trained, whole=whole)
    kept = tokens * architecture.hidden * _FLOAT
    inside = (architecture.layers * kept + layer) if checkpointing else architecture.layers * layer
    # Around the layers: a norm's input and, in BERT with dropout, its mask; the last state; what a language model says.
    around = (2 + (architecture.dropout > 0 and architecture.family == "bert")) * kept
    return inside + around + (tokens * architecture.vocabulary * _FLOAT if language else 0)


def layer_activations(
    architecture: Architecture,
    *,
    batch: int,
    length: int,
    rank: int = 0,
    trained: Collection[str] = (),
    whole: bool = False,
) -> int:
    """Bytes that one layer keeps for the backward pass.

    Parameters
    ----------
    architecture, batch, length, rank, trained, whole
        As `activations`.
    """
    a = architecture
    tokens = batch * length
    dropped = a.dropout > 0
    values = 2 * a.hidden  # inputs of the two norms
    values += 2 * a.hidden * dropped  # masks after attention and feed-forward, float32 on CPU
    values += a.gelu_steps * a.intermediate
    values += 2 * (1 if a.family == "llama" else 2)  # a norm's mean and deviation, or its deviation alone
    values += _attention(a, length)
    maps = [linear for linear in a.linears() if whole or linear.role in trained]
    read = {linear.reads: linear.into for linear in maps}
    if not dropped:
        read.pop("context", None)  # the fused kernel keeps its output already
    values += sum(read.values()) + rank * len(maps)
    values += 2 * a.hidden * (whole and a.family == "llama")  # normalized values, for the gradient of RMSNorm's weight
    return tokens * values * _FLOAT


def _attention(a: Architecture, length: int) -> int:
    """Values a token that attention keeps: with dropout in separate steps, without in one fused kernel."""
    queries, keys = a.heads * a.head_width, a.kv_heads * a.head_width
    if a.dropout > 0:
        return queries + 2 * keys + 3 * a.heads * length  # probabilities, mask, probabilities after the mask
    padding = length if a.family == "bert" else 0  # the mask, spread over every query
    return 2 * queries + 2 * keys + a.heads + padding
