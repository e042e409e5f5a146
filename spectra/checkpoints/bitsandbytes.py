"""Weights that bitsandbytes quantized, in safetensors: read dequantized, one tensor or its rows at a time.

A matrix in four bits is stored as ``X`` (packed codes), ``X.absmax`` (a scale a block), ``X.quant_map`` (the code
book) and ``X.quant_state.bitsandbytes__nf4`` or ``…__fp4`` (JSON in bytes); where the scales are quantized too, with
``X.nested_absmax`` and ``X.nested_quant_map`` beside these. One of LLM.int8 is stored as ``Y.weight``, ``Y.SCB`` (a
scale a row) and ``Y.weight_format``. The parts of one matrix may stand in different shards.

What is read equals bitsandbytes' own answer bit for bit; that package is not needed.

References
----------
T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; "LLM.int8()", NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch

from spectra.checkpoints.checkpoint import TensorFile, TensorInfo, places
from spectra.checkpoints.element_types import TORCH
from spectra.checkpoints.quantization import Quantization, quantization_notes
from spectra.checkpoints.safetensors import LARGEST_AXIS, SafetensorsFile
from spectra.checkpoints.strict_json import parse_object, shown
from spectra.errors import UnsafeCheckpoint, UnsupportedFormat
from spectra.quantize.formats import FP4, NF4, Format
from spectra.quantize.scales import PlainScales
from spectra.quantize.tensor import QuantizedTensor

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {format.name: format for format in (NF4, FP4)}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_LIMIT = 65536  # entries a scale; bitsandbytes knows 32 to 4096
_STATE_LIMIT = 65536  # bytes of JSON; bitsandbytes writes under 200
_MAP_TOLERANCE = 1e-6  # a code book computed elsewhere may differ by float32's rounding of numbers up to 1

_SCB, _LAYOUT = ".SCB", ".weight_format"
_ROW_MAJOR = 0  # of bitsandbytes' table of layouts; 1 to 3 are those of old GPUs' tensor cores
_INT8_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes spells it: bit for bit its own answer


def dequantizing(files: Sequence[SafetensorsFile]) -> Sequence[TensorFile]:
    """The same files, with the parts of every quantized matrix put together as one tensor.

    Parameters
    ----------
    files : sequence of SafetensorsFile
        All shards of one checkpoint.

    Returns
    -------
    sequence of TensorFile
        Of the same length and order; the files themselves where none of them holds a quantized matrix.

    Raises
    ------
    UnsafeCheckpoint
        A part is missing, or contradicts the others; a tensor stands in two files.
    UnsupportedFormat
        A code book, element type or layout that has no reader here.
    """
    if not any(_STATE in name or name.endswith(_SCB) for file in files for name in file.infos):
        return files
    parts = _Parts({name: files[place] for name, place in places(files).items()})
    states = [name for name in parts.files if _STATE in name]
    scales = [name for name in parts.files if name.endswith(_SCB) and parts.type(_weight_of(name)) == "I8"]
    matrices: dict[str, _Matrix] = {}
    hidden: set[str] = set()
    for name, (matrix, taken) in [*(_four_bits(parts, state) for state in states), *(_int8(parts, n) for n in scales)]:
        if name in matrices:
            raise UnsafeCheckpoint(f"{parts.files[name].path}: {shown(name)} is described twice, as two quantizations")
        matrices[name] = matrix
        hidden.update(taken)
    return [_DequantizedFile(file, matrices, hidden) for file in files]


class _Matrix(Protocol):
    """A quantized matrix whose parts have been checked against each other."""

    @property
    def info(self) -> TensorInfo: ...

    def read_rows(self, start: int, stop: int) -> torch.Tensor: ...


class _DequantizedFile:
    """One file's tensors, dequantized where they are quantized; a matrix belongs to the file that holds its codes."""

    def __init__(self, file: SafetensorsFile, matrices: Mapping[str, _Matrix], hidden: set[str]) -> None:
        self._file = file
        self._matrices = {name: matrix for name, matrix in matrices.items() if name in file.infos}
        self.path = file.path
        self.header_bytes = file.header_bytes
        self.infos: Mapping[str, TensorInfo] = {
            name: self._matrices[name].info if name in self._matrices else info
            for name, info in file.infos.items()
            if name not in hidden
        }
        self.aliases = file.aliases
        found = (info.quantization for info in self.infos.values())
        self.notes = (*file.notes, *quantization_notes(file.path.name, found))

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory, in `TensorInfo.dtype`; errors as `SafetensorsFile.read`."""
        if name not in self._matrices:
            return self._file.read(name)
        info = self.infos[name]
        return self._matrices[name].read_rows(0, info.shape[0]).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis, and of a quantized matrix the blocks that hold them."""
        if name not in self._matrices:
            return self._file.read_rows(name, start, stop)
        return self._matrices[name].read_rows(start, stop)


class _Stored(NamedTuple):
    """A stored part, and where it stands."""

    file: SafetensorsFile
    info: TensorInfo

    def read(self, start: int, stop: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Elements ``start:stop`` of the data, taken as this dtype."""
        return self.file.read_bytes(self.info.name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)


class _Parts:
    """The tensors of all files, by name."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        self.files = files

    def find(self, name: str) -> _Stored | None:
        file = self.files.get(name)
        return None if file is None else _Stored(file, file.infos[name])

    def type(self, name: str) -> str | None:
        found = self.find(name)
        return None if found is None else found.info.dtype

    def part(self, name: str, of: str) -> _Stored:
        found = self.find(name)
        if found is None:
            raise UnsafeCheckpoint(
                f"{self.files[of].path}: {shown(of)} stands without {shown(name)}; fetch the whole checkpoint again"
            )
        return found

    def typed(self, name: str, of: str, dtype: str, count: int) -> _Stored:
        """A part of this element type and so many elements."""
        found = self.part(name, of)
        if found.info.dtype != dtype or math.prod(found.info.shape) != count:
            raise UnsafeCheckpoint(
                f"{found.file.path}: {shown(name)} is {found.info.dtype} of shape {found.info.shape}; its matrix needs "
                f"{count} elements of {dtype}"
            )
        return found


@dataclass(frozen=True)
class _Nested:
    """What the scales of a matrix are themselves multiplied by, and moved by afterwards."""

    absmax: _Stored
    levels: _Stored
    block: int
    offset: float


@dataclass(frozen=True)
class _FourBits:
    info: TensorInfo
    format: Format
    block: int
    codes: _Stored
    absmax: _Stored
    nested: _Nested | None

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        if start == stop:  # torch does not view zero bytes as anything else
            return torch.empty((0, *self.info.shape[1:]), dtype=TORCH[self.info.dtype])
        row = math.prod(self.info.shape[1:])
        begin, end = start * row, stop * row
        first, last = begin // self.block, -(-end // self.block)
        skipped = first * self.block
        count = min(last * self.block, math.prod(self.info.shape)) - skipped
        quantized = QuantizedTensor(
            self.format,
            (count,),
            TORCH[self.info.dtype],
            self.block,
            self.codes.read(skipped // 2, (skipped + count + 1) // 2),
            PlainScales(self._scales(first, last)),
        )
        # The kernel of this package, with bitsandbytes or without: the same bytes on every machine.
        values = quantized.dequantize(backend="torch")[begin - skipped : end - skipped]
        return values.view(stop - start, *self.info.shape[1:])

    def _scales(self, first: int, last: int) -> torch.Tensor:
        """Scales of the blocks ``first:last``, float32, as bitsandbytes computes them."""
        if self.nested is None:
            return self.absmax.read(first, last, torch.float32)
        outer = torch.arange(first, last) // self.nested.block
        begin, end = first // self.nested.block, -(-last // self.nested.block)
        levels = self.nested.levels.read(0, 256, torch.float32)[self.absmax.read(first, last).long()]
        return levels * self.nested.absmax.read(begin, end, torch.float32)[outer - begin] + self.nested.offset


@dataclass(frozen=True)
class _Int8:
    info: TensorInfo
    codes: _Stored
    scales: _Stored

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return torch.empty(0, self.info.shape[1])
        codes = self.codes.file.read_rows(self.info.name, start, stop)
        return codes * self.scales.read(start, stop, torch.float32)[:, None] * _INT8_STEP


_Found = tuple[str, tuple[_Matrix, set[str]]]


def _four_bits(parts: _Parts, mark: str) -> _Found:
    """Name of the matrix that a quantization state describes, the matrix, and the names of its other parts."""
    name, _, kind = mark.partition(_STATE)
    where = f"{parts.files[mark].path}: {shown(mark)}"
    state = _state(parts.part(mark, of=mark), where)
    format = _FORMATS.get(kind)
    if format is None or state.get("quant_type") != kind:
        raise UnsupportedFormat(
            f"{where} is of type {shown(state.get('quant_type'))}; there are readers for nf4 and fp4"
        )
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedFormat(f"{where} dequantizes to {shown(dtype)}; there are readers for {', '.join(_DTYPES)}")
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(_is_count(axis) for axis in shape):
        raise UnsafeCheckpoint(f"{where} has no shape but {shown(shape)}")
    if not _is_block(block) or block % 2:
        raise UnsafeCheckpoint(
            f"{where} has no blocksize but {shown(block)}; it is an even number up to {_BLOCK_LIMIT}"
        )
    codes = parts.part(name, of=mark)
    count = _product(shape, 2 * codes.info.nbytes)
    if (count + 1) // 2 != codes.info.nbytes or not codes.info.shape:
        raise UnsafeCheckpoint(f"{where}: the shape {shown(shape)} does not take {codes.info.nbytes} bytes of codes")
    if codes.info.shape[0] == 1 and codes.info.nbytes > 1:
        raise UnsupportedFormat(f"{where}: the codes are stored as a row, transposed; save the model itself again")
    blocks = -(-count // block)
    double = "nested_blocksize" in state
    absmax = parts.typed(f"{name}.absmax", mark, "U8" if double else "F32", blocks)
    book = parts.typed(f"{name}.quant_map", mark, "F32", 16)
    _check_book(book.read(0, 16, torch.float32), format, where)
    nested = _nested(parts, name, mark, state, blocks) if double else None
    taken = [parts.part(mark, of=mark), absmax, book, *((nested.absmax, nested.levels) if nested else ())]
    info = TensorInfo(
        name,
        _DTYPES[dtype],
        tuple(shape),
        codes.info.file,
        codes.info.nbytes + sum(part.info.nbytes for part in taken),
        Quantization(kind, block, double=double),
    )
    return name, (_FourBits(info, format, block, codes, absmax, nested), {part.info.name for part in taken})


def _state(stored: _Stored, where: str) -> dict[str, Any]:
    if stored.info.nbytes > _STATE_LIMIT:
        raise UnsafeCheckpoint(f"{where} has {stored.info.nbytes} bytes; no genuine one needs over {_STATE_LIMIT}")
    return parse_object(stored.read(0, stored.info.nbytes).numpy().tobytes(), where)


def _check_book(book: torch.Tensor, format: Format, where: str) -> None:
    """Refuse a map that is not its type's: the kernels of bitsandbytes go by the type and never look at the map."""
    if not torch.allclose(book, torch.tensor(format.levels), rtol=0.0, atol=_MAP_TOLERANCE):
        raise UnsupportedFormat(
            f"{where}: its quant_map is not the code book of {format.name}. Dequantize the model with the package that "
            "wrote it (model.dequantize() in transformers), save that, and name the result."
        )


def _nested(parts: _Parts, name: str, mark: str, state: Mapping[str, Any], blocks: int) -> _Nested:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not _is_block(block) or not isinstance(offset, float) or not math.isfinite(offset):
        raise UnsafeCheckpoint(
            f"{parts.files[mark].path}: {shown(mark)} has scales in blocks of {shown(block)} about {shown(offset)}; "
            f"both must be numbers, and the first at most {_BLOCK_LIMIT}"
        )
    absmax = parts.typed(f"{name}.nested_absmax", mark, "F32", -(-blocks // block))
    levels = parts.typed(f"{name}.nested_quant_map", mark, "F32", 256)
    return _Nested(absmax, levels, block, offset)


def _int8(parts: _Parts, mark: str) -> _Found:
    """Name of the matrix that has these row scales, the matrix, and the names of its other parts."""
    name = _weight_of(mark)
    codes = parts.part(name, of=mark)
    where = f"{codes.file.path}: {shown(name)}"
    if len(codes.info.shape) != 2:
        raise UnsafeCheckpoint(f"{where} has scales of LLM.int8 but is no matrix: its shape is {codes.info.shape}")
    scales = parts.typed(mark, mark, "F32", codes.info.shape[0])
    layout = parts.find(mark.removesuffix(_SCB) + _LAYOUT)
    if layout is not None and (layout.info.nbytes != 1 or int(layout.read(0, 1)) != _ROW_MAJOR):
        raise UnsupportedFormat(
            f"{where} is stored in the layout of a GPU's tensor cores, not by rows; load the model and save it again "
            "with bitsandbytes 0.45 or newer"
        )
    taken = [scales, *([layout] if layout is not None else [])]
    nbytes = codes.info.nbytes + sum(part.info.nbytes for part in taken)
    info = TensorInfo(name, "F32", codes.info.shape, codes.info.file, nbytes, Quantization("int8", None))
    return name, (_Int8(info, codes, scales), {part.info.name for part in taken})


def _weight_of(scales: str) -> str:
    return scales.removesuffix(_SCB) + ".weight"


def _is_block(value: object) -> TypeGuard[int]:
    return _is_count(value) and value <= _BLOCK_LIMIT


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= LARGEST_AXIS  # type() because a bool is an int


def _product(shape: Sequence[int], limit: int) -> int:
    """Product of a shape, or the first partial one over `limit`: never a number of a million digits."""
    total = 1
    for axis in shape:
        total *= axis
        if total > limit:
            break
    return total
