"""Whether an update has anything to do with a quantization error: shared directions, shared energy, repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectra.errors import UsageError
from spectra.linalg import as_matrix, by_gram
from spectra.subspace import capture_curve, overlap
from spectra.theory.chance import cosine_std, overlap_mean
from spectra.values import Spectrum


@dataclass(frozen=True)
class Share:
    """A share beside what random directions would have."""

    value: float
    chance: float


@dataclass(frozen=True)
class UpdateMeeting:
    """An update ΔW beside the error E = W − Ŵ of the weight that it is added to.

    Attributes
    ----------
    rank : int
        Directions of ΔW that can be told from roundoff. Where r is larger, all of these are taken.
    left, right : dict of int to Share
        Overlap of the r leading left (right) singular vectors of E with those of ΔW
        (`spectra.subspace.overlap`).
    held : dict of int to Share
        Share of ‖E‖²_F in the r leading column or row directions of ΔW, either being enough: what an adapter could
        take away that kept one of them.
    inside : dict of int to Share
        Share in both at once.
    repaired : float
        ⟨ΔW, E⟩/‖E‖²: 1 where all of E is made up for, 0 where none, negative where it is made worse.
    cosine : float
        ⟨ΔW, E⟩/(‖ΔW‖‖E‖).
    cosine_std : float
        Its standard deviation, about 0, for matrices in random position.
    """

    rank: int
    left: dict[int, Share]
    right: dict[int, Share]
    held: dict[int, Share]
    inside: dict[int, Share]
    repaired: float
    cosine: float
    cosine_std: float


def meeting(error: torch.Tensor, found: Spectrum, update: torch.Tensor, ranks: Sequence[int]) -> UpdateMeeting:
    """An error and an update of the same weight, side by side.

    Parameters
    ----------
    error : Tensor of shape (out, in)
        E.
    found : Spectrum
        Of E, with vectors up to the largest rank.
    update : Tensor of shape (out, in)
        ΔW.
    ranks : sequence of int
        Each at least 1; beyond min(out, in) all directions are meant.

    Returns
    -------
    UpdateMeeting
        NaN throughout where E or ΔW is zero.

    Raises
    ------
    UsageError
        If the shapes differ.
    NonFiniteMatrix
        If the update holds NaN or infinity.
    """
    if update.shape != error.shape:
        raise UsageError(
            f"the update is {tuple(update.shape)} and its weight {tuple(error.shape)}; they must be of one"
        )
    matrix, shape = as_matrix(update.to(error.device), name="the update"), (error.shape[0], error.shape[1])
    most = min(max(ranks), *shape)
    if matrix.frobenius == 0.0 or found.frobenius == 0.0:
        return _nothing(ranks, shape)
    other = by_gram(matrix, vectors=True, keep=most)
    rank = int((other.values > other.certificate.squared_roundoff).sum())
    here = {r: min(r, *shape) for r in ranks}  # of E
    there = {r: min(r, rank, most) for r in ranks}  # of ΔW
    held, inside = _energies(error, found.frobenius, other)
    rows, cols = shape
    inner = float((error.double() * matrix.scaled.double()).sum()) * matrix.scale
    return UpdateMeeting(
        rank=rank,
        left={r: Share(overlap(found, other, i, there[r]), overlap_mean(i, there[r], rows)) for r, i in here.items()},
        right={
            r: Share(overlap(found, other, i, there[r], side="right"), overlap_mean(i, there[r], cols))
            for r, i in here.items()
        },
        held={r: Share(held[j - 1], 1.0 - (1.0 - j / rows) * (1.0 - j / cols)) for r, j in there.items()},
        inside={r: Share(inside[j - 1], j * j / (rows * cols)) for r, j in there.items()},
        repaired=inner / found.frobenius**2,
        cosine=inner / (found.frobenius * matrix.frobenius),
        cosine_std=cosine_std(shape),
    )


def _energies(error: torch.Tensor, frobenius: float, other: Spectrum) -> tuple[list[float], list[float]]:
    """Shares of ‖E‖² in either and in both of another matrix's leading spaces: ‖E‖² − ‖(1 − P)E(1 − Q)‖², ‖PEQ‖²."""
    assert other.left is not None  # for the type checker: vectors were asked for
    assert other.right is not None
    wide = error.double()
    left, right = (torch.from_numpy(part.copy()).to(wide) for part in (other.left, other.right.T))
    image = left.T @ wide
    found = capture_curve(image.cpu(), (wide @ right).cpu(), (image @ right).cpu(), frobenius)
    return (found.left + found.right - found.both).tolist(), found.both.tolist()


def _nothing(ranks: Sequence[int], shape: tuple[int, int]) -> UpdateMeeting:
    none = dict.fromkeys(ranks, Share(math.nan, math.nan))
    return UpdateMeeting(0, none, none, none, none, math.nan, math.nan, cosine_std(shape))
