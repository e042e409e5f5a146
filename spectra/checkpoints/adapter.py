"""`Adapter`: a PEFT folder of LoRA, AdaLoRA or IA3 as a lazy, picklable mapping, and what it does to its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from spectra.checkpoints.adapter_config import AdapterConfig, read_adapter_config
from spectra.checkpoints.adapter_keys import check_variants, understand_keys
from spectra.checkpoints.adapter_updates import (
    DoraUpdate,
    LowRankUpdate,
    RebasedUpdate,
    ReplacementUpdate,
    RescaleUpdate,
    ShiftUpdate,
    Update,
    find_updates,
)
from spectra.checkpoints.checkpoint import Checkpoint, TensorFile, TensorInfo
from spectra.checkpoints.digests import FULL_BELOW, FileDigest
from spectra.checkpoints.folder import contained, untrusted
from spectra.checkpoints.name_rules import is_table
from spectra.checkpoints.safetensors import SafetensorsFile
from spectra.checkpoints.strict_json import shown
from spectra.errors import CheckpointNotFound, MismatchError, UnsupportedFormat

__all__ = [
    "Adapter",
    "AdapterConfig",
    "DoraUpdate",
    "LowRankUpdate",
    "Merged",
    "RebasedUpdate",
    "ReplacementUpdate",
    "RescaleUpdate",
    "ShiftUpdate",
    "Update",
]


class Adapter(Mapping[str, torch.Tensor]):
    """Stored tensors of a LoRA, AdaLoRA or IA3 adapter by name, its configuration, and its updates of a base model.

    Parameters
    ----------
    tensors : Checkpoint
        The adapter's tensors.
    config : AdapterConfig
        Its configuration.

    Attributes
    ----------
    ref, root, revision, aliases, notes
        As a `Checkpoint`'s.
    config : AdapterConfig
        As given.

    Raises
    ------
    UnsupportedFormat
        A key that is not understood, or of another method.
    MismatchError
        A factor without its partner, or keys that contradict the configuration.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> from spectra.checkpoints.checkpoint import TensorInfo
    >>> q, folder = "base_model.model.q", tempfile.TemporaryDirectory()
    >>> factors = {f"{q}.lora_A.weight": torch.ones(1, 3), f"{q}.lora_B.weight": torch.ones(2, 1)}
    >>> save_file(factors, f"{folder.name}/adapter_model.safetensors")
    >>> _ = Path(folder.name, "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    >>> adapter = Adapter.open(folder.name)
    >>> (update,) = adapter.updates({"q.weight": TensorInfo("q.weight", "F32", (2, 3), "", 24)})
    >>> adapter.delta(update, torch.zeros(2, 3))
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    >>> folder.cleanup()
    """

    def __init__(self, tensors: Checkpoint, config: AdapterConfig) -> None:
        self.config = config
        self._tensors = tensors
        self._keys = understand_keys(tensors.infos(), source=str(tensors.root), peft_type=config.peft_type)
        check_variants(self._keys, config, source=str(tensors.root))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        ref: str | None = None,
        revision: str | None = None,
        trust_pickle: bool = False,
    ) -> Adapter:
        """Open the folder of an adapter; headers are checked, no tensor is read.

        Parameters
        ----------
        path : path
            Folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``adapter_model.bin``).
        ref : str, optional
            What the user called it; by default the path.
        revision : str, optional
            Commit, where it came from a hub.
        trust_pickle : bool
            Read ``adapter_model.bin``, with torch's ``weights_only`` unpickler, where there are no safetensors.

        Raises
        ------
        CheckpointNotFound
            A file is missing.
        UnsafeCheckpoint
            A file contradicts itself, or the tensors are a pickle that is not trusted.
        UnsupportedFormat, MismatchError
            As the class.
        """
        folder = Path(path)
        config_path = contained(folder, "adapter_config.json")
        config = read_adapter_config(config_path)
        tensors = Checkpoint(
            [_open_tensors(folder, trust_pickle=trust_pickle)],
            ref=str(path) if ref is None else ref,
            root=folder,
            revision=revision,
            beside=(config_path,),
        )
        return cls(tensors, config)

    @property
    def ref(self) -> str:
        """What the user called it."""
        return self._tensors.ref

    @property
    def root(self) -> Path:
        """Folder on this machine."""
        return self._tensors.root

    @property
    def revision(self) -> str | None:
        """Commit, where it came from a hub."""
        return self._tensors.revision

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors that are stored once."""
        return self._tensors.aliases

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made while opening."""
        return self._tensors.notes

    @property
    def files(self) -> tuple[Path, ...]:
        """The file that stores the tensors."""
        return self._tensors.files

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, without reading it; KeyError for a name that is not there."""
        return self._tensors.info(name)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype, shape and place of every tensor in stored order; nothing is read."""
        return self._tensors.infos()

    def digests(self, *, full_below: int = FULL_BELOW) -> tuple[FileDigest, ...]:
        """SHA-256 of the tensors' file and of ``adapter_config.json``."""
        return self._tensors.digests(full_below=full_below)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        if self.config.peft_type == "IA3":
            return f"<Adapter {self.ref}: IA3 of {len(self._keys.vectors)} modules>"
        kind = "AdaLoRA" if self.config.peft_type == "ADALORA" else "DoRA" if self.config.use_dora else "LoRA"
        return f"<Adapter {self.ref}: {kind} of {len(self._keys.modules)} modules, rank {self.config.r}>"

    def updates(self, base: Mapping[str, TensorInfo]) -> tuple[Update, ...]:
        """What the adapter does to each tensor of a base model.

        Parameters
        ----------
        base : mapping of str to TensorInfo
            Tensors of the base model; a prefix that it has or lacks is found as `names.pair_names` finds it.

        Returns
        -------
        tuple of LowRankUpdate, DoraUpdate, ReplacementUpdate, ShiftUpdate, RescaleUpdate or RebasedUpdate
            No two of the same name; every stored tensor has its place in one, but for empty factors (AdaLoRA may
            prune a module away) and AdaLoRA's ``ranknum``.

        Raises
        ------
        MismatchError
            The base lacks a target, or shapes do not fit; both shapes are named.
        UnsupportedFormat
            As `adapter_updates.find_updates`.
        """
        return find_updates(self._keys, self.config, self.infos(), base, source=str(self.root))

    def factors(self, update: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (B, A) of an update of low rank: ΔW = ``update.scale * B @ A`` as the base stores W.

        Returns
        -------
        b : torch.Tensor, shape (rows, r)
        a : torch.Tensor, shape (r, columns)
            In their stored dtype, views where the base is transposed. Of a convolution's kernel, columns are the
            flattened (in, kh, kw). AdaLoRA's are float64, diag(E)·A for A: products of two float32 are exact there.
        """
        a, b = self[update.a].flatten(1), self[update.b].flatten(1)
        if update.e is not None:
            a, b = a.double() * self[update.e].double(), b.double()
        return (a.T, b.T) if update.transposed else (b, a)

    def delta(self, update: Update, base_tensor: torch.Tensor | None) -> torch.Tensor:
        """Dense ΔW of an update of any kind.

        Parameters
        ----------
        update : Update
            One of `updates`.
        base_tensor : torch.Tensor or None
            W as the base stores it; only a low rank and a shift can do without.

        Returns
        -------
        torch.Tensor, shape of the base's tensor
            float64 where W or a stored tensor is float64, else float32; everything is upcast before it is multiplied
            or subtracted. Of a resized table the common rows.

        Raises
        ------
        MismatchError
            A replacement has another shape than the base's tensor; both are named.
        """
        dtype = self._working_dtype(update, base_tensor)
        if isinstance(update, LowRankUpdate):
            delta = self._product(update, dtype)
            return delta if base_tensor is None else delta.reshape(base_tensor.shape)
        if isinstance(update, ShiftUpdate):
            return self[update.source].to(dtype) * update.scale
        if base_tensor is None:
            raise MismatchError(f"{self.ref}: {shown(update.name)} has no tensor in the base model to subtract")
        base = base_tensor.to(dtype)
        if isinstance(update, DoraUpdate):
            return self._renormed(update, base) - base
        if isinstance(update, RescaleUpdate):
            return base * (self._factor(update, base) - 1)
        source = self[update.source].to(dtype)
        moved = torch.sub(*_common_rows(source, base, update.name))
        if isinstance(update, ReplacementUpdate):
            return moved
        return moved + self.delta(update.update, source)[: len(moved)]

    def merged(self, base: Checkpoint) -> Merged:
        """Merge: the tensors that PEFT's ``merge_and_unload`` would leave, lazily, under the base's names."""
        return Merged(self, base)

    def _working_dtype(self, update: Update, base_tensor: torch.Tensor | None) -> torch.dtype:
        stored = [self.info(name).dtype for name in _sources(update)]
        wide = "F64" in stored or (base_tensor is not None and base_tensor.dtype == torch.float64)
        return torch.float64 if wide else torch.float32

    def _product(self, update: LowRankUpdate | DoraUpdate, dtype: torch.dtype) -> torch.Tensor:
        """Product scale · B·A as the base stores it, kernels flattened to (out, in·kh·kw)."""
        a, b = self[update.a].to(dtype).flatten(1), self[update.b].to(dtype).flatten(1)
        if isinstance(update, LowRankUpdate) and update.e is not None:
            a = a * self[update.e].to(dtype)
        product = (b @ a) * update.scale
        return product.T if update.transposed else product

    def _renormed(self, update: DoraUpdate, base: torch.Tensor) -> torch.Tensor:
        """DoRA's new weight, in the dtype of `base`, which is the working one."""
        shifted = base + self._product(update, base.dtype).reshape(base.shape)
        by_output = shifted.T if update.transposed else shifted.flatten(1)  # (out, in)
        norms: torch.Tensor = torch.linalg.norm(by_output, dim=1)
        factor = self[update.magnitude].to(base.dtype).flatten() / norms
        return factor * shifted if update.transposed else factor.reshape(-1, *[1] * (base.ndim - 1)) * shifted

    def _factor(self, update: RescaleUpdate, base: torch.Tensor) -> torch.Tensor:
        """IA3's l, in the dtype of `base`, shaped so that it multiplies along the update's axis."""
        shape = [1] * base.ndim
        shape[update.axis] = -1
        return self[update.source].to(base.dtype).reshape(shape)


class Merged(Mapping[str, torch.Tensor]):
    """Tensors of a base model with an adapter merged into them, each merged when it is read.

    The arithmetic is PEFT's: adapters are upcast to float32 (float64 where the base is), multiplied, added, and the
    sum is rounded once to the base's dtype; for embeddings the product is rounded first.

    Parameters
    ----------
    adapter : Adapter
    base : Checkpoint
    """

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter = adapter
        self.base = base
        self._aliases = dict(base.aliases)
        # A tied tensor is one parameter: what is added to it shows under all its names, a replacement under its own.
        self._updates: dict[str, Update] = {}
        for update in adapter.updates(base.infos()):
            owner = update.name if isinstance(update, ReplacementUpdate) else self._owner(update.name)
            if owner in self._updates:
                raise UnsupportedFormat(
                    f"{adapter.ref} updates {shown(update.name)} and {shown(self._updates[owner].name)}, which "
                    f"{base.ref} stores once; merge with peft (merge_and_unload), and compare the merged model"
                )
            self._updates[owner] = update
        self._names = dict.fromkeys([*base, *(update.name for update in self._updates.values())])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Merge one tensor; KeyError for a name that neither the base nor the adapter has."""
        update = self._updates.get(name)
        if update is None:
            shared = self._updates.get(self._owner(name))
            update = None if isinstance(shared, ReplacementUpdate) else shared
        if update is None:
            return self.base[name]
        if update.name not in self.base:
            return self.adapter[_sources(update)[0]]
        return self._merge(update, self.base[update.name])

    def _owner(self, name: str) -> str:
        return self._aliases.get(name, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _merge(self, update: Update, base: torch.Tensor) -> torch.Tensor:
        adapter, dtype = self.adapter, torch.float64 if base.dtype == torch.float64 else torch.float32
        if isinstance(update, RebasedUpdate):
            return self._merge(update.update, adapter[update.source].to(base.dtype))
        if isinstance(update, ReplacementUpdate):
            return adapter[update.source].to(base.dtype)
        if isinstance(update, DoraUpdate):
            return adapter._renormed(update, base.to(dtype)).to(base.dtype)
        if isinstance(update, RescaleUpdate):
            wide = base.to(dtype)
            return (wide * adapter._factor(update, wide)).to(base.dtype)
        if isinstance(update, ShiftUpdate):
            return (base + adapter[update.source].to(dtype) * update.scale).to(base.dtype)
        delta = adapter._product(update, dtype).reshape(base.shape)
        if "lora_embedding_A" in update.a:
            return base + delta.to(base.dtype)
        return (base + delta).to(base.dtype)


def _sources(update: Update) -> tuple[str, ...]:
    """Stored tensors that an update reads."""
    if isinstance(update, RebasedUpdate):
        return (update.source, *_sources(update.update))
    if isinstance(update, ReplacementUpdate | ShiftUpdate | RescaleUpdate):
        return (update.source,)
    third = update.magnitude if isinstance(update, DoraUpdate) else update.e
    return (update.a, update.b, *(() if third is None else (third,)))


def _common_rows(source: torch.Tensor, base: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if source.shape == base.shape:
        return source, base
    if source.ndim == base.ndim == 2 and source.shape[1] == base.shape[1] and is_table(name):
        rows = min(len(source), len(base))
        return source[:rows], base[:rows]
    raise MismatchError(
        f"{shown(name)} has shape {tuple(source.shape)} in the adapter and {tuple(base.shape)} in the base model"
    )


def _open_tensors(folder: Path, *, trust_pickle: bool) -> TensorFile:
    if (folder / "adapter_model.safetensors").exists():
        return SafetensorsFile(contained(folder, "adapter_model.safetensors"), name="adapter_model.safetensors")
    if not (folder / "adapter_model.bin").exists():
        raise CheckpointNotFound(
            f"{folder} holds an adapter_config.json but no adapter_model.safetensors or adapter_model.bin; fetch it"
        )
    if not trust_pickle:
        raise untrusted(str(folder / "adapter_model.bin"))
    from spectra.checkpoints.torch_pickle import TorchPickleFile

    return TorchPickleFile(contained(folder, "adapter_model.bin"), name="adapter_model.bin")
