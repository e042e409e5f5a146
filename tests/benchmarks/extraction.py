"""An adapter from the real pair against mergekit's, and re-ranking against the dense way of kohya's script."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from spectra.examples import fetch
from spectra.extract.factors import factored_error, reranked_factors
from tests.benchmarks.timing import Row, in_turn

MERGEKIT = Path(".venv-mergekit/bin")
RANK = 16


def extraction(rounds: int = 3) -> Iterator[Row]:
    """Rank 16 of the real pair, the whole process; then LoRA of rank 64 to 16 on 4096 × 4096."""
    base, tuned = fetch("minilm"), fetch("minilm-sre")
    for words, ours, theirs in (
        ("embeddings too", ["--embeddings", "lora"], ["--embed-lora"]),
        ("embeddings saved whole", ["--embeddings", "save"], []),
    ):
        yield _against_mergekit(base, tuned, words, ours, theirs, rounds)
    yield _reranking()


def _against_mergekit(base: Path, tuned: Path, words: str, ours: list[str], theirs: list[str], rounds: int) -> Row:
    best, peak = [math.inf, math.inf], [0.0, 0.0]
    with tempfile.TemporaryDirectory() as temporary:
        outs = [Path(temporary, "ours"), Path(temporary, "theirs")]
        sides = [
            [sys.executable, "-m", "spectra.extract", base, tuned, "--out", outs[0], "--rank", RANK, *ours, "-q"],
            [
                MERGEKIT / "mergekit-extract-lora",
                *(
                    "--model",
                    tuned,
                    "--base-model",
                    base,
                    "--out-path",
                    outs[1],
                    "--max-rank",
                    RANK,
                    *theirs,
                    "--quiet",
                ),
            ],
        ]
        for _ in range(rounds):
            for i, side in enumerate(sides):
                seconds, megabytes = _whole_process([str(word) for word in side])
                best[i], peak[i] = min(best[i], seconds), max(peak[i], megabytes)
        errors = [_error(base, tuned, out) for out in outs]
    excess = errors[0] / errors[1] - 1
    version = subprocess.run(
        [MERGEKIT / "python", "-c", "from importlib.metadata import version; print(version('mergekit'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return Row(
        f"rank {RANK} of the real pair as an adapter, {words}, whole process",
        best[0],
        f"mergekit-extract-lora {version}",
        best[1],
        "≥ 3×",
        # Theirs is a float32 SVD of each matrix: the optimum to about 1e-6, which ours may not be above.
        best[1] / best[0] >= 3 and excess <= 1e-6,
        f"error {errors[0]:.6g}, over theirs {excess:+.0e}; peak RSS {peak[0]:.0f} against {peak[1]:.0f} MB",
    )


# Between exec and fork a child counts as large as its parent, so a small process stands between.
_LAUNCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
seconds = time.perf_counter() - start
if done.returncode:
    sys.exit(done.stdout[-2000:].decode())
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""


def _whole_process(words: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a process of its own."""
    told = subprocess.run([sys.executable, "-c", _LAUNCH, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, megabytes = map(float, told.split())
    return seconds, megabytes


def _error(base: Path, tuned: Path, adapter: Path) -> float:
    """‖Δ − adapter‖_F over every matrix, in float64 from the stored factors.

    Read key by key: mergekit writes biases of B that its configuration does not speak of, which no reader takes.
    """
    before, after, stored = (
        load_file(folder / name)
        for folder, name in (
            (base, "model.safetensors"),
            (tuned, "model.safetensors"),
            (adapter, "adapter_model.safetensors"),
        )
    )
    lost = []
    for name, weight in after.items():
        if weight.ndim == 2 and weight.is_floating_point():
            left = weight.double() - before[name].double()
            prefix = "base_model.model." + name.removesuffix("weight")
            if f"{prefix}lora_A.weight" in stored:
                left -= stored[f"{prefix}lora_B.weight"].double() @ stored[f"{prefix}lora_A.weight"].double()
            elif f"{prefix}lora_embedding_A" in stored:
                left -= (stored[f"{prefix}lora_embedding_B"].double() @ stored[f"{prefix}lora_embedding_A"].double()).T
            elif f"{prefix}weight" in stored:
                left = weight.double() - stored[f"{prefix}weight"].double()
            lost.append(float(left.square().sum()))
    return math.sqrt(math.fsum(lost))


def _reranking() -> Row:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(4096, 64, generator=generator), torch.randn(64, 4096, generator=generator)

    def ours() -> tuple[torch.Tensor, torch.Tensor, float]:
        found = reranked_factors(b, a, RANK, scale=0.5)
        new_b, new_a = found.b.float(), found.a.float()
        return new_b, new_a, factored_error(b, a, 0.5, new_b, new_a)

    def dense() -> torch.Tensor:
        u, s, vh = torch.linalg.svd((b @ a) * 0.5, full_matrices=False)
        return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command takes factors: several side by side, a thread each
    (mine,) = in_turn(ours, rounds=7)
    torch.set_num_threads(threads)
    (theirs,) = in_turn(dense, rounds=1)
    new_b, new_a, told = mine.result
    exact = (b.double() @ a.double()) * 0.5
    errors = [float((exact - product.double()).norm()) for product in (new_b.double() @ new_a.double(), theirs.result)]
    ratio = theirs.seconds / mine.seconds
    return Row(
        f"LoRA of rank 64 to {RANK} on 4096 × 4096",
        mine.seconds,
        "forming BA, dense SVD (kohya's resize_lora)",
        theirs.seconds,
        "≥ 100×",
        ratio >= 100 and errors[0] <= errors[1] * (1 + 1e-6) and abs(told / errors[0] - 1) <= 1e-6,
        f"error over theirs: {errors[0] / errors[1] - 1:+.0e}; error told without forming it is right to "
        f"{abs(told / errors[0] - 1):.0e}",
    )
