"""Names of the modules that carry parts, in PEFT's way: endings that match those modules and no other."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spectra.methods.injection import Injection


def target_modules(injection: Injection) -> list[str] | str:
    """PEFT's ``target_modules``: for each part the shortest ending of its name that matches parts alone.

    Where a part's name is the ending of a module's that carries none, no ending tells the two apart, and the names are
    given as one regular expression, which PEFT matches whole.
    """
    endings = shortest_endings(injection.parts, module_names(injection))
    return "|".join(map(re.escape, injection.parts)) if endings is None else endings


def module_names(injection: Injection) -> list[str]:
    """Names of the model's modules as they were before the parts came in."""
    names: list[str] = []
    for name, _ in injection.model.named_modules():
        part = _innermost(name, injection.parts)
        if part is None or name == part:
            names.append(name)
        elif name.startswith(f"{part}.base."):
            names.append(part + name.removeprefix(f"{part}.base"))
    return [name for name in names if name]


def shortest_endings(wanted: Iterable[str], names: Iterable[str]) -> list[str] | None:
    """Endings, from a dot on, that together match every wanted name and no other; None where there are none.

    Examples
    --------
    >>> shortest_endings(["h.0.q", "h.1.q", "h.0.o.dense"], ["h.0.q", "h.1.q", "h.0.o.dense", "h.0.i.dense"])
    ['q', 'o.dense']
    """
    wanted = list(wanted)
    chosen = set(wanted)
    matched: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        for ending in _endings(name):
            matched[ending].add(name)
    found = [next((ending for ending in _endings(name) if matched[ending] <= chosen), None) for name in wanted]
    return None if None in found else list(dict.fromkeys(ending for ending in found if ending is not None))


def _endings(name: str) -> list[str]:
    """Endings of a name, shortest first: c, b.c, a.b.c."""
    segments = name.split(".")
    return [".".join(segments[i:]) for i in reversed(range(len(segments)))]


def _innermost(name: str, parts: Iterable[str]) -> str | None:
    """The part that a name belongs to, or None."""
    return max((p for p in parts if name == p or name.startswith(p + ".")), key=len, default=None)
