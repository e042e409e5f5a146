"""The verdict: exactly three sentences — how much changed and where, how many directions carry it, how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from spectra.report.rows import Interval, TensorRow, median, pooled
from spectra.report.tables import by_layer, by_role, rounding_share, share_span, span
from spectra.report.text import counted, elide, listed, percent, trace, visible

# LoRA’s bet is taken to hold at a rank that keeps 90 % of the squared norm: what rank_90 counts, by another road.
BET_ERROR = math.sqrt(0.1)
BET_RANKS = (8, 16, 64)
# Above this share of the squared norm, what a truncation leaves out is partly rounding, and is said to be.
NOISY_SHARE = 0.1

Verdict = tuple[str, str, str]


@dataclass(frozen=True)
class _Subject:
    """The changed matrices, and the words for one or many of them."""

    rows: tuple[TensorRow, ...]

    @property
    def one(self) -> bool:
        return len(self.rows) == 1

    @property
    def the_median(self) -> str:
        return "the" if self.one else "the median"

    @property
    def a_median(self) -> str:
        return "" if self.one else "a median of "

    def middle(self, measure: str) -> Interval:
        return median(r.measures[measure] for r in self.rows)


def verdict(rows: Sequence[TensorRow]) -> Verdict:
    """Say in three sentences what a run found.

    Parameters
    ----------
    rows : sequence of TensorRow
        Every row of the run.

    Returns
    -------
    tuple of str
        How much changed and where; how many directions carry it; how sure that is.
    """
    analysed = tuple(r for r in rows if r.analysed)
    if analysed:
        subject = _Subject(analysed)
        return _how_much(subject, rows), _how_many(subject), _how_sure(subject)
    compared = [r for r in rows if r.status not in ("base_only", "tuned_only", "shape_mismatch")]
    if not compared:
        return _nothing_matched(rows)
    moved = [r for r in compared if r.numbers["frobenius"] > 0]
    broken = [r for r in compared if r.status in ("nonfinite", "unsupported_dtype", "failed")]
    if not moved and not broken:
        return _all_unchanged(compared)
    return _no_matrix(moved, broken)


def _how_much(subject: _Subject, rows: Sequence[TensorRow]) -> str:
    matrices = subject.rows
    relative = [r.numbers["relative_frobenius"] for r in matrices if math.isfinite(r.numbers["relative_frobenius"])]
    if subject.one:
        name = elide(visible(matrices[0].name), 72)
        amount = f"by {percent(relative[0])} of its norm" if relative else "from a zero matrix"
        return f"One matrix changed, {name}, {amount} (‖Δ‖/‖W‖, Frobenius){_others(rows, matrices)}."
    spread = _spread(relative)
    text = (
        f"{_share_changed(rows, matrices)} changed, each by {spread} of its norm, and all tensors together by "
        f"{percent(pooled(rows))} (‖Δ‖/‖W‖, Frobenius)"
    )
    return text + _where(rows) + "."


def _share_changed(rows: Sequence[TensorRow], matrices: Sequence[TensorRow]) -> str:
    known = len(matrices) + sum(r.status == "unchanged" and len(r.shape) == 2 for r in rows)
    if known == len(matrices):
        return f"All {counted(known, 'matrix', 'matrices')}"
    return f"{len(matrices)} of {counted(known, 'matrix', 'matrices')}"


def _spread(relative: Sequence[float]) -> str:
    low, high = percent(min(relative, default=math.nan)), percent(max(relative, default=math.nan))
    return low if low == high else f"{low} to {high}"


def _others(rows: Sequence[TensorRow], matrices: Sequence[TensorRow]) -> str:
    moved = sum(r.status == "vector" and r.numbers["frobenius"] > 0 for r in rows)
    return f", besides {counted(moved, 'vector')}" if moved else ""


def _where(rows: Sequence[TensorRow]) -> str:
    """Name the role and the layer that moved most, and how far from the least."""
    parts = []
    roles, layers = by_role(rows), [g for g in by_layer(rows) if g.label != "outside layers"]
    for groups, said in ((roles, "in {}"), (layers, "in layer {}")):
        ranked = sorted((g for g in groups if math.isfinite(g.relative)), key=lambda g: -g.relative)
        if len(ranked) > 1 and ranked[0].relative > ranked[-1].relative * 1.05:
            label = elide(visible(ranked[0].label), 60)
            parts.append(f"{said.format(label)} ({percent(ranked[0].relative)}, least {percent(ranked[-1].relative)})")
    return ", most " + " and ".join(parts) if parts else ""


def _how_many(subject: _Subject) -> str:
    entropy, ninety = subject.middle("entropy_rank"), subject.middle("rank_90")
    limits = {r.limit for r in subject.rows}
    shares = [
        share_span(median(r.measures[m].over(r.limit) for r in subject.rows)) for m in ("entropy_rank", "rank_90")
    ]
    possible = f"of {limits.pop()} possible ({shares[0]})" if len(limits) == 1 else f"({shares[0]} of what is possible)"
    text = (
        f"{subject.the_median.capitalize()} entropy rank is {span(entropy)} {possible}, {_above_floor(subject)}, and "
        f"90\xa0% of the squared norm takes {subject.a_median}{span(ninety)} "
        f"{'direction' if span(ninety) == '1' else 'directions'} ({shares[1]})"
    )
    if all(r.factored for r in subject.rows):
        return text + f"; {_fixed_rank(subject)}."
    return f"{text}; {_left_by_truncation(subject)}, {_bet(subject)}."


def _above_floor(subject: _Subject) -> str:
    """No effective rank is printed without this beside it."""
    signal = subject.middle("signal_rank")
    if signal.known:
        verb = "stands" if span(signal) == "1" else "stand"
        values = "singular value" if span(signal) == "1" else "singular values"
        return f"where {span(signal)} {values} {verb} above the storage floor{_out_of_noise(subject)}"
    if all(r.factored for r in subject.rows):
        return "in factors, which have no storage floor"
    return "the storage floor being unknown"


def _out_of_noise(subject: _Subject) -> str:
    spikes = _spikes(subject)
    return "" if math.isnan(spikes) else f" and {spikes:g} out of random noise (Marchenko–Pastur)"


def _spikes(subject: _Subject) -> float:
    """Median count of values above the Marchenko–Pastur edge; NaN where no spectrum is complete."""
    known = [r.numbers["mp_rank"] for r in subject.rows if math.isfinite(r.numbers["mp_rank"])]
    return statistics.median(known) if known else math.nan


def _fixed_rank(subject: _Subject) -> str:
    held = Interval(min(r.count for r in subject.rows), max(r.count for r in subject.rows))
    return (
        f"the adapter could hold at most {span(held)} directions in a matrix, a limit that its training set, so this "
        "says how much of its budget it used and nothing on whether a low rank was enough"
    )


def _left_by_truncation(subject: _Subject) -> str:
    errors = [(r, subject.middle(f"error_r{r}")) for r in _ranks(subject)]
    known = [(r, e) for r, e in errors if e.known]
    if not known:
        return "the error of a low-rank truncation is unknown"
    ranks = ", ".join(str(r) for r, _ in known[:-1]) + (" or " if len(known) > 1 else "") + str(known[-1][0])
    shares = [share_span(e).removesuffix("\xa0%") for _, e in known]
    left = ", ".join(shares[:-1]) + (" or " if len(shares) > 1 else "") + shares[-1] + "\xa0%"
    return f"cut to rank {ranks}, {'it' if subject.one else 'the median update'} would lose {left} of its norm"


def _bet(subject: _Subject) -> str:
    """Whether the update is low rank at the ranks that adapters use, and whether rounding lets anyone tell."""
    ranks = _ranks(subject)
    if not ranks:
        return "and the matrices are too small for LoRA’s bet on a low rank to mean anything"
    if _spikes(subject) == 0:
        return (
            "yet not one direction stands out of random noise, so there is nothing for LoRA’s bet on a low rank to hold"
        )
    for rank in ranks:
        error = subject.middle(f"error_r{rank}")
        if error.known and error.high <= BET_ERROR:
            return (
                f"so LoRA’s bet on a low rank holds for this update from rank {rank} (90\xa0% of the squared norm kept)"
            )
    signal, noise = subject.middle("signal_rank"), rounding_share(subject.rows) ** 2
    enough = [r for r in ranks if signal.known and signal.high <= r]
    if noise > NOISY_SHARE and enough:
        return (
            f"yet what rank {enough[0]} leaves cannot be told from storage rounding, so LoRA’s bet on a low rank "
            "is not refuted"
        )
    lowest = subject.middle(f"error_r{ranks[-1]}")
    if lowest.known and lowest.low <= BET_ERROR:
        return f"and the certified bounds do not settle whether LoRA’s bet on a low rank holds at rank {ranks[-1]}"
    return (
        f"so LoRA’s bet on a low rank does not hold for this update up to rank {ranks[-1]} (less than 90\xa0% of the "
        "squared norm kept)"
    )


def _ranks(subject: _Subject) -> list[int]:
    """Ranks at which an adapter of the median matrix has fewer parameters than a square matrix of its smaller side."""
    limit = statistics.median(r.limit for r in subject.rows)
    return [rank for rank in BET_RANKS if 2 * rank <= limit]


def _how_sure(subject: _Subject) -> str:
    return f"{_rounding_words(subject)}; {_completeness(subject)}."


def _rounding_words(subject: _Subject) -> str:
    known = [r for r in subject.rows if math.isfinite(r.rounding)]
    if not known and all(r.factored for r in subject.rows):
        return (
            "The update is stored as its factors and not as a difference of rounded weights, so no rounding enters it"
        )
    if not known:
        return "How much of the update is storage rounding is not known"
    noisy = [r.name for r in known if r.mostly_rounding]
    worst = max(known, key=lambda r: r.rounding)
    share = rounding_share(known)
    whole, most = trace(share), trace(worst.rounding)
    text = f"Rounding to the stored dtype explains {whole.replace('<', 'less than')} of the update’s norm"
    if len(known) > 1 and most != whole:
        text += f" overall and at most {most.replace('<', 'less than')} in one matrix"
    if not noisy:
        return f"{text}, and {'it is not' if subject.one else 'no matrix is'} mostly rounding"
    if subject.one:
        return f"{text}: it is mostly rounding, and its ranks describe the rounding"
    verb = "is" if len(noisy) == 1 else "are"
    return (
        f"{text}, and {len(noisy)} of {counted(len(known), 'matrix', 'matrices')} {verb} mostly rounding "
        f"({listed(noisy)}), where ranks describe the rounding"
    )


def _completeness(subject: _Subject) -> str:
    cut = [r for r in subject.rows if r.truncated]
    if subject.one:
        return "its spectrum is truncated, with certified bounds" if cut else "its spectrum is complete"
    if not cut:
        return f"all {counted(len(subject.rows), 'spectrum', 'spectra')} are complete"
    if len(cut) == len(subject.rows):
        return f"all {counted(len(cut), 'spectrum', 'spectra')} are truncated, each number given with certified bounds"
    verb = "is" if len(cut) == 1 else "are"
    return (
        f"{len(subject.rows) - len(cut)} spectra are complete and {len(cut)} {verb} truncated, with certified bounds "
        f"({listed([r.name for r in cut], most=2)})"
    )


def _nothing_matched(rows: Sequence[TensorRow]) -> Verdict:
    odd = sum(r.status == "shape_mismatch" for r in rows)
    shapes = f" ({counted(odd, 'name')} matched, but not in shape)" if odd else ""
    return (
        f"None of {counted(len(rows), 'tensor')} could be matched between the two checkpoints{shapes}, so no change "
        "was measured.",
        "There is no update whose directions could be counted.",
        "The table lists every unmatched tensor: most likely these are two different architectures, or names that "
        "differ by more than a prefix.",
    )


def _all_unchanged(compared: Sequence[TensorRow]) -> Verdict:
    same = counted(len(compared), "tensor")
    rounded = [r for r in compared if r.numbers["quantization_frobenius"] > 0]
    if rounded:
        return (
            f"The tuned weights are the base's, quantized: {counted(len(rounded), 'matrix', 'matrices')} of {same} "
            "differ by that, and nothing was trained beside it.",
            "There is no update, and so no direction to count.",
            "This is exact: entries were compared with what quantizing makes of the base's, without a threshold.",
        )
    return (
        f"The two checkpoints hold the same weights: {same} compared, none differs in any entry.",
        "There is no update, and so no direction to count.",
        "This is exact: entries were compared as stored, without a threshold.",
    )


def _no_matrix(moved: Sequence[TensorRow], broken: Sequence[TensorRow]) -> Verdict:
    if moved:
        first = (
            f"No matrix with a spectrum changed; {counted(len(moved), 'other tensor')} did, together by "
            f"{percent(pooled(moved))} of their norm (‖Δ‖/‖W‖, Frobenius): {listed([r.name for r in moved])}."
        )
    else:
        first = "No change could be measured."
    second = "There is no matrix update whose directions could be counted."
    if broken:
        names = listed([r.name for r in broken])
        return (
            first,
            second,
            f"{counted(len(broken), 'tensor')} could not be analysed ({names}): the reasons are below.",
        )
    return first, second, "Norms of vectors are exact to the rounding of float64."
