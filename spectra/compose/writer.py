"""`ShardWriter`: a safetensors file written tensor by tensor: memory follows the largest tensor, not the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from spectra.checkpoints import TensorInfo
from spectra.errors import CheckpointError

_ALIGNED = 8  # the header ends at a multiple of it, as safetensors' own writer has it


class ShardWriter:
    """Writes the tensors of a header that is known beforehand, in its order, and takes its place when it is whole.

    Parameters
    ----------
    path : Path
        Of the finished file; until then it grows beside it.
    infos : iterable of TensorInfo
        Names, dtypes and shapes, in the order in which they will come.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> info = TensorInfo("w", "F32", (2, 2), "m.safetensors", 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "m.safetensors")
    ...     with ShardWriter(path, [info]) as shard:
    ...         shard.write("w", torch.eye(2))
    ...     load_file(path)["w"].trace()
    tensor(2.)
    """

    def __init__(self, path: Path, infos: Iterable[TensorInfo]) -> None:
        self.path = path
        self._part = path.with_name(f".{path.name}.part")
        self._expected = list(infos)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for info in self._expected:
            end = begin + info.read_bytes
            header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % _ALIGNED)
        self._next = 0

    def __enter__(self) -> ShardWriter:
        try:
            self._stream = self._part.open("wb")
            self._stream.write(len(self._header).to_bytes(8, "little") + self._header)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, the next one of the header.

        Raises
        ------
        CheckpointError
            If another one was due, its bytes are of another number, or the disk is full.
        """
        info = self._expected[self._next]
        if (name, tensor.nbytes, tuple(tensor.shape)) != (info.name, info.read_bytes, info.shape):
            raise CheckpointError(f"{self.path}: {info.name} of {info.read_bytes} bytes was due, not {name}")
        try:
            self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._next += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        if kind is None and self._next == len(self._expected):
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)
