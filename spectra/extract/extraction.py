"""`extract`: from two checkpoints to an adapter folder and an `Extraction`, which tells what every tensor lost."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import MatrixError, UsageError
from spectra.extract.adapter_folder import Contents, assemble, write_folder
from spectra.extract.card import model_card
from spectra.extract.measure import Matrix, Measured, measure_model
from spectra.extract.planning import Plan, plan
from spectra.extract.ranks import uniform_error
from spectra.inputs import matching_info, side_info, versions
from spectra.moments import Moments
from spectra.theory.allocation import uniform_rank

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "spectra extraction 1"


@dataclass(frozen=True, eq=False)
class Extraction:
    """What an extraction left behind: where, how large, how exact.

    Parameters
    ----------
    out : Path
        Folder of the adapter.
    tensors : tuple of dict
        One a tensor, in the base's stored order: ``name``, ``module``, ``kind``, ``treatment`` (``"factors"``,
        ``"whole"``, ``"bias"``, ``"listed"``, ``"unchanged"``, ``"dropped"``: no direction kept, ``"nonfinite"``,
        ``"failed"``), ``reason``, ``rows``, ``cols``, ``rank``, ``parameters``, ``norm`` ‖Δ‖_F, ``error``
        ‖Δ − written‖_F measured from the written factors, ``optimum`` (no factors of this rank leave less),
        ``relative_error``, ``route``. With moments also ``weighted_norm`` ‖ΔR^½‖_F, ``weighted_error``,
        ``weighted_optimum`` and ``weighted_error_of_plain``, what Δ's own leading directions would leave; None of a
        tensor whose inputs have none.
    totals : dict
        ``parameters``, ``factor_parameters``, ``bytes``; ``norm``, ``error``, ``energy_kept`` of the whole model; the
        same of the matrices alone (``matrices_…``) and ``matrices_optimum``; ``uniform_rank``, ``uniform_error``:
        what the largest uniform rank of no more parameters would leave of the matrices (None where the rank is
        uniform already). With moments also ``weighted_matrices``, how many have them, and of those together
        ``weighted_norm``, ``weighted_error``, ``weighted_energy_kept``, ``weighted_optimum``,
        ``weighted_error_of_plain``; ``uniform_error`` is then weighted, and None where some matrices have no moments.
    config : dict
        Content of ``adapter_config.json``.
    info : dict
        Inputs, settings, versions, the command.
    files : tuple of Path
        What was written, the configuration first.
    """

    out: Path
    tensors: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    config: dict[str, Any]
    info: dict[str, Any]
    files: tuple[Path, ...] = ()

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a tensor (pandas)."""
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame.from_records(list(self.tensors))
        return frame

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """Tensors that could not be extracted."""
        return tuple(row for row in self.tensors if row["treatment"] in ("nonfinite", "failed"))

    @property
    def record(self) -> dict[str, Any]:
        """Content of ``extraction.json``: NaN never stands in it."""
        return {"format": FORMAT, **self.info, "totals": self.totals, "tensors": list(self.tensors)}

    @property
    def verdict(self) -> tuple[str, ...]:
        """What a reader needs to know, in sentences."""
        return tuple(_verdict(self))

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(sentence) for sentence in self.verdict)
        return f"<div><b>Adapter</b> in {html.escape(str(self.out))}<br>{lines}</div>"


def extract(
    base: Any,
    tuned: Any,
    *,
    out: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    criterion: str | None = None,
    allocation: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embeddings: str = "lora",
    rest: str = "save",
    dtype: str = "fp32",
    moments: str | os.PathLike[str] | Mapping[str, Moments] | None = None,
    seed: int = 0,
    device: str | None = None,
    jobs: int | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
    progress: bool = True,
) -> Extraction:
    """Write what a fine-tune did to a model as a LoRA adapter of PEFT: the best one of its ranks.

    Every matrix is truncated to its leading singular directions, which no other factors of that rank come closer than
    (Eckart and Young). Factors are balanced and their scale is 1 for every loader (lora_alpha = r). Memory follows the
    largest matrix and the adapter itself.

    Parameters
    ----------
    base, tuned : path, hub id ``org/name@revision``, Checkpoint or Adapter
        A tuned side that is an adapter is re-ranked from its factors, which are never multiplied out.
    out : path
        Folder of the adapter: new, empty, or one of an earlier extraction, which is replaced.
    rank : int, optional
        Directions of every matrix. One of `rank`, `energy`, `parameters` and `criterion` is given.
    energy : float, optional
        Share of ‖Δ‖²_F to keep, 0 < energy ≤ 1.
    parameters : int, optional
        Parameters that all factors may take together.
    criterion : {"signal", "gavish-donoho", "marchenko-pastur", "entropy", "stable", "elbow"}, optional
        A rank for each matrix by what its spectrum says, as `spectra.advice` reads it.
    allocation : {"uniform", "global"}, optional
        Each matrix by itself, or directions where they help the whole model most; by default global for `parameters`.
    include, exclude : str, optional
        Regular expressions searched in the tensors' canonical names; other tensors stay the base's. A head that PEFT
        looks for (``classifier``) is saved in any case.
    embeddings : {"lora", "save", "list"}
        Embeddings as factors, as modules saved whole, or only listed.
    rest : {"save", "list"}
        Norms, heads and biases that changed: in the adapter, or only listed.
    dtype : {"fp32", "bf16", "fp16"}
        Of the factors. Modules saved whole keep theirs.
    moments : path or mapping of str to Moments, optional
        Second moments R of the inputs of linear maps, by module (`spectra.moments`), or the file that ``python -m
        spectra.train.moments`` writes. Their factors then leave least of ‖(Δ − BA)R^½‖, what they do to those
        inputs, and the rule reads that spectrum; errors are told both ways. Moments of a file are read one at a
        time, and roots of 1 GiB together are kept, or two of the largest.
    seed : int
        Seed of the sketches that matrices of more than 2048 rows and columns go through.
    device : str, optional
        Where to compute.
    jobs : int, optional
        Small matrices at a time; by default one a core. The bytes do not depend on it.
    trust_pickle, offline : bool
        As in `spectra.open_checkpoint`.
    allow_partial : bool
        Go on where fewer than 95 % of the tensors match.
    progress : bool
        Show a bar for anything longer than two seconds.

    Returns
    -------
    Extraction

    Raises
    ------
    UsageError
        If arguments contradict each other, the budget pays for no direction, nothing changed, or `out` holds anything
        but an earlier extraction.
    CheckpointError, MismatchError
        If a checkpoint cannot be opened, or the two do not match.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"q.weight": torch.zeros(4, 3)}, f"{folder}/a.safetensors")
    ...     save_file({"q.weight": torch.ones(4, 3)}, f"{folder}/b.safetensors")
    ...     found = extract(f"{folder}/a.safetensors", f"{folder}/b.safetensors", out=f"{folder}/adapter", rank=1)
    >>> found.totals["factor_parameters"], round(found.totals["energy_kept"], 6)
    (7, 1.0)
    """
    todo = plan(
        base,
        tuned,
        out=out,
        rank=rank,
        energy=energy,
        parameters=parameters,
        criterion=criterion,
        allocation=allocation,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        rest=rest,
        dtype=dtype,
        moments=moments,
        seed=seed,
        device=device,
        trust_pickle=trust_pickle,
        offline=offline,
        allow_partial=allow_partial,
    )
    return execute(todo, jobs=jobs, progress=progress)


def execute(todo: Plan, *, jobs: int | None = None, progress: bool = True) -> Extraction:
    """Carry out a plan; parameters, returns and errors are those of `extract`."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: at least one matrix must be taken at a time")
    with ThreadPoolExecutor(1) as beside:  # digests read the files once more, and wait for no matrix
        sides = beside.map(side_info, (todo.base, todo.tuned))
        measured = measure_model(todo, jobs=jobs or os.cpu_count() or 1, progress=progress)
        base, tuned = sides
    failed = [measured[place.name] for place in todo.matrices if measured[place.name].status != "ok"]
    if len(failed) == len(todo.matrices):
        told = f"none of {len(failed)} matrices could be taken; {failed[0].place.name}: {failed[0].reason}"
        raise (MatrixError if failed[0].status == "nonfinite" else UsageError)(told)
    pieces = {name: one.piece for name, one in measured.items() if one.piece is not None}
    contents = assemble(todo, pieces, dtype=todo.torch_dtype)
    rows = tuple(_row(place.name, todo, measured[place.name], contents) for place in todo.places)
    totals = _totals(todo, rows, measured, contents)
    info = {
        "command": todo.command,
        "rule": str(todo.rule),
        "base": base,
        "tuned": tuned,
        "matching": matching_info(todo.pairing),
        "settings": {**todo.settings},
        **({"moments": dict(todo.weighting.info)} if todo.weighting.moments else {}),
        "notes": _notes(todo, rows, totals),
        "versions": versions(),
    }
    found = Extraction(todo.out, rows, totals, contents.config, info)
    files = write_folder(todo.out, contents, record=found.record, card=model_card(found))
    return Extraction(todo.out, rows, totals, contents.config, info, tuple(files))


def _row(name: str, todo: Plan, found: Measured, contents: Contents) -> dict[str, Any]:
    """One line of the record."""
    place = found.place
    treatment, reason = _treatment(found, contents)
    error = {"factors": found.error, "whole": 0.0, "bias": _bias_error(found, todo, reason), "unchanged": 0.0}.get(
        treatment, found.norm
    )
    rows, cols = place.delta.shape if place.delta is not None else (None, None)
    rank = found.matrix.rank if found.matrix is not None and treatment in ("factors", "dropped") else None
    return {
        "name": name,
        "module": place.module,
        "kind": place.kind,
        "treatment": treatment,
        "reason": reason,
        "rows": rows,
        "cols": cols,
        "rank": rank,
        "parameters": _parameters(found, treatment, rank, todo),
        "norm": _number(found.norm),
        "error": _number(error),
        "optimum": _number(found.matrix.optimum) if found.matrix is not None else None,
        "relative_error": _number(error / found.norm) if found.norm else None,
        "route": found.matrix.method if found.matrix is not None else "",
        **(_on_inputs(found) if todo.weighting.moments else {}),
    }


def _on_inputs(found: Measured) -> dict[str, float | None]:
    """Errors where a matrix's inputs are."""
    held = None if found.matrix is None else found.matrix.on_inputs
    names = {"norm": "norm", "error": "error", "optimum": "optimum", "error_of_plain": "plain"}
    return {f"weighted_{name}": None if held is None else _number(getattr(held, key)) for name, key in names.items()}


def _treatment(found: Measured, contents: Contents) -> tuple[str, str]:
    if found.status != "ok":
        return found.status, found.reason
    name = found.place.name
    if name in contents.treatment:
        return contents.treatment[name]
    if found.norm == 0.0:
        return "unchanged", ""
    if found.place.factored:
        return "dropped", "no direction kept"
    return "listed", found.place.reason


def _bias_error(found: Measured, todo: Plan, how: str) -> float:
    shift = None if found.piece is None else found.piece.shift
    if shift is None or how != "as a shift":
        return 0.0
    return float((shift.double() - shift.to(todo.torch_dtype).double()).norm())


def _parameters(found: Measured, treatment: str, rank: int | None, todo: Plan) -> int:
    if treatment == "factors":
        return (rank or 0) * found.place.cost
    if treatment not in ("whole", "bias"):
        return 0
    delta = found.place.delta
    info = delta.tuned_info if delta is not None else todo.tuned.info(found.place.stored or "")
    return math.prod(info.shape)


def _totals(
    todo: Plan, rows: tuple[dict[str, Any], ...], measured: Mapping[str, Measured], contents: Contents
) -> dict[str, Any]:
    known = [row for row in rows if row["norm"] is not None and row["treatment"] not in ("nonfinite", "failed")]
    matrices = [row for row in known if measured[row["name"]].matrix is not None]
    spent = sum(row["parameters"] for row in matrices)
    totals: dict[str, Any] = {
        "parameters": sum(tensor.numel() for tensor in contents.tensors.values()),
        "factor_parameters": spent,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in contents.tensors.values()),
        "matrices": len(matrices),
        "factored": sum(row["treatment"] == "factors" for row in matrices),
        **_energy("", known),
        **_energy("matrices_", matrices),
        "matrices_optimum": _norm(row["optimum"] for row in matrices),
        "uniform_rank": None,
        "uniform_error": None,
    }
    weighted = [row for row in matrices if row.get("weighted_norm") is not None]
    if todo.weighting.moments:
        totals.update(_weighted(weighted))
    if weighted and len(weighted) < len(matrices):
        return totals  # weighted errors and plain ones do not add up to one that equal ranks could be held against
    found = [measured[row["name"]].matrix for row in matrices]
    if todo.rule.needs_values and not (todo.rule.whole_model and todo.rule.allocation == "uniform"):
        totals.update(_against_uniform([one for one in found if one is not None], spent, rows=matrices))
    return totals


def _against_uniform(found: list[Matrix], spent: int, *, rows: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [row["rows"] + row["cols"] for row in rows]
    limits = [len(one.values) for one in found]
    rank = uniform_rank(costs, spent, largest=limits)
    squares, missing = [one.values**2 for one in found], [one.missing for one in found]
    return {"uniform_rank": rank, "uniform_error": uniform_error(rank, squares, missing)}


def _weighted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("weighted_norm", "weighted_error", "weighted_optimum", "weighted_error_of_plain")
    sums = {name: _norm(row[name] for row in rows) for name in names}
    norm, error = sums["weighted_norm"], sums["weighted_error"]
    kept = 1.0 - (error / norm) ** 2 if norm > 0 else 1.0
    return {"weighted_matrices": len(rows), "weighted_energy_kept": kept, **sums}


def _energy(prefix: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    norm, error = _norm(row["norm"] for row in rows), _norm(row["error"] for row in rows)
    kept = 1.0 - (error / norm) ** 2 if norm > 0 else 1.0
    return {f"{prefix}norm": norm, f"{prefix}error": error, f"{prefix}energy_kept": kept}


def _norm(values: Any) -> float:
    return math.sqrt(math.fsum(value**2 for value in values))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _notes(todo: Plan, rows: tuple[dict[str, Any], ...], totals: Mapping[str, Any]) -> list[str]:
    """What a user of the adapter has to know, in sentences."""
    notes = []
    model = todo.model
    tied = next((row for row in rows if row["module"] == model.tied and row["treatment"] == "factors"), None)
    if tied is not None:
        notes.append(
            f"{tied['name']} is tied to the output head: PEFT applies its factors to the head only once the adapter is "
            "merged (merge_and_unload). For logits that are right unmerged too, extract with --embeddings save."
        )
    large = [
        row for row in rows if row["rank"] and row["rank"] * (row["rows"] + row["cols"]) > row["rows"] * row["cols"]
    ]
    if large:
        notes.append(f"{len(large)} of {totals['factored']} matrices take more parameters as factors than as they are.")
    if todo.model.task_type is None:
        notes.append("The kind of model is not known, so task_type is left out: load the base model, then the adapter.")
    return notes


def _verdict(found: Extraction) -> list[str]:
    totals = found.totals
    kept, error = totals["energy_kept"], math.sqrt(max(0.0, 1.0 - totals["energy_kept"]))
    ranks = sorted({row["rank"] for row in found.tensors if row["treatment"] == "factors"})
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    said = [
        f"{totals['factored']} of {totals['matrices']} matrices as factors of {told}: "
        f"{totals['factor_parameters']:,} parameters, {totals['parameters']:,} with all that is stored "
        f"({totals['bytes'] / 1e6:,.2f} MB)",
        f"keeps {100 * kept:.2f}\xa0% of the energy of the whole update: relative error {error:.3g}, of the matrices "
        f"alone {_relative(totals, 'matrices_'):.3g}",
        *(_told_of_inputs(totals) if "weighted_norm" in totals else [_optimality(totals)]),
    ]
    whole = totals.get("weighted_norm", totals["matrices_norm"])
    if totals["uniform_error"] is not None and whole > 0:
        uniform = totals["uniform_error"] / whole
        said.append(
            f"against uniform: rank {totals['uniform_rank']} everywhere, the largest of no more parameters, leaves "
            f"{uniform:.3g} of the matrices" + (" on their inputs" if "weighted_norm" in totals else "")
        )
    listed = [row for row in found.tensors if row["treatment"] in ("listed", "nonfinite", "failed")]
    if listed:
        said.append(f"{len(listed)} tensors are not in the adapter: {found.out / 'README.md'} lists them")
    return [*said, *found.info["notes"]]


def _relative(totals: Mapping[str, Any], prefix: str) -> float:
    norm = totals[f"{prefix}norm"]
    return float(totals[f"{prefix}error"] / norm) if norm > 0 else 0.0


def _told_of_inputs(totals: Mapping[str, Any]) -> list[str]:
    count, norm = totals["weighted_matrices"], totals["weighted_norm"]
    if norm == 0.0:
        return [f"nothing of the {count} matrices with moments acts on their inputs"]
    error, best, plain = (totals[f"weighted_{name}"] / norm for name in ("error", "optimum", "error_of_plain"))
    told = f"on their inputs {count} matrices leave {error:.3g} of what the update does"
    within = f", within {max(0.0, error / best - 1):.1g} of the least that these ranks can" if best > 0 else ""
    plainly = _norm_share(totals, "matrices_optimum")
    return [
        f"{told}{within}; each matrix's own leading directions, as many, would leave {plain:.3g}",
        f"in the entries no factors of these ranks leave less than {plainly:.3g} of the matrices",
    ]


def _norm_share(totals: Mapping[str, Any], name: str) -> float:
    return float(totals[name] / totals["matrices_norm"]) if totals["matrices_norm"] > 0 else 0.0


def _optimality(totals: Mapping[str, Any]) -> str:
    best, error = totals["matrices_optimum"], totals["matrices_error"]
    if error == 0.0 or best == 0.0:
        return "nothing of the matrices is lost but rounding"
    least = best / totals["matrices_norm"]
    return (
        f"no factors of these ranks leave less than {least:.3g} of the matrices: within {error / best - 1:.1g} of that"
    )
