"""`compose`: several updates of one model merged into a checkpoint, tensor by tensor, shard by shard."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spectra.checkpoints import Checkpoint, TensorInfo
from spectra.compose.merging import Merge, in_any_order, merged
from spectra.compose.products import Product
from spectra.compose.writer import ShardWriter
from spectra.delta import AnyDelta, Delta, LowRankDelta, as_rows, is_float, name_filter
from spectra.errors import CheckpointError, NonFiniteMatrix, UsageError
from spectra.inputs import progress_bar, side_info, versions
from spectra.linalg.matrix import row_blocks, sum_of_squares
from spectra.pairwise.opening import Opened, open_updates

RECORD = "composition.json"
SCHEMA = 1

# Beside the weights, what loaders want of a model's folder.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class ComposedTensor:
    """One tensor of the merged model.

    Attributes
    ----------
    name : str
        As the base stores it.
    shape : tuple of int
    tasks : tuple of float
        ‖Δ‖_F of every update, before its coefficient; 0 where an update leaves the tensor alone.
    frobenius : float
        ‖Δ‖_F of the merged update.
    merge_loss : float
        ‖round(W + Δ) − (W + Δ)‖_F/‖Δ‖_F in the stored dtype; NaN where nothing changed.
    status : str
        ``"merged"``, ``"unchanged"``, or ``"left out"`` by `include` and `exclude`.
    """

    name: str
    shape: tuple[int, ...]
    tasks: tuple[float, ...]
    frobenius: float
    merge_loss: float
    status: str


@dataclass(frozen=True)
class Composition:
    """A merged model, and what merging did.

    Attributes
    ----------
    out : Path
        Folder of the checkpoint.
    labels : tuple of str
        Of the updates.
    tensors : tuple of ComposedTensor
    dropped : dict of str to tuple of str
        By label: tensors of an update that the base has no place for, a task's own head for instance.
    info : dict
        Inputs, method, versions.
    """

    out: Path
    labels: tuple[str, ...]
    tensors: tuple[ComposedTensor, ...]
    dropped: Mapping[str, tuple[str, ...]]
    info: Mapping[str, Any]

    @property
    def frobenius(self) -> float:
        """‖Δ‖_F of the whole merged update."""
        return math.sqrt(math.fsum(tensor.frobenius**2 for tensor in self.tensors))

    @property
    def merge_loss(self) -> float:
        """Share of its norm that storing lost; NaN where nothing changed."""
        changed = [tensor for tensor in self.tensors if tensor.frobenius > 0.0]
        lost = math.fsum((tensor.frobenius * tensor.merge_loss) ** 2 for tensor in changed)
        return math.sqrt(lost) / self.frobenius if changed else math.nan

    def __repr__(self) -> str:
        changed = sum(tensor.status == "merged" for tensor in self.tensors)
        return (
            f"Composition({self.info['method']['method']} of {', '.join(self.labels)}: {changed} of "
            f"{len(self.tensors)} tensors merged, {self.merge_loss:.2%} of the update lost on storing, in {self.out})"
        )


def compose(
    base: Any,
    updates: Sequence[Any],
    *,
    out: str | os.PathLike[str],
    how: Merge | None = None,
    coefficients: Sequence[float] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    progress: bool = True,
) -> Composition:
    """Merge updates of one base, and write the merged model in the base's dtypes and shards.

    Parameters
    ----------
    base : path, hub id or Checkpoint, or None
        None: the base that all adapters name.
    updates : sequence of path, hub id, Checkpoint or Adapter
        Fine-tuned models and adapters, in any mixture.
    out : path
        Folder, which must be empty or not there.
    how : Merge, optional
        By default the sum.
    coefficients : sequence of float, optional
        One an update; by default 1 each.
    include, exclude : str, optional
        Regular expressions searched in names; tensors that are left out stay the base's.
    trust_pickle, offline, allow_partial, progress
        As in `spectra.compare`.

    Returns
    -------
    Composition

    Raises
    ------
    CheckpointError, MismatchError
        If an input cannot be opened or is of another model, or the result cannot be written.
    UsageError
        If arguments contradict each other, or the folder holds something.
    NonFiniteMatrix
        If a tensor of the result leaves the range of its dtype, or an update is not finite.

    Notes
    -----
    One tensor of each model is in memory at a time. Vectors, and whatever else is no matrix, have no singular vectors:
    the methods that work on these take their sum.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, value in (("base", 1.0), ("a", 2.0), ("b", 4.0)):
    ...         save_file({"w": torch.full((2, 2), value)}, f"{folder}/{name}.safetensors")
    ...     inputs = [f"{folder}/{name}.safetensors" for name in ("base", "a", "b")]
    ...     found = compose(inputs[0], inputs[1:], out=f"{folder}/merged", coefficients=[1.0, 0.5], progress=False)
    ...     load_file(f"{folder}/merged/base.safetensors")["w"][0]
    tensor([3.5000, 3.5000])
    """
    how = how or Merge()
    options = {"trust_pickle": trust_pickle, "offline": offline, "allow_partial": allow_partial}
    weights = [1.0] * len(updates) if coefficients is None else [float(value) for value in coefficients]
    if not updates or len(weights) != len(updates):
        raise UsageError(f"{len(weights)} coefficients for {len(updates)} updates: one each, in their order")
    wanted = name_filter(include, exclude)
    whole, sides, notes = open_updates(updates, base, **options)
    folder = _begun(Path(out))
    deltas = [_by_stored_name(side) for side in sides]
    rows: list[ComposedTensor] = []
    work = {name: float(math.prod(info.shape)) + 1.0 for name, info in whole.infos().items()}
    shards = _shards(whole)
    with _removed_on_failure(folder), progress_bar(work, progress) as advance:
        for shard, infos in shards.items():
            with ShardWriter(folder / shard, infos) as writer:
                for info in infos:
                    found = [held.get(info.name) if wanted(info.name) else None for held in deltas]
                    tensor, row = _composed(whole, info, found, weights, how)
                    rows.append(row if wanted(info.name) else _left_out(row))
                    writer.write(info.name, tensor)
                    advance(info.name)
        _index(folder, shards)
        _copy_beside(whole, folder)
    told = {
        "schema": SCHEMA,
        "base": side_info(whole),
        "updates": [side_info(side.tuned) for side in sides],
        "coefficients": weights,
        "method": asdict(how),
        "notes": list(notes),
        "versions": versions(),
    }
    dropped = {side.label: _dropped(side) for side in sides}
    composition = Composition(Path(out), tuple(side.label for side in sides), tuple(rows), dropped, told)
    _write_record(composition, folder)
    _ended(folder, composition.out)
    return composition


def _composed(
    base: Checkpoint, info: TensorInfo, deltas: Sequence[AnyDelta | None], weights: Sequence[float], how: Merge
) -> tuple[torch.Tensor, ComposedTensor]:
    """One tensor as it is to be stored, and its row."""
    stored = base[info.name]
    held = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if delta is not None]
    if not held or not is_float(info.dtype) or stored.numel() == 0:
        return stored, ComposedTensor(info.name, info.shape, (0.0,) * len(deltas), 0.0, math.nan, "unchanged")
    updates = [product_of(delta) for delta, _ in held]
    norms = iter([update.norm for update in updates])
    tasks = tuple(0.0 if delta is None else next(norms) for delta in deltas)
    scales = [weight for _, weight in held]
    if min(updates[0].shape) == 1 and how.method in _OF_MATRICES:
        update = how.scale * in_any_order([w * u.dense() for w, u in zip(scales, updates, strict=True)])
    else:
        update = merged(updates, how, coefficients=scales).dense()
    result, lost = _rounded(as_rows(stored), update, info)
    norm = math.sqrt(sum_of_squares(update))
    row = ComposedTensor(info.name, info.shape, tasks, norm, lost / norm if norm > 0.0 else math.nan, "merged")
    return result.view(stored.shape), row


# Methods that need singular vectors.
_OF_MATRICES = ("knots", "tsv", "iso", "orthogonal", "svd")


def product_of(delta: AnyDelta) -> Product:
    """An update read: in factors where it is an adapter's, dense otherwise."""
    if isinstance(delta, LowRankDelta):
        b, a = delta.factors()
        return Product(delta.update.scale * b.double(), a)
    return Product.of(delta.dense())


def _rounded(stored: torch.Tensor, update: torch.Tensor, info: TensorInfo) -> tuple[torch.Tensor, float]:
    """W + Δ in W's dtype, and ‖round(W + Δ) − (W + Δ)‖_F, a block of rows at a time."""
    out, lost = torch.empty_like(stored), []
    for target, w, moved in zip(row_blocks(out), row_blocks(stored), row_blocks(update), strict=True):
        exact = w.double() + moved
        target.copy_(exact)
        difference = target.double() - exact
        lost.append(float(difference.square_().sum()))
    if not math.isfinite(math.fsum(lost)):
        bad = int((~torch.isfinite(out)).sum())
        raise NonFiniteMatrix(
            f"{info.name}: {bad} of {out.numel()} merged entries leave the range of {info.dtype}; take smaller "
            "coefficients, or a base stored in a wider dtype"
        )
    return out, math.sqrt(math.fsum(lost))


def _by_stored_name(side: Opened) -> dict[str, AnyDelta]:
    """Updates by the base's stored names. Raises `UsageError` where a tensor is only part of a stored one."""
    found: dict[str, AnyDelta] = {}
    for delta in side.deltas.values():
        if isinstance(delta, Delta) and delta.view:
            raise UsageError(
                f"{side.label} stores {delta.tuned_name} otherwise than the base does ({delta.view}): convert one of "
                "them to the other's layout first"
            )
        stored = delta.base_info.name
        if stored in found:
            raise UsageError(
                f"{side.label} moves {found[stored].name} and {delta.name} each by itself, which the base stores once "
                f"as {stored}: untie the base's weights first, or leave one of them out by exclude"
            )
        found[stored] = delta
    return found


def _dropped(side: Opened) -> tuple[str, ...]:
    return tuple(pair.name for pair in side.pairing.pairs if pair.status in ("tuned_only", "shape_mismatch"))


def _left_out(row: ComposedTensor) -> ComposedTensor:
    return ComposedTensor(row.name, row.shape, row.tasks, 0.0, math.nan, "left out")


def _shards(base: Checkpoint) -> dict[str, list[TensorInfo]]:
    """File names to write, with the tensors of each; what is stored once under two names is written once."""
    aliases, found = base.aliases, dict[str, list[TensorInfo]]()
    for name, info in base.infos().items():
        if name not in aliases:
            file = Path(info.file)
            stem = file.stem.replace("pytorch_model", "model")  # what loaders look for beside .safetensors
            found.setdefault(f"{stem}.safetensors", []).append(info)
    return found


def _index(folder: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
    if len(shards) > 1:
        weight_map = {info.name: shard for shard, infos in shards.items() for info in infos}
        total = sum(info.read_bytes for infos in shards.values() for info in infos)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text + "\n", "utf-8")


def _copy_beside(base: Checkpoint, folder: Path) -> None:
    """Configuration and tokenizer, as they lie beside the base's weights."""
    root = base.root if base.root.is_dir() else None
    for path in _beside(root):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config = dict(base.config)
    if config.pop("quantization_config", None) is not None:  # the merged weights are plain
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _beside(root: Path | None) -> Iterator[Path]:
    if root is not None:
        for pattern in _BESIDE:
            yield from sorted(path for path in root.glob(pattern) if not path.name.endswith(".index.json"))


def _begun(out: Path) -> Path:
    """A new folder beside `out`, which becomes it when all is written: what is left of an older one goes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} holds something already; give the merged model a folder of its own")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{part} cannot be made: {error.strerror or error}") from error
    return part


@contextmanager
def _removed_on_failure(part: Path) -> Iterator[None]:
    """Leave nothing of a folder whose making fails or is interrupted."""
    try:
        yield
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _ended(part: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()
    part.rename(out)


def _write_record(found: Composition, folder: Path) -> None:
    record = {
        **found.info,
        "labels": list(found.labels),
        "dropped": {label: list(names) for label, names in found.dropped.items()},
        "tensors": [_plain(asdict(tensor)) for tensor in found.tensors],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", "utf-8")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
