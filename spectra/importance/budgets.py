"""How many triplets may stay after each step of a training, and which: budget schedules, and the best of all matrices.

Over T steps the budget goes from b_0 to b_T between a warm-up of t_i steps and a final stretch of t_f. With x the share
of the way that is done, x = (t − t_i)/(T − t_i − t_f), what is left above b_T is (b_0 − b_T) times

=========  =============  ==========================================================================================
cubic      (1 − x)³       Zhang et al. [1]_, eq. 12, after Zhu and Gupta [2]_, eq. 1
linear     1 − x          [2]_, eq. 1 with exponent 1
step       0              trained, pruned once behind the warm-up, trained on, as by Han et al. [3]_
none       1              never pruned: b_0 stays to the end, as in LoRA; b_T plays no part
=========  =============  ==========================================================================================

References
----------
.. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
.. [2] M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
.. [3] S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from spectra.errors import UsageError

SHAPES: dict[str, Callable[[float], float]] = {
    "cubic": lambda left: left**3,
    "linear": lambda left: left,
    "step": lambda left: 0.0,
    "none": lambda left: 1.0,
}
"""Share of b_0 − b_T that stays above b_T, by the share of the way that is left, 1 − x."""


class Stretches(NamedTuple):
    """Steps of a budget's three stretches: warm-up and final stretch, and steps from one pruning to the next."""

    warmup: int
    final: int
    interval: int


def stretches(total: int, *, warmup: float = 0.1, final: float = 0.5, interval: float = 0.002) -> Stretches:
    """The stretches of a training from their shares of all its steps.

    Parameters
    ----------
    total : int
        Steps in all. A training of two steps or more reaches the last budget.
    warmup, final, interval : float
        Shares: before pruning begins, with the last budget, and from one pruning to the next (a step at least).

    Raises
    ------
    UsageError
        If the shares leave no step to prune in.

    Examples
    --------
    >>> stretches(200)
    Stretches(warmup=20, final=100, interval=1)
    """
    if min(warmup, final, interval) < 0 or warmup + final >= 1.0:
        raise UsageError(
            f"warmup = {warmup} and final = {final} are shares of all steps that leave some to prune in, and "
            f"interval = {interval} is not negative"
        )
    before = min(round(warmup * total), max(0, total - 2))
    behind = min(max(1, round(final * total)), max(0, total - 1 - before))
    return Stretches(before, behind, max(1, round(interval * total)))


def budget(step: int, *, total: int, warmup: int, final: int, start: int, end: int, shape: str = "cubic") -> int:
    """How many triplets may stay after a step: b_T + (b_0 − b_T)(1 − (t − t_i)/(T − t_i − t_f))³ ([1]_, eq. 12).

    The paper prints t − t_i − t_f in the numerator, which would exceed b_0 at t_i; this is the form that is continuous
    at both ends. A fraction of a triplet is dropped.

    Parameters
    ----------
    step : int
        t, from 0.
    total : int
        T, the number of steps.
    warmup, final : int
        t_i and t_f: steps at the start with everything, and at the end with the last budget.
    start, end : int
        b_0 and b_T, over all matrices together.
    shape : {"cubic", "linear", "step", "none"}
        The way from one to the other, as the module's table says.

    Returns
    -------
    int

    Raises
    ------
    UsageError
        If warm-up and end leave no step between them, the budget would grow, or no shape is called so.

    Examples
    --------
    >>> [budget(t, total=100, warmup=10, final=50, start=12, end=4) for t in (0, 10, 20, 30, 50, 99)]
    [12, 12, 7, 5, 4, 4]
    >>> [budget(t, total=100, warmup=10, final=50, start=12, end=4, shape="linear") for t in (0, 10, 20, 30, 50)]
    [12, 12, 10, 8, 4]
    """
    if warmup < 0 or final < 0 or warmup + final >= total:
        raise UsageError(f"{total} steps leave none between a warm-up of {warmup} and a final stretch of {final}")
    if not 0 <= end <= start:
        raise UsageError(f"a budget shrinks: it cannot go from {start} triplets to {end}")
    if shape not in SHAPES:
        raise UsageError(f"no budget's schedule is called {shape!r}; there are {', '.join(SHAPES)}")
    if step <= warmup or shape == "none":
        return start
    if step >= total - final:
        return end
    left = 1.0 - (step - warmup) / (total - warmup - final)
    return int(end + (start - end) * SHAPES[shape](left))


def keep_best(scores: Sequence[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """Which triplets stay: the best over all matrices together, exactly as many as the budget says.

    Of equal scores the earlier stays, so that ties neither empty the budget nor overrun it.

    Parameters
    ----------
    scores : sequence of Tensor of shape (r_k,)
        One tensor a matrix.
    kept : int
        The budget; at or above the number of triplets all of them stay.

    Returns
    -------
    list of bool Tensor of shape (r_k,)
        True where a triplet stays, on its scores' device.

    Examples
    --------
    >>> keep_best([torch.tensor([0.1, 0.9]), torch.tensor([0.5])], 2)
    [tensor([False,  True]), tensor([True])]
    """
    everything = torch.cat([score.detach().reshape(-1).to("cpu", torch.float64) for score in scores])
    best = torch.argsort(everything, descending=True, stable=True)[: max(0, kept)]
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[best] = True
    parts = torch.split(mask, [score.numel() for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]
