"""Every timing of the README's table, in one run: ``make bench``. Ends with 1 where an aim is missed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import click
import numpy as np
import torch

from spectra.linalg import as_matrix, by_gram, product_spectrum, truncated
from tests.benchmarks import geometry, subspace
from tests.benchmarks.extraction import extraction
from tests.benchmarks.quantization import analysis, qlora_step, quantization
from tests.benchmarks.steps import lora_step
from tests.benchmarks.synthetic import make_pair
from tests.benchmarks.timing import HEADER, Row, in_turn

HERE = Path(__file__).parent
RIVALS = Path(".venv-rivals/bin/python")


def _update(rows: int, cols: int) -> torch.Tensor:
    """A matrix like a weight update: a power law in noise, float32."""
    generator = torch.Generator().manual_seed(0)
    p = min(rows, cols)
    count = p // 4
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(cols, count, generator=generator))[0]
    values = torch.arange(1, count + 1) ** -0.5
    return (u * values) @ v.T + torch.randn(rows, cols, generator=generator) * (0.5 / p)


def all_values_square() -> Iterator[Row]:
    """4096 × 4096, every value, against NumPy's and torch's thin SVD."""
    a = _update(4096, 4096)
    ours, theirs, numpy = in_turn(
        lambda: by_gram(as_matrix(a)),
        lambda: torch.linalg.svd(a, full_matrices=False),
        lambda: np.linalg.svd(a.numpy(), full_matrices=False),
        rounds=2,
    )
    exact = torch.linalg.svdvals(a.double()).numpy()
    # The entries themselves are float32: below ε₃₂‖A‖_F/√p their rounding decides, not the route.
    seen = exact > np.finfo(np.float32).eps * float(torch.linalg.norm(a)) / 64
    error = float(np.max(np.abs(ours.result.values - exact)[seen] / exact[seen]))
    accuracy = f"relative error {error:.1e} above the storage floor (≤ 1e-5)"
    good = error <= 1e-5
    for rival, timing, least in (("numpy thin SVD", numpy, 5.0), ("torch thin SVD", theirs, 2.5)):
        ratio = timing.seconds / ours.seconds
        yield Row(
            "all values, 4096 × 4096",
            ours.seconds,
            rival,
            timing.seconds,
            f"≥ {least}×",
            ratio >= least and good,
            accuracy,
        )


def all_values_wide() -> Iterator[Row]:
    """4096 × 11008, every value, against torch's thin SVD."""
    a = _update(4096, 11008)
    ours, theirs = in_turn(lambda: by_gram(as_matrix(a)), lambda: torch.linalg.svd(a, full_matrices=False), rounds=1)
    reference = theirs.result[1].double().numpy()
    error = float(np.max(np.abs(ours.result.values - reference)) / reference[0])
    yield Row(
        "all values, 4096 × 11008",
        ours.seconds,
        "torch thin SVD",
        theirs.seconds,
        "≥ 6×",
        theirs.seconds / ours.seconds >= 6.0 and error < 1e-5,
        f"abs(Δσ) ≤ {error:.1e} σ₁ of torch's float32 values",
    )


def certified_top() -> Iterator[Row]:
    """Certified top 64 of 4096 × 4096, against torch's thin SVD and torch.svd_lowrank."""
    a = _update(4096, 4096)
    exact = torch.linalg.svdvals(a.double()).numpy()[:64]
    ours, lowrank = in_turn(lambda: truncated(as_matrix(a), 64), lambda: torch.svd_lowrank(a, q=74, niter=2), rounds=5)
    (thin,) = in_turn(lambda: torch.linalg.svd(a, full_matrices=False), rounds=1)
    low, high = ours.result.interval()
    inside = bool(np.all(low <= exact) and np.all(exact <= high))
    error = float(np.max(np.abs(ours.result.values / exact - 1)))
    theirs = float(np.max(np.abs(lowrank.result[1][:64].double().numpy() / exact - 1)))
    accuracy = f"truth in every interval: {inside}; 64th value off by {error:.1%} (svd_lowrank: {theirs:.1%})"
    for rival, timing, aim, good in (
        ("torch thin SVD", thin, "≥ 30×", thin.seconds / ours.seconds >= 30),
        ("torch.svd_lowrank(q=74, niter=2)", lowrank, "≥ 0.4×", lowrank.seconds / ours.seconds >= 0.4),
    ):
        yield Row(
            "certified top 64 of 4096 × 4096", ours.seconds, rival, timing.seconds, aim, good and inside, accuracy
        )


def adapter() -> Iterator[Row]:
    """Adapter of rank 16 on 4096 × 11008, against forming the product and taking its values."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(4096, 16, generator=generator), torch.randn(16, 11008, generator=generator)
    ours, _ = in_turn(lambda: product_spectrum(b, a), lambda: None, rounds=9)
    (dense,) = in_turn(lambda: by_gram(as_matrix(b @ a)), rounds=1)
    exact = torch.linalg.svdvals(torch.linalg.qr(b.double())[1] @ torch.linalg.qr(a.double().T)[1].T)
    full = torch.linalg.eigvalsh(b.double() @ (a.double() @ a.double().T) @ b.double().T).flip(0)[:16].sqrt()
    error = float((torch.from_numpy(ours.result.values[:16].copy()) - exact).abs().max() / exact[0])
    cross = float((full - exact).abs().max() / exact[0])
    yield Row(
        "adapter r = 16 on 4096 × 11008",
        ours.seconds,
        "the dense route",
        dense.seconds,
        "≥ 1000×",
        dense.seconds / ours.seconds >= 1000 and error <= 20 * 2.0**-52,
        f"abs(Δσ) = {error / 2.0**-52:.1f} ε σ₁ of LAPACK's on the factors, {cross:.0e} σ₁ of another Gram matrix",
    )


def real_pair() -> Iterator[Row]:
    """The real pair, every value, compute only, against weightwatcher's analyze(model, base_model)."""
    from spectra.comparison import execute, plan
    from spectra.examples import fetch

    base, tuned = fetch("minilm"), fetch("minilm-sre")
    todo = plan(base, tuned, exact=True)
    (ours,) = in_turn(lambda: execute(todo, progress=False), rounds=5)
    answer = subprocess.run(
        [RIVALS, HERE / "rival_weightwatcher.py", base, tuned], check=True, capture_output=True, text=True
    )
    theirs = json.loads(answer.stdout.splitlines()[-1])
    rows = ours.result.frame.set_index("name")
    # weightwatcher reports the largest eigenvalue of the delta's Gram matrix: it must be our σ₁².
    errors = [
        abs(float(rows.spectral_norm[f"{name}.weight"]) ** 2 / value - 1)
        for name, value in theirs["largest"].items()
        if f"{name}.weight" in rows.index and value > 0
    ]
    yield Row(
        "the real pair, exact, compute only",
        ours.seconds,
        f"weightwatcher {theirs['version']}",
        theirs["seconds"],
        "≥ 3×",
        theirs["seconds"] / ours.seconds >= 3,
        f"σ₁² of {len(errors)} matrices agree to {max(errors):.0e}",
    )


def large_pair(folder: Path) -> Iterator[Row]:
    """A sharded 1.1-billion-parameter bf16 pair at rank 64, against only reading and upcasting both."""
    base, tuned = make_pair(folder)
    limit = 500 + 4 * 32000 * 2048 * 4 / 1e6
    for source, forget in (("from disk", True), ("from the page cache", False)):
        floor = _child("read", base, tuned, forget)
        ours = _child("report", base, tuned, forget)
        found = ours["signal_rank"]
        yield Row(
            f"1.1 B bf16 pair, `--rank 64`, {source}",
            ours["seconds"],
            "only reading and upcasting both",
            floor["seconds"],
            "≥ 0.25×",
            ours["seconds"] <= 4 * floor["seconds"] and ours["peak_mb"] <= limit and found == 8,
            f"planted rank 8 found in the median matrix: {found == 8}; "
            f"peak RSS {ours['peak_mb']:.0f} MB, allowed {limit:.0f}",
        )


def start_up() -> Iterator[Row]:
    """Import beyond torch's own, and the help page."""

    code = "import time, torch; start = time.perf_counter(); import spectra; print(time.perf_counter() - start)"
    beyond = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    help_page = [sys.executable, "-m", "spectra.report", "--help"]
    (told,) = in_turn(lambda: subprocess.run(help_page, check=True, capture_output=True), rounds=7)
    yield Row("import spectra beyond torch", beyond, "allowed", 0.2, "≤ 0.2 s", beyond <= 0.2, "")
    yield Row("`spectra.report --help`", told.seconds, "allowed", 0.6, "≤ 0.6 s", told.seconds <= 0.6, "")


def _child(task: str, base: Path, tuned: Path, forget: bool) -> dict[str, float]:
    """Run a task in a process of its own, so that its peak memory is its own; with files out of the page cache."""
    for path in (*base.iterdir(), *tuned.iterdir()) if forget else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    answer = subprocess.run(
        [sys.executable, HERE / "large_pair.py", task, base, tuned], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


@click.command()
@click.option("--only", help="Name of one benchmark.")
@click.option(
    "--pair", type=click.Path(path_type=Path), help="Keep the 1.1 B pair in this folder (4.4 GB) for the next run."
)
def main(only: str | None, pair: Path | None) -> None:
    """Print the table of timings; exit 1 where an aim is missed."""
    with tempfile.TemporaryDirectory() as temporary:
        benches: dict[str, Callable[[], Iterator[Row]]] = {
            "square": all_values_square,
            "wide": all_values_wide,
            "top": certified_top,
            "adapter": adapter,
            "real": real_pair,
            "large": lambda: large_pair(pair or Path(temporary)),
            "start": start_up,
            "lora": lora_step,
            "quantization": quantization,
            "quantization-error": analysis,
            "qlora": qlora_step,
            "extraction": extraction,
            "subspace": lambda: chain(subspace.fastfood(), subspace.subspace_step()),
            "geometry": lambda: chain(geometry.overlaps(), geometry.intruder_search()),
        }
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
        print(HEADER, flush=True)
        missed = 0
        for name, bench in benches.items():
            if only in (None, name):
                for row in bench():
                    print(row.markdown(), flush=True)
                    missed += not row.reached
        sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
