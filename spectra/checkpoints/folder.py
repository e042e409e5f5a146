"""Which files of a folder hold the weights, and whether they are the folder's own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectra.checkpoints.checkpoint import TensorFile, listed
from spectra.checkpoints.strict_json import read_object, shown
from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint, UnsupportedFormat

INDEX_LIMIT = 100_000_000  # as a safetensors header, which holds the same names and more
CONFIG_LIMIT = 10_000_000

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
GGUF = (".gguf",)

# In the order in which transformers and diffusers look for them.
_PREFERRED = ("model", "diffusion_pytorch_model", "pytorch_model")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)")
# State of a training run that stands beside weights and holds none.
_TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)([._].*)?|.*optim_states.*"
)

_REFUSED = (
    (re.compile(r".*\.onnx"), "ONNX graphs have no reader here; compare the safetensors they were exported from"),
    (
        re.compile(r"\.metadata|.*\.distcp"),
        "torch distributed checkpoints are raw pickles; convert with torch.distributed.checkpoint.format_utils."
        "dcp_to_torch_save, then save as safetensors",
    ),
    (
        re.compile(r".*\.(h5|keras|msgpack|pb)|.*\.ckpt\.(index|meta|data-.*)"),
        "TensorFlow and Flax weights have no reader here; load them with transformers (from_tf=True or "
        "from_flax=True) and call save_pretrained",
    ),
    (
        re.compile(r".*\.(npz|npy|mlpackage|tflite|engine|ggml|tar|nemo|llamafile)"),
        "this format has no reader here; save the tensors with safetensors.torch.save_file",
    ),
)
# Kinds of which two files without numbers are two checkpoints.
_ALONE = {"pickle": "pickles", "gguf": "GGUF files"}
_TOKENIZER = re.compile(r"(tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|.*\.model|added_tokens\.json)")


@dataclass(frozen=True)
class Choice:
    """Files of one folder to read as one checkpoint.

    Attributes
    ----------
    kind : str
        ``"safetensors"``, ``"pickle"``, ``"gguf"`` or ``"adapter"``.
    files : tuple of str
        Tensor files, relative to the folder; empty where the `index` names them.
    index : str or None
        File that maps each tensor to its file.
    notes : tuple of str
        What else stood there and was left out.
    """

    kind: str
    files: tuple[str, ...]
    index: str | None = None
    notes: tuple[str, ...] = ()


def choose(names: Collection[str], *, trust_pickle: bool, where: str) -> Choice:
    """Choose the files that hold the weights from the names in a folder or repository.

    Safetensors come before pickles, a single file before an index, as in transformers. A GGUF file, which is rounded
    as a rule, is chosen only where neither stands beside it.

    Parameters
    ----------
    names : collection of str
        File names, with ``/`` for those in subfolders, which are not searched but named in errors.
    trust_pickle : bool
        Whether pickles may be chosen, where there are no safetensors.
    where : str
        The folder or repository, for messages.

    Raises
    ------
    CheckpointNotFound
        No weights, or shards missing from a numbered set.
    UnsafeCheckpoint
        Only pickles, and they are not trusted.
    UnsupportedFormat
        Only formats that have no reader here, or several files without a way to tell which is meant.

    Examples
    --------
    >>> choose(["config.json", "model.safetensors"], trust_pickle=False, where="example").files
    ('model.safetensors',)
    """
    top = sorted(name for name in names if "/" not in name)
    if "adapter_config.json" in top and not _merged_model(top):
        return _choose_adapter(top, trust_pickle=trust_pickle, where=where)
    weights = [name for name in top if not name.startswith("adapter_model")]
    chosen = _choose_ending(weights, "safetensors", SAFETENSORS, where)
    if chosen is not None:
        return chosen
    pickles = [name for name in weights if not _TRAINING_STATE.fullmatch(name)]
    chosen = _choose_ending(pickles, "pickle", PICKLES, where) if trust_pickle else None
    if chosen is None and not any(name.endswith(PICKLES) for name in pickles):
        chosen = _choose_ending(weights, "gguf", GGUF, where)
    if chosen is not None:
        return chosen
    raise _nothing_chosen(names, top, pickles, where)


def refusal(name: str) -> str | None:
    """Why a file of that name is not read, with the way out; None where its format has a reader."""
    return next((reason for pattern, reason in _REFUSED if pattern.fullmatch(name.lower())), None)


def untrusted(where: str) -> UnsafeCheckpoint:
    """The error for pickles that were not trusted."""
    return UnsafeCheckpoint(
        f"{where} is a pickle, which can run code when it is opened. Where its author is trusted, --trust-pickle "
        "(trust_pickle=True) reads it with torch's weights_only unpickler, which runs no code but whose parser must "
        "then withstand the file. Better: convert it once, in a sandbox, with safetensors.torch.save_file, or take "
        "the author's safetensors."
    )


def _choose_adapter(top: list[str], *, trust_pickle: bool, where: str) -> Choice:
    files = [name for name in top if name.startswith("adapter_model")]
    safe = tuple(name for name in files if name.endswith((*SAFETENSORS, ".safetensors.index.json")))
    if files and not safe and not trust_pickle:
        raise untrusted(f"{where}: {listed(files)}")
    return Choice("adapter", safe or tuple(files))


def _merged_model(top: Collection[str]) -> bool:
    """A full model whose folder kept the configuration of an adapter that was merged into it."""
    has_adapter = any(name.startswith("adapter_model") for name in top)
    return not has_adapter and any(name.endswith((*SAFETENSORS, ".safetensors.index.json")) for name in top)


def _choose_ending(names: list[str], kind: str, endings: tuple[str, ...], where: str) -> Choice | None:
    files = [name for name in names if name.endswith(endings)]
    indices = [name for name in names if name.endswith(tuple(f"{ending}.index.json" for ending in endings))]
    for stem in _PREFERRED:
        single = next((name for ending in endings if (name := stem + ending) in files), None)
        if single is not None:
            left = [name for name in (*files, *indices) if name != single]
            return Choice(kind, (single,), notes=_left_out(single, left))
        index = next((name for ending in endings if (name := f"{stem}{ending}.index.json") in indices), None)
        if index is not None:
            return Choice(kind, (), index)
    if len(indices) == 1:
        return Choice(kind, (), indices[0])
    if indices:
        raise UnsupportedFormat(f"{where} holds several indices ({listed(indices)}); name the one to read")
    if not files:
        return None
    return _choose_without_index(files, kind, where)


def _choose_without_index(files: list[str], kind: str, where: str) -> Choice:
    others = [name for name in files if not name.startswith("consolidated")]
    left = [name for name in files if name not in others] if others else []
    files = others or files
    _check_numbering(files, where)
    if kind in _ALONE and len(files) > 1 and not all(_SHARD.fullmatch(name) for name in files):
        raise UnsupportedFormat(f"{where} holds several {_ALONE[kind]} ({listed(files)}); name the one to read")
    return Choice(kind, tuple(files), notes=_left_out(files[0], left))


def _left_out(single: str, left: list[str]) -> tuple[str, ...]:
    return (f"{single} was read; beside it stood, and was left out: {listed(left)}",) if left else ()


def _check_numbering(files: Iterable[str], where: str) -> None:
    """Shards say how many they are: an interrupted download shows even without an index."""
    for name in files:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        count = int(match["count"])
        have = sum(other.startswith(match["stem"] + "-") and other.endswith(match["ending"]) for other in files)
        if have < count:
            raise CheckpointNotFound(
                f"{where} holds {have} of the {count} shards of {shown(match['stem'])}; fetch the others"
            )


def _nothing_chosen(names: Collection[str], top: list[str], pickles: list[str], where: str) -> CheckpointError:
    untrusted_files = [name for name in pickles if name.endswith(PICKLES)]
    if untrusted_files:
        return untrusted(f"{where}: {listed(untrusted_files)}")
    for name in top:
        reason = refusal(name)
        if reason is not None:
            return UnsupportedFormat(f"{where}: {shown(name)}: {reason}")
    adapter = [name for name in top if name.startswith("adapter_model")]
    if adapter:
        return CheckpointNotFound(
            f"{where} holds {listed(adapter)} without the adapter_config.json that says its scale"
        )
    deeper = sorted({name.rpartition("/")[0] for name in names if "/" in name and name.endswith(SAFETENSORS)})
    if deeper:
        return CheckpointNotFound(
            f"{where} holds no weights itself, its subfolders do: name one, as {where}/{deeper[0]} ({listed(deeper)})"
        )
    if not names:
        return CheckpointNotFound(f"{where} is empty")
    if any(_TOKENIZER.fullmatch(name) for name in top):
        return CheckpointNotFound(f"{where} holds a tokenizer but no weights")
    return CheckpointNotFound(f"{where} holds no weights (no *.safetensors); it holds {listed(top or sorted(names))}")


def list_folder(folder: Path) -> list[str]:
    """Names of a folder's files and, as ``sub/name``, of its subfolders' files.

    Raises
    ------
    CheckpointError
        The folder may not be listed.
    """
    names: list[str] = []
    try:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                names.extend(f"{entry.name}/{file.name}" for file in _visible(entry))
            else:
                names.append(entry.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}") from error
    return names


def _visible(folder: Path) -> list[Path]:
    """Files of a subfolder, which is only looked into to help with an error: one that is closed counts as empty."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return []


def contained(root: Path, name: str) -> Path:
    """Path of a folder's file, refused if a link leads out of the folder.

    The hub cache's own layout is accepted: there, the files of ``snapshots/<commit>`` are links into ``blobs``.

    Raises
    ------
    CheckpointNotFound
        No such file.
    UnsafeCheckpoint
        It is a link to a file elsewhere.
    """
    path = root / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path} does not exist; fetch it, or give a folder that is complete") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    home = root.resolve()
    if target.is_relative_to(home) or _is_own_blob(home, target):
        return path
    raise UnsafeCheckpoint(
        f"{path} is a link that leads out of its folder, to {target}. Copy the file into the folder, or name it itself."
    )


def _is_own_blob(home: Path, target: Path) -> bool:
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots":
            return target.is_relative_to(folder.parent.parent / "blobs")
    return False


def read_index(path: Path, *, endings: tuple[str, ...] = SAFETENSORS) -> dict[str, str]:
    """Read an index's ``weight_map``: tensor name to file name, each checked to stay in the folder.

    Raises
    ------
    UnsafeCheckpoint
        It is malformed, or a file name is absolute, leads upwards, or has another ending.
    """
    weight_map = read_object(path, limit=INDEX_LIMIT).get("weight_map")
    return check_weight_map(weight_map, str(path), endings=endings)


def check_weight_map(weight_map: Any, source: str, *, endings: tuple[str, ...] = SAFETENSORS) -> dict[str, str]:
    """Check that a ``weight_map`` maps tensor names to plain file names inside the folder.

    Raises
    ------
    UnsafeCheckpoint
        As `read_index`.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsafeCheckpoint(f"{source} has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise UnsafeCheckpoint(
                f"{source}: tensor {shown(name)} is said to be in {shown(file)}, which is no file of this folder"
            )
        if not file.endswith(endings):
            raise UnsafeCheckpoint(
                f"{source}: tensor {shown(name)} is said to be in {shown(file)}, which does not end in "
                f"{' or '.join(endings)}"
            )
    return weight_map


def _is_plain(file: str) -> bool:
    """A relative path, on any system: no drive, backslash, ``..``, empty step or control character."""
    return (
        file.isprintable()
        and not any(character in file for character in '\\:*?"<>|')
        and all(step.strip(" .") for step in file.split("/"))
    )


def cross_check(weight_map: dict[str, str], files: Iterable[tuple[str, TensorFile]], index: Path) -> None:
    """Check that index and shards tell the same story.

    Raises
    ------
    UnsafeCheckpoint
        A tensor is in a shard but not in the index, or in the index but not in that shard.
    """
    stored = {name: shard for shard, file in files for name in file.infos}
    absent = [name for name in weight_map if name not in stored]
    unlisted = [name for name in stored if name not in weight_map]
    moved = [name for name in weight_map if name in stored and stored[name] != weight_map[name]]
    for names, trouble in (
        (absent, "in the index but in no shard"),
        (unlisted, "in a shard but not in the index"),
        (moved, "in another shard than the index says"),
    ):
        if names:
            raise UnsafeCheckpoint(
                f"{index}: {len(names)} tensors are {trouble}: {listed(names)}. The files come from different saves; "
                "fetch or save the checkpoint again."
            )


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The folder's ``config.json``, or an empty dict, and the path it was read from.

    Raises
    ------
    UnsafeCheckpoint
        It is over 10 MB, not a JSON object, or a link that leads out of the folder.
    """
    if not (folder / "config.json").exists():
        return {}, ()
    path = contained(folder, "config.json")
    return read_object(path, limit=CONFIG_LIMIT, unique=False), (path,)
