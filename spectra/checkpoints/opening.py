"""`open_checkpoint`: from what a user calls a checkpoint to one whose every header has been checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spectra.checkpoints import hub
from spectra.checkpoints.adapter import Adapter
from spectra.checkpoints.bitsandbytes import dequantizing
from spectra.checkpoints.checkpoint import Checkpoint, TensorFile
from spectra.checkpoints.folder import (
    GGUF,
    PICKLES,
    SAFETENSORS,
    Choice,
    choose,
    contained,
    cross_check,
    list_folder,
    read_config,
    read_index,
    refusal,
    untrusted,
)
from spectra.checkpoints.gguf import GgufFile
from spectra.checkpoints.safetensors import SafetensorsFile
from spectra.checkpoints.torch_pickle import TorchPickleFile
from spectra.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat


def open_checkpoint(
    ref: str | os.PathLike[str],
    *,
    trust_pickle: bool = False,
    offline: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint | Adapter:
    """Open a checkpoint; every header is checked, no tensor is read.

    Parameters
    ----------
    ref : str or path
        A folder, a tensor file (``.safetensors`` or ``.gguf``), an index, or an id on the Hugging Face hub:
        ``"name"``, ``"org/name"`` or ``"org/name@revision"``. What exists on this machine is never looked up on the
        hub; nor is a ``Path``.
    trust_pickle : bool
        Read ``.bin``, ``.pt``, ``.pth`` and ``.ckpt`` files, with torch's ``weights_only`` unpickler, where no
        safetensors stand beside them.
    offline : bool
        Use only what the hub's cache on this machine holds; implied by ``HF_HUB_OFFLINE``.
    cache_dir : path, optional
        The hub's cache; by default huggingface_hub's own.

    Returns
    -------
    Checkpoint or Adapter
        An `Adapter` where the folder holds an ``adapter_config.json``.

    Raises
    ------
    CheckpointNotFound
        No such file, folder, hub id or revision; no weights there; a shard is missing.
    UnsupportedFormat
        The format, or a type in it, has no reader here; the message gives the way out.
    UnsafeCheckpoint
        A file contradicts itself or its index, leads out of its folder, or is a pickle that is not trusted.
    CheckpointError
        The hub refuses or cannot be reached, or a file cannot be read.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"query.weight": torch.ones(3, 2)}, f"{folder}/model.safetensors")
    ...     open_checkpoint(folder).info("query.weight")
    TensorInfo(name='query.weight', dtype='F32', shape=(3, 2), file='model.safetensors', nbytes=24, quantization=None)
    """
    name = os.fspath(ref)
    try:
        path = Path(name).expanduser()
        exists = bool(name) and path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a closed door, an unknown ~user
        raise CheckpointError(f"{name!r} cannot be opened: {error}") from None
    if exists:
        return _open_local(path, ref=name, revision=None, trust_pickle=trust_pickle)
    if not isinstance(ref, str) or not hub.is_hub_id(ref):
        raise CheckpointNotFound(f"{name!r} does not exist, and is no hub id (name, org/name, org/name@revision)")
    snapshot = hub.fetch(ref, trust_pickle=trust_pickle, offline=offline, cache_dir=cache_dir)
    return _open_local(
        snapshot.folder, ref=ref, revision=snapshot.commit, trust_pickle=trust_pickle, notes=snapshot.notes
    )


def _open_local(
    path: Path, *, ref: str, revision: str | None, trust_pickle: bool, notes: Sequence[str] = ()
) -> Checkpoint | Adapter:
    if path.is_dir():
        folder = path
        choice = choose(list_folder(path), trust_pickle=trust_pickle, where=str(path))
    else:
        folder = path.parent
        choice = _choose_file(path, trust_pickle=trust_pickle)
    if choice.kind == "adapter":
        return Adapter.open(folder, ref=ref, revision=revision, trust_pickle=trust_pickle)
    weight_map, index = _read_index(folder, choice)
    names = sorted(set(weight_map.values())) or choice.files
    # A file that the user named may be a link to anywhere; one that a folder or an index named may not.
    named = path.name if path is not folder else None
    paths = [path if name == named else contained(folder, name) for name in names]
    stored = [_open_file(file, name, kind=choice.kind) for file, name in zip(paths, names, strict=True)]
    config, config_path = read_config(folder)
    checkpoint = Checkpoint(
        _put_together(stored),
        ref=ref,
        root=path,
        revision=revision,
        config=config,
        beside=(*index, *config_path),
        notes=(*notes, *choice.notes),
    )
    for source in index:
        cross_check(weight_map, zip(names, stored, strict=True), source)
    return checkpoint


def _read_index(folder: Path, choice: Choice) -> tuple[dict[str, str], tuple[Path, ...]]:
    """Which file the index puts each tensor in, and the index's path; both empty where there is none."""
    if choice.index is None:
        return {}, ()
    path = contained(folder, choice.index)
    return read_index(path, endings=SAFETENSORS if choice.kind == "safetensors" else PICKLES), (path,)


def _choose_file(path: Path, *, trust_pickle: bool) -> Choice:
    name = path.name
    kind = "safetensors" if ".safetensors" in name else "pickle"
    reason = refusal(name)
    if reason is not None:
        raise UnsupportedFormat(f"{path}: {reason}")
    if name.endswith((*PICKLES, *(f"{ending}.index.json" for ending in PICKLES))) and not trust_pickle:
        raise untrusted(str(path))
    if name.endswith(tuple(f"{ending}.index.json" for ending in (*SAFETENSORS, *PICKLES))):
        return Choice(kind, (), name)
    if name.endswith((*SAFETENSORS, *PICKLES)):
        is_adapter = name.startswith("adapter_model.") and (path.parent / "adapter_config.json").exists()
        return Choice("adapter" if is_adapter else kind, (name,))
    if name.endswith(GGUF):
        return Choice("gguf", (name,))
    raise UnsupportedFormat(
        f"{path}: there are readers for *.safetensors, *.safetensors.index.json, *.gguf, and with trust_pickle for "
        f"{', '.join('*' + ending for ending in PICKLES)}; a file's ending says which it is"
    )


def _put_together(stored: Sequence[TensorFile]) -> Sequence[TensorFile]:
    """Tensors as the model knows them: what stores one as several tensors does so over all shards at once."""
    safe = [file for file in stored if isinstance(file, SafetensorsFile)]
    return dequantizing(safe) if len(safe) == len(stored) else stored


def _open_file(path: Path, name: str, *, kind: str) -> TensorFile:
    if kind == "safetensors":
        return SafetensorsFile(path, name=name)
    if kind == "gguf":
        return GgufFile(path, name=name)
    return TorchPickleFile(path, name=name)
