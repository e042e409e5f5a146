"""`AdapterConfig`: what ``adapter_config.json`` says, checked, and the scale that it gives each module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spectra.checkpoints.module_patterns import PatternTable
from spectra.checkpoints.strict_json import read_object, shown
from spectra.errors import UnsafeCheckpoint, UnsupportedFormat

CONFIG_LIMIT = 10_000_000

# PEFT's ranks are small; the bound only keeps a stranger's integer inside a float.
_LARGEST_RANK = 2**31
# PEFT divides AdaLoRA's α by r + 1e-5, so that a module of rank 0 does not divide by zero.
_NO_ZERO = 1e-5
READ_TYPES = ("LORA", "ADALORA", "IA3")
_MERGE = "merge it with peft (merge_and_unload), save the model, and compare that folder"

# Fields that change what the factors mean, with the name people know each by.
_REFUSED_FIELDS = {
    "target_parameters": "LoRA on parameters (target_parameters, fused experts)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "layer_replication": "layer replication, whose layers the base model does not store",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing, which depends on the input",
    "alora_invocation_tokens": "activated LoRA, which depends on the input",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which truncates the base weights",
}
# Types whose parts act on activations, with the name people know each by.
_ACTIVATION_TYPES = {
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "SPECTRA_HOULSBY": "Houlsby's adapters",
}
# Types of this package that PEFT has not, with where the weights that they lead to are found.
_WHOLE_MODELS = {
    "SPECTRA_GLORA": "GLoRA's support tensors have no reader here; compare the merged model in the folder's merged/",
    "SPECTRA_FULLFINETUNE": "full fine-tuning stores weights, not updates; load it with spectra.methods.load_adapter, "
    "save the model, and compare that folder",
}
# Ways to begin that move part of the base weights into the factors: the stored factors belong to other base weights.
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """Fields of an adapter's ``adapter_config.json`` that its reader needs: of LoRA, AdaLoRA or IA3.

    Attributes
    ----------
    source : str
        The file, for messages.
    peft_type : str
        ``"LORA"``, ``"ADALORA"`` or ``"IA3"``.
    base_model : str or None
        ``base_model_name_or_path``: a hub id or a folder.
    base_revision : str or None
        ``revision`` of the base model.
    r, lora_alpha : int, float
        Rank, and the numerator of the scale. Of AdaLoRA the rank before pruning (``init_r``), which the scale keeps.
    use_rslora, use_dora, fan_in_fan_out, lora_bias : bool
        As in PEFT.
    bias : str
        ``"none"``, ``"all"`` or ``"lora_only"``: which biases were trained.
    rank_pattern, alpha_pattern : dict
        Ranks and alphas of single modules, by pattern of their names; LoRA's alone (AdaLoRA's ``rank_pattern`` says
        which triplets are left, and the factors' shapes say it too).
    modules_to_save : tuple of str
        Modules that were trained whole.
    target_modules : tuple of str, str or None
        Names, or one regular expression; None where the file does not say.
    task_type : str or None
        ``"SEQ_CLS"``, ``"CAUSAL_LM"``, …
    """

    source: str
    peft_type: str = "LORA"
    base_model: str | None = None
    base_revision: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str | None = None
    task_type: str | None = None

    def scales(self) -> Scales:
        """Rank and scale by module, patterns compiled."""
        return Scales(
            self,
            PatternTable(self.rank_pattern, source=f"{self.source}: rank_pattern"),
            PatternTable(self.alpha_pattern, source=f"{self.source}: alpha_pattern"),
        )


@dataclass(frozen=True)
class Scales:
    """Rank and scale of each module of an adapter: α/r, α/√r (rank-stabilised), or α/(r + 1e-5) (AdaLoRA in PEFT).

    Examples
    --------
    >>> config = AdapterConfig(source="example", r=4, lora_alpha=8, rank_pattern={"query": 16}, use_rslora=True)
    >>> scales = config.scales()
    >>> scales.rank("layer.0.query"), scales.scale("layer.0.query"), scales.scale("layer.0.key")
    (16, 2.0, 4.0)

    References
    ----------
    .. [1] E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.
    .. [2] D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, eq. (3).
    """

    config: AdapterConfig
    ranks: PatternTable
    alphas: PatternTable

    def rank(self, module: str) -> int:
        """Rank of a module, given by its path in the base model."""
        return int(self.ranks.find(module) or self.config.r)

    def scale(self, module: str) -> float:
        """Factor in front of B·A, or of B·diag(E)·A."""
        found = self.alphas.find(module)
        alpha = self.config.lora_alpha if found is None else found
        rank = self.rank(module)
        if self.config.peft_type == "ADALORA":
            return alpha / (rank + _NO_ZERO)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read and check an ``adapter_config.json``.

    Raises
    ------
    UnsafeCheckpoint
        Over 10 MB, malformed, or a field is of the wrong type or out of range.
    UnsupportedFormat
        Another method than LoRA, AdaLoRA or IA3, or a variant that has no reader here.
    CheckpointNotFound, CheckpointError
        The file is missing or cannot be read.
    """
    return parse_adapter_config(read_object(path, limit=CONFIG_LIMIT, unique=False), source=str(path))


def parse_adapter_config(fields: Mapping[str, Any], *, source: str) -> AdapterConfig:
    """Check the fields of an ``adapter_config.json``; unknown ones are ignored, null stands for the default.

    Raises
    ------
    UnsafeCheckpoint, UnsupportedFormat
        As `read_adapter_config`.

    Examples
    --------
    >>> parse_adapter_config({"peft_type": "LORA", "r": 4, "lora_alpha": 16}, source="example").lora_alpha
    16.0
    """
    reader = _Fields(fields, source)
    kind = _method(reader)
    bias = (reader.text("bias") if kind != "IA3" else None) or "none"
    if bias not in {"none", "all", "lora_only"}:
        raise UnsafeCheckpoint(f'{source}: bias is {shown(bias)}, not "none", "all" or "lora_only"')
    common = AdapterConfig(
        source=source,
        peft_type=kind,
        base_model=reader.text("base_model_name_or_path"),
        base_revision=reader.text("revision"),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        bias=bias,
        modules_to_save=reader.names("modules_to_save"),
        target_modules=_target_modules(reader),
        task_type=reader.text("task_type"),
    )
    if kind == "IA3":
        return common
    if kind == "ADALORA":
        # PEFT takes the rank itself where alpha is not positive.
        rank, alpha = reader.rank("init_r", 12), reader.number("lora_alpha", 8.0)
        return replace(common, r=rank, lora_alpha=alpha if alpha > 0 else float(rank))
    return replace(
        common,
        r=reader.rank("r", 8),
        lora_alpha=reader.number("lora_alpha", 8.0),
        use_rslora=reader.flag("use_rslora"),
        use_dora=reader.flag("use_dora"),
        lora_bias=reader.flag("lora_bias"),
        rank_pattern={
            key: reader.as_rank(value, f"rank_pattern[{shown(key)}]") for key, value in reader.table("rank_pattern")
        },
        alpha_pattern={
            key: reader.as_number(value, f"alpha_pattern[{shown(key)}]") for key, value in reader.table("alpha_pattern")
        },
    )


def _target_modules(reader: _Fields) -> tuple[str, ...] | str | None:
    value = reader.fields.get("target_modules")
    if value is None or isinstance(value, str):
        return value
    return reader.names("target_modules")


def _method(reader: _Fields) -> str:
    """Give the type of adapter, in capitals, where it has a reader and its variant has one."""
    method = reader.text("peft_type")
    if method is None:
        raise UnsupportedFormat(f'{reader.source} names no peft_type; a LoRA adapter of PEFT says "LORA"')
    kind = method.upper()
    if kind in _WHOLE_MODELS:
        raise UnsupportedFormat(f"{reader.source}: {_WHOLE_MODELS[kind]}")
    if kind in _ACTIVATION_TYPES:
        raise UnsupportedFormat(
            f"{reader.source}: {_ACTIVATION_TYPES[kind]} ({shown(method)}) acts on activations and has no weight "
            "update, so there is nothing to compare with the base model"
        )
    if kind not in READ_TYPES:
        raise UnsupportedFormat(f"{reader.source}: {shown(method)} adapters have no reader here; {_MERGE}")
    for name, words in _REFUSED_FIELDS.items():
        if reader.fields.get(name):
            raise UnsupportedFormat(f"{reader.source}: {words} has no reader here; {_MERGE}")
    start = reader.fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASE):
        raise UnsupportedFormat(
            f"{reader.source}: factors that began as {shown(start)} belong to changed base weights; save the adapter "
            f"with path_initial_model_for_weight_conversion, or {_MERGE}"
        )
    return kind


class _Fields:
    """Typed access to a stranger's JSON object."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = fields
        self.source = source

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def rank(self, name: str, default: int) -> int:
        value = self.fields.get(name)
        return default if value is None else self.as_rank(value, name)

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        return default if value is None else self.as_number(value, name)

    def as_rank(self, value: Any, name: str) -> int:
        if type(value) is not int or not 0 < value < _LARGEST_RANK:
            raise self._wrong(name, value, "a positive integer")
        return value

    def as_number(self, value: Any, name: str) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self._wrong(name, value, "a number")
        return float(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of names")
        return tuple(value)

    def table(self, name: str) -> list[tuple[str, Any]]:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return list((value or {}).items())

    def _wrong(self, name: str, value: Any, wanted: str) -> UnsafeCheckpoint:
        return UnsafeCheckpoint(f"{self.source}: {name} is {shown(value)}, not {wanted}")
