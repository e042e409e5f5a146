"""Safetensors files: the header is checked in full before any tensor is read, tensors are read without mapping.

The header is parsed here rather than by the safetensors package so that every violation names the file and the
tensor. Reading into allocated memory (``readinto``, as the package's ``pread`` back end does) keeps the file's
pages out of the process: its peak memory is one tensor, where a memory map's is the whole file.

References
----------
The safetensors format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectra.checkpoints.checked_file import CheckedFile
from spectra.checkpoints.checkpoint import TensorInfo
from spectra.checkpoints.element_types import BITS, TORCH
from spectra.checkpoints.strict_json import is_unicode, parse_object, regular_size, shown
from spectra.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LARGEST_AXIS = 2**63 - 1  # of a 64-bit index

_UNKNOWN_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
_FIELDS = {"dtype", "shape", "data_offsets"}


class Header(NamedTuple):
    """A checked header: its tensors, and where each begins, counted from the first byte after the header."""

    infos: dict[str, TensorInfo]
    begins: dict[str, int]


def parse_header(header: bytes, *, data_bytes: int, file: str) -> Header:
    """Parse and check a safetensors header (the JSON alone, without its length).

    Every byte of the data must belong to exactly one tensor. Nothing is allocated from a shape.

    Parameters
    ----------
    header : bytes
        JSON text.
    data_bytes : int
        Bytes that follow the header in the file.
    file : str
        Name of the file, for messages and for ``TensorInfo.file``.

    Returns
    -------
    Header
        Tensors in the order of their data.

    Raises
    ------
    UnsafeCheckpoint
        Anything in the header contradicts itself, the format or the file's size.

    Examples
    --------
    >>> text = b'{"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
    >>> parse_header(text, data_bytes=24, file="example").infos["w"].shape
    (2, 3)
    """
    if not header.startswith(b"{"):
        raise UnsafeCheckpoint(f"{file}: header does not begin with '{{'; this is no safetensors file")
    entries = parse_object(header, f"{file}: header")
    _check_metadata(entries.pop("__metadata__", {}), file)
    spans = [_check_entry(name, entry, file) for name, entry in entries.items()]
    spans.sort(key=lambda span: (span[1], span[2]))
    _check_cover([(info.name, begin, end) for info, begin, end in spans], data_bytes, file)
    return Header({info.name: info for info, _, _ in spans}, {info.name: begin for info, begin, _ in spans})


def _check_metadata(metadata: object, file: str) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and is_unicode(key + value) for key, value in metadata.items()
    ):
        raise UnsafeCheckpoint(f"{file}: __metadata__ does not map strings to strings")


def _check_entry(name: str, entry: Any, file: str) -> tuple[TensorInfo, int, int]:
    """Check one tensor's entry by itself; return it with the first and the last-but-one byte of its data."""
    where = f"{file}: tensor {shown(name)}"
    if not is_unicode(name):
        raise UnsafeCheckpoint(f"{where}: the name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise UnsafeCheckpoint(f"{where} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not (dtype in BITS or _UNKNOWN_DTYPE.fullmatch(dtype)):
        raise UnsafeCheckpoint(f"{where} has no element type but {shown(dtype)}")
    if not isinstance(shape, list) or not all(_is_count(axis) for axis in shape):
        raise UnsafeCheckpoint(f"{where} has no shape but {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise UnsafeCheckpoint(f"{where} has no data_offsets but {shown(offsets)}")
    begin, end = offsets
    if begin > end:
        raise UnsafeCheckpoint(f"{where} ends at byte {end}, before it begins at {begin}")
    # The bytes of a type that is not known here cannot be checked against its shape; reading it is refused.
    if dtype in BITS and not _fills(shape, BITS[dtype], end - begin):
        raise UnsafeCheckpoint(f"{where}: {dtype} of shape {shown(shape)} does not take the {end - begin} bytes given")
    return TensorInfo(name, dtype, tuple(shape), file, end - begin), begin, end


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_AXIS  # type() because a bool is an int


def _fills(shape: list[int], bits: int, nbytes: int) -> bool:
    """Whether a shape takes exactly `nbytes`, without ever forming a product much larger than they allow."""
    if 0 in shape:
        return nbytes == 0
    total = bits
    for axis in shape:
        total *= axis
        if total > 8 * nbytes:
            return False
    return total == 8 * nbytes


def _check_cover(spans: list[tuple[str, int, int]], data_bytes: int, file: str) -> None:
    """Spans in ascending order must follow each other without overlap or gap and end with the file."""
    reached = 0
    for name, begin, end in spans:
        where = f"{file}: tensor {shown(name)}"
        if end > data_bytes:
            raise UnsafeCheckpoint(
                f"{where} ends at byte {end} of {data_bytes} that the file has; a truncated file? Copy it again."
            )
        if begin < reached:
            raise UnsafeCheckpoint(f"{where} begins at byte {begin}, inside another tensor's data")
        if begin > reached:
            raise UnsafeCheckpoint(f"{where} begins at byte {begin}, leaving a gap from byte {reached}")
        reached = end
    if reached != data_bytes:
        raise UnsafeCheckpoint(f"{file}: {data_bytes - reached} bytes after the last tensor belong to none")


class SafetensorsFile:
    """One safetensors file whose header has been checked; each read opens the file for itself.

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
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.path = path
        name = name or path.name
        size = regular_size(path)
        length, header = _read_header(path, size)
        self.header_bytes = 8 + len(header)
        parsed = parse_header(header, data_bytes=size - self.header_bytes, file=name)
        self.infos: Mapping[str, TensorInfo] = parsed.infos
        self.aliases: Mapping[str, str] = {}  # the format stores every tensor once, under one name
        self.notes: tuple[str, ...] = ()
        self._begins = parsed.begins
        digest = hashlib.sha256(length + header).digest()
        self._bytes = CheckedFile(path, size=size, header_bytes=self.header_bytes, digest=digest)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory, in its stored dtype.

        Raises
        ------
        UnsupportedFormat
            torch has no such element type or cannot hold such a shape.
        CheckpointError
            The file cannot be read, or has changed since it was opened.
        """
        info = self.infos[name]
        return self._read(info, 0, info.nbytes, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis; see `read`."""
        info = self.infos[name]
        _torch_dtype(info)  # sub-byte rows need not begin at a byte, so refuse them before counting bytes
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, start * row, (stop - start) * row, (stop - start, *info.shape[1:]))

    def read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read bytes ``start:stop`` of a tensor's data, whatever its type, as (stop - start,) uint8; see `read`."""
        return torch.from_numpy(self._bytes.read(self.header_bytes + self._begins[name] + start, stop - start))

    def _read(self, info: TensorInfo, start: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = _torch_dtype(info)
        flat = self.read_bytes(info.name, start, start + nbytes)
        try:
            if not nbytes:  # torch does not view zero bytes as anything else
                return torch.empty(shape, dtype=dtype)
            # A stored bool other than 0 and 1 would be undefined behaviour inside torch.
            return (flat.ne(0) if dtype is torch.bool else flat.view(dtype)).view(shape)
        except (RuntimeError, TypeError):  # an empty tensor whose other axes overflow torch's index arithmetic
            raise UnsupportedFormat(
                f"{self.path}: tensor {shown(info.name)} of shape {shown(shape)} is too large for torch to describe"
            ) from None


def _read_header(path: Path, size: int) -> tuple[bytes, bytes]:
    """The eight bytes that hold the header's length, and the header."""
    if size < 8:
        raise UnsafeCheckpoint(f"{path} has {size} bytes; a safetensors file has at least 8")
    try:
        with path.open("rb", buffering=0) as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise UnsafeCheckpoint(
                    f"{path}: the header claims {length} bytes; the file has {size}, the format allows "
                    f"{MAX_HEADER_BYTES}. It is truncated, or no safetensors file (a Git LFS pointer?)."
                )
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(header) != length:
        raise CheckpointError(f"{path} became shorter while it was opened")
    return prefix, header


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    try:
        return TORCH[info.dtype]
    except KeyError:
        raise UnsupportedFormat(
            f"{info.file}: tensor {shown(info.name)} has element type {info.dtype}, which has no reader here; "
            "convert it to BF16 or F32 with the tool that wrote it"
        ) from None
