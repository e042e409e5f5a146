"""Tables by module are read back by PEFT's own rules: `re.match`, `endswith`, first match wins."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectra.extract.patterns import rank_patterns, saved_modules, target_modules


def peft_rank(path: str, rank: int, table: dict[str, int]) -> int:
    """PEFT's `get_pattern_key`, word for word."""
    return next((table[key] for key in table if re.match(rf"(.*\.)?({key})$", path)), rank)


def peft_targets(named: list[str] | str, path: str) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, path) is not None
    return path in named or any(path.endswith(f".{name}") for name in named)


def reads_back(ranks: dict[str, int]) -> None:
    rank, table = rank_patterns(ranks)
    assert {path: peft_rank(path, rank, table) for path in ranks} == ranks


TRAPS = {
    "layer one and eleven": {"layer.1.q": 2, "layer.11.q": 3, "layer.111.q": 4, "layer.12.q": 2},
    "one path ends like another": {"q": 1, "h.q": 2, "h.0.h.q": 3, "k": 4, "h.k": 4},
    "the common one ends like another": {"q": 1, "h.q": 2, "g.q": 1, "f.q": 1},
    "a dot is any character": {"a.b.c": 1, "a.b_c": 2, "a_b_c": 3, "x": 4, "y": 4},
    "a dot is any character, within a longer path": {"b.c": 1, "a.b_c": 2, "x": 2},
    "one rank": {"a": 5, "b": 5},
}


@pytest.mark.parametrize("ranks", TRAPS.values(), ids=TRAPS)
def test_every_module_gets_its_rank(ranks: dict[str, int]) -> None:
    reads_back(ranks)


SEGMENTS = st.sampled_from(["a", "b", "1", "11", "a_b", "q"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(PATHS, st.integers(1, 3), min_size=1, max_size=12))
def test_every_module_gets_its_rank_whatever_the_names(ranks: dict[str, int]) -> None:
    reads_back(ranks)


@given(st.sets(PATHS, min_size=1, max_size=12), st.data())
def test_targets_are_those_and_no_other(modules: set[str], data: st.DataObject) -> None:
    wanted = data.draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))
    named = target_modules(sorted(wanted), modules)
    assert {path for path in modules if peft_targets(named, path)} == wanted


@given(st.sets(PATHS, min_size=2, max_size=12), st.data())
def test_saved_modules_are_wrapped_as_peft_wraps_them(modules: set[str], data: st.DataObject) -> None:
    """Leaves alone hold factors or are saved; PEFT wraps by `endswith` and keeps targets out by its expression."""
    leaves = sorted(path for path in modules if not any(other.startswith(f"{path}.") for other in modules))
    targets = data.draw(st.sets(st.sampled_from(leaves)))
    wanted = set(leaves) - targets
    names, wrapped, refused = saved_modules(wanted, [], modules, targets)
    assert set(wrapped) == {path for path in modules if any(path.endswith(name) for name in names)}
    kept = {path for path in wanted if any(f"{path}.".startswith(f"{module}.") for module in wrapped)}
    assert not any(one != other and one.startswith(f"{other}.") for one in wrapped for other in wrapped)
    assert wanted <= kept | set(refused)  # what stands inside a wrapped module is saved with it
    for target in targets:
        assert not any(re.match(rf"(^|.*\.){name}($|\..*)", target) for name in names)
        assert not any(f"{target}.".startswith(f"{module}.") for module in wrapped)


def test_a_forced_head_takes_what_stands_in_it() -> None:
    modules = ["classifier", "classifier.dense", "h.q"]
    assert saved_modules(["classifier.dense"], ["classifier"], modules, ["h.q"]) == (["classifier"], ["classifier"], {})


def test_a_module_that_holds_one_saved_by_itself_is_refused() -> None:
    """PEFT wraps h.norm.alpha for `alpha`; wrapping h.norm too would put one wrapper into another."""
    modules = ["alpha", "h", "h.norm", "h.norm.alpha", "norm", "q"]
    names, wrapped, refused = saved_modules(["alpha", "norm"], [], modules, ["q"])
    assert (names, wrapped) == (["alpha"], ["alpha", "h.norm.alpha"])
    assert refused == {"norm": "h.norm.alpha, inside a module that PEFT would take for it, is saved by itself"}
    assert saved_modules(["head"], ["head.out"], ["head", "head.out", "q"], ["q"])[2].keys() == {"head"}
