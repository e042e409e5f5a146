"""GGUF files: tensors by transformers' names where the architecture is known, dequantized one at a time.

Plain numbers are read as they are stored. What is quantized is turned into float32 by the gguf package, which stands
for llama.cpp's own arithmetic; without that package such a file opens, and reading one of those tensors says what to
install.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.checkpoints.checked_file import CheckedFile
from spectra.checkpoints.checkpoint import TensorInfo
from spectra.checkpoints.element_types import TORCH
from spectra.checkpoints.gguf_header import GgufTensor, read_gguf_header
from spectra.checkpoints.gguf_names import in_order, naming
from spectra.checkpoints.quantization import Quantization, quantization_notes
from spectra.checkpoints.strict_json import shown
from spectra.errors import UnsafeCheckpoint, UnsupportedFormat

# Entries dequantized at a time, so that the arithmetic in between stays in the cache: 0.7 GB/s of Q8_0 in pieces of
# 2¹⁶ to 2¹⁸ entries, 0.4 GB/s of a matrix of 28 million entries at once.
_AT_ONCE = 1 << 17

# Of the types in blocks of 256, those that have no quantized scales for groups within a block.
_ONE_SCALE = ("Q8_K", "TQ1_0", "TQ2_0")


class GgufFile:
    """One GGUF file whose header has been checked; each read opens the file for itself.

    Parameters
    ----------
    path : Path
        The file.
    name : str, optional
        Its name relative to the checkpoint's folder; by default the file's own.

    Raises
    ------
    CheckpointNotFound, CheckpointError
        The file is missing or cannot be read.
    UnsafeCheckpoint
        Its header contradicts itself, the format or the file's size.
    UnsupportedFormat
        It is of another version or byte order, one piece of a split model, or holds a type that is not known here.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.path = path
        name = name or path.name
        header = read_gguf_header(path)
        _refuse_piece(header.metadata, path)
        self.header_bytes = header.nbytes
        found = naming({stored: tensor.shape for stored, tensor in header.tensors.items()}, header.metadata)
        self._tensors: Mapping[str, GgufTensor] = _renamed(header.tensors, found.names, path)
        self._heads = {found.names[stored]: count for stored, count in found.heads.items()}
        self.infos: Mapping[str, TensorInfo] = {
            key: TensorInfo(key, _dtype(tensor), tensor.shape, name, tensor.nbytes, _quantization(tensor))
            for key, tensor in self._tensors.items()
        }
        self.aliases: Mapping[str, str] = {}  # tied weights stand in a file once, under the embeddings' name
        quantizations = (info.quantization for info in self.infos.values())
        self.notes = (f"{name}: {found.note}", *quantization_notes(name, quantizations))
        self._bytes = CheckedFile(path, size=header.size, header_bytes=header.nbytes, digest=header.digest)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory, in `TensorInfo.dtype`.

        Raises
        ------
        UnsupportedFormat
            It is of a type that the gguf package does not dequantize, or that package is not installed.
        CheckpointError
            The file cannot be read, or has changed since it was opened.
        """
        tensor = self._tensors[name]
        if not tensor.shape:
            return self._stored(name, tensor, 0, tensor.nbytes).view(())
        return self.read_rows(name, 0, tensor.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis, and the rest of their heads; see `read`."""
        tensor = self._tensors[name]
        unit = self._rows_together(name, tensor)
        first, last = start // unit, -(-stop // unit)
        if first == last:
            return torch.empty((0, *tensor.shape[1:]), dtype=TORCH[self.infos[name].dtype])
        bytes_each = tensor.nbytes // (tensor.shape[0] // unit)
        flat = self._stored(name, tensor, first * bytes_each, last * bytes_each)
        rows = flat.view((last - first) * unit, *tensor.shape[1:])
        if name in self._heads:
            rows = in_order(rows, self._heads[name] * len(rows) // tensor.shape[0])
        return rows[start - first * unit : stop - first * unit]

    def _rows_together(self, name: str, tensor: GgufTensor) -> int:
        """Rows that are read at once or not at all: a head's, or a whole vector, whose entries may share blocks."""
        if len(tensor.shape) == 1:
            return tensor.shape[0]
        return tensor.shape[0] // self._heads.get(name, tensor.shape[0])

    def _stored(self, name: str, tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
        """Entries that the bytes ``begin:end`` of a tensor hold, one after the other."""
        data = self._bytes.read(tensor.begin + begin, end - begin)
        if tensor.block == 1:
            return torch.from_numpy(data).view(TORCH[tensor.kind])
        return torch.from_numpy(_dequantized(data, tensor, f"{self.path}: tensor {shown(name)}"))


def _refuse_piece(metadata: Mapping[str, object], path: Path) -> None:
    count = metadata.get("split.count", 1)
    if type(count) is int and count > 1:
        raise UnsupportedFormat(
            f"{path} is one of {count} pieces of a model; join them with llama.cpp's `llama-gguf-split --merge`, and "
            "name the result"
        )


def _renamed(tensors: Mapping[str, GgufTensor], names: Mapping[str, str], path: Path) -> dict[str, GgufTensor]:
    renamed = {names[stored]: tensor for stored, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise UnsafeCheckpoint(f"{path}: two tensors would both be called {shown(twice)}")
    return renamed


def _dtype(tensor: GgufTensor) -> str:
    return tensor.kind if tensor.block == 1 else "F32"


def _quantization(tensor: GgufTensor) -> Quantization | None:
    if tensor.block == 1:
        return None
    return Quantization(tensor.kind.lower(), tensor.block, double=tensor.block == 256 and tensor.kind not in _ONE_SCALE)


def _dequantized(data: NDArray[np.uint8], tensor: GgufTensor, where: str) -> NDArray[np.float32]:
    """Blocks of a quantized type as float32 numbers, a piece at a time."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import QuantError, dequantize
    except ImportError:
        raise UnsupportedFormat(
            f"{where} is quantized ({tensor.kind}), which the gguf package undoes: pip install 'spectra-weights[gguf]'"
        ) from None
    values = np.empty(len(data) // tensor.block_bytes * tensor.block, np.float32)
    stride = _AT_ONCE // tensor.block * tensor.block_bytes
    try:
        kind = GGMLQuantizationType[tensor.kind]
        with np.errstate(all="ignore"):  # a scale that is infinite is found where the matrix is measured
            for start in range(0, len(data), stride):
                piece = dequantize(data[start : start + stride], kind)
                values[start // tensor.block_bytes * tensor.block :][: len(piece)] = piece
    except (KeyError, NotImplementedError, QuantError):
        raise UnsupportedFormat(
            f"{where} is of type {tensor.kind}, which the installed gguf package does not dequantize; quantize the "
            "model to another type, or convert it to BF16"
        ) from None
    return values
