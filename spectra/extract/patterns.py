r"""PEFT's tables by module: which names an adapter targets, and ranks by pattern, written so that PEFT reads them back.

PEFT looks a module up with ``re.match(rf"(.*\.)?({pattern})$", path)`` and the first pattern that matches wins, so a
path that ends like another one must stand before it, and a dot matches any character.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from spectra.checkpoints.module_patterns import PatternTable
from spectra.methods.targets import shortest_endings


def target_modules(targets: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules``: the shortest endings that match these modules and no other known one.

    Parameters
    ----------
    targets : iterable of str
        Paths of the modules with factors.
    modules : iterable of str
        Paths of all modules known.

    Returns
    -------
    list of str, or str
        A regular expression, which PEFT matches whole, where no endings tell the two kinds apart.

    Examples
    --------
    >>> target_modules(["h.0.q", "h.1.q"], ["h", "h.0", "h.0.q", "h.1.q", "h.0.k"])
    ['q']
    >>> target_modules(["q"], ["q", "h.q"])
    'q'
    """
    wanted = list(targets)
    endings = shortest_endings(wanted, modules)
    return "|".join(map(re.escape, wanted)) if endings is None else endings


def rank_patterns(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """PEFT's ``r`` and ``rank_pattern``: the commonest rank, and full paths of the modules that have another.

    Parameters
    ----------
    ranks : mapping of str to int
        Rank of every module with factors, by path; not empty.

    Returns
    -------
    r : int
    pattern : dict of str to int
        In the order in which PEFT must try them.

    Examples
    --------
    >>> rank_patterns({"layer.1.q": 4, "layer.11.q": 4, "layer.1.k": 2})
    (4, {'layer.1.k': 2})
    >>> rank_patterns({"q": 2, "h.q": 4, "k": 4})
    (4, {'h.q': 4, 'q': 2})
    """
    counts = Counter(ranks.values())
    common = min(counts, key=lambda rank: (-counts[rank], rank))
    named = {path for path, rank in ranks.items() if rank != common}
    for escape in (False, True):
        while True:
            # A longer path is tried first: what ends like another path is longer than it.
            order = sorted(named, key=lambda path: (-path.count("."), path))
            table = {re.escape(path) if escape else path: ranks[path] for path in order}
            wrong = _misread(table, ranks, common)
            if not wrong - named:
                break
            named |= wrong
        if not wrong:
            break
    return common, table


def _misread(table: Mapping[str, int], ranks: Mapping[str, int], common: int) -> set[str]:
    """Modules that a table of patterns gives another rank than their own."""
    if not table:
        return set()
    lookup = PatternTable(table, source="rank_pattern")
    return {path for path, rank in ranks.items() if (lookup.find(path) or common) != rank}


def saved_modules(
    wanted: Iterable[str], forced: Iterable[str], modules: Iterable[str], targets: Iterable[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """PEFT's ``modules_to_save`` for modules that are to be saved whole, and all that PEFT will wrap for them.

    PEFT wraps every module whose path *ends* like a name, dot or not, and will look for the tensors of each. So all
    of them are saved; a name that would also wrap, or keep from being targeted, a module with factors is refused.

    Parameters
    ----------
    wanted : iterable of str
        Paths of modules to save.
    forced : iterable of str
        Paths of modules that PEFT wraps in any case.
    modules, targets : iterable of str
        Paths of all modules known, and of those with factors.

    Returns
    -------
    names : list of str
        What to write.
    wrapped : list of str
        Modules whose every tensor must be stored.
    refused : dict of str to str
        Modules that cannot be saved, and why.

    Examples
    --------
    >>> saved_modules(["norm"], [], ["norm", "h", "h.0", "h.0.input_norm", "h.0.q"], ["h.0.q"])
    (['norm'], ['h.0.input_norm', 'norm'], {})
    >>> saved_modules(["q"], [], ["q", "h", "h.q"], ["h.q"])[2]
    {'q': 'PEFT would take h.q, which has factors, for it'}
    """
    every, factored = list(modules), list(targets)
    names = list(forced)
    wrapped = set(names)
    refused: dict[str, str] = {}
    for name in sorted(set(wanted), key=lambda path: (path.count("."), path)):
        if any(_inside(name, other) for other in wrapped):
            continue
        also = {module for module in every if module.endswith(name)}
        clash = next((target for target in factored if _keeps_out(name, target) or _touches(target, also)), None)
        nested = next((one for one in also for other in also | wrapped if one != other and _inside(one, other)), None)
        held = next((one for one in wrapped for other in also if one != other and _inside(one, other)), None)
        if clash is not None:
            refused[name] = f"PEFT would take {clash}, which has factors, for it"
        elif nested is not None:
            refused[name] = f"PEFT would take {nested}, inside another module saved whole, for it"
        elif held is not None:
            refused[name] = f"{held}, inside a module that PEFT would take for it, is saved by itself"
        else:
            names.append(name)
            wrapped |= also
    return names, sorted(wrapped), refused


def _keeps_out(name: str, target: str) -> bool:
    """Whether PEFT would not target a module because of a name in ``modules_to_save`` (its own expression)."""
    return re.match(rf"(^|.*\.){name}($|\..*)", target) is not None


def _touches(target: str, wrapped: Iterable[str]) -> bool:
    return any(_inside(target, module) for module in wrapped)


def _inside(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")
