"""Roots: taken once while there is room, one at a time in memory where there is not, the same bits on any thread."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.extract import extract, weighting
from spectra.extract.roots import Inputs, Roots
from spectra.moments import Moments, save_moments
from tests.extract.tuned import save_tensors, update


def moments_of(size: int, seed: int) -> Moments:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Moments(x.T @ x, len(x))


class Counted:
    """Reads moments, and remembers how often."""

    def __init__(self, size: int, seed: int) -> None:
        self.of, self.times = (size, seed), 0

    def __call__(self) -> Moments:
        self.times += 1
        return moments_of(*self.of)


def test_a_root_is_taken_once_while_there_is_room() -> None:
    reads = [Counted(20, seed) for seed in range(3)]
    inputs = [Inputs(read, 20) for read in reads]
    roots = Roots(2 * 8 * 20**2)
    for one in (inputs[0], inputs[0], inputs[1], inputs[0], inputs[2], inputs[0], inputs[1]):
        root = roots(one)
        torch.testing.assert_close(root @ root.T, one.read().matrix)
    assert [read.times - 1 for read in reads] == [4, 3, 1 + 1 - 1]  # a read more for every comparison above


def test_nothing_is_kept_beyond_the_room() -> None:
    roots = Roots(8 * 20**2)
    first = Inputs(lambda: moments_of(20, 0), 20)
    one = weakref.ref(roots(first))
    assert one() is not None
    roots(Inputs(lambda: moments_of(20, 1), 20))
    assert one() is None


def test_threads_take_one_root_together() -> None:
    read = Counted(60, 0)
    inputs, roots = Inputs(read, 60), Roots(1 << 20)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: roots(inputs), range(8)))
    assert read.times == 1
    assert all(one is found[0] for one in found)


def test_an_extraction_is_the_same_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers whose q and k read one input: at most two roots live at a time, and no byte differs."""
    names = [f"h.{i}.{role}" for i in range(2) for role in ("q", "k", "down")]
    base = save_tensors(tmp_path / "base", {f"{name}.weight": torch.zeros(24, 24) for name in names})
    tuned = save_tensors(tmp_path / "tuned", {f"{n}.weight": update(24, 24, seed=i) for i, n in enumerate(names)})
    moments = {name: moments_of(24, seed=int(name[2]) + 10 * name.endswith("down")) for name in names}
    file = save_moments(moments, tmp_path / "moments.safetensors")
    alive: list[Any] = []
    most = []
    taken = Roots._taken

    def watched(self: Roots, inputs: Inputs) -> torch.Tensor:
        root = taken(self, inputs)
        alive.append(weakref.ref(root))
        most.append(sum(one() is not None for one in alive))
        return root

    monkeypatch.setattr(Roots, "_taken", watched)
    seen = []
    for room, roots in ((1 << 30, 4), (0, 2)):
        monkeypatch.setattr(weighting, "KEPT_BYTES", room)
        alive.clear()
        most.clear()
        extract(base, tuned, out=tmp_path / "out", energy=0.8, allocation="global", moments=file, jobs=1)
        seen.append({path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())})
        assert len(most) >= 4
        assert max(most) <= roots + 1  # and the one that is being taken
    assert seen[0] == seen[1]
