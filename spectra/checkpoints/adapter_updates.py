"""What an adapter does to each tensor of a base model: small values that hold names, found from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from spectra.checkpoints.adapter_config import AdapterConfig
from spectra.checkpoints.adapter_keys import AdapterKeys, ModuleKeys
from spectra.checkpoints.checkpoint import TensorInfo, listed
from spectra.checkpoints.name_rules import canonical_name, is_input_embedding, is_table, may_be_tied
from spectra.checkpoints.names import Pair, nearest_names, pair_names
from spectra.checkpoints.strict_json import shown
from spectra.errors import MismatchError, UnsupportedFormat

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = scale · B·A, of AdaLoRA scale · B·diag(E)·A, or its transpose where the base stores (in, out).

    Attributes
    ----------
    name : str
        Tensor of the base model, as it is called there.
    a, b : str
        Stored names of A (r, in) and B (out, r); of an embedding's A (r, rows) and B (columns, r). Kernels of a
        convolution are meant flattened to (r, in·kh·kw) and (out, r).
    scale : float
        α/r or α/√r; of AdaLoRA α/(r + 1e-5), r the rank before pruning.
    transposed : bool
        Whether the base stores (in, out): Conv1D, fan-in-fan-out, and every embedding.
    e : str or None
        Stored name of AdaLoRA's diagonal E (r, 1).

    References
    ----------
    .. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, eq. (3).
    """

    name: str
    a: str
    b: str
    scale: float
    transposed: bool
    e: str | None = None


@dataclass(frozen=True)
class DoraUpdate:
    """ΔW = m · (W + scale·B·A) / ‖W + scale·B·A‖ − W, norms and magnitudes m by output; not of low rank.

    References
    ----------
    .. [1] S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, eq. (5).
    """

    name: str
    a: str
    b: str
    magnitude: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class ReplacementUpdate:
    """A tensor that was trained whole (modules_to_save, a bias): `source` is its new value.

    The base may have no tensor of that name (a new head), or one of another shape (a head with more labels).
    """

    name: str
    source: str


@dataclass(frozen=True)
class ShiftUpdate:
    """The bias of B (lora_bias): ΔW = scale · source."""

    name: str
    source: str
    scale: float


@dataclass(frozen=True)
class RescaleUpdate:
    """IA3: ΔW = W ⊙ (l − 1), l along one axis of the tensor as the base stores it; not of low rank.

    Attributes
    ----------
    name : str
        Tensor of the base model: a weight, or the bias of a module whose outputs are rescaled.
    source : str
        Stored name of l, (out, 1) or (1, in).
    axis : int
        Axis of the base's tensor that l runs along.

    References
    ----------
    .. [1] H. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
       NeurIPS 2022, section 3.3.
    """

    name: str
    source: str
    axis: int


@dataclass(frozen=True)
class RebasedUpdate:
    """A tensor that was stored whole and is updated too (PEFT saves an embedding that LoRA targets).

    ΔW = source − W + what `update` adds to source; of low rank only where source is W.
    """

    name: str
    source: str
    update: LowRankUpdate | DoraUpdate | ShiftUpdate | RescaleUpdate


_Value = TypeVar("_Value")

Update = LowRankUpdate | DoraUpdate | ReplacementUpdate | ShiftUpdate | RescaleUpdate | RebasedUpdate


def find_updates(
    keys: AdapterKeys,
    config: AdapterConfig,
    infos: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    *,
    source: str,
) -> tuple[Update, ...]:
    """Updates that an adapter makes to a base model, in the order in which the adapter stores them.

    Parameters
    ----------
    keys : AdapterKeys
    config : AdapterConfig
    infos, base : mapping of str to TensorInfo
        Stored tensors of the adapter and of the base model.
    source : str
        The adapter's file, for messages.

    Raises
    ------
    MismatchError
        Shapes do not fit each other, the rank that the configuration gives, or the base; or the base has no tensor
        for a target.
    UnsupportedFormat
        IA3 on a convolution, or by a vector of one number.
        The base stacks a targeted expert, two updates would act on one tensor, factors are no floats, or a tensor
        stored whole has no place in the base and is no module to save.
    """
    scales = config.scales()
    shapes = _shapes_by_name(keys, base)
    implied = _rescaled(keys.vectors, infos, shapes, source)
    for path, module in keys.modules.items():
        shape = _update_shape(path, module, infos, scales.rank(path), source)
        kernel = shapes.get(f"{path}.weight", ())[1:]
        if len(kernel) > 1 and prod(kernel) == shape[1]:  # AdaLoRA's factors know it flattened
            shape = (shape[0], *kernel)
        implied[f"{path}.weight"] = TensorInfo(f"{path}.weight", infos[module.b].dtype, shape, "", 0)
        if module.bias is not None:
            _check_bias(module.bias, infos, shape, source)
            implied[f"{path}.bias"] = infos[module.bias]
    targets = _by_canonical_name(implied, source)
    whole = _by_canonical_name(keys.whole, source)
    places = _Places(base, {**{name: infos[stored] for name, stored in whole.items()}, **targets}, set(whole), source)
    evidence = _orientation(places, keys)
    updates: dict[str, Update] = {}

    def add(wanted: str, update: LowRankUpdate | DoraUpdate | ShiftUpdate | RescaleUpdate) -> None:
        stored_whole = whole.pop(canonical_name(wanted), None)
        _add(updates, RebasedUpdate(update.name, stored_whole, update) if stored_whole else update, source)

    for path, module in keys.modules.items():
        weight = places.target(f"{path}.weight")
        transposed = module.embedding or _is_transposed(weight, places, evidence, config)
        update = _factored(module, weight.base or "", scales.scale(path), transposed)
        _check_magnitude(module, infos, update, places, source)
        if infos[module.b].shape[1]:  # AdaLoRA may have pruned a module away
            add(f"{path}.weight", update)
        if module.bias is not None:
            bias = places.target(f"{path}.bias").base or ""
            add(f"{path}.bias", ShiftUpdate(bias, module.bias, scales.scale(path)))
    for path, vector in keys.vectors.items():
        weight = places.target(f"{path}.weight")
        rows = infos[vector].shape[1] == 1
        axis = int(rows == _is_transposed(weight, places, evidence, config))
        add(f"{path}.weight", RescaleUpdate(weight.base or "", vector, axis))
        if f"{path}.bias" in implied:
            add(f"{path}.bias", RescaleUpdate(places.target(f"{path}.bias").base or "", vector, 0))
    for name, stored in whole.items():
        _add(updates, ReplacementUpdate(places.whole(name, config), stored), source)
    return tuple(updates.values())


def _by_canonical_name(table: Mapping[str, _Value], source: str) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, value in table.items():
        short = canonical_name(name)
        if short in found:
            raise MismatchError(f"{source}: two entries are both {shown(short)} once wrappers are stripped")
        found[short] = value
    return found


def _shapes_by_name(keys: AdapterKeys, base: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Shapes in the base of weights and biases whose own shape the adapter's tensors do not tell, found by name."""
    paths = [*keys.vectors, *(path for path, module in keys.modules.items() if module.e is not None)]
    if not paths:
        return {}

    def alike(names: Iterable[str]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, "F32", (1,), "", 0) for name in names}

    wanted = {canonical_name(f"{path}.{end}"): f"{path}.{end}" for path in paths for end in ("weight", "bias")}
    pairs = pair_names(alike(base), alike(wanted)).pairs
    return {wanted[p.tuned]: base[p.base].shape for p in pairs if p.base is not None and p.tuned is not None}


def _rescaled(
    vectors: Mapping[str, str], infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, TensorInfo]:
    """Weights (out, in) and biases that IA3's vectors rescale; the side that a vector does not tell is the base's."""
    found: dict[str, TensorInfo] = {}
    for path, name in vectors.items():
        info, weight = infos[name], f"{path}.weight"
        _check_floats((info,), source)
        size, stored = prod(info.shape), shapes.get(weight, (0, 0))
        if len(info.shape) > 2 or len(stored) > 2 or size == 1:
            raise UnsupportedFormat(
                f"{source}: {shown(name)} {info.shape} rescales {shown(weight)} {stored}, and does not tell whether "
                "by input or by output; merge the adapter with peft (merge_and_unload), save the model, and compare "
                "that folder"
            )
        if len(info.shape) != 2 or 1 not in info.shape or size == 0 or len(stored) != 2:
            raise MismatchError(f"{source}: {shown(name)} {info.shape} does not rescale {shown(weight)} {stored}")
        rows = info.shape[1] == 1
        out, inner = stored if size == stored[not rows] else stored[::-1]
        found[weight] = replace(info, name=weight, shape=(size, inner) if rows else (out, size))
        if rows and f"{path}.bias" in shapes:
            found[f"{path}.bias"] = replace(info, name=f"{path}.bias", shape=(size,))
    return found


def _update_shape(
    path: str, module: ModuleKeys, infos: Mapping[str, TensorInfo], rank: int, source: str
) -> tuple[int, ...]:
    """Shape of the tensor that a module's factors update, as an untransposed base stores it."""
    a, b = infos[module.a], infos[module.b]
    _check_floats((a, b), source)
    shapes = f"{shown(module.a)} {a.shape}, {shown(module.b)} {b.shape}"
    flat = len(a.shape) == len(b.shape) >= 2 and prod(b.shape[2:]) == 1 and (len(a.shape) == 2 or not module.embedding)
    if module.e is not None:
        e = infos[module.e]
        _check_floats((e,), source)
        flat, shapes = flat and e.shape == (a.shape[0], 1), f"{shapes}, {shown(module.e)} {e.shape}"
    pruned = module.e is not None and flat and a.shape[0] == 0
    if not flat or a.shape[0] != b.shape[1] or 0 in (*a.shape[pruned:], *b.shape[: len(b.shape) - pruned]):
        raise MismatchError(f"{source}: factors of {shown(path)} do not fit each other: {shapes}")
    if a.shape[0] > rank if module.e is not None else a.shape[0] != rank:
        raise MismatchError(
            f"{source}: adapter_config.json gives {shown(path)} rank {rank}, its factors have {a.shape[0]}: {shapes}"
        )
    return (a.shape[1], b.shape[0]) if module.embedding else (b.shape[0], *a.shape[1:])


def _check_floats(tensors: tuple[TensorInfo, ...], source: str) -> None:
    for info in tensors:
        if info.dtype not in _FLOATS:
            raise UnsupportedFormat(
                f"{source}: {shown(info.name)} is {info.dtype}; factors are read as {', '.join(sorted(_FLOATS))}"
            )


def _check_bias(name: str, infos: Mapping[str, TensorInfo], shape: tuple[int, ...], source: str) -> None:
    _check_floats((infos[name],), source)
    if infos[name].shape != shape[:1]:
        raise MismatchError(f"{source}: {shown(name)} has shape {infos[name].shape}, its module {shape[0]} outputs")


def _check_magnitude(
    module: ModuleKeys,
    infos: Mapping[str, TensorInfo],
    update: LowRankUpdate | DoraUpdate,
    places: _Places,
    source: str,
) -> None:
    if module.magnitude is None:
        return
    magnitude = infos[module.magnitude]
    _check_floats((magnitude,), source)
    shape = places.base[update.name].shape
    outputs = shape[-1] if update.transposed else shape[0]
    if prod(magnitude.shape) != outputs:
        raise MismatchError(
            f"{source}: {shown(module.magnitude)} has shape {magnitude.shape}, but {shown(update.name)} of shape "
            f"{shape} has {outputs} outputs"
        )


def _factored(module: ModuleKeys, name: str, scale: float, transposed: bool) -> LowRankUpdate | DoraUpdate:
    if module.magnitude is None:
        return LowRankUpdate(name, module.a, module.b, scale, transposed, module.e)
    return DoraUpdate(name, module.a, module.b, module.magnitude, scale, transposed)


def _add(updates: dict[str, Update], update: Update, source: str) -> None:
    if update.name in updates:
        raise UnsupportedFormat(
            f"{source} updates {shown(update.name)} of the base model twice (a head that is tied to its embedding?); "
            "merge the adapter with peft (merge_and_unload), save the model, and compare that folder"
        )
    updates[update.name] = update


class _Places:
    """Where in a base model the tensors of an adapter belong, found as `pair_names` finds the pairs of two models."""

    def __init__(
        self, base: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], whole: set[str], source: str
    ) -> None:
        self.base = base
        self._stored_whole = whole
        self.source = source
        self._wanted = wanted
        pairs = pair_names(base, wanted).pairs
        self._found: dict[str, Pair] = {pair.tuned: pair for pair in pairs if pair.tuned is not None}

    def target(self, name: str) -> Pair:
        """Pair of a tensor that factors or biases act on, its base present and of the right shape."""
        name = canonical_name(name)
        pair, shape = self._found[name], self._wanted[name].shape
        if pair.status == "ok" and pair.view in ("", "transpose_tuned"):
            return pair
        if pair.status == "ok" and pair.view.startswith("rows:") and name in self._stored_whole:
            return pair
        if pair.status == "ok" and pair.view.startswith("expert:"):
            raise UnsupportedFormat(
                f"{self.source} targets {shown(name)}, but the base stacks its experts in {shown(pair.base)}; merge "
                "the adapter with peft (merge_and_unload), save the model, and compare that folder"
            )
        if pair.base is not None:
            raise MismatchError(
                f"{self.source}: factors for {shown(name)} make a matrix of shape {shape}, but {shown(pair.base)} of "
                f"the base has shape {self.base[pair.base].shape}"
            )
        tied = self._tied_embedding(name)
        if tied is not None:
            return Pair(name, tied, name, "ok", f"tied to {shown(tied)} in base", "")
        raise self._no_place([name])

    def whole(self, name: str, config: AdapterConfig) -> str:
        """Name under which a tensor that was stored whole stands in the base, or its own where it is a new module."""
        pair = self._found[name]
        if pair.base is not None and not pair.reason.startswith("tied to"):
            return pair.base
        # As PEFT chooses modules to save: by the ending of a module's path.
        saved = any(f"{ending}." in name for ending in config.modules_to_save if ending)
        if pair.base is None and not saved:
            raise UnsupportedFormat(
                f"{self.source}: {shown(name)} is neither a tensor of the base model nor in a module to save "
                f"({listed(config.modules_to_save) or 'none'}); is this the adapter's base model?"
            )
        return name

    def _tied_embedding(self, name: str) -> str | None:
        """The base's only word embeddings, where an output head is wanted that the base does not store."""
        if not may_be_tied(name):
            return None
        shape = self._wanted[name].shape
        same = [n for n, info in self.base.items() if info.shape == shape and is_input_embedding(canonical_name(n))]
        return same[0] if len(same) == 1 else None

    def _no_place(self, names: list[str]) -> MismatchError:
        lines = []
        for name in names:
            near = nearest_names(name, [canonical_name(stored) for stored in self.base])
            lines.append(shown(name) + (f" (nearest: {listed(near)})" if near else ""))
        return MismatchError(
            f"{self.source} targets tensors that the base model does not have: {'; '.join(lines)}. Is this the "
            "adapter's base model?"
        )


def _orientation(places: _Places, keys: AdapterKeys) -> bool | None:
    """Whether the base stores its linear layers (in, out), as its matrices that are not square tell; None: they differ.

    PEFT corrects fan_in_fan_out to the layer it wraps last, so for a model that mixes Conv1D with a linear head the
    field tells of the head. Heads and embeddings are no evidence.
    """
    seen = set()
    embeddings = {path for path, module in keys.modules.items() if module.embedding}
    for path in (*keys.modules, *keys.vectors):
        name = f"{path}.weight"
        if path in embeddings or is_table(name):
            continue
        shape = places.base[places.target(name).base or ""].shape
        if len(shape) == 2 and shape[0] != shape[1]:
            seen.add(places.target(name).view == "transpose_tuned")
    return seen.pop() if len(seen) == 1 else None


def _is_transposed(pair: Pair, places: _Places, evidence: bool | None, config: AdapterConfig) -> bool:
    shape = places.base[pair.base or ""].shape
    if len(shape) != 2:
        return False
    if shape[0] != shape[1]:
        return pair.view == "transpose_tuned"
    if is_table(pair.name) or evidence is None:
        return config.fan_in_fan_out and not is_table(pair.name)
    return evidence
