"""Files of ``torch.save``: opened only where pickles are trusted, and then only by the weights_only unpickler.

There is no fallback to an unrestricted unpickler. Tensors are mapped, not loaded, where the file allows it; what has
been mapped is let go again once enough of it has been read, so that the file's pages do not pile up in the process.
"""

from __future__ import annotations

import pickle
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spectra.checkpoints.checkpoint import TensorInfo, listed
from spectra.checkpoints.element_types import TORCH, spelling
from spectra.checkpoints.strict_json import is_unicode, regular_size, shown
from spectra.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat

# Mapped pages count as the process's memory until the map goes; reopening costs milliseconds, so a quarter of a GiB
# keeps both the peak and the number of reopenings low.
MAPPED_BYTES = 256 * 1024**2

# Under which a training script's checkpoint keeps the model's tensors, in order of preference.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class TorchPickleFile:
    """One file of ``torch.save``, read by the weights_only unpickler.

    A dict of tensors, one under ``"state_dict"``, ``"model_state_dict"``, ``"model"`` or ``"module"``, and dicts of
    tensors one level deeper (as ``outer.inner``) are understood. Other entries are counted in `notes`.

    Parameters
    ----------
    path : Path
        The file. The caller has made sure that the user trusts it.
    name : str, optional
        Its name relative to the checkpoint's folder; by default the file's own.

    Raises
    ------
    CheckpointNotFound, CheckpointError
        The file is missing or cannot be read.
    UnsafeCheckpoint
        It needs a global that weights_only does not allow, is damaged, or claims entries it does not hold.
    UnsupportedFormat
        It is a TorchScript archive or holds no tensors.
    """

    header_bytes = 0

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.path = path
        self._name = name or path.name
        self._size = regular_size(path)
        self._stamp: tuple[int, int] | None = _stamp(path)
        self._records = _record_sizes(path)
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] | None = None
        self._read_bytes = 0
        tensors, others = self._load()
        if not tensors:
            raise UnsupportedFormat(f"{path} holds no tensors by name; save the model's state_dict() in it")
        self.infos: Mapping[str, TensorInfo] = {key: self._info(key, tensor) for key, tensor in tensors.items()}
        self.aliases: Mapping[str, str] = _tied(tensors)
        self.notes: tuple[str, ...] = self._notes(others)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_tensors": None, "_stamp": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory, in its stored dtype.

        Raises
        ------
        UnsupportedFormat
            It is sparse, quantized or of an element type that safetensors has no word for.
        CheckpointError
            The file has changed since it was opened.
        """
        return self._mapped(name, self.infos[name].nbytes).clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis; see `read`."""
        info = self.infos[name]
        tensor = self._mapped(name, info.nbytes // max(info.shape[0], 1) * (stop - start))
        return tensor[start:stop].clone(memory_format=torch.contiguous_format)

    def _mapped(self, name: str, nbytes: int) -> torch.Tensor:
        with self._lock:
            if self._tensors is None:
                self._tensors = self._reload()
                self._read_bytes = 0
            elif _stamp(self.path) != self._stamp:  # what is mapped may be another file's bytes by now
                raise self._changed()
            tensor = self._tensors[name]
            self._read_bytes += nbytes
            if self._read_bytes >= MAPPED_BYTES:
                self._tensors = None
        if tensor.layout is not torch.strided or tensor.is_quantized or self.infos[name].dtype not in TORCH:
            raise UnsupportedFormat(
                f"{self.path}: tensor {shown(name)} is {tensor.layout} {tensor.dtype}, which has no reader here; "
                "save it dense, in a plain floating type"
            )
        return tensor

    def _reload(self) -> dict[str, torch.Tensor]:
        stamp = _stamp(self.path)
        if self._stamp is None:  # the first read after a journey to this process
            self._stamp = stamp
        if stamp != self._stamp or regular_size(self.path) != self._size or _record_sizes(self.path) != self._records:
            raise self._changed()
        tensors, _ = self._load()
        if {key: self._info(key, tensor) for key, tensor in tensors.items()} != self.infos:
            raise self._changed()
        return tensors

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path} has changed since it was opened; open the checkpoint again")

    def _load(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Tensors by name, and the names of the entries that are none."""
        try:
            content = torch.load(self.path, weights_only=True, mmap=self._records is not None, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise self._rejected(error) from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        except Exception as error:  # a damaged file makes the parser fail in any way it likes
            raise UnsafeCheckpoint(f"{self.path} cannot be read as a file of torch.save: {_reason(error)}") from error
        if not isinstance(content, Mapping):
            raise UnsupportedFormat(f"{self.path} holds a {type(content).__name__}, not a dict of tensors by name")
        tensors, others = _flatten(_unwrap(content))
        if self._records is not None:
            _check_records(tensors, self._records, self.path)
        return tensors, others

    def _rejected(self, error: pickle.UnpicklingError) -> UnsafeCheckpoint:
        found = _GLOBAL.search(str(error))
        what = (
            f"needs the global {found[1]}, which could run code"
            if found
            else f"is damaged or no plain pickle of tensors ({_reason(error)})"
        )
        return UnsafeCheckpoint(
            f"{self.path} {what}; the weights_only unpickler refused it, and nothing was run. Ask its author for the "
            "state_dict as safetensors."
        )

    def _info(self, key: str, tensor: torch.Tensor) -> TensorInfo:
        where = f"{self.path}: tensor {shown(key)}"
        if tensor.device.type != "cpu":
            raise UnsafeCheckpoint(f"{where} was saved without its data (device {tensor.device.type})")
        nbytes = tensor.numel() * tensor.element_size()
        # A stride of 0 lets a few bytes stand for any number of entries; never allocate more than the file is large.
        if tensor.layout is torch.strided and nbytes > max(self._size, tensor.untyped_storage().nbytes()):
            raise UnsafeCheckpoint(f"{where} of shape {tuple(tensor.shape)} claims more bytes than the file has")
        return TensorInfo(key, spelling(tensor.dtype), tuple(tensor.shape), self._name, nbytes)

    def _notes(self, others: list[str]) -> tuple[str, ...]:
        notes = []
        if others:
            notes.append(f"{self._name}: left out what is no tensor: {listed(others)}")
        if self._records is None:
            notes.append(
                f"{self._name} is in torch's old format and is loaded whole; torch.save it again to avoid that"
            )
        return tuple(notes)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written or replaced."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return status.st_mtime_ns, status.st_ino


def _record_sizes(path: Path) -> Counter[int] | None:
    """Sizes of the storages in the zip archive that ``torch.save`` writes; None for its old format, which is no zip.

    torch maps a storage where its record begins and trusts the pickle for its length, so a compressed or shorter
    record would be read as other bytes than were saved.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                return None
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile has no one class for what a damaged directory makes it do
        raise UnsafeCheckpoint(f"{path} is a damaged archive, or only part of one: {_reason(error)}") from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise UnsupportedFormat(
            f"{path} is a TorchScript archive, which carries code. Load it with torch.jit.load where it is trusted, "
            "and save its state_dict() with safetensors.torch.save_file."
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UnsafeCheckpoint(f"{path} is a compressed archive, which torch.save never writes; torch.save it again")
    return Counter(record.file_size for record in records if "/data/" in record.filename)


def _check_records(tensors: Mapping[str, torch.Tensor], records: Counter[int], path: Path) -> None:
    """Every storage must have a record of exactly its size."""
    storages: dict[int, int] = {}
    for tensor in tensors.values():
        if tensor.layout is torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    without = Counter(size for size in storages.values() if size) - records
    if without:
        raise UnsafeCheckpoint(
            f"{path}: no record of the archive has the {max(without)} bytes that its pickle claims for a tensor"
        )


def _unwrap(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The model's own dict in a training script's checkpoint."""
    if _holds_tensors(content):
        return content
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (_holds_tensors(inner) or any(map(_holds_tensors, inner.values()))):
            return inner
    return content


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, torch.Tensor) for inner in value.values())


def _flatten(content: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of a dict and of the dicts in it, and the names of all other entries."""
    tensors: dict[str, torch.Tensor] = {}
    others: list[str] = []
    for name, value in _entries(content):
        if not isinstance(value, torch.Tensor):
            others.append(name)
        elif not is_unicode(name):
            raise UnsafeCheckpoint(f"tensor {shown(name)}: the name is not valid Unicode")
        elif name in tensors:
            raise UnsafeCheckpoint(f"tensor {shown(name)} is there twice, as one entry and as an entry of an entry")
        else:
            tensors[name] = value.detach()
    return tensors, others


def _entries(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if _holds_tensors(value):
            yield from ((f"{key}.{inner}", tensor) for inner, tensor in value.items())
        else:
            yield str(key), value


def _tied(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names that are a second view of all of an earlier tensor's memory."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or not tensor.numel():
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return aliases


def _reason(error: Exception) -> str:
    """What torch says went wrong, without its advice to load the file unsafely, and safe to print."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    if not text or "weights_only" in text:
        return type(error).__name__
    return "".join(character for character in text[:160] if character.isprintable())
