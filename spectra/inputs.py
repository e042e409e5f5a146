"""What every comparison of stored weights checks and tells of its inputs, and the progress bar over them."""

from __future__ import annotations

import math
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.names import Pairing
from spectra.errors import UsageError
from spectra.version import __version__

# Least share of tensors that must match before a comparison means anything.
LEAST_MATCH = 0.95

# min(rows, cols) up to which every singular value is taken by default: beyond, the cube of it is felt (2048: about a
# second a matrix, 4096: four) and the top values are certified instead.
EXACT_BELOW = 2048
DEFAULT_RANK = 64


def check_device(device: str | None) -> None:
    """Refuse a device that cannot hold a tensor, with torch's reason.

    Raises
    ------
    UsageError
        If it cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {device!r} cannot be used: {reason}; leave it out to compute on the CPU") from error


def check_folder(sides: Iterable[Checkpoint | Adapter], out: str | os.PathLike[str]) -> None:
    """Refuse to write among the inputs, which are read only.

    Raises
    ------
    UsageError
        If `out` is the folder of a side.
    """
    for side in sides:
        folder = side.root if side.root.is_dir() else None
        if folder is not None and Path(out).resolve() == folder.resolve():
            raise UsageError(f"{out} is the folder of {side.ref}; give the report a folder of its own")


def physical_memory() -> int:
    """Bytes of the machine's memory; 16 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 << 30


def mismatch_message(base: Checkpoint, tuned: Checkpoint | Adapter, pairing: Pairing) -> str:
    """Say which tensors of two checkpoints find no partner, and the way out."""
    unmatched = [pair for pair in pairing.pairs if pair.status in ("base_only", "tuned_only", "shape_mismatch")]
    shown = [f"  {pair.name}: {pair.status} {pair.reason}".rstrip() for pair in unmatched[:8]]
    more = [f"  … and {len(unmatched) - 8} more"] if len(unmatched) > 8 else []
    return "\n".join(
        [
            f"only {pairing.matched} of {pairing.total} tensors of {base.ref} and {tuned.ref} match "
            f"({pairing.share:.1%}, {LEAST_MATCH:.0%} are needed): are they one architecture?",
            *shown,
            *more,
            "To compare what does match, add --allow-partial (allow_partial=True)",
        ]
    )


def side_info(checkpoint: Checkpoint | Adapter) -> dict[str, Any]:
    """What a result remembers of one input: its name, size and the digests of its files; JSON-able."""
    infos: Iterable[Any] = checkpoint.infos().values()
    return {
        "ref": str(checkpoint.ref),
        "kind": "adapter" if isinstance(checkpoint, Adapter) else "checkpoint",
        "tensors": len(checkpoint),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "revision": checkpoint.revision,
        "notes": list(checkpoint.notes),
        "digests": [
            {"name": digest.name, "bytes": digest.bytes, "sha256": digest.sha256, "sampled": digest.sampled}
            for digest in checkpoint.digests()
        ],
    }


def matching_info(pairing: Pairing) -> dict[str, Any]:
    """How many tensors matched, and what had to be done to their names; JSON-able."""
    return {
        "matched": pairing.matched,
        "total": pairing.total,
        "share": pairing.share,
        "transforms": list(pairing.transforms),
    }


def versions() -> dict[str, str]:
    """Releases that numbers depend on."""
    return {
        "spectra": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scipy", "safetensors")},
    }


@contextmanager
def progress_bar(work: Mapping[str, float], shown: bool) -> Iterator[Callable[[str], None]]:
    """Progress by what the time goes by, shown only for what takes longer than two seconds.

    Parameters
    ----------
    work : mapping of str to float
        Multiply-adds of every tensor that is to be measured.
    shown : bool
        Whether there is to be a bar at all.

    Yields
    ------
    callable
        To be called with the name of a tensor that is done, from any thread.
    """
    with tqdm(
        total=sum(work.values()),
        delay=2.0,
        disable=not shown,
        leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left{postfix}",
    ) as bar:
        guard = threading.Lock()

        def advance(name: str) -> None:
            with guard:
                bar.set_postfix_str("".join(c if c.isprintable() else "?" for c in name[-40:]), refresh=False)
                bar.update(work[name])

        yield advance
