"""Fastfood over a model's parameters, and a training step in a subspace."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from spectra.methods import FullFineTune, Subspace, inject
from spectra.projections import FastfoodProjection, adjoint, forward
from tests.benchmarks.steps import BATCH, LENGTH, classifier, stepper
from tests.benchmarks.timing import Row, in_turn

_MEMORY = "import sys; from tests.benchmarks.subspace import beyond; print(beyond(int(sys.argv[1])))"


def fastfood(rounds: int = 7) -> Iterator[Row]:
    """θ₀ + Px and Pᵀg over MiniLM's parameters, against a copy of them and against butterflies over one long vector."""
    shapes = [tuple(parameter.shape) for parameter in classifier().parameters()]
    total = sum(math.prod(shape) for shape in shapes)
    theta = [torch.randn(shape) for shape in shapes]
    out = [torch.empty_like(tensor) for tensor in theta]
    for dimension in (1024, 8192):
        projection = FastfoodProjection(shapes, dimension=dimension, seed=0)
        x = torch.randn(dimension, generator=torch.Generator().manual_seed(0))

        def both(projection: FastfoodProjection = projection, x: torch.Tensor = x) -> float:
            copy()
            projection.add_all(x, dict(enumerate(out)), {})
            return float(adjoint(projection, out) @ x)

        def copy() -> None:
            for target, start in zip(out, theta, strict=True):
                target.copy_(start)

        def butterflies() -> torch.Tensor:
            padded = torch.zeros(1 << (total - 1).bit_length())
            padded[:total] = torch.cat([tensor.view(-1) for tensor in theta])
            return butterfly(butterfly(padded))

        ours, plain, loop = in_turn(both, copy, butterflies, rounds=rounds)
        images = forward(projection, x)
        there = sum(float(((a + b).double() * b.double()).sum()) for a, b in zip(theta, images, strict=True))
        apart = abs(ours.result - there) / abs(there)
        memory = int(subprocess.check_output([sys.executable, "-c", _MEMORY, str(dimension)], text=True)) / (4 * total)
        told = f"⟨Px, y⟩ and ⟨x, Pᵀy⟩ agree to {apart:.0e} (≤ 1e-6); memory beyond the parameters {memory:.2f} D floats"
        good = apart <= 1e-6 and memory <= 1.5
        work = f"Fastfood there and back, {total / 1e6:.1f} M parameters, d = {dimension}"
        times = ours.seconds / plain.seconds
        yield Row(work, ours.seconds, "a copy of them", plain.seconds, "≥ 1/20×", times <= 20 and good, told)
        ratio = loop.seconds / ours.seconds
        yield Row(
            work, ours.seconds, "a butterfly loop there and back", loop.seconds, "≥ 15×", ratio >= 15 and good, told
        )


def subspace_step(rounds: int = 5) -> Iterator[Row]:
    """A training step in 1024 dimensions against one of full fine-tuning."""
    ours, full = classifier(), classifier()
    inject(ours, "", Subspace(dimension=1024))
    inject(full, "", FullFineTune())
    mine, theirs = in_turn(stepper(ours), stepper(full), rounds=rounds)
    ratio = mine.seconds / theirs.seconds
    yield Row(
        f"step in a subspace, d = 1024, batch {BATCH}, length {LENGTH}",
        mine.seconds,
        "full fine-tuning's step",
        theirs.seconds,
        "≥ 1/1.4×",
        ratio <= 1.4,
        f"a subspace step takes {ratio:.2f} of full's",
    )


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """The textbook's loop over all stages."""
    half = 1
    while half < len(x):
        pairs = x.view(-1, 2, half)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1)
        half *= 2
    return x


def beyond(dimension: int) -> int:
    """Bytes by which a pass there and back raises the process's peak above parameters and result."""
    shapes = [tuple(parameter.shape) for parameter in classifier().parameters()]
    theta = [torch.randn(shape) for shape in shapes]
    x = torch.randn(dimension)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()  # the matrix product's own memory is there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    before = _peak()
    projection = FastfoodProjection(shapes, dimension=dimension, seed=0)
    for piece, start in enumerate(theta):
        projection.add(x, piece, start)
        projection.adjoint(start, piece)
    return _peak() - before


def _peak() -> int:
    """Largest resident set, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))  # type: ignore[union-attr]  # Linux has it
