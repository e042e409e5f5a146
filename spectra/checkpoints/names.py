"""Which tensor of one checkpoint is which of another: pure functions of names, dtypes and shapes, no tensor is read."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spectra.checkpoints.name_rules import (
    canonical_name,
    expert_parts,
    is_buffer,
    is_input_embedding,
    layer_and_role,
    may_be_tied,
    modern_spelling,
)
from spectra.checkpoints.prefixes import PrefixChange, Shape, alike, best_prefix_change
from spectra.checkpoints.strict_json import shown
from spectra.errors import MismatchError

if TYPE_CHECKING:
    from spectra.checkpoints.checkpoint import TensorInfo

__all__ = ["Pair", "Pairing", "canonical_name", "layer_and_role", "nearest_names", "pair_names"]

# Rounds of prefix changes: a vision-language model has a tower, a language model and a head to rename.
_ROUNDS = 4
# The largest public mixture (Switch-C) has 2048 experts; a longer first dimension is no stack of experts.
_MOST_EXPERTS = 4096
# Nearest neighbours are looked up for this many unmatched names, among this many others, no longer than this.
_NEIGHBOURS_FOR, _NEIGHBOURS_AMONG, _LONGEST_NEIGHBOUR = 50, 200, 300


@dataclass(frozen=True)
class Pair:
    """One row of a comparison: a tensor of the base model, one of the tuned model, or both.

    Parameters
    ----------
    name : str
        Canonical name, of the tuned model where both have the tensor. No two pairs of a `Pairing` share one.
    base, tuned : str or None
        Names as each checkpoint stores them; None where it has no such tensor.
    status : str
        ``"ok"``, ``"alias"``, ``"shape_mismatch"``, ``"base_only"`` or ``"tuned_only"``.
    reason : str
        Why the status, or what had to be done to compare the two; "" where there is nothing to say.
    view : str
        What to take of the two tensors, steps joined by ``|``, applied left to right; "" is all of both.
        ``expert:3:base`` (``:tuned``, ``:both``) takes entry 3 of the stacked tensor of that side;
        ``transpose_tuned`` transposes the tuned one; ``rows:30522`` takes the first 30522 rows of both.
    buffer : bool
        Whether the tensor is a constant that a model computes for itself; it does not count in the share.
    """

    name: str
    base: str | None
    tuned: str | None
    status: str
    reason: str
    view: str
    buffer: bool = False


@dataclass(frozen=True)
class Pairing:
    """All pairs of two checkpoints, in the base's stored order, then what only the tuned one has, then aliases.

    Parameters
    ----------
    pairs : tuple of Pair
        Every tensor of both checkpoints stands in at least one.
    transforms : tuple of str
        Sentences that say what was stripped from the names or read otherwise.
    matched, total : int
        Pairs that can be compared, and all pairs, neither counting buffers nor aliases.
    share : float
        matched / total; 0 where there is nothing to compare.
    """

    pairs: tuple[Pair, ...]
    transforms: tuple[str, ...]
    matched: int
    total: int
    share: float


@dataclass
class _Side:
    """One checkpoint while it is being paired; a key is a name as the other side may spell it."""

    label: str
    infos: Mapping[str, TensorInfo]
    canonical: dict[str, str]  # stored name → canonical name
    key: dict[str, str]  # stored name or alias → key
    alias_of: dict[str, str]  # alias → stored name
    alone: dict[str, str] = field(default_factory=dict)  # key → stored name, not yet paired

    def shapes(self) -> dict[str, Shape]:
        return {key: self.infos[name].shape for key, name in self.alone.items()}


def pair_names(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    *,
    base_aliases: Mapping[str, str] | None = None,
    tuned_aliases: Mapping[str, str] | None = None,
) -> Pairing:
    """Pair the tensors of two checkpoints by name and shape.

    Wrappers are stripped, a prefix that one side alone has is found from the data, tied weights, resized
    vocabularies, transposed (Conv1D) weights and stacked experts are recognised. Nothing is dropped: what has no
    counterpart gets a pair with one name and a reason.

    Parameters
    ----------
    base, tuned : mapping of str to TensorInfo
        Tensors of the two checkpoints; only ``dtype`` and ``shape`` of an entry are read.
    base_aliases, tuned_aliases : mapping of str to str, optional
        Other names of stored tensors, as `Checkpoint.aliases` gives them: alias to stored name.

    Returns
    -------
    Pairing

    Raises
    ------
    MismatchError
        Two names of one checkpoint are the same once wrappers are stripped.

    Notes
    -----
    An output head that one side stores and the other ties to its word embeddings is compared with those
    embeddings; its pair has status ``"ok"`` and a reason that begins with "tied to". Tied on both sides, it has
    status ``"alias"``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> infos = lambda *names: {name: SimpleNamespace(dtype="F32", shape=(4, 3)) for name in names}
    >>> pairing = pair_names(infos("h.0.up.weight"), infos("module.bert.h.0.up.weight"))
    >>> pairing.pairs[0].base, pairing.pairs[0].tuned, pairing.share
    ('h.0.up.weight', 'module.bert.h.0.up.weight', 1.0)
    >>> pairing.transforms
    ("tuned names lose the wrappers 'module'", "tuned names lose the prefix 'bert.'")
    """
    left, said = _side("base", base, base_aliases or {})
    right, said_too = _side("tuned", tuned, tuned_aliases or {})
    found, changes = _match(left, right)
    pairs = [pair for b, t in found for pair in _compared(left, right, b, t)]
    pairs += _tied(left, right, found)
    pairs += _unstacked(left, right)
    pairs += [pair for side, other in ((left, right), (right, left)) for pair in _unmatched(side, other)]
    pairs = _square_like_the_rest(pairs, base)
    ordered = _with_unique_names(_in_stored_order(pairs, left, right) + _alias_rows(left, right, pairs))
    counted = [pair for pair in ordered if not pair.buffer and pair.status != "alias"]
    matched = sum(pair.status == "ok" for pair in counted)
    return Pairing(
        pairs=tuple(ordered),
        transforms=(*said, *said_too, *(change.sentence() for change in changes)),
        matched=matched,
        total=len(counted),
        share=matched / len(counted) if counted else 0.0,
    )


def nearest_names(name: str, candidates: list[str], *, most: int = 3) -> list[str]:
    """Candidates that are spelt most like a name, nearest first; at bounded cost, so not every one is looked at."""
    if len(name) > _LONGEST_NEIGHBOUR:
        return []
    last = name.rpartition(".")[2]
    short = [c for c in candidates if len(c) <= _LONGEST_NEIGHBOUR]
    same_end = [c for c in short if c.rpartition(".")[2] == last]
    return difflib.get_close_matches(name, (same_end or short)[:_NEIGHBOURS_AMONG], n=most, cutoff=0.5)


def _side(label: str, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str]) -> tuple[_Side, list[str]]:
    """Strip wrappers from the names of one checkpoint, and say which."""
    alias_of = {alias: stored for alias, stored in aliases.items() if stored in infos and stored not in aliases}
    canonical: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in [*(n for n in infos if n not in alias_of), *alias_of]:
        short = canonical_name(name)
        if short in seen:
            raise MismatchError(
                f"{label} checkpoint: {shown(seen[short])} and {shown(name)} are both {shown(short)} once wrappers "
                "are stripped; remove one of the two, or save the unwrapped model"
            )
        seen[short] = name
        canonical[name] = short
    key = {name: _modern(short, seen) for name, short in canonical.items()}
    side = _Side(label, infos, canonical, key, alias_of)
    side.alone = {key[name]: name for name in infos if name not in alias_of}
    lost = sorted(_lost_wrappers(canonical))
    return side, [f"{label} names lose the wrappers {', '.join(map(repr, lost))}"] if lost else []


def _modern(short: str, taken: Mapping[str, str]) -> str:
    modern = modern_spelling(short)
    return short if modern in taken else modern


def _lost_wrappers(canonical: Mapping[str, str]) -> set[str]:
    lost: set[str] = set()
    for name, short in canonical.items():
        if len(name) != len(short):
            before, after = name.split("."), short.split(".")
            lost.update(s for s in set(before) if before.count(s) > after.count(s))
    return (lost - {"base_model", "model"}) | ({"base_model.model"} if "base_model" in lost else set())


def _match(base: _Side, tuned: _Side) -> tuple[list[tuple[str, str]], list[PrefixChange]]:
    """Pair equal keys of like shapes, changing prefixes as long as that helps; equal keys of unlike shapes last."""
    found = _take_equal_keys(base, tuned, any_shape=False)
    changes: list[PrefixChange] = []
    for _ in range(_ROUNDS):
        change = best_prefix_change(base.shapes(), tuned.shapes(), first=not found)
        if change is None:
            break
        _rekey(base, change.base_key)
        _rekey(tuned, change.tuned_key)
        changes.append(change)
        found += _take_equal_keys(base, tuned, any_shape=False)
    return found + _take_equal_keys(base, tuned, any_shape=True), changes


def _take_equal_keys(base: _Side, tuned: _Side, *, any_shape: bool) -> list[tuple[str, str]]:
    found = []
    for key in [key for key in base.alone if key in tuned.alone]:
        b, t = base.alone[key], tuned.alone[key]
        if any_shape or alike(key, base.infos[b].shape, tuned.infos[t].shape):
            found.append((base.alone.pop(key), tuned.alone.pop(key)))
    return found


def _rekey(side: _Side, change: Callable[[str], str]) -> None:
    """Change the keys of what is still alone, never into a key that is taken."""
    taken = set(side.key.values())
    for name, key in side.key.items():
        new = change(key)
        if new in taken or (key not in side.alone and name not in side.alias_of):
            continue
        side.key[name] = new
        taken.add(new)
        if key in side.alone:
            side.alone[new] = side.alone.pop(key)


def _compared(base: _Side, tuned: _Side, b: str, t: str, *, tie: str = "", name: str = "") -> list[Pair]:
    """Pairs of two tensors that are to be compared: one, or one an expert where both are stacks."""
    name = name or tuned.canonical[t]
    one, other = base.infos[b], tuned.infos[t]
    buffer = is_buffer(name, one.dtype, one.shape) and is_buffer(name, other.dtype, other.shape)
    if _is_stack(name, one.shape) and _is_stack(name, other.shape) and one.shape[0] == other.shape[0]:
        status, view, reason = _verdict(name, one.shape[1:], other.shape[1:])
        return [
            Pair(f"{name}[{i}]", b, t, status, reason, _steps(f"expert:{i}:both", view)) for i in range(one.shape[0])
        ]
    status, view, reason = _verdict(name, one.shape, other.shape)
    return [Pair(name, b, t, status, "; ".join(filter(None, (tie, reason))), view, buffer)]


def _verdict(name: str, base: Shape, tuned: Shape) -> tuple[str, str, str]:
    """Status, view and reason that two shapes ask for; square transposes cannot be told and are left alone."""
    if base == tuned:
        return "ok", "", ""
    if len(base) == 2 and base == tuned[::-1]:
        reason = f"stored transposed (Conv1D or fan-in-fan-out): {base} in base, {tuned} in tuned"
        return "ok", "transpose_tuned", reason
    if alike(name, base, tuned) and min(base[0], tuned[0]) > 0:
        common = min(base[0], tuned[0])
        return "ok", f"rows:{common}", f"{base[0]} → {tuned[0]} rows; the {common} common rows compared"
    return "shape_mismatch", "", f"shape {base} in base, {tuned} in tuned"


def _square_like_the_rest(pairs: list[Pair], base: Mapping[str, TensorInfo]) -> list[Pair]:
    """Turn the square matrices of the layers too where every other matrix of the layers is stored transposed."""

    def kernel(pair: Pair) -> bool:
        both = pair.status == "ok" and pair.base is not None and pair.tuned is not None
        return both and len(base[pair.base or ""].shape) == 2 and layer_and_role(pair.name)[0] is not None

    kernels = [pair for pair in pairs if kernel(pair)]
    square = {pair.name for pair in kernels if len(set(base[pair.base or ""].shape)) == 1 and not pair.view}
    others = [pair for pair in kernels if pair.name not in square]
    if not others or not all(pair.view == "transpose_tuned" for pair in others):
        return pairs
    reason = "square: taken as stored transposed, since every other matrix of the layers is"
    return [replace(p, view="transpose_tuned", reason=reason) if p.name in square else p for p in pairs]


def _is_stack(name: str, shape: Shape) -> bool:
    parts = expert_parts(name)
    return parts is not None and parts[1] is None and len(shape) == 3 and all(shape) and shape[0] <= _MOST_EXPERTS


def _steps(*views: str) -> str:
    return "|".join(filter(None, views))


def _tied(base: _Side, tuned: _Side, found: list[tuple[str, str]]) -> list[Pair]:
    """Pairs of tensors that one side stores and the other ties to a tensor of another name."""
    pairs = []
    for side, other in ((base, tuned), (tuned, base)):
        other_aliases = {other.key[alias]: stored for alias, stored in other.alias_of.items()}
        embeddings = _common_embeddings(side, other, found)
        for key, name in list(side.alone.items()):
            stored = other_aliases.get(key) or _implied_tie(side, name, embeddings)
            if stored is None:
                continue
            del side.alone[key]
            other.alone.pop(other.key[stored], None)
            b, t = (name, stored) if side is base else (stored, name)
            tie = f"tied to {shown(stored)} in {other.label}"
            pairs += _compared(base, tuned, b, t, tie=tie, name=side.canonical[name])
    return pairs


def _common_embeddings(side: _Side, other: _Side, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(own name, other's name) of tensors that a head or a second embedding may be tied to.

    Only those that both sides spell alike: where one side lacks the prefix it is a model without a head, which says
    nothing on how a head was tied.
    """
    both = found if side.label == "base" else [(t, b) for b, t in found]
    return [
        (own, theirs)
        for own, theirs in both
        if side.canonical[own] == other.canonical[theirs]
        and (is_input_embedding(side.canonical[own]) or own.endswith("bias"))
    ]


def _implied_tie(side: _Side, name: str, embeddings: list[tuple[str, str]]) -> str | None:
    """Tensor of the other side that stands for one it does not store, or None."""
    short, shape = side.canonical[name], side.infos[name].shape
    if may_be_tied(short):
        same = [t for own, t in embeddings if own.endswith("weight") and side.infos[own].shape == shape]
        return same[0] if same and len(shape) == 2 else None
    if short.endswith(".decoder.bias"):
        twin = short.removesuffix("decoder.bias") + "bias"
        return next(
            (t for own, t in embeddings if side.canonical[own] == twin and side.infos[own].shape == shape), None
        )
    return None


def _unstacked(base: _Side, tuned: _Side) -> list[Pair]:
    """Pairs of one stacked tensor of experts on one side with one tensor an expert on the other."""
    pairs = []
    for side, other in ((base, tuned), (tuned, base)):
        singles: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        for key, name in other.alone.items():
            parts = expert_parts(key)
            if parts and parts[1] is not None and len(other.infos[name].shape) == 2:
                singles[parts[0], parts[2]][parts[1]] = key
        for key, name in list(side.alone.items()):
            parts = expert_parts(key)
            if parts and _is_stack(key, side.infos[name].shape) and singles.get((parts[0], parts[2])):
                del side.alone[key]
                pairs += list(_experts(side, other, name, singles[parts[0], parts[2]]))
    return pairs


def _experts(side: _Side, other: _Side, stack: str, singles: dict[int, str]) -> Iterator[Pair]:
    """One pair an expert of a stack; experts without a counterpart get a pair of their own."""
    count, *rest = side.infos[stack].shape
    for i in range(count):
        view, name = f"expert:{i}:{side.label}", f"{side.canonical[stack]}[{i}]"
        key = singles.get(i)
        if key is None:
            b, t = (stack, None) if side.label == "base" else (None, stack)
            yield Pair(name, b, t, f"{side.label}_only", f"no expert {i} in {other.label}", view)
            continue
        single = other.alone.pop(key)
        shapes = tuple(rest), other.infos[single].shape
        if side.label == "base":
            status, more, reason = _verdict(key, *shapes)
            yield Pair(other.canonical[single], stack, single, status, reason, _steps(view, more))
        else:
            status, more, reason = _verdict(key, *shapes[::-1])
            yield Pair(name, single, stack, status, reason, _steps(view, more))


def _unmatched(side: _Side, other: _Side) -> Iterator[Pair]:
    """Pairs of what one side has alone, the first of them with the other side's nearest names."""
    candidates = [other.canonical[name] for name in other.alone.values()]
    for number, name in enumerate(side.alone.values()):
        short, info = side.canonical[name], side.infos[name]
        buffer = is_buffer(short, info.dtype, info.shape)
        reason = "buffer" if buffer else f"no counterpart in {other.label}"
        if not buffer and may_be_tied(short):
            reason += f"; {other.label} may tie it to its word embeddings, or have no head"
        near = nearest_names(short, candidates) if number < _NEIGHBOURS_FOR and not buffer else []
        if near:
            reason += f"; nearest there: {', '.join(map(shown, near))}"
        b, t = (name, None) if side.label == "base" else (None, name)
        yield Pair(short, b, t, f"{side.label}_only", reason, "", buffer)


def _alias_rows(base: _Side, tuned: _Side, pairs: list[Pair]) -> list[Pair]:
    """One row for every second name of a stored tensor that has not been compared under it."""
    compared = {pair.name for pair in pairs}
    rows: dict[str, Pair] = {}
    for side, other in ((tuned, base), (base, tuned)):
        there = {key: name for name, key in other.key.items()}
        for alias, stored in side.alias_of.items():
            key, short = side.key[alias], side.canonical[alias]
            counterpart = there.get(key)
            if key in rows or short in compared or (counterpart and other.canonical[counterpart] in compared):
                continue
            b, t = (alias, counterpart) if side is base else (counterpart, alias)
            rows[key] = Pair(short, b, t, "alias", f"tied to {shown(stored)}", "")
    return list(rows.values())


def _in_stored_order(pairs: list[Pair], base: _Side, tuned: _Side) -> list[Pair]:
    at_base = {name: i for i, name in enumerate(base.infos)}
    at_tuned = {name: i for i, name in enumerate(tuned.infos)}

    def place(pair: Pair) -> tuple[int, int]:
        return (0, at_base[pair.base]) if pair.base is not None else (1, at_tuned[pair.tuned or ""])

    return sorted(pairs, key=place)


def _with_unique_names(pairs: list[Pair]) -> list[Pair]:
    """Rows are told apart by name: a base tensor whose name another row has already is marked as the base's."""
    taken = {pair.name for pair in pairs if pair.tuned is not None}
    unique, seen = [], set()
    for pair in pairs:
        name = f"{pair.name} (base)" if pair.tuned is None and pair.name in taken else pair.name
        while name in seen:
            name += "'"
        seen.add(name)
        unique.append(pair if name == pair.name else replace(pair, name=name))
    return unique
