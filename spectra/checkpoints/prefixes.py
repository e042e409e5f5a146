"""The leading path that one checkpoint's names have and another's have not, found from the names themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spectra.checkpoints.name_rules import is_index, is_table

Shape = tuple[int, ...]

# Deepest leading path tried: "model.vision_tower.vision_model.encoder." has four segments.
_DEPTH = 4
# A rest shared by more names than this is no evidence for any one of them (and would cost n² on hostile names).
_CROWD = 16
# Changes looked at, best first: real checkpoints have a handful.
_TRIED = 50
# Names that replacing one path by another must bring together; two towers of one model share a few by chance.
_ENOUGH_FOR_REPLACEMENT = 4


@dataclass(frozen=True)
class PrefixChange:
    """``base`` in front of a name of the base model stands where ``tuned`` stands in the tuned model; "" is nothing."""

    base: str
    tuned: str

    def base_key(self, key: str) -> str:
        """Key of a name of the base model after the change."""
        return key[len(self.base) :] if not self.tuned and key.startswith(self.base) else key

    def tuned_key(self, key: str) -> str:
        """Key of a name of the tuned model after the change."""
        return self.base + key[len(self.tuned) :] if self.tuned and key.startswith(self.tuned) else key

    def sentence(self) -> str:
        """Say the change as a report prints it."""
        if not self.base:
            return f"tuned names lose the prefix {self.tuned!r}"
        if not self.tuned:
            return f"base names lose the prefix {self.base!r}"
        return f"the prefix {self.tuned!r} of tuned names is read as {self.base!r}"


def best_prefix_change(base: Mapping[str, Shape], tuned: Mapping[str, Shape], *, first: bool) -> PrefixChange | None:
    """Change of prefix that brings most unmatched names of both sides together, shapes included.

    Parameters
    ----------
    base, tuned : mapping of name to shape
        Names that are still alone.
    first : bool
        Whether nothing has matched so far; later changes need more than one chance agreement.

    Returns
    -------
    PrefixChange or None
        Of equally good ones the shortest, then the first by spelling; None where no change helps.
    """
    votes = _one_sided(base, tuned)
    if 2 * max(votes.values(), default=0) < min(len(base), len(tuned)):
        votes += _replacements(base, tuned)
    ranked = sorted(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair))
    for prefixes in ranked[:_TRIED]:
        change = PrefixChange(*prefixes)
        if _is_convincing(change, votes[prefixes], base, tuned, first=first):
            return change
    return None


def _one_sided(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> Counter[tuple[str, str]]:
    """Count, for every prefix (base's, "") or ("", tuned's), the pairs of names that agree once it is lost."""
    votes: Counter[tuple[str, str]] = Counter()
    for names, others, of_base in ((base, tuned, True), (tuned, base, False)):
        for name, shape in names.items():
            for prefix, rest in _cuts(name):
                if rest in others and alike(rest, shape, others[rest]):
                    votes[(prefix, "") if of_base else ("", prefix)] += 1
    return votes


def _replacements(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> Counter[tuple[str, str]]:
    """Count, for every (base prefix, tuned prefix), the pairs of names in layers that agree under both.

    Prefixes that end alike are a longer spelling of a shorter change that gets as many votes, and lose to it.
    """
    votes: Counter[tuple[str, str]] = Counter()
    by_rest: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in base:
        for prefix, rest in _cuts(name):
            if _has_index(rest):
                by_rest[rest].append((prefix, name))
    for name, shape in tuned.items():
        for prefix, rest in _cuts(name):
            crowd = by_rest.get(rest, ())
            for other_prefix, other in crowd if len(crowd) <= _CROWD else ():
                if alike(rest, shape, base[other]):
                    votes[other_prefix, prefix] += 1
    return votes


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Every (prefix, rest) at a segment boundary before the first index, at most four segments deep."""
    start = 0
    for _ in range(_DEPTH):
        dot = name.find(".", start)
        if dot < 0 or is_index(name[start:dot]):
            return
        start = dot + 1
        yield name[:start], name[start:]


def _has_index(rest: str) -> bool:
    return any(is_index(segment) for segment in rest.split(".", 8)[:8])


def _is_convincing(
    change: PrefixChange, votes: int, base: Mapping[str, Shape], tuned: Mapping[str, Shape], *, first: bool
) -> bool:
    """Whether a change is more than one chance agreement, such as of two layers that are both called "dense"."""
    under_base = [name for name in base if name.startswith(change.base)]
    under_tuned = [name for name in tuned if name.startswith(change.tuned)]
    if change.base and change.tuned:
        layered = min(
            sum(_has_index(name[len(change.base) :]) for name in under_base),
            sum(_has_index(name[len(change.tuned) :]) for name in under_tuned),
        )
        return votes >= _ENOUGH_FOR_REPLACEMENT and votes >= 0.9 * layered
    # A head or an embedding is alone of its kind, and large enough to be told by its shape.
    return first or votes >= 2 or any(map(is_table, under_base if change.base else under_tuned))


def alike(name: str, one: Shape, other: Shape) -> bool:
    """Whether two shapes may be of the same tensor: equal, transposed, or a table with more rows."""
    if one == other or (len(one) == 2 and one == other[::-1]):
        return True
    return len(one) == len(other) and one[1:] == other[1:] and is_table(name)
