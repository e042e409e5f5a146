"""Exact spectrum of a product scale·B·A from its factors: O((rows + cols) r²), the product never formed."""

from __future__ import annotations

import numpy as np
import torch

from spectra.errors import MatrixError, NonFiniteMatrix
from spectra.values import Certificate, Spectrum

# Error of a value in units of ε·‖B‖₂‖A‖₂: two Householder QRs and one small SVD, each backward stable to a few ε
# (Higham, "Accuracy and Stability", 2nd ed., ch. 19). Largest seen over the tests' gallery: 3.7.
_ROUNDOFF = 10.0


def product_spectrum(
    b: torch.Tensor, a: torch.Tensor, *, scale: float = 1.0, vectors: bool = False, name: str = "the product"
) -> Spectrum:
    """Spectrum of scale·B·A: the singular values of the r × r matrix R_B R_Aᵀ, B = Q_B R_B and Aᵀ = Q_A R_A.

    Parameters
    ----------
    b : Tensor of shape (rows, r)
        Any floating dtype; all is computed in float64.
    a : Tensor of shape (r, cols)
    scale : float
        LoRA's γ, for instance α/r.
    vectors : bool
        Also give the left (rows, r) and right (r, cols) vectors.
    name : str
        How errors call it.

    Returns
    -------
    Spectrum
        Complete: min(rows, cols) values, of which all but r are exactly 0. With vectors, only those r values.

    Raises
    ------
    MatrixError
        If the factors do not fit together.
    NonFiniteMatrix
        If a factor or the scale holds NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> b, a = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> [round(float(s), 12) for s in product_spectrum(b, a, scale=2.0).values]
    [10.0, 0.0]
    """
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or 0 in (*b.shape, *a.shape):
        raise MatrixError(f"{name}: factors of shapes {tuple(b.shape)} and {tuple(a.shape)} have no product")
    b64, a64 = b.detach().double(), a.detach().double()
    bad = int((~torch.isfinite(b64)).sum()) + int((~torch.isfinite(a64)).sum())
    if bad or not np.isfinite(scale):
        raise NonFiniteMatrix(f"{name} holds {bad} NaN or infinite entries in its factors (scale {scale})")
    mode = "reduced" if vectors else "r"
    q_b, r_b = torch.linalg.qr(b64, mode=mode)
    q_a, r_a = torch.linalg.qr(a64.T, mode=mode)
    core = (r_b @ r_a.T) * scale
    shape = (int(b.shape[0]), int(a.shape[1]))
    frobenius = float(torch.linalg.vector_norm(core))
    size = float(torch.linalg.matrix_norm(r_b, 2)) * float(torch.linalg.matrix_norm(r_a, 2)) * abs(scale)
    certificate = Certificate(f"factors of rank {b.shape[1]} in float64", roundoff=_ROUNDOFF * 2.0**-52 * size)
    if not vectors:
        values = np.zeros(min(shape))
        small = torch.linalg.svdvals(core).cpu().numpy()[: min(shape)]
        values[: len(small)] = small
        return Spectrum(values, shape, frobenius, certificate)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return Spectrum(
        s.cpu().numpy(), shape, frobenius, certificate, left=(q_b @ u).cpu().numpy(), right=(vh @ q_a.T).cpu().numpy()
    )
