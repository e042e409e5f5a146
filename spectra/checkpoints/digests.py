"""Digests of the files a checkpoint consists of: whole below a size, sampled above it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spectra.errors import CheckpointError

# 256 chunks of 64 KiB are 16 MiB a file: read in well under a second from any disk, and a fine-tuned file differs
# in nearly every chunk from its base.
SAMPLE_CHUNKS = 256
SAMPLE_BYTES = 64 * 1024
FULL_BELOW = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Identity of one file.

    Attributes
    ----------
    name : str
        Path relative to the checkpoint's folder, with ``/``.
    bytes : int
        Size of the file.
    sha256 : str
        Hexadecimal digest of the whole file, or, where `sampled`, of its size (8 bytes, little endian), its header
        and 256 evenly spread chunks of 64 KiB.
    sampled : bool
        Whether only chunks were read.
    """

    name: str
    bytes: int
    sha256: str
    sampled: bool


def digest_files(files: Iterable[tuple[str, Path, int]], *, full_below: int = FULL_BELOW) -> tuple[FileDigest, ...]:
    """Digest files; only chunks of the large ones where all of them together reach `full_below` bytes.

    Parameters
    ----------
    files : iterable of (name, path, header)
        `header`: how many bytes at the start of the file describe the rest; they are always digested.
    full_below : int
        Total bytes below which every file is read whole.

    Raises
    ------
    CheckpointError
        A file cannot be read any more.
    """
    listed = list(files)
    try:
        sizes = [path.stat().st_size for _, path, _ in listed]
        sample = sum(sizes) >= full_below
        return tuple(
            _digest(name, path, header, size, sample) for (name, path, header), size in zip(listed, sizes, strict=True)
        )
    except OSError as error:
        raise CheckpointError(f"{error.filename or listed} cannot be read: {error.strerror or error}") from error


def _digest(name: str, path: Path, header: int, size: int, sample: bool) -> FileDigest:
    sample = sample and size > SAMPLE_CHUNKS * SAMPLE_BYTES
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        if sample:
            digest.update(size.to_bytes(8, "little"))
            digest.update(stream.read(header))
            for index in range(SAMPLE_CHUNKS):
                stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLE_CHUNKS - 1))
                digest.update(stream.read(SAMPLE_BYTES))
        else:
            buffer = memoryview(bytearray(1024 * 1024))
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
    return FileDigest(name, size, digest.hexdigest(), sample)
