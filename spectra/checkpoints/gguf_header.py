"""The header of a GGUF file, checked in full before any tensor is read: metadata, and where every tensor lies.

The header is parsed here rather than by the gguf package, whose reader believes every count that a file states: 49
bytes keep it busy until memory ends. Here each count is held against the bytes that are left before anything is done so
many times, so that a header costs no more than its own bytes. It is also quicker: 0.2 s in place of 5.4 s for a
vocabulary of 49 152 words, which that reader turns into as many arrays.

References
----------
The GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from spectra.checkpoints.strict_json import regular_size, shown
from spectra.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat

MAX_HEADER_BYTES = 100_000_000  # as of a safetensors header; a vocabulary of 256 000 words takes about 15 MB
MAX_AXES = 4  # the format's own limit

# Name, entries and bytes of a block, by the number that stands in the file (ggml.h, ggml-common.h).
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# How metadata of one number is stored, as the struct module spells it.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize("<" + letter) for kind, letter in _SCALARS.items()}
_STRING, _ARRAY = 8, 9

_VERSIONS = (2, 3)
_LEAST_ENTRY = 8 + 4 + 1  # bytes of the shortest key, its type and the shortest value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of the shortest name, number of axes, type and offset
_KEPT_TEXT = 256  # bytes; longer metadata are chat templates and licences
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as a GGUF header describes it.

    Attributes
    ----------
    kind : str
        GGUF's name of its type: ``"F32"``, ``"Q4_1"``, …
    block, block_bytes : int
        Entries of a block of that type, consecutive along the last axis, and the bytes they take together; one entry
        for plain numbers.
    shape : tuple of int
        As torch counts: the axis that is consecutive in memory last.
    begin : int
        Where its data begin, counted from the first byte of the file.
    """

    kind: str
    block: int
    block_bytes: int
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) // self.block * self.block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Attributes
    ----------
    metadata : mapping of str to int, float, bool or str
        Single values only; arrays and long texts are passed over.
    tensors : mapping of str to GgufTensor
        In the file's order.
    size : int
        Bytes of the file.
    nbytes : int
        Bytes of the header.
    digest : bytes
        SHA-256 of the header.
    """

    metadata: Mapping[str, int | float | bool | str]
    tensors: Mapping[str, GgufTensor]
    size: int
    nbytes: int
    digest: bytes


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; errors as `parse_gguf_header`, and those of a file that is not there.

    Raises
    ------
    CheckpointNotFound, CheckpointError
        The file is missing or cannot be read.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as stream:
            return parse_gguf_header(stream, size=size, file=str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_gguf_header(stream: BinaryIO, *, size: int, file: str) -> GgufHeader:
    """Parse and check the header of a GGUF file.

    Parameters
    ----------
    stream : binary file
        At the first byte.
    size : int
        Bytes of the file.
    file : str
        Its name, for messages.

    Raises
    ------
    UnsafeCheckpoint
        The header contradicts itself, the format or the file's size.
    UnsupportedFormat
        It is of another version or byte order, or of a type that is not known here.
    CheckpointError
        The stream ends before `size` bytes.

    Examples
    --------
    >>> import io
    >>> empty = b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16)
    >>> parse_gguf_header(io.BytesIO(empty), size=24, file="example").nbytes
    24
    """
    cursor = _Cursor(stream, size, file)
    _check_version(cursor)
    tensor_count, entry_count = cursor.u64(), cursor.u64()
    metadata = _metadata(cursor, entry_count)
    cursor.reserve(tensor_count, _LEAST_TENSOR, "tensors")
    described = [_described(cursor) for _ in range(tensor_count)]
    alignment = _alignment(metadata, file)
    begin = -(-cursor.taken // alignment) * alignment
    tensors = _placed(described, begin, alignment, file)
    _check_cover(tensors, begin, size, alignment, file)
    return GgufHeader(metadata, tensors, size, cursor.taken, cursor.digest.digest())


class _Cursor:
    """The header from its first byte on; nothing is taken that the file does not have."""

    def __init__(self, stream: BinaryIO, size: int, where: str) -> None:
        self.where = where
        self.left = size
        self.taken = 0
        self.digest = hashlib.sha256()
        self._stream = stream

    def take(self, count: int) -> bytes:
        self.reserve(count, 1, "a value")
        if count > MAX_HEADER_BYTES - self.taken:
            raise UnsafeCheckpoint(f"{self.where}: the header has over {MAX_HEADER_BYTES} bytes; no genuine one does")
        data = self._stream.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.where} became shorter while it was opened")
        self.digest.update(data)
        self.left -= count
        self.taken += count
        return data

    def reserve(self, count: int, least: int, what: str) -> None:
        """Refuse a count of things that take at least so many bytes each, if the file is too short for them."""
        if count * least > self.left:
            raise UnsafeCheckpoint(
                f"{self.where}: the header claims {count} bytes or entries for {what}, and {self.left} bytes are left; "
                "a truncated file? Copy it again."
            )

    def skip(self, count: int, what: str) -> None:
        self.reserve(count, 1, what)
        while count:
            count -= len(self.take(min(count, _PIECE)))

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def name(self) -> str:
        data = self.take(self.u64())
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise UnsafeCheckpoint(f"{self.where}: the name {shown(data)} is not UTF-8") from None


def _metadata(cursor: _Cursor, count: int) -> dict[str, int | float | bool | str]:
    cursor.reserve(count, _LEAST_ENTRY, "metadata")
    metadata: dict[str, int | float | bool | str] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.name()
        if key in seen:
            raise UnsafeCheckpoint(f"{cursor.where}: the header has the key {shown(key)} twice")
        seen.add(key)
        value = _value(cursor, cursor.u32(), key)
        if value is not None:
            metadata[key] = value
    return metadata


def _check_version(cursor: _Cursor) -> None:
    if cursor.left < 24 or cursor.take(4) != b"GGUF":
        raise UnsafeCheckpoint(
            f"{cursor.where} does not begin as a GGUF file does; it is truncated, or none (a Git LFS pointer?)"
        )
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise UnsupportedFormat(
            f"{cursor.where} is big-endian; convert it with gguf's own gguf-convert-endian, and name the result"
        )
    if version not in _VERSIONS:
        raise UnsupportedFormat(
            f"{cursor.where} is GGUF version {version}; there are readers for {' and '.join(map(str, _VERSIONS))}. "
            "Convert the model again with a current llama.cpp."
        )


def _value(cursor: _Cursor, kind: int, key: str) -> int | float | bool | str | None:
    """One number or short text; None for anything else, which is passed over."""
    if kind in _SCALARS:
        (value,) = struct.unpack("<" + _SCALARS[kind], cursor.take(_SIZES[kind]))
        return value  # type: ignore[no-any-return]
    if kind == _STRING:
        length = cursor.u64()
        if length <= _KEPT_TEXT:
            return cursor.take(length).decode("utf-8", "replace")
        cursor.skip(length, shown(key))
        return None
    if kind != _ARRAY:
        raise UnsafeCheckpoint(f"{cursor.where}: {shown(key)} is of type {kind}, which the format does not have")
    inner, count = cursor.u32(), cursor.u64()
    if inner in _SCALARS:
        cursor.reserve(count, _SIZES[inner], shown(key))
        cursor.skip(count * _SIZES[inner], shown(key))
    elif inner == _STRING:
        cursor.reserve(count, 8, shown(key))
        for _ in range(count):
            cursor.skip(cursor.u64(), shown(key))
    else:
        raise UnsafeCheckpoint(f"{cursor.where}: {shown(key)} is an array of type {inner}, which nothing writes")
    return None


def _described(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """A tensor's entry in the header, its data counted from where all data begin."""
    name = cursor.name()
    where = f"{cursor.where}: tensor {shown(name)}"
    axes = cursor.u32()
    if axes > MAX_AXES:
        raise UnsafeCheckpoint(f"{where} has {axes} axes; the format allows {MAX_AXES}")
    shape = tuple(cursor.u64() for _ in range(axes))[::-1]
    if 0 in shape:
        raise UnsafeCheckpoint(f"{where} of shape {shape} has no entries; nothing writes such a tensor")
    kind, offset = cursor.u32(), cursor.u64()
    if kind not in _TYPES:
        raise UnsupportedFormat(
            f"{where} is of type {kind}, which has no reader here; quantize the model to another, or convert it to BF16"
        )
    label, block, width = _TYPES[kind]
    if (shape[-1] if shape else 1) % block:
        raise UnsafeCheckpoint(f"{where}: rows of {shape[-1:]} entries are no whole blocks of {label}, of {block} each")
    return name, GgufTensor(label, block, width, shape, offset)


def _alignment(metadata: Mapping[str, object], where: str) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise UnsafeCheckpoint(f"{where}: the alignment {shown(alignment)} is no power of two")
    return alignment


def _placed(
    described: Sequence[tuple[str, GgufTensor]], begin: int, alignment: int, where: str
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, tensor in described:
        if name in tensors:
            raise UnsafeCheckpoint(f"{where}: tensor {shown(name)} is there twice")
        if tensor.begin % alignment:
            raise UnsafeCheckpoint(
                f"{where}: tensor {shown(name)} begins at {tensor.begin}, no multiple of {alignment}"
            )
        tensors[name] = replace(tensor, begin=begin + tensor.begin)
    return tensors


def _check_cover(tensors: Mapping[str, GgufTensor], begin: int, size: int, alignment: int, where: str) -> None:
    """Tensors must follow each other without overlap, with no more between them than fills to the alignment."""
    reached = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        end = tensor.begin + tensor.nbytes
        if end > size:
            raise UnsafeCheckpoint(
                f"{where}: tensor {shown(name)} ends at byte {end} of {size} that the file has; a truncated file? "
                "Copy it again."
            )
        if tensor.begin < reached:
            raise UnsafeCheckpoint(
                f"{where}: tensor {shown(name)} begins at byte {tensor.begin}, inside another's data"
            )
        if tensor.begin - reached >= alignment:
            raise UnsafeCheckpoint(
                f"{where}: tensor {shown(name)} begins at byte {tensor.begin}, leaving a gap from byte {reached}"
            )
        reached = end
    if size - reached >= alignment:
        raise UnsafeCheckpoint(f"{where}: {size - reached} bytes after the last tensor belong to none")
