"""Importance of rank-one triplets from weights and gradients: AdaLoRA's arithmetic and what it is compared with.

An update PΛQ of rank r is a sum of r triplets (P_i, λ_i, Q_i): a column of P (out, r), a value, a row of Q (r, in).
Scores by entry, from |w·∇w| smoothed over steps, are collected into one a triplet (Zhang et al. [1]_, section 3.2); a
few look at the parameters alone. `SCORES` has all of them by name.

References
----------
.. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
.. [2] Y.-L. Sung, V. Nair and C. Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    before = previous or Smoothed(*(torch.zeros_like(now),) * 2)
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

    For orthonormal P and Q it is |λ_i|, as `value_scores`.

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


def value_scores(values: torch.Tensor) -> torch.Tensor:
    """|λ_i|, the magnitude that Zhang et al. [1]_ tried beside the sensitivity and found weaker.

    Parameters
    ----------
    values : Tensor of shape (r,) or (r, 1)
        λ.

    Returns
    -------
    Tensor of shape (r,)

    Examples
    --------
    >>> value_scores(torch.tensor([[-2.0], [0.5]]))
    tensor([2.0000, 0.5000])
    """
    return values.detach().reshape(-1).abs()


def norm_scores(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """‖P_i‖·|λ_i|·‖Q_i‖: the Frobenius norm of the triplet, which a matrix of rank one has as its singular value.

    Parameters
    ----------
    left, values, right : Tensor of shape (out, r), (r,) or (r, 1), (r, in)
        P, λ and Q.

    Returns
    -------
    Tensor of shape (r,)

    Examples
    --------
    >>> norm_scores(torch.tensor([[3.0], [4.0]]), torch.tensor([-2.0]), torch.tensor([[0.0, 1.0]]))
    tensor([10.])
    """
    lengths = torch.linalg.vector_norm(left.detach(), dim=0) * torch.linalg.vector_norm(right.detach(), dim=1)
    scores: torch.Tensor = value_scores(values) * lengths
    return scores


def fisher(previous: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Σ (∇w)² over the steps so far, the diagonal of the empirical Fisher information up to a factor ([2]_).

    The gradient is a batch's, not a text's: where texts' gradients cancel in a batch, their squares are not in it.

    Parameters
    ----------
    previous : Tensor or None
        The sum up to the step before; None at the first.
    gradient : Tensor
        Of this step.

    Examples
    --------
    >>> fisher(fisher(None, torch.tensor([2.0, 0.0])), torch.tensor([-1.0, 3.0]))
    tensor([5., 9.])
    """
    squares = gradient.detach().square()
    return squares if previous is None else previous + squares


class Factor(NamedTuple):
    """One parameter at one step, entry by entry; all of one shape.

    Attributes
    ----------
    weight : Tensor
        What the gradient was taken at.
    sensitivity : Tensor
        |w·∇w| of this step.
    smoothed : Smoothed
        Its averages up to this step.
    squares : Tensor
        Σ (∇w)² up to this step.
    """

    weight: torch.Tensor
    sensitivity: torch.Tensor
    smoothed: Smoothed
    squares: torch.Tensor


class Triplets(NamedTuple):
    """The triplets of one matrix at one step.

    Attributes
    ----------
    left, right : Factor
        P (out, r) and Q (r, in); of LoRA, B and A.
    values : Factor or None
        λ (r,) or (r, 1). None where there is none, as in LoRA: λ is the constant 1 then, and no entry is scored.
    """

    left: Factor
    values: Factor | None
    right: Factor


@dataclass(frozen=True)
class Score:
    """A way to say how important a direction is, or a whole tensor.

    Attributes
    ----------
    name : str
        Its key in `SCORES`.
    formula : str
        In the letters of this module.
    about : str
        What it is, in a few words.
    of_triplets : callable
        `Triplets` → Tensor of shape (r,), NaN where the score is not defined.
    of_tensor : callable
        `Factor` of a parameter that has no triplets → Tensor of shape (): the mean over its entries, or NaN.
    """

    name: str
    formula: str
    about: str
    of_triplets: Callable[[Triplets], torch.Tensor]
    of_tensor: Callable[[Factor], torch.Tensor]


def _by_entry(name: str, formula: str, about: str, entries: Callable[[Factor], torch.Tensor]) -> Score:
    """A score of entries, collected by equation (7), or averaged over a tensor."""

    def of_triplets(given: Triplets) -> torch.Tensor:
        left, right = entries(given.left), entries(given.right)
        values = left.new_zeros(left.shape[1]) if given.values is None else entries(given.values)
        return triplet_scores(left, values, right)

    return Score(name, formula, about, of_triplets, lambda factor: entries(factor).mean())


def _nowhere(factor: Factor) -> torch.Tensor:
    return factor.weight.new_full((), float("nan"))


def _values(given: Triplets) -> torch.Tensor:
    if given.values is not None:
        return given.values.weight
    return given.left.weight.new_ones(given.left.weight.shape[1])


def _value(given: Triplets) -> torch.Tensor:
    if given.values is None:
        return given.left.weight.new_full((given.left.weight.shape[1],), float("nan"))
    return value_scores(given.values.weight)


_ALL = (
    _by_entry(
        "adalora", "Ī·Ū", "AdaLoRA's: smoothed sensitivity times its uncertainty", lambda f: entry_scores(f.smoothed)
    ),
    _by_entry("sensitivity", "I = |w·∇w|", "change of the loss, to first order, of one step", lambda f: f.sensitivity),
    _by_entry("smoothed", "Ī", "sensitivity averaged over steps", lambda f: f.smoothed.sensitivity),
    _by_entry("uncertainty", "Ū", "how far single steps stray from that", lambda f: f.smoothed.uncertainty),
    _by_entry("fisher", "Σ (∇w)²", "squared gradients summed over steps", lambda f: f.squares),
    Score("value", "|λ|", "size of λ", _value, _nowhere),
    Score(
        "magnitude",
        "|λ|·(‖P‖+‖Q‖)/2",
        "size of λ by the mean length of its vectors",
        lambda t: magnitude_scores(t.left.weight, _values(t), t.right.weight),
        _nowhere,
    ),
    Score(
        "norm",
        "‖P‖·|λ|·‖Q‖",
        "Frobenius norm of the triplet, or of the tensor",
        lambda t: norm_scores(t.left.weight, _values(t), t.right.weight),
        lambda f: torch.linalg.vector_norm(f.weight.detach()),
    ),
)

SCORES: dict[str, Score] = {score.name: score for score in _ALL}
"""Every score by name. What AdaLoRA's setting ``score`` calls "sensitivity" is "adalora" here, "magnitude" the same."""


def score_of(name: str) -> Score:
    """The score of a name.

    Raises
    ------
    UsageError
        If there is none.

    Examples
    --------
    >>> score_of("norm").formula
    '‖P‖·|λ|·‖Q‖'
    """
    if name not in SCORES:
        raise UsageError(f"no score is called {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name]
