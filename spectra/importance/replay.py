"""`replay`: which directions a budget would have kept, step by step, by any score and schedule, on a recorded training.

It is what the rule would have kept *on this trajectory*. The training went on under its own rule: a direction that the
replay drops was trained on all the same, and one that the training had pruned scores what it scored pruned. Under the
score and schedule that an AdaLoRA training had itself, the replay keeps what the training kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.errors import UsageError
from spectra.importance.budgets import Stretches, budget, keep_best, stretches
from spectra.importance.rank_map import RankMap
from spectra.importance.recorded import Recorded


def replay(
    recorded: Recorded,
    *,
    score: str = "adalora",
    kept: int,
    schedule: Stretches | None = None,
    shape: str = "cubic",
) -> RankMap:
    """Keep the best directions under a budget over a recorded training, as algorithm 1 of AdaLoRA [1]_ does.

    Past the warm-up, at every interval, the best directions over all matrices together stay, as many as the budget of
    that step says; one that was dropped may come back. When the final stretch begins the choice is made for good, from
    the scores of the step before it. Where not every step was recorded, the last scores before a step count.

    Parameters
    ----------
    recorded : Recorded
        Of a training that has directions.
    score : str
        A key of `SCORES`.
    kept : int
        b_T, directions in all matrices together at the end; b_0 is all of them.
    schedule : Stretches, optional
        Steps of the warm-up, of the final stretch and from one choice to the next; by default the training's own where
        it had one, `stretches` of its steps otherwise.
    shape : {"cubic", "linear", "step", "none"}
        As `budget`.

    Returns
    -------
    RankMap

    Raises
    ------
    UsageError
        If a name is unknown, the score is not defined for this training, or the budget is out of range.

    References
    ----------
    .. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
    """
    scores = recorded.directions(score)
    counts = [entry.rows for entry in recorded.matrices]
    start, total = sum(counts), recorded.total
    if not 1 <= kept <= start:
        raise UsageError(f"a budget of {kept} directions: the training has {start}, and one at least is to be kept")
    schedule = own_stretches(recorded) if schedule is None else schedule
    table = np.concatenate(list(scores.values()), axis=1)  # (steps, directions of all matrices)
    kept_over_time = _over_time(recorded.steps, table, start, kept, total, schedule, shape)  # (steps, directions)
    parts = np.split(kept_over_time, np.cumsum(counts)[:-1], axis=1)
    return RankMap(
        modules=tuple(scores),
        shapes=tuple((entry.shape[0], entry.shape[1]) for entry in recorded.matrices),
        steps=recorded.steps,
        ranks=np.stack([part.sum(axis=1) for part in parts], axis=1).astype(np.int64),
        kept=tuple(part[-1] for part in parts),
        rule={
            "score": score,
            "schedule": shape,
            "warmup": schedule.warmup,
            "final": schedule.final,
            "interval": schedule.interval,
            "budget": kept,
            "start": start,
            "total": total,
            "method": recorded.info["method"],
        },
    )


def own_stretches(recorded: Recorded) -> Stretches:
    """The schedule that a recorded training had itself, or `stretches` of its steps."""
    info = recorded.info
    if "warmup" in info:
        return Stretches(int(info["warmup"]), int(info["final"]), int(info["interval"]))
    return stretches(recorded.total)


def _over_time(
    steps: NDArray[np.int64],
    table: NDArray[np.float32],
    start: int,
    end: int,
    total: int,
    schedule: Stretches,
    shape: str,
) -> NDArray[np.bool_]:
    """What is kept after each recorded step, (steps, directions)."""
    warmup, final, interval = schedule
    if interval < 1:
        raise UsageError(f"an interval of {interval} steps from one choice to the next: one at least")
    chosen = np.ones(table.shape[1], dtype=bool)
    settled, rows = False, []
    for row, number in enumerate(steps):
        before = 0 if row == 0 else int(steps[row - 1])
        for step in range(before, int(number)):  # from 0, as the schedule counts: the last of them is this row's own
            settling = not settled and step >= total - final
            if not (settling or (not settled and step > warmup and step % interval == 0)):
                continue
            # This row's scores are of step number − 1. The final choice looks at those of the step before it.
            own = step == number - 1 and not (settling and row > 0)
            if own or row > 0:
                now = budget(step, total=total, warmup=warmup, final=final, start=start, end=end, shape=shape)
                best = keep_best([torch.from_numpy(table[row if own else row - 1])], now)
                chosen = best[0].numpy()
                settled = settled or settling
        rows.append(chosen)
    return np.stack(rows) if rows else np.ones((0, table.shape[1]), dtype=bool)
