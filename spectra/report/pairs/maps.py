"""Layer × role maps of one pair of updates: shared directions, captured share, cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from spectra.pairwise.pooled import PooledPair, capture_told
from spectra.pairwise.ranks import RANKS
from spectra.pairwise.rows import MatrixRow
from spectra.report.pairs.verdict import cosine_text, name
from spectra.report.tables import Cell, HeatMap, layer_role_map, together
from spectra.report.text import percent


def heat_maps(rows: Sequence[MatrixRow], pair: PooledPair, labels: Sequence[str]) -> tuple[HeatMap, ...]:
    """Return the maps of one pair.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row of the geometry.
    pair : PooledPair
        The two updates.
    labels : sequence of str
        Names of all updates.
    """
    held = [r for r in rows if r.analysed and (pair.a, pair.b) in r.pairs]
    a, b = (name(labels[i]) for i in (pair.a, pair.b))
    suffix = f"{pair.a}-{pair.b}"
    maps = []
    if pair.rank:
        maps.append(
            layer_role_map(
                held,
                f"shared-{suffix}",
                "Shared directions",
                f"overlap of the leading {pair.rank}, above chance",
                f"Of the leading {pair.rank} output directions of {a} and {b}, the share they have in common above "
                "chance: 0 for random ones, 100 for the same (colour and first number). The small number is the same "
                "of the input directions.",
                _shared_cell(pair),
                from_zero=True,
            )
        )
    if pair.captured["a_in_b"].known:
        maps.append(
            layer_role_map(
                held,
                f"captured-{suffix}",
                f"What {b} holds of {a}",
                "captured share of the squared norm",
                f"Share of the squared norm of {a} inside the leading row and column directions of {b} (colour and "
                "first number). The small number is the best that as many directions could hold.",
                _captured_cell(pair),
                from_zero=True,
            )
        )
    maps.append(
        layer_role_map(
            held,
            f"cosine-{suffix}",
            "Cosine",
            "cosine, in standard deviations of random updates",
            f"Cosine of {a} and {b}, in standard deviations of that of two random updates (colour and first number); "
            "the small number is the cosine itself.",
            _cosine_cell(pair),
            kind="number",
        )
    )
    return tuple(maps)


_Maker = Callable[[Sequence[MatrixRow]], Cell]


def _shared_cell(pair: PooledPair) -> _Maker:
    place = RANKS.index(pair.rank)

    def cell(rows: Sequence[MatrixRow]) -> Cell:
        row = _largest(rows, pair)
        left, right = (float(row.above_chance(row.pairs[pair.a, pair.b], s)[place, place]) for s in ("left", "right"))
        raw = row.pairs[pair.a, pair.b].left.overlap[place, place]
        spoken = (
            f"{percent(max(left, 0.0))} of the leading {pair.rank} output directions shared above chance "
            f"(overlap {percent(raw)}), {percent(max(right, 0.0))} of the input directions{together(rows)}"
        )
        return Cell(max(left, 0.0), _hundred(left), _hundred(right), spoken, row.position)

    return cell


def _captured_cell(pair: PooledPair) -> _Maker:
    def cell(rows: Sequence[MatrixRow]) -> Cell:
        row = _largest(rows, pair)
        caught, net = row.updates[pair.a], row.updates[pair.b]
        rank, share = capture_told("a_in_b", row.pairs[pair.a, pair.b], caught, net)
        best = caught.optimum_at(rank)
        spoken = f"{percent(share)} of the squared norm at rank {rank}, best {percent(best)}{together(rows)}"
        return Cell(share, _hundred(share), _hundred(best), spoken, row.position)

    return cell


def _cosine_cell(pair: PooledPair) -> _Maker:
    def cell(rows: Sequence[MatrixRow]) -> Cell:
        row = _largest(rows, pair)
        held = row.pairs[pair.a, pair.b]
        spoken = f"cosine {cosine_text(held.cosine)}, {held.deviations:.1f} standard deviations{together(rows)}"
        text = "–" if math.isnan(held.deviations) else f"{held.deviations:.0f}"
        return Cell(held.deviations, text, f"{held.cosine:.2f}", spoken, row.position)

    return cell


def _largest(rows: Sequence[MatrixRow], pair: PooledPair) -> MatrixRow:
    """The matrix of a cell that the two updates moved most: what the cell shows and opens."""
    return max(rows, key=lambda r: r.updates[pair.a].relative * r.updates[pair.b].relative)


def _hundred(share: float) -> str:
    """A share in per cent without the sign, as it stands in a cell under a title that says so."""
    return "–" if math.isnan(share) else f"{100 * max(share, 0.0):.0f}"
