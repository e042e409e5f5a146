"""The verdict on two updates: what one found of the other, whether they agree, where, and what is new in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spectra.pairwise.pooled import PooledPair, PooledUpdate
from spectra.pairwise.ranks import EPSILON, TOP
from spectra.pairwise.rows import EPSILONS, MatrixRow
from spectra.report.text import counted, elide, listed, number, percent, significant, visible, whole_percent

# A cosine within three standard deviations of zero is what two random updates give once in 370 times or more.
CHANCE = 3.0
ALIKE = 1.05  # two sizes with a lesser ratio are called about the same
NAME = 32  # columns of an update's name in a sentence


def verdict(
    rows: Sequence[MatrixRow], updates: Sequence[PooledUpdate], pairs: Sequence[PooledPair]
) -> tuple[tuple[str, str], ...]:
    """Say in four sentences what a geometry found, each with what it is about.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row of the geometry.
    updates : sequence of PooledUpdate
        All of them.
    pairs : sequence of PooledPair
        Every two that change a matrix together.

    Returns
    -------
    tuple of (str, str)
        What the sentence is about, and the sentence.
    """
    if not pairs:
        return (("Nothing to compare", _nothing(rows)),)
    names = [name(u.label) for u in updates]
    found = [
        ("What one found of the other", _captured(pairs, names)),
        ("The same way?", _direction(pairs, updates, names)),
        ("Shared directions", _shared(pairs, names)),
        ("New directions", _intruders(updates, names)),
    ]
    return tuple(found)


def name(label: str) -> str:
    """Return an update's name as it stands in a sentence.

    Parameters
    ----------
    label : str
        As `Geometry.labels` has it.
    """
    return elide(visible(label), NAME)


def deviations(pair: PooledPair) -> str:
    """Say how far a cosine stands from that of random updates.

    Parameters
    ----------
    pair : PooledPair
        Two updates.
    """
    count = pair.deviations
    if not math.isfinite(count):
        return "random updates unknown"
    if abs(count) < CHANCE:
        return "within what random updates give"
    side = "above" if count > 0 else "below"
    return (
        f"{number(round(abs(count)) if abs(count) >= 10 else abs(count), 2)} standard deviations {side} random updates"
    )


def cosine_text(cosine: float) -> str:
    """Return a cosine with two significant digits, and four decimals at most.

    Parameters
    ----------
    cosine : float
        NaN gives a dash.

    Examples
    --------
    >>> cosine_text(0.6123), cosine_text(0.0123), cosine_text(-0.00004)
    ('0.61', '0.012', '0')
    """
    if math.isnan(cosine):
        return "–"
    return significant(float(f"{cosine:.2g}"), 2) if abs(cosine) >= 1e-3 else f"{round(cosine, 4) + 0.0:g}"


def _captured(pairs: Sequence[PooledPair], names: Sequence[str]) -> str:
    ways = [(pair, way) for pair in pairs for way in ("a_in_b", "b_in_a") if pair.captured[way].known]
    if not ways:
        return "No captured share is known: no update has a spectrum with its directions."
    if len(pairs) == 1:
        said = [_caught(pair, way, names) for pair, way in ways]
        return said[0][0].upper() + said[0][1:] + (f"; the other way round, {said[1]}" if len(said) > 1 else "") + "."
    # An order among pairs of different ranks: what is held, of what could be.
    order = sorted(ways, key=lambda held: -_of_best(*held))
    return f"Most was found where {_caught(*order[0], names)}; least where {_caught(*order[-1], names)}."


def _caught(pair: PooledPair, way: str, names: Sequence[str]) -> str:
    caught, net = (pair.a, pair.b) if way == "a_in_b" else (pair.b, pair.a)
    held = pair.captured[way]
    low, high = held.ranks
    many = f"{low}" if low == high else f"{low} to {high}"
    verb = "holds" if high == 1 else "hold"
    return (
        f"the {many} leading direction{'' if high == 1 else 's'} of {names[net]} {verb} {percent(held.share)} of the "
        f"squared norm of {names[caught]}, where the best {many} would hold {percent(held.best)} and random ones "
        f"{percent(held.random)}"
    )


def _of_best(pair: PooledPair, way: str) -> float:
    held = pair.captured[way]
    return held.share / held.best if held.best > 0 else 0.0


def _direction(pairs: Sequence[PooledPair], updates: Sequence[PooledUpdate], names: Sequence[str]) -> str:
    if len(pairs) == 1:
        pair = pairs[0]
        return f"{_pointing(pair)}: {_cosine(pair)}, and {_sizes(pair, names)}."
    order = sorted(pairs, key=lambda pair: -pair.cosine)
    first, last = order[0], order[-1]
    return (
        f"Closest in direction are {_two(first, names)} ({_cosine(first)}), farthest apart {_two(last, names)} "
        f"({_cosine(last)}); {_widest([u for u in updates if u.matrices], names)}."
    )


def _pointing(pair: PooledPair) -> str:
    if not abs(pair.deviations) >= CHANCE:
        return "The two updates point no more the same way than random ones"
    if pair.cosine < 0:
        return "The two updates point against each other"
    part = "nearly" if pair.cosine >= 0.9 else "largely" if pair.cosine >= 0.5 else "partly" if pair.cosine >= 0.1 else "hardly"  # fmt: skip # noqa: E501
    return f"The two updates point {part} the same way"


def _cosine(pair: PooledPair) -> str:
    return f"cosine {cosine_text(pair.cosine)}, {deviations(pair)}"


def _sizes(pair: PooledPair, names: Sequence[str]) -> str:
    sizes = [percent(share) for share in pair.relative]
    if not all(share > 0 for share in pair.relative):
        return f"{names[pair.a]} moved the matrices by {sizes[0]} and {names[pair.b]} by {sizes[1]} of their norm"
    far, near = sorted((0, 1), key=lambda i: -pair.relative[i])
    places = (pair.a, pair.b)
    times = pair.relative[far] / pair.relative[near]
    if times < ALIKE:
        return f"both moved the weights about as far ({sizes[0]} and {sizes[1]} of their norm)"
    return (
        f"{names[places[far]]} moved the weights {number(times, 2)} times as far as {names[places[near]]} "
        f"({sizes[far]} of their norm against {sizes[near]})"
    )


def _widest(updates: Sequence[PooledUpdate], names: Sequence[str]) -> str:
    far, near = max(updates, key=lambda u: u.relative), min(updates, key=lambda u: u.relative)
    if not far.relative >= ALIKE * near.relative:
        return f"all moved the weights about as far ({percent(near.relative)} to {percent(far.relative)} of their norm)"
    return (
        f"{names[far.position]} moved the weights most, by {percent(far.relative)} of their norm, and "
        f"{names[near.position]} least, by {percent(near.relative)}"
    )


def _two(pair: PooledPair, names: Sequence[str]) -> str:
    return f"{names[pair.a]} and {names[pair.b]}"


def _shared(pairs: Sequence[PooledPair], names: Sequence[str]) -> str:
    known = [pair for pair in pairs if pair.rank]
    if not known:
        return "No shared directions are known: no update has a spectrum with its directions."
    if len(pairs) == 1:
        pair = pairs[0]
        return f"{_counted_shares(pair, 'Of their ' + counted(pair.rank, 'leading direction'))}; {_resolution(pair)}."
    order = sorted(known, key=lambda pair: -pair.agreement)
    first, last = order[0], order[-1]
    return (
        f"{_counted_shares(first, f'Of the leading {first.rank} directions of {_two(first, names)}')}; "
        f"of those of {_two(last, names)}, {' and '.join(_shares(last))}; {_resolutions(known)}."
    )


def _counted_shares(pair: PooledPair, start: str) -> str:
    left, right = _shares(pair)
    random = [_directions(pair.rank * pair.chance[side]) for side in ("left", "right")]
    chance = random[0] if random[0] == random[1] else f"{random[0]} and {random[1]}"
    above = [whole_percent(pair.shared_above(side)) for side in ("left", "right")]
    both = above[0] if above[0] == above[1] else f"{above[0][:-2]} and {above[1]}"  # without hard space and sign
    middle = "the median matrix shares" if pair.counted > 1 else "the one matrix shares"
    return (
        f"{start}, {middle} {left} on the output side and {right} on the input side, where random ones would share "
        f"{chance} (above chance: {both})"
    )


def _shares(pair: PooledPair) -> tuple[str, str]:
    left, right = (_directions(pair.rank * pair.shared(side)) for side in ("left", "right"))
    return left, right


def _directions(count: float) -> str:
    return "none" if count == 0 else number(float(f"{count:.2g}"), 2)


def _resolution(pair: PooledPair) -> str:
    if pair.counted == 1:
        if pair.resolved_matrices:
            return "storage rounding leaves their subspaces resolved in both updates"
        return "storage rounding or a small gap does not resolve their subspaces, so the overlap is uncertain"
    where = "every matrix" if pair.resolved_matrices == pair.counted else f"{pair.resolved_matrices} of {counted(pair.counted, 'matrix', 'matrices')}"  # fmt: skip # noqa: E501
    if pair.resolved_matrices:
        return f"those subspaces are resolved in both updates (turned by less than 30° by rounding) in {where}"
    return "in no matrix are those subspaces resolved in both updates, so rounding may have turned them"


def _resolutions(pairs: Sequence[PooledPair]) -> str:
    held, whole = sum(p.resolved_matrices for p in pairs), sum(p.counted for p in pairs)
    share = "all" if held == whole else f"{held} of"
    return (
        f"both subspaces are resolved (turned by less than 30° by rounding) in {share} {counted(whole, 'comparison')}"
    )


def _intruders(updates: Sequence[PooledUpdate], names: Sequence[str]) -> str:
    place = EPSILONS.index(EPSILON)
    known = [u for u in updates if u.intruders]
    if not known:
        return (
            "New directions were not looked for: the base is decomposed for that where its smaller side is at most "
            "2048, or with --exact."
        )
    said = [
        f"{counted(u.count(EPSILON), 'direction')} of {u.directions} in {names[u.position]}"
        for u in known
        if u.count(EPSILON)
    ]
    clean = [names[u.position] for u in known if not u.count(EPSILON)]
    said += [f"none in {_listing(clean)}"] if clean else []
    chance = min(u.chance[place] * u.matched / u.directions for u in known)
    random = (
        "nearly every random direction would" if chance > 0.99 else f"of random ones {whole_percent(chance)} would"
    )  # fmt: skip
    return (
        f"Of the {TOP} leading directions of each tuned matrix, {_listing(said)} resemble no direction of the base "
        f"(intruders, |cos| below {EPSILON:g}), where {random}; {determined(known, names)}."
    )


def determined(updates: Sequence[PooledUpdate], names: Sequence[str]) -> str:
    """Say how many of the leading directions of the tuned matrices are directions at all.

    Parameters
    ----------
    updates : sequence of PooledUpdate
        Those whose directions were looked for in the base.
    names : sequence of str
        Of all updates, as they stand in a sentence.
    """
    if all(u.clear == u.directions for u in updates):
        return "all those directions are resolved"
    told = [f"{u.clear} of {u.directions} in {names[u.position]}" for u in updates]
    return f"of those directions {_listing(told)} are resolved, and the rest may stand for others beside them"


def _listing(said: Sequence[str]) -> str:
    return said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]


def _nothing(rows: Sequence[MatrixRow]) -> str:
    broken = [r.name for r in rows if r.failed]
    if broken:
        return (
            f"No matrix could be compared: {counted(len(broken), 'tensor')} could not be analysed ({listed(broken)})."
        )
    return "No matrix is changed by two of these updates, so there is nothing to compare."
