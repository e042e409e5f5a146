"""Keys of an adapter file: which module each belongs to and what it is there; none is guessed at, none dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from spectra.checkpoints.adapter_config import AdapterConfig
from spectra.checkpoints.checkpoint import listed
from spectra.errors import MismatchError, UnsafeCheckpoint, UnsupportedFormat

# Segment that marks a tensor of each method, and the endings that it may have (an adapter's name may stand before
# them). AdaLoRA's ranknum is the rank before pruning, which the configuration gives: PEFT does not read it either.
_ENDINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "LORA": {
        "lora_A": ("weight",),
        "lora_B": ("weight", "bias"),
        "lora_embedding_A": ("",),
        "lora_embedding_B": ("",),
        "lora_magnitude_vector": ("", "weight"),
    },
    "ADALORA": {"lora_A": ("",), "lora_E": ("",), "lora_B": ("",), "ranknum": ("",)},
    "IA3": {"ia3_l": ("",)},
}
_MARKERS = frozenset(marker for endings in _ENDINGS.values() for marker in endings)
# Beginnings of segments that other methods put into their keys.
_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "lora_diag": "KaSA",
    "lora_down": "kohya's LoRA",
    "lora_up": "kohya's LoRA",
    "lora_mid": "kohya's LoRA",
    "dora_scale": "kohya's LoRA",
    "trainable_tokens": "trainable tokens",
    "prompt_embeddings": "prompt tuning",
}


@dataclass(frozen=True)
class ModuleKeys:
    """Stored names of one module's tensors of LoRA or AdaLoRA.

    Attributes
    ----------
    a, b : str
        The factors.
    embedding : bool
        Whether they are those of an embedding: A (r, rows), B (columns, r).
    magnitude : str or None
        DoRA's magnitudes.
    bias : str or None
        The bias of B.
    e : str or None
        AdaLoRA's diagonal between the factors.
    """

    a: str
    b: str
    embedding: bool
    magnitude: str | None = None
    bias: str | None = None
    e: str | None = None


@dataclass(frozen=True)
class AdapterKeys:
    """All keys of an adapter, understood.

    Attributes
    ----------
    modules : mapping of str to ModuleKeys
        Modules with factors, by path.
    whole : mapping of str to str
        Tensors that are stored whole, by name.
    vectors : mapping of str to str
        IA3's rescaling vectors, by path of the module.
    """

    modules: Mapping[str, ModuleKeys]
    whole: Mapping[str, str]
    vectors: Mapping[str, str] = field(default_factory=dict)


def understand_keys(names: Iterable[str], *, source: str, peft_type: str = "LORA") -> AdapterKeys:
    """Sort the keys of an adapter file.

    Parameters
    ----------
    names : iterable of str
        Stored names, such as ``base_model.model.h.0.attn.lora_A.weight``.
    source : str
        The file, for messages.
    peft_type : str
        ``"LORA"``, ``"ADALORA"`` or ``"IA3"``, as the configuration says.

    Returns
    -------
    AdapterKeys
        Paths as the base model has them, PEFT's prefix removed.

    Raises
    ------
    UnsupportedFormat
        A key of another method, or one that is not understood; all of them are listed.
    MismatchError
        A factor without its partner.
    UnsafeCheckpoint
        Two keys say the same thing.

    Examples
    --------
    >>> keys = understand_keys(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], source="…")
    >>> keys.modules["q"].a
    'base_model.model.q.lora_A.weight'
    """
    parts: defaultdict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, str] = {}
    adapters: set[str] = set()
    unknown: list[str] = []
    for name in names:
        _refuse_other_method(name, source, peft_type)
        path, marker, tail = _split(name)
        if marker is None:
            _put(whole, _without_wrapper(path), name, source)
            continue
        ending = _ending(_ENDINGS[peft_type].get(marker, ()), tail)
        if ending is None or not path:
            unknown.append(name)
            continue
        if len(tail) > bool(ending):
            adapters.add(tail[0])
        _put(parts[path], f"{marker}.{ending}" if ending == "bias" else marker, name, source)
    if unknown:
        raise UnsupportedFormat(
            f"{source} holds {len(unknown)} keys that are not understood: {listed(unknown)}. Merge the adapter with "
            "peft (merge_and_unload), save the model, and compare that folder."
        )
    if len(adapters) > 1:
        raise UnsupportedFormat(f"{source} holds several adapters ({listed(sorted(adapters))}); save one a folder")
    if peft_type == "IA3":
        return AdapterKeys({}, whole, {path: found["ia3_l"] for path, found in parts.items()})
    adaptive = peft_type == "ADALORA"
    return AdapterKeys({path: _module(path, found, source, adaptive) for path, found in parts.items()}, whole)


def check_variants(keys: AdapterKeys, config: AdapterConfig, *, source: str) -> None:
    """Check that configuration and keys tell of the same variant.

    Raises
    ------
    MismatchError
        DoRA, trained biases of B or whole tensors are in one and not in the other.
    """
    for path, module in keys.modules.items():
        if config.use_dora and module.magnitude is None:
            raise MismatchError(f"{source}: use_dora is true, but {path} has no lora_magnitude_vector")
        if not config.use_dora and module.magnitude is not None:
            raise MismatchError(f"{source}: use_dora is false, but there is {listed([module.magnitude])}")
        if not config.lora_bias and module.bias is not None:
            raise MismatchError(f"{source}: lora_bias is false, but there is {listed([module.bias])}")


def _split(name: str) -> tuple[str, str | None, list[str]]:
    """(path, marker, what follows it); without a marker the whole name is the path."""
    bare = name.removeprefix("base_model.model.")
    segments = bare.split(".")
    at = [i for i, segment in enumerate(segments) if segment in _MARKERS]
    if not at:
        return bare, None, []
    return ".".join(segments[: at[-1]]), segments[at[-1]], segments[at[-1] + 1 :]


def _ending(endings: tuple[str, ...], tail: list[str]) -> str | None:
    """Last part of a key, with at most an adapter's name before it; None where it is not one of PEFT's."""
    if tail and tail[-1] in endings and len(tail) <= 2:
        return tail[-1]
    return "" if "" in endings and len(tail) <= 1 else None


def _refuse_other_method(name: str, source: str, peft_type: str) -> None:
    for segment in name.split("."):
        if segment in _ENDINGS[peft_type]:
            continue
        for beginning, method in _OTHER_METHODS.items():
            if segment in _MARKERS and segment.startswith(beginning):
                raise UnsupportedFormat(
                    f"{source}: {listed([name])} is a key of {method}, but adapter_config.json says {peft_type}; "
                    "give the configuration that the tensors were saved with"
                )
            if segment.startswith(beginning):
                raise UnsupportedFormat(
                    f"{source}: {listed([name])} is a key of {method}, which has no reader here; merge the adapter "
                    "with the tool that wrote it, and compare the merged model"
                )


def _without_wrapper(path: str) -> str:
    """Name of a tensor stored whole, without ``modules_to_save`` and an adapter's name after it."""
    head, found, tail = path.rpartition(".modules_to_save.")
    if not found:
        return path
    rest = tail.split(".")
    return ".".join([head, *(rest[1:] if len(rest) > 1 else rest)])


def _put(table: dict[str, str], key: str, name: str, source: str) -> None:
    if key in table:
        raise UnsafeCheckpoint(f"{source}: {listed([table[key], name])} say the same thing twice")
    table[key] = name


def _module(path: str, found: Mapping[str, str], source: str, adaptive: bool) -> ModuleKeys:
    plain = found.get("lora_A"), found.get("lora_B")
    embedding = found.get("lora_embedding_A"), found.get("lora_embedding_B")
    a, b = plain if any(plain) else embedding
    if a is None or b is None or (any(plain) and any(embedding)):
        held = listed(sorted(found.values()))
        raise MismatchError(f"{source}: module {listed([path])} needs one lora_A and one lora_B, but holds {held}")
    e = found.get("lora_E")
    if adaptive and e is None:
        raise MismatchError(f"{source}: module {listed([path])} needs a lora_E between its factors, but has none")
    return ModuleKeys(a, b, any(embedding), found.get("lora_magnitude_vector"), found.get("lora_B.bias"), e)
