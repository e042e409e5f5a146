"""One task on a large pair, in a process of its own: prints seconds and peak memory as JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path


def read(base: str, tuned: str) -> dict[str, float]:
    """Only read both through safetensors and upcast, tensor by tensor."""
    import torch
    from safetensors import safe_open

    start = time.perf_counter()
    for side in (base, tuned):
        for path in sorted(Path(side).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    file.get_tensor(name).to(torch.float32)
    return {"seconds": time.perf_counter() - start}


def report(base: str, tuned: str) -> dict[str, float]:
    """Compare at rank 64."""
    from spectra import compare

    start = time.perf_counter()
    run = compare(base, tuned, rank=64, progress=False)
    seconds = time.perf_counter() - start
    frame = run.frame[["signal_rank_low", "signal_rank"]].astype(float)
    found = frame.signal_rank_low.fillna(frame.signal_rank).dropna()
    return {"seconds": seconds, "signal_rank": float(found.median())}


if __name__ == "__main__":
    answer = {"read": read, "report": report}[sys.argv[1]](*sys.argv[2:])
    # Not getrusage's ru_maxrss: a child's begins at its parent's peak.
    answer["peak_mb"] = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps(answer))
