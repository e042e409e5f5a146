"""Importance of rank-one triplets, and the budget that keeps the best of them: AdaLoRA's arithmetic as pure functions.

An update PΛQ of rank r is a sum of r triplets (P_i, λ_i, Q_i): a column of P (out, r), a value, a row of Q (r, in).
Every entry of every triplet is scored from |w·∇w|, smoothed over steps; a triplet's score collects its entries'; a
budget that shrinks over training says how many triplets stay, over all matrices together (Zhang et al. [1]_).

References
----------
.. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectra.errors import UsageError


class Smoothed(NamedTuple):
    """Sensitivity of a tensor's entries, smoothed over steps, and how far single steps stray from it.

    Attributes
    ----------
    sensitivity : Tensor
        Ī, the exponential average of |w·∇w|.
    uncertainty : Tensor
        Ū, the exponential average of |I − Ī|.
    """

    sensitivity: torch.Tensor
    uncertainty: torch.Tensor


def sensitivity(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w·∇w|: the first-order change of the loss where an entry is set to zero ([1]_, eq. 8).

    Both must be of one moment: the gradient at the weights it was taken at, before an optimizer moves them.

    Examples
    --------
    >>> sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5]))
    tensor([6.0000, 0.5000])
    """
    return (weight.detach() * gradient.detach()).abs()


def smooth(previous: Smoothed | None, now: torch.Tensor, *, beta1: float = 0.85, beta2: float = 0.85) -> Smoothed:
    """Averages after one more step ([1]_, eq. 9 and 10); both begin at zero.

    Parameters
    ----------
    previous : Smoothed or None
        Averages so far; None at the first step.
    now : Tensor
        Sensitivity I of this step.
    beta1, beta2 : float
        Weights of the past in Ī and in Ū; each in (0, 1).

    Returns
    -------
    Smoothed
        Ī ← β₁Ī + (1−β₁)I, then Ū ← β₂Ū + (1−β₂)|I − Ī| with the new Ī.

    Raises
    ------
    UsageError
        If a weight is outside (0, 1).

    Examples
    --------
    >>> smooth(None, torch.tensor([1.0]), beta1=0.5, beta2=0.5)
    Smoothed(sensitivity=tensor([0.5000]), uncertainty=tensor([0.2500]))
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 < beta < 1.0:
            raise UsageError(f"{name} weighs the past and lies in (0, 1), not {beta}")
    zero = torch.zeros_like(now)
    before = previous or Smoothed(zero, zero)
    mean = beta1 * before.sensitivity + (1.0 - beta1) * now
    return Smoothed(mean, beta2 * before.uncertainty + (1.0 - beta2) * (now - mean).abs())


def entry_scores(smoothed: Smoothed) -> torch.Tensor:
    """Scores s = Ī·Ū of every entry ([1]_, eq. 11)."""
    return smoothed.sensitivity * smoothed.uncertainty


def triplet_scores(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) ([1]_, eq. 7).

    Parameters
    ----------
    left : Tensor of shape (out, r)
        Scores of P's entries.
    values : Tensor of shape (r,) or (r, 1)
        Scores of Λ's.
    right : Tensor of shape (r, in)
        Scores of Q's.

    Returns
    -------
    Tensor of shape (r,)

    Examples
    --------
    >>> triplet_scores(torch.tensor([[1.0], [3.0]]), torch.tensor([10.0]), torch.tensor([[5.0, 7.0]]))
    tensor([18.])
    """
    return values.reshape(-1) + left.mean(dim=0) + right.mean(dim=1)


def magnitude_scores(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """|λ_i|·(‖P_i‖ + ‖Q_i‖)/2, from the parameters alone: no gradient, no history.

    For orthonormal P and Q it is |λ_i|, which Zhang et al. [1]_ tried beside the sensitivity and found weaker.

    Parameters
    ----------
    left, values, right : Tensor of shape (out, r), (r,) or (r, 1), (r, in)
        P, λ and Q.

    Returns
    -------
    Tensor of shape (r,)

    Examples
    --------
    >>> magnitude_scores(torch.eye(3, 2), torch.tensor([-2.0, 0.5]), torch.eye(2, 4))
    tensor([2.0000, 0.5000])
    """
    lengths: torch.Tensor = torch.linalg.vector_norm(left.detach(), dim=0) + torch.linalg.vector_norm(
        right.detach(), dim=1
    )
    return values.detach().reshape(-1).abs() * lengths / 2


def budget(step: int, *, total: int, warmup: int, final: int, start: int, end: int) -> int:
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

    Returns
    -------
    int

    Raises
    ------
    UsageError
        If warm-up and end leave no step between them, or the budget would grow.

    Examples
    --------
    >>> [budget(t, total=100, warmup=10, final=50, start=12, end=4) for t in (0, 10, 20, 30, 50, 99)]
    [12, 12, 7, 5, 4, 4]
    """
    if warmup < 0 or final < 0 or warmup + final >= total:
        raise UsageError(f"{total} steps leave none between a warm-up of {warmup} and a final stretch of {final}")
    if not 0 <= end <= start:
        raise UsageError(f"a budget shrinks: it cannot go from {start} triplets to {end}")
    if step <= warmup:
        return start
    if step >= total - final:
        return end
    left = 1.0 - (step - warmup) / (total - warmup - final)
    return int(end + (start - end) * left**3)


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
