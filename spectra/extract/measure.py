"""Every update of a plan measured: its spectrum where the rule asks for it, its factors, and the error they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.delta import AnyDelta, Delta, LowRankDelta, as_rows
from spectra.difference import Difference
from spectra.errors import CheckpointError, MatrixError, NonFiniteMatrix, OutOfMemory, UsageError
from spectra.extract.adapter_folder import Piece
from spectra.extract.factors import Factors, dense_error, factored_error, leading_factors, reranked_factors
from spectra.extract.places import Place
from spectra.extract.planning import Plan
from spectra.extract.weighting import Options, Seen, SeenMatrix, SeenProduct
from spectra.inputs import physical_memory, progress_bar
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import row_blocks
from spectra.schedule import Load, in_lanes, resident_bytes
from spectra.values import Spectrum

# min(rows, cols) up to which every singular value is taken where a rule asks for the spectrum: four seconds a matrix
# on two cores. Beyond, the leading ones are certified, more of them as long as the rule is not satisfied.
VALUES_BELOW = 4096
# How many at first, and for rules that look at the whole model.
FIRST_VALUES, MOST_VALUES = 64, 256


@dataclass(frozen=True, eq=False)
class Matrix:
    """What is known of one matrix's update and of the factors that were made of it.

    Parameters
    ----------
    values : ndarray
        σ, descending, as far as they were found.
    missing : float
        Energy past them.
    rank : int
        Directions kept.
    optimum : float
        No factors of this rank leave a smaller error.
    method : str
        Route.
    on_inputs : OnInputs or None
        Errors where its inputs are, where their moments are known. `values` are then those of ΔR^½.
    """

    values: NDArray[np.float64]
    missing: float
    rank: int = 0
    optimum: float = math.nan
    method: str = ""
    on_inputs: OnInputs | None = None


@dataclass(frozen=True)
class OnInputs:
    """Errors of one matrix in the units of its output: ‖ΔR^½‖, what is left of it, and what would be.

    Parameters
    ----------
    norm : float
        ‖ΔR^½‖.
    error : float
        Of the stored factors, measured.
    optimum : float
        No factors of this rank leave less.
    plain : float
        What Δ's own leading directions, as many of them, would leave.
    """

    norm: float
    error: float
    optimum: float
    plain: float


@dataclass(frozen=True, eq=False)
class Measured:
    """What was found for one place.

    Parameters
    ----------
    place : Place
    status : str
        ``"ok"``, ``"nonfinite"`` or ``"failed"``.
    reason : str
        Why it failed.
    norm : float
        ‖Δ‖_F; NaN where only one side has the tensor.
    error : float
        ‖Δ − written‖_F of a matrix, measured.
    piece : Piece or None
        What is to be stored; None where it failed.
    matrix : Matrix or None
        Of places that become factors.
    """

    place: Place
    status: str = "ok"
    reason: str = ""
    norm: float = math.nan
    error: float = math.nan
    piece: Piece | None = None
    matrix: Matrix | None = None


def measure_model(todo: Plan, *, jobs: int, progress: bool) -> dict[str, Measured]:
    """Measure every place: in one pass over the tensors, or in two where the ranks hang together.

    Parameters
    ----------
    todo : Plan
    jobs : int
        Small matrices at a time.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    dict of str to Measured
        By name.
    """
    ranks: Mapping[str, int] = {}
    first: dict[str, Measured] = {}
    passes = 2 if todo.rule.whole_model else 1
    work = {f"{name} ({i})": amount for i in range(passes) for name, amount in _work(todo).items()}
    with progress_bar(work, progress) as advance:
        if todo.rule.whole_model:
            first = _each(
                todo, todo.matrices, lambda place: _spectrum_of(todo, place), jobs, lambda n: advance(f"{n} (1)")
            )
            good = [place for place in todo.matrices if first[place.name].norm > 0]
            known = [matrix for place in good if (matrix := first[place.name].matrix) is not None]
            if any(len(one.values) for one in known):
                found = todo.rule.of_model(good, [one.values**2 for one in known], [one.missing for one in known])
                ranks = {place.name: rank for place, rank in zip(good, found, strict=True)}
        failed = {name: one for name, one in first.items() if one.status != "ok"}
        rest = [place for place in todo.places if place.name not in failed]

        def measure(place: Place) -> Measured:
            return _measured(todo, place, ranks.get(place.name), first.get(place.name))

        return failed | _each(todo, rest, measure, jobs, lambda name: advance(f"{name} (0)"))


def _each(
    todo: Plan,
    places: Sequence[Place],
    measure: Callable[[Place], Measured],
    jobs: int,
    advance: Callable[[str], None],
) -> dict[str, Measured]:
    """Measure places side by side, each failure kept to itself."""
    by_name = {place.name: place for place in places}

    def row(record: dict[str, Any]) -> dict[str, Any]:
        return {"name": record["name"], "found": _guarded(by_name[record["name"]], measure)}

    found = {}
    loads = {place.name: _load(todo, place) for place in places}
    records = [{"name": name} for name in by_name]
    for done in in_lanes(row, records, loads, jobs=jobs, max_bytes=_limit(), device=todo.settings["device"]):
        found[done["name"]] = done["found"]
        advance(done["name"])
    return found


def _guarded(place: Place, measure: Callable[[Place], Measured]) -> Measured:
    try:
        return measure(place)
    except NonFiniteMatrix as error:
        return Measured(place, "nonfinite", str(error))
    except (MatrixError, CheckpointError, OutOfMemory, UsageError, OSError, torch.OutOfMemoryError) as error:
        return Measured(place, "failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _limit() -> int:
    return physical_memory() // 2


def _load(todo: Plan, place: Place) -> Load:
    delta = place.delta
    if delta is None:
        return Load((1, 1), 0)
    if isinstance(delta, LowRankDelta):
        wide = 8 * sum(math.prod(delta.tuned.info(name).shape) for name in (delta.update.a, delta.update.b))
        return Load((max(delta.shape), 1), 6 * wide)
    p = min(delta.shape) if place.factored else 1
    seen = 0
    if place.name in todo.weighting.moments:
        # ΔR^½ in float64, its bidiagonalization's copies, and a plain factorization after it; R and its root.
        seen = 8 * 4 * (math.prod(delta.shape) + todo.weighting.moments[place.name].size ** 2)
    return Load(delta.shape, resident_bytes(delta) + seen + 8 * (2 * p * p + 2048 * p))


def _work(todo: Plan) -> dict[str, float]:
    work = {}
    for place in todo.places:
        rows, cols = place.delta.shape if place.delta is not None else (1, 1)
        small = isinstance(place.delta, LowRankDelta) or not place.factored
        own = float(rows + cols) * 64 if small else float(rows * cols) * (64 + min(rows, cols))
        work[place.name] = own + todo.weighting.work(place.name)
    return work


def _spectrum_of(todo: Plan, place: Place) -> Measured:
    """The spectrum alone: the first pass of a rule that looks at the whole model."""
    delta = place.delta
    assert delta is not None
    if isinstance(delta, LowRankDelta):
        b, a = delta.factors()
        spectrum = product_spectrum(b, a, scale=delta.update.scale, name=place.name)
        if place.name in todo.weighting.moments and spectrum.frobenius > 0.0:
            return _weighted_spectrum(todo, place, spectrum.frobenius, _seen_product(todo, place, b, a))
    else:
        difference = delta.difference()
        if difference.frobenius == 0.0:
            return Measured(place, norm=0.0, matrix=Matrix(np.zeros(0), 0.0))
        if place.name in todo.weighting.moments:
            return _weighted_spectrum(todo, place, difference.frobenius, _seen_matrix(todo, place, difference))
        most = None if min(delta.shape) <= VALUES_BELOW else MOST_VALUES
        spectrum = _spectrum(todo, place, difference, most)
    return Measured(place, norm=spectrum.frobenius, matrix=_known(spectrum))


def _weighted_spectrum(todo: Plan, place: Place, norm: float, seen: Seen) -> Measured:
    assert place.delta is not None
    spectrum = seen.spectrum(None if min(place.delta.shape) <= VALUES_BELOW else MOST_VALUES)
    return Measured(place, norm=norm, matrix=_known(spectrum))


def _seen_matrix(todo: Plan, place: Place, difference: Difference) -> Seen:
    assert place.delta is not None
    root = todo.weighting.root(place.name)
    image = 8 * root.shape[1] * sum(place.delta.shape)
    options = Options(todo.settings["seed"], todo.settings["device"], _limit() - resident_bytes(place.delta) - image)
    return SeenMatrix(difference.matrix, root, difference.frobenius, transposed=place.transposed, options=options)


def _seen_product(todo: Plan, place: Place, b: torch.Tensor, a: torch.Tensor) -> Seen:
    assert isinstance(place.delta, LowRankDelta)
    root, scale = todo.weighting.root(place.name), place.delta.update.scale
    return SeenProduct(b, a, scale, root, transposed=place.transposed, name=place.name)


def _known(spectrum: Spectrum) -> Matrix:
    values = spectrum.values[spectrum.values > spectrum.certificate.roundoff]
    missing = 0.0 if spectrum.complete else max(0.0, spectrum.frobenius**2 - float(np.sum(values**2)))
    return Matrix(values, missing)


def _spectrum(todo: Plan, place: Place, difference: Difference, rank: int | None) -> Spectrum:
    assert place.delta is not None
    return difference.spectrum(
        rank=rank,
        seed=todo.settings["seed"],
        max_bytes=_limit() - resident_bytes(place.delta),
        device=todo.settings["device"],
    )


def _measured(todo: Plan, place: Place, rank: int | None, before: Measured | None) -> Measured:
    if place.delta is None:
        return _alone(todo, place)
    if place.kind == "bias":
        difference = place.delta.difference()
        shift = difference.matrix.flatten().clone()
        return Measured(place, norm=difference.frobenius, piece=Piece(difference.frobenius, shift=shift))
    if not place.factored:
        norm = _distance(place.delta)
        return Measured(place, norm=norm, piece=Piece(norm))
    if isinstance(place.delta, LowRankDelta):
        return _reranked(todo, place, place.delta, rank, before)
    return _factored(todo, place, rank, before)


def _distance(delta: AnyDelta) -> float:
    """‖Δ‖_F alone: not what storage rounding adds, which takes six times as long."""
    if isinstance(delta, Delta) and not delta.view:
        old, new = delta.weights(), as_rows(delta.tuned[delta.tuned_name])
        wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
        if old.shape == new.shape:
            blocks = zip(row_blocks(old), row_blocks(new), strict=True)
            energy = math.fsum(float((b.to(wide) - a.to(wide)).double().square_().sum()) for a, b in blocks)
            if math.isfinite(energy):
                return math.sqrt(energy)
    return delta.difference().frobenius  # which says what is wrong with it


def _alone(todo: Plan, place: Place) -> Measured:
    """A tensor that one side alone has: read for what it holds, if it is to be saved."""
    if place.kind == "whole" and place.stored is not None:
        tensor = todo.tuned[place.stored]
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise NonFiniteMatrix(f"{place.name}: {bad} NaN or infinite entries of {tensor.numel()}")
    return Measured(place, piece=Piece(math.nan))


def _factored(todo: Plan, place: Place, rank: int | None, before: Measured | None) -> Measured:
    delta = place.delta
    assert delta is not None
    difference = delta.difference()
    norm = difference.frobenius
    if norm == 0.0:
        return Measured(place, norm=0.0, error=0.0, piece=Piece(0.0), matrix=Matrix(np.zeros(0), 0.0, optimum=0.0))
    if place.name in todo.weighting.moments:
        return _on_inputs(todo, place, norm, _seen_matrix(todo, place, difference), rank, before)
    known = None if before is None else before.matrix
    if rank is None and todo.rule.needs_values:
        spectrum = _enough(todo, place, norm, lambda count: _spectrum(todo, place, difference, count))
        known, rank = _known(spectrum), todo.rule.of_matrix(spectrum)
    elif rank is None:
        rank = min(todo.rule.rank or 1, *delta.shape)
    if rank == 0:
        return _dropped(place, norm, known)
    found = leading_factors(
        difference.matrix,
        rank,
        frobenius=norm,
        floor=difference.floor.spectral,
        seed=todo.settings["seed"],
        device=todo.settings["device"],
        max_bytes=_limit() - resident_bytes(delta),
    )
    b, a = _stored(found, todo, place)
    return _kept(place, norm, dense_error(difference.matrix, b, a), found, known, b, a)


def _on_inputs(
    todo: Plan, place: Place, norm: float, seen: Seen, rank: int | None, before: Measured | None
) -> Measured:
    """Factors that are best on a matrix's inputs, with the errors they leave there and in the entries."""
    assert place.delta is not None
    known = None if before is None else before.matrix
    if rank is None and todo.rule.needs_values:
        spectrum = _enough(todo, place, seen.norm, seen.spectrum)
        known, rank = _known(spectrum), todo.rule.of_matrix(spectrum)
    elif rank is None:
        rank = min(todo.rule.rank or 1, *place.delta.shape)
    if rank == 0 or seen.norm == 0.0:
        dropped = _dropped(place, norm, known or Matrix(np.zeros(0), 0.0))
        assert dropped.matrix is not None
        return replace(dropped, matrix=replace(dropped.matrix, on_inputs=OnInputs(*[seen.norm] * 4)))
    found = seen.best(rank)
    b, a = _stored(found, todo, place)
    error, weighted = seen.errors(b, a)
    plain = seen.plain(found.rank)
    kept = _kept(place, seen.norm, weighted, found, known, b, a)
    assert kept.matrix is not None
    on_inputs = OnInputs(seen.norm, weighted, kept.matrix.optimum, seen.errors(plain.b, plain.a)[1])
    optimum = math.sqrt(max(0.0, norm**2 - plain.captured_high))
    matrix = replace(kept.matrix, optimum=optimum, on_inputs=on_inputs)
    return replace(kept, norm=norm, error=error, piece=Piece(norm, b, a), matrix=matrix)


def _enough(todo: Plan, place: Place, norm: float, spectrum_of: Callable[[int | None], Spectrum]) -> Spectrum:
    """The whole spectrum, or of a very large matrix as many values as the rule needs."""
    p = min(place.delta.shape) if place.delta is not None else 0
    if p <= VALUES_BELOW or norm == 0.0:
        return spectrum_of(None)
    if todo.rule.energy is None:
        return spectrum_of(MOST_VALUES)
    count = FIRST_VALUES
    while True:
        spectrum = spectrum_of(min(count, p))
        held = float(np.sum(spectrum.values**2)) / norm**2
        if spectrum.complete or held >= todo.rule.energy:
            return spectrum
        count *= 2


def _reranked(todo: Plan, place: Place, delta: LowRankDelta, rank: int | None, before: Measured | None) -> Measured:
    b, a = delta.factors()
    scale = delta.update.scale
    if place.name in todo.weighting.moments:
        whole = product_spectrum(b, a, scale=scale, name=place.name).frobenius
        if whole > 0.0:
            return _on_inputs(todo, place, whole, _seen_product(todo, place, b, a), rank, before)
    known = None if before is None else before.matrix
    if rank is None and todo.rule.needs_values:
        spectrum = product_spectrum(b, a, scale=scale, name=place.name)
        known, rank = _known(spectrum), todo.rule.of_matrix(spectrum)
    elif rank is None:
        rank = min(todo.rule.rank or 1, *delta.shape)
    found = reranked_factors(b, a, rank, scale=scale, name=place.name)
    if found.frobenius == 0.0:
        return Measured(place, norm=0.0, error=0.0, piece=Piece(0.0), matrix=Matrix(np.zeros(0), 0.0, optimum=0.0))
    if not found.rank:
        return _dropped(place, found.frobenius, known)
    new_b, new_a = _stored(found, todo, place)
    error = factored_error(b, a, scale, new_b, new_a)
    return _kept(place, found.frobenius, error, found, known, new_b, new_a)


def _stored(found: Factors, todo: Plan, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors in the dtype they are stored in."""
    b, a = found.b.to(todo.torch_dtype), found.a.to(todo.torch_dtype)
    if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise MatrixError(
            f"{place.name}: factors of size {math.sqrt(float(found.values[0])):.3g} leave the range of "
            f"{todo.settings['dtype']}; store them as fp32 or bf16"
        )
    return b, a


def _dropped(place: Place, norm: float, known: Matrix | None) -> Measured:
    matrix = replace(known or Matrix(np.zeros(0), norm**2), rank=0, optimum=norm, method="")
    return Measured(place, norm=norm, error=norm, piece=Piece(norm), matrix=matrix)


def _kept(
    place: Place,
    norm: float,
    error: float,
    found: Factors,
    known: Matrix | None,
    b: torch.Tensor,
    a: torch.Tensor,
) -> Measured:
    captured = found.captured_high
    optimum = math.sqrt(max(0.0, norm**2 - captured))
    if known is not None and known.missing == 0.0:  # no cancellation where the tail itself is known
        optimum = float(np.linalg.norm(known.values[found.rank :]))
    held = known or Matrix(found.values, max(0.0, norm**2 - captured))
    matrix = replace(held, rank=found.rank, optimum=optimum, method=found.method)
    return Measured(place, norm=norm, error=error, piece=Piece(norm, b, a), matrix=matrix)
