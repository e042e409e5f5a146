"""`CheckedFile`: bytes of a file whose header has been checked, read for as long as it is still the same file."""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectra.errors import CheckpointError


class CheckedFile:
    """A file and the header that was checked; each read opens the file for itself.

    A file that was replaced since is refused: the header's offsets would point into other data. The first read in a
    process compares the header itself, later ones its size, time of change and inode.

    Parameters
    ----------
    path : Path
        The file.
    size : int
        Its bytes when it was checked.
    header_bytes : int
        How many bytes its header takes, from the first on.
    digest : bytes
        SHA-256 of those.
    """

    def __init__(self, path: Path, *, size: int, header_bytes: int, digest: bytes) -> None:
        self.path = path
        self.size = size
        self.header_bytes = header_bytes
        self._digest = digest
        self._stamp: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stamp": None}  # another machine's clock or copy may differ

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Read bytes, counted from the first of the file, into fresh memory.

        Raises
        ------
        CheckpointError
            The file cannot be read, or has changed since it was checked.
        """
        # numpy's allocation, not torch's: torch asks for 64-byte alignment, and freed blocks of that kind are not
        # reused well; over a 512 MiB file of 16 MiB tensors the peak was 110 to 270 MiB higher.
        buffer = np.empty(nbytes, np.uint8)
        target = buffer.data
        try:
            with self.path.open("rb", buffering=0) as stream:
                self._check_unchanged(stream)
                stream.seek(offset)
                while len(target):
                    count = stream.readinto(target)
                    if not count:
                        raise CheckpointError(f"{self.path} became shorter while it was read")
                    target = target[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return buffer

    def _check_unchanged(self, stream: FileIO) -> None:
        status = os.fstat(stream.fileno())
        stamp = (status.st_mtime_ns, status.st_ino)
        unchanged = status.st_size == self.size
        if unchanged and self._stamp is None:
            unchanged = hashlib.sha256(stream.read(self.header_bytes)).digest() == self._digest
            self._stamp = stamp
        if not unchanged or stamp != self._stamp:
            raise CheckpointError(f"{self.path} has changed since it was opened; open the checkpoint again")
