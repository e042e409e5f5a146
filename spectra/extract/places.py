"""Which place each tensor of a fine-tune takes in an adapter: factors, a bias, a module saved whole, or a list.

Decided from names, shapes and the model's configuration alone. PEFT wraps modules, so every tensor is told by the path
of its module, as the fine-tuned model has it, and by the parameter's name there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectra.checkpoints import Adapter, Checkpoint, TensorInfo
from spectra.checkpoints.adapter import DoraUpdate, LowRankUpdate
from spectra.checkpoints.name_rules import (
    canonical_name,
    is_input_embedding,
    is_table,
    layer_and_role,
    may_be_tied,
    modern_spelling,
)
from spectra.checkpoints.names import Pair, Pairing
from spectra.delta import AdapterDelta, AnyDelta, Delta, LowRankDelta, is_float

EMBEDDING_PLACES = ("lora", "save", "list")
REST_PLACES = ("save", "list")

# PEFT's name of what a model does, by the end of its class's name; the first that fits.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("Model", "FEATURE_EXTRACTION"),
)
_NO_TASK = ("DoubleHeadsModel", "PreTrainedModel")

# Modules that PEFT saves whole for a task whatever the configuration says: those whose path ends like this.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Models of transformers whose layers are Conv1D and store (in, out).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

# Tables besides word embeddings that are plain torch embeddings looked up by index. Not `embed_positions`: BART's and
# OPT's shift the index first, and PEFT's factors would be looked up unshifted.
_LOOKED_UP = frozenset({"position_embeddings", "position_embedding", "token_type_embeddings", "wpe"})
# Tables by another name than their module's type tells: T5's relative positions are an embedding of a few rows.
_ODD_TABLES = ("relative_attention_bias",)
# Linear maps whose names hold "embed", though no row of them is a word.
_NO_TABLES = ("embeddings_project", "embed_out")

# Heads of models that tie one to their word embeddings and store it once.
_TIED_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Place:
    """One tensor and where it goes.

    Parameters
    ----------
    name : str
        Tensor, as the comparison calls it.
    module, parameter : str
        Path of its module in the fine-tuned model, and the parameter's name there.
    kind : str
        ``"linear"``, ``"embedding"`` and ``"convolution"`` become factors; ``"bias"`` is that of a linear map;
        ``"whole"`` belongs to a module to be saved; ``"listed"`` can only be told of.
    delta : delta or None
        Its update; None where only one side has it.
    transposed : bool
        Whether the base stores the transpose of what the module multiplies by: Conv1D (in, out), and embeddings.
    reason : str
        Why it is listed, or what is to be known of it.
    stored : str or None
        Name under which the tuned side stores it, where the base has none like it.
    """

    name: str
    module: str
    parameter: str
    kind: str
    delta: AnyDelta | None = None
    transposed: bool = False
    reason: str = ""
    stored: str | None = None

    @property
    def factored(self) -> bool:
        """Whether it is to become factors."""
        return self.kind in ("linear", "embedding", "convolution")

    @property
    def cost(self) -> int:
        """Parameters a direction takes: rows + columns."""
        assert self.delta is not None
        return sum(self.delta.shape)


@dataclass(frozen=True)
class Model:
    """What the fine-tuned side says of the model that the adapter is for.

    Parameters
    ----------
    tensors : mapping of str to mapping of str to str
        Module to parameter to the name that the tuned side stores it under.
    modules : frozenset of str
        Paths of all modules that hold a tensor in either checkpoint, and of those around them.
    task_type : str or None
        PEFT's name of what the model does.
    saved : tuple of str
        Modules that have to be saved whole, whatever changed: PEFT will look for them.
    tied : str or None
        Word embeddings (their module) that an output head shares without a tensor of its own.
    tied_head : str or None
        That head's module, where its name is known.
    """

    tensors: Mapping[str, Mapping[str, str]]
    modules: frozenset[str]
    task_type: str | None
    saved: tuple[str, ...] = ()
    tied: str | None = None
    tied_head: str | None = None


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's name of what a model does, from the class that its ``config.json`` names; None where none fits.

    Parameters
    ----------
    config : mapping
        Content of ``config.json``.

    Examples
    --------
    >>> task_type({"architectures": ["LlamaForCausalLM"]}), task_type({"architectures": ["BertForMaskedLM"]})
    ('CAUSAL_LM', None)
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith(_NO_TASK):
        return None
    found = next((task for ending, task in _TASKS if name.endswith(ending)), None)
    if found == "SEQ_2_SEQ_LM" and config.get("is_encoder_decoder") is not True:
        return None  # a decoder that also sees images generates under the same class name
    return found


def model_of(base: Checkpoint, tuned: Checkpoint | Adapter) -> Model:
    """Read the model that an adapter is for off the names that the fine-tune stores.

    Parameters
    ----------
    base : Checkpoint
    tuned : Checkpoint or Adapter
        An adapter's own configuration tells its task and the modules that it saves.
    """
    tensors: dict[str, dict[str, str]] = {}
    for stored in tuned:
        if stored in tuned.aliases:
            continue
        module, parameter = module_of(stored)
        tensors.setdefault(module, {})[parameter] = stored
    paths = {*tensors, *(module_of(name)[0] for name in base)}
    modules = frozenset(around for path in paths for around in _around(path))
    if isinstance(tuned, Adapter):
        return Model(tensors, modules, tuned.config.task_type, _ending(modules, tuned.config.modules_to_save, tensors))
    task = task_type(tuned.config)
    tied, head = _tie(tuned, tensors)
    return Model(tensors, modules, task, _ending(modules, _HEADS.get(task or "", ()), tensors), tied, head)


def module_of(stored: str) -> tuple[str, str]:
    """Path of a module and a parameter's name, from the name of a stored tensor, wrappers and old spellings undone.

    Parameters
    ----------
    stored : str
        Name in a checkpoint or an adapter file.

    Examples
    --------
    >>> module_of("module.bert.embeddings.LayerNorm.gamma"), module_of("base_model.model.h.0.q.lora_A.weight")
    (('bert.embeddings.LayerNorm', 'weight'), ('h.0.q', 'lora_A.weight'))
    """
    name = modern_spelling(canonical_name(stored))
    segments = name.split(".")
    marked = next((i for i, segment in enumerate(segments) if segment.startswith(("lora_", "ia3_"))), len(segments) - 1)
    if "modules_to_save" in segments:  # PEFT drops the segment on saving; older files have it, with an adapter's name
        at = segments.index("modules_to_save")
        segments = segments[:at] + segments[at + 2 :]
        marked = len(segments) - 1
    return ".".join(segments[:marked]), ".".join(segments[marked:])


def find_places(
    pairing: Pairing,
    deltas: Mapping[str, AnyDelta],
    base: Checkpoint,
    tuned: Checkpoint | Adapter,
    model: Model,
    *,
    wanted: Callable[[str], bool],
    embeddings: str,
    rest: str,
) -> list[Place]:
    """Place every tensor that changed or may have; constants that a model computes for itself have none.

    Parameters
    ----------
    pairing : Pairing
    deltas : mapping of str to delta
        Updates by name.
    base, tuned : Checkpoint or Adapter
    model : Model
    wanted : callable
        Whether a tensor's name is asked for; modules that PEFT looks for are saved in any case.
    embeddings : {"lora", "save", "list"}
        What becomes of embeddings.
    rest : {"save", "list"}
        What becomes of norms, biases, heads and all else that is no matrix of a linear map.
    """
    conv1d = _Conv1D(base, tuned, pairing)
    places = []
    for pair in pairing.pairs:
        if pair.status in ("unchanged", "alias") or pair.buffer:
            continue
        place = _place(pair, deltas.get(pair.name), tuned, model, conv1d)
        saved = _within(place.module, model.saved)
        if not wanted(pair.name) and not saved:
            continue
        if saved and place.kind != "listed":
            place = replace(place, kind="whole")
        elif place.kind == "embedding" and embeddings != "lora":
            place = _moved(place, embeddings, "an embedding, and embeddings are to be listed")
        elif place.kind in ("whole", "bias") and rest == "list":
            place = _moved(place, rest, "no matrix of a linear map, and the rest is to be listed")
        places.append(place)
    return places


def _moved(place: Place, where: str, reason: str) -> Place:
    return replace(place, kind="whole") if where == "save" else replace(place, kind="listed", reason=reason)


def _place(pair: Pair, delta: AnyDelta | None, tuned: Checkpoint | Adapter, model: Model, conv1d: _Conv1D) -> Place:
    module, parameter = _module_of_pair(pair, delta)
    listed = Place(pair.name, module, parameter, "listed", delta)
    if pair.status == "base_only":
        return replace(listed, reason=f"only in the base: {pair.reason}")
    if pair.status == "tuned_only" or (pair.status == "shape_mismatch" and _within(module, model.saved)):
        return replace(listed, kind="whole", reason=f"new in the fine-tune: {pair.reason}", stored=_stored(pair, model))
    if pair.status != "ok" or delta is None:
        return replace(listed, reason=f"{pair.status.replace('_', ' ')}: {pair.reason}")
    if not is_float(delta.base_info.dtype) or not is_float(delta.tuned_info.dtype):
        return replace(
            listed, delta=None, reason=f"stored as {delta.base_info.dtype} and {delta.tuned_info.dtype}, not as floats"
        )
    if pair.reason.startswith("tied to") and not _untied(tuned):
        return replace(listed, delta=None, reason=f"{pair.reason}; it moves with them")
    if "expert" in pair.view:
        return replace(listed, reason="one of a stack of experts, which PEFT's modules do not hold")
    if "rows" in pair.view:
        return replace(listed, reason=f"a table of another length than the base's: {pair.reason}")
    if isinstance(delta, LowRankDelta):
        return _of_factors(listed, delta)
    if isinstance(delta, AdapterDelta):
        return _of_adapter(listed, delta, conv1d)
    return _of_weights(listed, delta, model, conv1d, pair)


def _stored(pair: Pair, model: Model) -> str | None:
    """Name that the tuned side stores a tensor of a pair under; an adapter's pairs are named as the base is."""
    module, parameter = module_of(pair.tuned or pair.name)
    return model.tensors.get(module, {}).get(parameter)


def _of_factors(listed: Place, delta: LowRankDelta) -> Place:
    update = delta.update
    if "lora_embedding_A" in update.a:
        return replace(listed, parameter="weight", kind="embedding", transposed=True)
    kernel = len(delta.base_info.shape) > 2
    return replace(listed, parameter="weight", kind="convolution" if kernel else "linear", transposed=update.transposed)


def _of_adapter(listed: Place, delta: AdapterDelta, conv1d: _Conv1D) -> Place:
    """An adapter's update that is not of low rank: factors of the dense matrix, or the bias that it is."""
    shape = delta.base_info.shape
    if len(shape) == 1:
        return replace(listed, parameter="bias", kind="bias")
    if len(shape) != 2:
        return replace(listed, reason="a kernel whose update is not of low rank")
    update = delta.update
    inner = update if isinstance(update, DoraUpdate) else getattr(update, "update", None)
    if isinstance(inner, LowRankUpdate | DoraUpdate):
        kind = "embedding" if "lora_embedding_A" in inner.a else "linear"
        return replace(listed, parameter="weight", kind=kind, transposed=inner.transposed)
    return replace(listed, parameter="weight", kind="linear", transposed=conv1d.base_stores_transposed(listed.name, ""))


def _of_weights(listed: Place, delta: Delta, model: Model, conv1d: _Conv1D, pair: Pair) -> Place:
    shape, parameter = delta.base_info.shape, listed.parameter
    if parameter == "weight" and len(shape) == 2:
        kind = table_kind(f"{listed.module}.weight")
        if isinstance(delta.tuned, Adapter):  # saved whole there
            return replace(listed, kind="whole")
        transposed = kind == "embedding" or (
            kind == "linear" and conv1d.base_stores_transposed(delta.tuned_name, pair.view)
        )
        return replace(listed, kind=kind, transposed=transposed)
    if parameter == "bias" and len(shape) == 1:
        weight = model.tensors.get(listed.module, {}).get("weight")
        linear = isinstance(delta.tuned, Adapter) or (weight is not None and len(delta.tuned.info(weight).shape) == 2)
        return replace(listed, kind="bias" if linear else "whole")
    if parameter in ("weight", "bias", "running_mean", "running_var"):
        return replace(listed, kind="whole")
    return replace(listed, reason=f"a parameter ({parameter}) that no module of PEFT's wraps")


def table_kind(name: str) -> str:
    """Whether a two-dimensional weight is a linear map's, an embedding's, or a table's that PEFT's factors do not fit.

    Parameters
    ----------
    name : str
        Of the tensor.

    Returns
    -------
    {"linear", "embedding", "whole"}

    Examples
    --------
    >>> names = ("h.0.q.weight", "wte.weight", "lm_head.weight", "decoder.embed_positions.weight")
    >>> [table_kind(name) for name in names]
    ['linear', 'embedding', 'linear', 'whole']
    """
    last = name.removesuffix(".weight").rpartition(".")[2]
    if is_input_embedding(name) or last in _LOOKED_UP:
        return "embedding"
    if last in _ODD_TABLES:
        return "whole"
    if last in _NO_TABLES or may_be_tied(name) or not is_table(name):
        return "linear"
    return "whole"


class _Conv1D:
    """Which linear maps are transformers' Conv1D, told by their biases: a Conv1D has one as long as its columns."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint | Adapter, pairing: Pairing) -> None:
        self._infos: Mapping[str, TensorInfo] = base.infos() if isinstance(tuned, Adapter) else tuned.infos()
        config = base.config if isinstance(tuned, Adapter) else tuned.config
        votes = {self._own(name) for name in self._infos if layer_and_role(name)[0] is not None} - {None}
        self._rest = votes == {True} or (not votes and config.get("model_type") in _CONV1D_MODELS)

    def _own(self, name: str) -> bool | None:
        """What a matrix that is not square says of itself, against its bias."""
        shape, bias = self._infos[name].shape, self._bias(name)
        if len(shape) != 2 or shape[0] == shape[1] or bias is None or not name.endswith("weight"):
            return None
        return True if bias == shape[1] else False if bias == shape[0] else None

    def _bias(self, name: str) -> int | None:
        info = self._infos.get(name.removesuffix("weight") + "bias")
        return info.shape[0] if info is not None and len(info.shape) == 1 else None

    def base_stores_transposed(self, stored: str, view: str) -> bool:
        """Whether the base holds (in, out); a view says where the two sides differ."""
        turned = "transpose_tuned" in view.split("|")
        if stored not in self._infos or self._bias(stored) is None:
            return turned
        own = self._own(stored)
        here = own if own is not None else self._rest and layer_and_role(stored)[0] is not None
        return here != turned


def _module_of_pair(pair: Pair, delta: AnyDelta | None) -> tuple[str, str]:
    """Module and parameter as the fine-tune has them; an adapter's own keys tell them."""
    if isinstance(delta, LowRankDelta):
        return module_of(delta.update.a)
    if isinstance(delta, AdapterDelta):
        update = delta.update
        source = update.a if isinstance(update, DoraUpdate) else update.source
        return module_of(source)
    if isinstance(delta, Delta):
        return module_of(delta.tuned_name)
    return module_of(pair.tuned or pair.base or pair.name)


def _untied(tuned: Checkpoint | Adapter) -> bool:
    return isinstance(tuned, Checkpoint) and tuned.config.get("tie_word_embeddings") is False


def _tie(tuned: Checkpoint, tensors: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str | None]:
    """Word embeddings that an output head is tied to, and the head's module where its name is known."""
    named = tuned.config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if not name.endswith(_TIED_HEADS) or _untied(tuned):
        return None, None
    words = [module for module, held in tensors.items() if "weight" in held and is_input_embedding(f"{module}.weight")]
    heads = [m for m, held in tensors.items() if "weight" in held and may_be_tied(f"{m}.weight") and m not in words]
    if not words or heads:
        return None, None
    known = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return words[0], "lm_head" if known else None


def _ending(modules: Iterable[str], endings: Iterable[str], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Outermost modules whose path ends like one of these and that the fine-tune stores tensors of."""
    found = sorted(
        m for m in modules if any(m.endswith(end) for end in endings) and any(_within(t, (m,)) for t in tensors)
    )
    return tuple(m for m in found if not any(m != other and _within(m, (other,)) for other in found))


def _within(module: str, paths: Iterable[str]) -> bool:
    return any(module == path or module.startswith(f"{path}.") for path in paths)


def _around(path: str) -> list[str]:
    """A module's path and those of the modules around it."""
    segments = path.split(".")
    return [".".join(segments[:depth]) for depth in range(1, len(segments) + 1) if segments[0]]
