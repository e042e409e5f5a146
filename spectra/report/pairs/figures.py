"""The figures of a report on two or more updates: captured shares, shared directions, new directions, spectra."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.pairwise.pooled import Captured, PooledPair
from spectra.pairwise.ranks import RANKS, TOP
from spectra.pairwise.rows import EPSILONS, SIDES, MatrixRow
from spectra.plot import DASHES, SERIES, plot_capture, plot_intruders, plot_overlap, tidy
from spectra.report.drawing import FAINT, Drawing, drawing_style, evenly_at, finished, heat_map_drawing
from spectra.report.pairs.build import PairsData
from spectra.report.pairs.verdict import determined, name
from spectra.report.text import counted, elide, visible

PANELS = 6  # roles drawn; the caption counts them
DECADES = 4  # that the axis of the spectra spans at most
PAIRS = 15  # pairs drawn, six updates' worth; the numbers of further ones are in the tables
SIDE_NAMES = {"left": "output side (left)", "right": "input side (right)"}


def draw_figures(data: PairsData) -> tuple[Drawing, ...]:
    """Draw the figures of a report on two or more updates; none without a pair.

    Parameters
    ----------
    data : PairsData
        Content of the report.

    Returns
    -------
    tuple of Drawing
        For every pair ``captured``, ``overlap`` and its maps, for all updates ``intruders`` and ``spectra``. The bytes
        depend on the data and the version of matplotlib alone.
    """
    if not data.pairs:
        return ()
    names = [name(label) for label in data.labels]
    with drawing_style():
        drawings = []
        for pair in data.pairs[:PAIRS]:
            if any(held.known for held in pair.captured.values()):
                drawings.append(_captured(pair, names))
            if pair.rank:
                drawings.append(_overlap(pair, names))
            drawings += [heat_map_drawing(heat_map) for heat_map in data.maps[pair.a, pair.b]]
        if any(update.intruders for update in data.updates):
            drawings.append(_intruders(data, names))
        roles = _main_roles(data.rows)
        if roles:
            drawings.append(_spectra(roles, names))
    return tuple(drawings)


def _captured(pair: PooledPair, names: Sequence[str]) -> Drawing:
    a, b = names[pair.a], names[pair.b]
    figure = Figure(figsize=(7.0, 3.3), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for ax, way, (caught, net), color in zip(panels, pair.captured, ((a, b), (b, a)), SERIES, strict=False):
        held = pair.captured[way]
        _capture_panel(ax, held, color)
        ax.set_title(f"{caught} inside {net}", loc="left")
        ax.set_xlabel(f"leading r of {net}")
    panels[1].set_ylabel("")
    handles, told = panels[0].get_legend_handles_labels()
    figure.legend(handles, told, loc="outside upper left", ncols=len(told), frameon=False, handlelength=2.4)
    caption = (
        "Share of an update’s squared norm inside the leading r directions of the other, "
        f"{_over(pair)} pooled by energy. Dashed: the best that r directions could hold (Eckart–Young). Dotted: random "
        "directions. Thin: one side alone."
    )
    return finished(f"captured_curve-{pair.a}-{pair.b}", "What each holds of the other", caption, figure)


def _capture_panel(ax: Axes, held: Captured, color: str) -> None:
    at = [i for i, r in enumerate(RANKS) if r <= held.limit and math.isfinite(held.both[i])]
    ranks = [RANKS[i] for i in at]
    plot_capture(
        ax,
        ranks,
        held.both[at],
        optimum=held.optimum[at],
        chance=held.chance[at],
        label="both sides",
        color=color,
    )
    for side, dashes in zip(SIDES, (DASHES[2], DASHES[3]), strict=True):
        curve = getattr(held, side)[at]
        label = {"left": "output side alone", "right": "input side alone"}[side]
        ax.plot(ranks, curve, color=color, linewidth=0.8, linestyle=dashes, alpha=0.8, label=label)


def _overlap(pair: PooledPair, names: Sequence[str]) -> Drawing:
    figure = Figure(figsize=(7.0, 3.5), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    for ax, side in zip(panels, SIDES, strict=True):
        table = pair.above[side]
        rows, columns = (np.flatnonzero(np.isfinite(table).any(axis=axis)) for axis in (1, 0))
        plot_overlap(
            ax,
            np.clip(table[np.ix_(rows, columns)], 0.0, None),
            [RANKS[i] for i in rows],
            [RANKS[j] for j in columns],
            names=(elide(names[pair.a], 22), elide(names[pair.b], 22)),
            resolved=pair.resolved,
            bar=False,  # every cell says its number, and matplotlib draws a bar as a bitmap
        )
        ax.set_title(SIDE_NAMES[side], loc="left")
    panels[1].set_ylabel("")
    caption = (
        f"Overlap of the leading i directions of {names[pair.a]} with the leading j of {names[pair.b]}, above chance "
        "and in per cent: 0 for random directions, 100 where one subspace holds the other. Medians over "
        f"{_over(pair)}. Hatched: beyond what the median matrix resolves, where rounding may have turned the subspaces "
        "by 30° or more."
    )
    return finished(f"overlap-{pair.a}-{pair.b}", "Shared directions", caption, figure)


def _intruders(data: PairsData, names: Sequence[str]) -> Drawing:
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    ax = figure.subplots()
    known = [u for u in data.updates if u.intruders]
    for i, update in enumerate(known):
        place = update.position
        plot_intruders(
            ax,
            EPSILONS,
            update.intruders,
            chance=known[0].chance if i == len(known) - 1 else None,
            label=names[place],
            color=SERIES[place % len(SERIES)],
            linestyle=DASHES[place % len(DASHES)],
        )
    ax.legend(frameon=False, loc="center", handlelength=3)
    caption = (
        f"Of the {TOP} leading directions of a tuned matrix, how many stand below the threshold in |cos| to every "
        "direction of the base: the mean over matrices. Dotted: how many random directions would. In all matrices, "
        f"{determined(known, names)}."
    )
    return finished("intruders", "New directions", caption, figure)


def _main_roles(rows: Sequence[MatrixRow]) -> dict[str, list[MatrixRow]]:
    """The roles with most parameters among those with layers, in the order of the model; all roles if none has any."""
    held = [r for r in rows if r.analysed and any(u.values for u in r.updates)]
    layered = [r for r in held if r.layer is not None] or held
    members: dict[str, list[MatrixRow]] = {}
    for row in layered:
        members.setdefault(row.role, []).append(row)
    largest = sorted(members, key=lambda role: -sum(r.parameters for r in members[role]))[:PANELS]
    return {role: members[role] for role in members if role in largest}


def _spectra(roles: dict[str, list[MatrixRow]], names: Sequence[str]) -> Drawing:
    columns = min(3, len(roles))
    lines = math.ceil(len(roles) / columns)
    figure = Figure(figsize=(7.0, 0.6 + 2.1 * lines), layout="constrained")
    panels: list[Axes] = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for ax, (role, held) in zip(panels, roles.items(), strict=False):
        for place in range(len(names)):
            _spectrum_line(ax, held, place)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(elide(visible(role), 30), loc="left")
    for ax in panels[len(roles) :]:
        ax.set_visible(False)
    low, high = panels[0].get_ylim()
    bottom = max(low, high * 10.0**-DECADES)
    for ax in panels[: len(roles)]:
        ax.set_ylim(bottom, high)
        tidy(ax)
        ax.minorticks_off()
    figure.supxlabel("index i", fontsize=9)
    figure.supylabel("singular value σᵢ", fontsize=9)
    updates = [u for held in roles.values() for r in held for u in r.updates]
    _legend(figure, names, floor=any(u.storage_floor > bottom for u in updates))
    caption = (
        f"Singular values of the updates, medians over layers by role ({counted(len(roles), 'role')}); the band "
        "reaches from the least to the greatest layer. Dashed: storage rounding floor, where the axis reaches it; "
        "beneath it nothing can be told from rounding."
    )
    return finished("spectra", "Spectra of the updates", caption, figure)


def _spectrum_line(ax: Axes, held: Sequence[MatrixRow], place: int) -> None:
    mine = [r.updates[place] for r in held if r.updates[place].values]
    if not mine:
        return
    count = min(len(u.values) for u in mine)
    values = np.array([u.values[:count] for u in mine])
    at = [i for i in evenly_at(count, 40) if np.all(values[:, i] > 0)]
    index, color, dashes = np.array(at) + 1, SERIES[place % len(SERIES)], DASHES[place % len(DASHES)]
    marker = "o" if len(at) == 1 else ""
    ax.plot(index, np.median(values[:, at], axis=0), color=color, linewidth=1.3, linestyle=dashes, marker=marker)
    ax.fill_between(index, values[:, at].min(axis=0), values[:, at].max(axis=0), color=color, alpha=0.15, linewidth=0)
    floor = _median(u.storage_floor for u in mine)
    if floor > 0:
        ax.axhline(floor, color=color, linewidth=0.9, linestyle=(0, (5, 2)))


def _legend(figure: Figure, names: Sequence[str], *, floor: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SERIES[i % len(SERIES)], linestyle=cast("Any", DASHES[i % len(DASHES)]), label=label)
        for i, label in enumerate(names)
    ]
    if floor:
        handles.append(Line2D([], [], color=FAINT, linewidth=0.9, linestyle=(0, (5, 2)), label="storage floor"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), 4), frameon=False, handlelength=2.4
    )


def _over(pair: PooledPair) -> str:
    return counted(pair.matrices, "matrix", "matrices")


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan
