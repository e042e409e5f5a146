"""`Checkpoint`: the tensors of one model as a lazy, picklable mapping over the files that store them."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from spectra.checkpoints.digests import FULL_BELOW, FileDigest, digest_files
from spectra.checkpoints.element_types import BITS
from spectra.checkpoints.quantization import Quantization
from spectra.checkpoints.strict_json import shown
from spectra.errors import UnsafeCheckpoint, UsageError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor without reading it.

    Attributes
    ----------
    name : str
        Name in the file.
    dtype : str
        Element type in safetensors' spelling: ``"F32"``, ``"BF16"``, ``"F8_E4M3"``, ``"I64"``, …
    shape : tuple of int
        May be larger than torch can hold where an axis is 0.
    file : str
        File that stores it, relative to the checkpoint's folder.
    nbytes : int
        Bytes it takes in the file.
    quantization : Quantization or None
        How it was quantized, where it is read dequantized; `dtype` and `shape` are then what reading gives, and
        `nbytes` counts codes and scales.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    quantization: Quantization | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of what reading gives: `nbytes`, but for tensors that are dequantized, up to eight times as many."""
        return self.nbytes if self.quantization is None else math.prod(self.shape) * BITS[self.dtype] // 8


class TensorFile(Protocol):
    """One file of tensors, checked when it was opened; reads are safe from several threads at once."""

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def header_bytes(self) -> int: ...  # noqa: D102 - bytes at the start of the file that describe the rest

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...  # noqa: D102 - in stored order, aliases too

    @property
    def aliases(self) -> Mapping[str, str]: ...  # noqa: D102 - second names of one stored tensor

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102 - sentences on what was left out

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory, in its stored dtype."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis."""
        ...


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors of a model by name, read from the files each time they are asked for.

    Holds paths and headers, never tensors or open handles, so a pickle of it is small and a worker process can read
    what it names. Two checkpoints are equal only if they are the same object.

    Parameters
    ----------
    files : sequence of TensorFile
        Files that together hold the tensors; no name may stand in two of them.
    ref : str
        What the user called it.
    root : Path
        File or folder on this machine.
    revision : str, optional
        Commit, where it came from a hub.
    config : dict, optional
        The model's ``config.json``.
    beside : sequence of Path
        Small files, such as the index and ``config.json``, that `digests` covers too.
    notes : sequence of str
        Sentences on choices made while opening.

    Attributes
    ----------
    ref, root, revision, config : as above
    notes : tuple of str
        Choices made and entries left out while opening; nothing is skipped silently.

    Raises
    ------
    UnsafeCheckpoint
        Two files store a tensor of the same name.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> from spectra.checkpoints import open_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": torch.eye(2)}, f"{folder}/model.safetensors")
    ...     checkpoint = open_checkpoint(folder)
    ...     checkpoint.info("weight").shape, checkpoint["weight"].trace()
    ((2, 2), tensor(2.))
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        *,
        ref: str,
        root: Path,
        revision: str | None = None,
        config: dict[str, Any] | None = None,
        beside: Sequence[Path] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.ref = ref
        self.root = root
        self.revision = revision
        self.config: dict[str, Any] = {} if config is None else config
        self.notes: tuple[str, ...] = (*notes, *(note for file in files for note in file.notes))
        self._files = tuple(files)
        self._beside = tuple(beside)
        self._place = places(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor into fresh memory in its stored dtype; KeyError for a name that is not there."""
        return self._file(name).read(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor: the same as ``checkpoint[name]``."""
        return self[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of the first axis, and no other bytes of the tensor.

        Returns
        -------
        torch.Tensor, shape (stop - start, *shape[1:])
            In the stored dtype, freshly allocated.

        Raises
        ------
        KeyError
            No tensor has that name.
        UsageError
            Not ``0 <= start <= stop <= shape[0]``, or the tensor is a scalar.
        """
        shape = self.info(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise UsageError(f"rows {start}:{stop} do not exist in {shown(name)} of shape {shape}")
        return self._file(name).read_rows(name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, name: object) -> bool:
        """Whether a tensor has that name; nothing is read."""
        return name in self._place

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, without reading it; KeyError for a name that is not there."""
        return self._file(name).infos[name]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype, shape and place of every tensor in stored order, aliases included; nothing is read."""
        return MappingProxyType({name: self._files[place].infos[name] for name, place in self._place.items()})

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors that are stored once (tied weights), each with the name it is stored under."""
        return MappingProxyType({alias: name for file in self._files for alias, name in file.aliases.items()})

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that store the tensors."""
        return tuple(file.path for file in self._files)

    def digests(self, *, full_below: int = FULL_BELOW) -> tuple[FileDigest, ...]:
        """SHA-256 of every file: the tensors' files, then the index and ``config.json`` where they exist.

        Parameters
        ----------
        full_below : int
            Below this many bytes in all, files are read whole; from it on, files over 16 MiB are sampled: size,
            header and 256 evenly spread chunks of 64 KiB.
        """
        folder = self.root if self.root.is_dir() else self.root.parent
        paths = [(file.path, file.header_bytes) for file in self._files] + [(path, 0) for path in self._beside]
        named = [(path.relative_to(folder).as_posix(), path, header) for path, header in paths]
        return digest_files(named, full_below=full_below)

    def __repr__(self) -> str:
        revision = f"@{self.revision[:12]}" if self.revision else ""
        return f"<Checkpoint {self.ref}{revision}: tensors: {len(self)}, files: {len(self._files)}>"

    def _file(self, name: str) -> TensorFile:
        place = self._place.get(name)
        if place is None:
            raise KeyError(f"{self.ref} has no tensor {shown(name)}{_nearest(name, self._place)}")
        return self._files[place]


def places(files: Sequence[TensorFile]) -> dict[str, int]:
    """Which of the files stores each tensor, as an index into them.

    Raises
    ------
    UnsafeCheckpoint
        Two of them store a tensor of the same name.
    """
    place = {name: index for index, file in enumerate(files) for name in file.infos}
    if len(place) != sum(len(file.infos) for file in files):
        counts = Counter(name for file in files for name in file.infos)
        twice = [name for name, count in counts.items() if count > 1]
        where = sorted({file.path.name for file in files if twice[0] in file.infos})
        raise UnsafeCheckpoint(
            f"{files[0].path.parent}: {len(twice)} tensors are stored in more than one file: {listed(twice)} "
            f"(the first in {', '.join(where)}). If the files are different versions of one model, name one of them."
        )
    return place


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, quoted, and how many more there are.

    Examples
    --------
    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more


def _nearest(name: object, names: Mapping[str, int]) -> str:
    """Up to three names that share the longest ending: a wrong prefix is the usual mistake."""
    if not isinstance(name, str):
        return ""
    near = heapq.nlargest(3, names, key=lambda other: _common_ending(name, other))
    near = [other for other in near if _common_ending(name, other) > 1]
    return f"; nearest: {listed(near)}" if near else ""


def _common_ending(first: str, second: str) -> int:
    """How many characters two names end in alike."""
    count = 0
    for left, right in zip(reversed(first), reversed(second), strict=False):
        if left != right:
            break
        count += 1
    return count
