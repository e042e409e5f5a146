"""What one tensor name says by itself: its spelling without wrappers, its layer and role, whether it is a buffer.

Pure functions of a string (and, for buffers, of a dtype and a shape). `names` pairs two checkpoints with them.
"""

from __future__ import annotations

import re

# What DistributedDataParallel, torch.compile, FSDP, activation checkpointing and PEFT put into a path.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})

# Spellings that libraries changed over the years: (old last segments, new last segments). TensorFlow's names of a
# normalisation live on in the first BERT checkpoints; torch moved weight_norm to parametrizations in 2.0.
_OLD_NORM = {"gamma": "weight", "beta": "bias"}
_OLD_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

_PLAIN_CONTAINERS = frozenset({"layers", "layer", "h", "blocks", "block"})
_OTHER_CONTAINER = re.compile(r"(?:\w+_)?(?:layers|blocks|layer_groups)|resblocks|stages|(?:layer|stage|block)\d{1,3}")
_TOWERS = frozenset(
    {"vision_model", "text_model", "vision_tower", "visual", "language_model", "audio_tower", "text_encoder"}
)

_BUFFER_NAMES = frozenset(
    {
        "position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "num_batches_tracked", "masked_bias",
        "relative_position_index", "cos_cached", "sin_cached", "attn_mask", "causal_mask", "rotary_pos_emb",
    }
)  # fmt: skip
_WIDE_INTEGERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "BOOL"})
_BYTES = frozenset({"I8", "U8"})
# Integer tensors under these names are packed weights (GPTQ, AWQ, bitsandbytes), not buffers.
_PACKED = frozenset({"weight", "qweight", "qzeros", "g_idx", "scales", "absmax", "quant_map"})

_TABLE = re.compile(r"embed|wte|wpe|vocab|lm_head|^decoder$|^shared$|^predictions$")
_INPUT_EMBEDDING = re.compile(r"^(?:embed_tokens|word_embeddings?|wte|shared|tok_embeddings|embed_in|token_embedding)$")
_TIED_TABLE = re.compile(r"^(?:lm_head|decoder|embed_out|embed_tokens|word_embeddings?|wte|shared|output_embeddings?)$")


def canonical_name(name: str) -> str:
    """Name of a tensor without the segments that wrappers put into its path.

    ``module``, ``_orig_mod``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, ``base_layer`` and the pair
    ``base_model.model`` go, wherever they stand and however often; the last segment, the parameter's own name, stays.

    Examples
    --------
    >>> canonical_name("module._orig_mod.base_model.model.h.0.attn.base_layer.weight")
    'h.0.attn.weight'
    """
    *path, last = name.split(".")
    kept: list[str] = []
    for segment in path:
        if segment in WRAPPERS:
            continue
        if segment == "model" and kept and kept[-1] == "base_model":
            kept.pop()
            continue
        kept.append(segment)
    return ".".join([*kept, last])


def modern_spelling(name: str) -> str:
    """Canonical name with the last segment as today's libraries spell it.

    Examples
    --------
    >>> modern_spelling("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    head, _, last = name.rpartition(".")
    if last in _OLD_NORM and "norm" in head.rpartition(".")[2].lower():
        return f"{head}.{_OLD_NORM[last]}"
    if last in _OLD_WEIGHT_NORM and head:
        return f"{head}.{_OLD_WEIGHT_NORM[last]}"
    return name


def is_index(segment: str) -> bool:
    """Whether a path segment is the plain index of a module list (at most six digits, so that it fits anywhere)."""
    return len(segment) <= 6 and segment.isascii() and segment.isdecimal()


def layer_and_role(name: str) -> tuple[int | None, str]:
    """Index of the layer that holds a tensor, and what the tensor does there.

    Tensors that do the same thing in two layers share a role, so that a heat map of role against layer has one row
    for each; what tells the two halves of an encoder-decoder, or the towers of a multimodal model, apart stays in it.

    Parameters
    ----------
    name : str
        Tensor name; wrappers are stripped first, and a trailing ``[3]`` (one expert of a stack) is ignored.

    Returns
    -------
    layer : int or None
        First integer segment that follows a container of layers (``layers``, ``layer``, ``h``, ``blocks``,
        ``block``, ``conv_layers``, ``stages``, ``layer1`` …) or begins the name; None where there is none.
    role : str
        What follows that integer, without a final ``.weight``. In front of it stand: ``encoder`` or ``decoder``
        where the container is ``layers`` or ``block`` (T5, BART; BERT's ``encoder.layer`` stands alone); the tower
        of a model with several (``vision_model`` …); a container that is not one of the five plain ones. The
        index of an expert becomes ``*``. Without a layer: the whole name without ``.weight``.

    Examples
    --------
    >>> layer_and_role("bert.encoder.layer.11.attention.self.query.weight")
    (11, 'attention.self.query')
    >>> layer_and_role("decoder.block.3.layer.0.SelfAttention.q.weight")
    (3, 'decoder.layer.0.SelfAttention.q')
    >>> layer_and_role("model.layers.7.mlp.experts.5.w1.weight")
    (7, 'mlp.experts.*.w1')
    >>> layer_and_role("layer1.0.conv1.weight")
    (0, 'layer1.conv1')
    >>> layer_and_role("lm_head.weight")
    (None, 'lm_head')
    """
    segments = canonical_name(re.sub(r"\[\d+\]$", "", name)).split(".")
    if len(segments) > 1 and segments[-1] == "weight":
        segments.pop()
    starred = ["*" if _is_expert_index(segments, i) else segment for i, segment in enumerate(segments)]
    for i, segment in enumerate(starred):
        if not is_index(segment) or not (i == 0 or _is_container(starred[i - 1])):
            continue
        role = [*_role_prefix(starred[:i]), *starred[i + 1 :]]
        return int(segment), ".".join(role) or "weight"
    return None, ".".join(starred)


def _is_expert_index(segments: list[str], i: int) -> bool:
    return i > 0 and is_index(segments[i]) and "expert" in segments[i - 1].lower()


def _is_container(segment: str) -> bool:
    return segment in _PLAIN_CONTAINERS or (len(segment) < 64 and _OTHER_CONTAINER.fullmatch(segment) is not None)


def _role_prefix(path: list[str]) -> list[str]:
    """Segments before a layer's index that tell two layers of the same number apart."""
    if not path:
        return []
    *above, container = path
    prefix = [segment for segment in above if segment in _TOWERS][:1]
    if not prefix and container in {"layers", "block"}:
        prefix = [segment for segment in above if segment in {"encoder", "decoder"}][-1:]
    if container not in _PLAIN_CONTAINERS:
        prefix.append(container)
    return prefix


def is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a constant that a model computes for itself: position ids, masks, rotary frequencies.

    Integer and boolean tensors are, unless they are packed weights; so are the names that libraries give such
    constants, and a "bias" of three or more dimensions (GPT-2's causal mask).

    Examples
    --------
    >>> is_buffer("bert.embeddings.position_ids", "I64", (1, 512)), is_buffer("h.0.attn.bias", "F32", (1, 1, 8, 8))
    (True, True)
    >>> is_buffer("h.0.attn.c_attn.bias", "F32", (24,)), is_buffer("model.layers.0.up.qweight", "I32", (8, 8))
    (False, False)
    """
    last = name.rpartition(".")[2]
    if last in _BUFFER_NAMES or (last == "bias" and (len(shape) >= 3 or dtype in _WIDE_INTEGERS | _BYTES)):
        return True
    return dtype in _WIDE_INTEGERS and last not in _PACKED


def _module(name: str) -> str:
    """Last segment before the parameter's own, ``predictions`` of ``cls.predictions.bias``."""
    parts = name.rsplit(".", 2)
    return parts[-2] if len(parts) > 1 else parts[-1]


def is_table(name: str) -> bool:
    """Whether the rows of a tensor are words or positions, so that a longer one has the shorter one's rows first."""
    return _TABLE.search(_module(name)) is not None


def is_input_embedding(name: str) -> bool:
    """Whether a name is that of a model's word embeddings."""
    return name.endswith("weight") and _INPUT_EMBEDDING.match(_module(name)) is not None


def may_be_tied(name: str) -> bool:
    """Whether a name is one that models tie to their word embeddings: an output head, a second embedding."""
    return name.endswith("weight") and _TIED_TABLE.match(_module(name)) is not None


def expert_parts(name: str) -> tuple[str, int | None, str] | None:
    """Split at the experts of a mixture: path, index (None for a stack), what follows without ``.weight``.

    Examples
    --------
    >>> expert_parts("layers.0.moe.experts.3.w1.weight"), expert_parts("layers.0.moe.experts.w1")
    (('layers.0.moe.experts', 3, 'w1'), ('layers.0.moe.experts', None, 'w1'))
    >>> expert_parts("layers.0.mlp.up.weight") is None
    True
    """
    segments = name.removesuffix(".weight").split(".")
    at = [i for i, segment in enumerate(segments[:-1]) if "expert" in segment.lower()]
    if not at:
        return None
    head, tail = segments[: at[-1] + 1], segments[at[-1] + 1 :]
    if is_index(tail[0]):
        return ".".join(head), int(tail[0]), ".".join(tail[1:])
    return ".".join(head), None, ".".join(tail)
