"""Factors that are best where a map's inputs are: updates seen through R^½, and the moments of each matrix's inputs.

`spectra.weighted` has the mathematics: with M = ΔS, SSᵀ = R = E[xxᵀ], and U_r the leading left vectors of M, no matrix
of rank r leaves less of ‖(Δ − B)S‖ than B = U_rU_rᵀΔ. Here Δ is a dense difference or an adapter's two factors, which
are never multiplied out, and B is split into balanced factors as the base stores its matrix.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from spectra.checkpoints.checkpoint import listed
from spectra.checkpoints.digests import digest_files
from spectra.errors import UsageError
from spectra.extract.factors import (
    Factors,
    dense_error,
    factored_error,
    leading_factors,
    reranked_factors,
)
from spectra.extract.places import Place
from spectra.extract.ranks import Rule
from spectra.extract.roots import KEPT_BYTES, Inputs, Roots
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import row_blocks
from spectra.linalg.route import spectrum
from spectra.moments import Moments, load_moments
from spectra.values import Spectrum

# Criteria that hold a spectrum against rounding or noise of the entries, which weighting mixes.
_OF_ENTRIES = ("signal", "gavish-donoho", "marchenko-pastur")


@dataclass(frozen=True, eq=False)
class Weighting:
    """Inputs of the matrices whose moments are known, by the matrix's name; and what the record says of them."""

    moments: Mapping[str, Inputs]
    info: Mapping[str, Any]
    roots: Roots = field(default_factory=Roots)

    def root(self, name: str) -> torch.Tensor:
        """S of shape (inputs, s) with SSᵀ = R, of one matrix's inputs."""
        return self.roots(self.moments[name])

    def work(self, name: str) -> float:
        """Flops of a matrix's part of its input's root: ten an entry and row, LAPACK's dsyevd."""
        if name not in self.moments:
            return 0.0
        readers = sum(other is self.moments[name] for other in self.moments.values())
        return 10.0 * self.moments[name].size ** 3 / readers


NONE = Weighting({}, {})


def weighting_of(
    given: str | os.PathLike[str] | Mapping[str, Moments] | None, places: Sequence[Place], rule: Rule
) -> Weighting:
    """Give every matrix of a linear map the moments of its inputs.

    Parameters
    ----------
    given : path or mapping of str to Moments, optional
        By the name of a module, with or without the model's prefix.
    places : sequence of Place
        Matrices that become factors.
    rule : Rule
        How many directions each keeps.

    Raises
    ------
    UsageError
        If no matrix has moments, some belong to a matrix of another size, or the rule does not go with them.
    CheckpointNotFound, UnsafeCheckpoint
        If the file is not there, or none of `spectra.moments.save_moments`.
    """
    if given is None:
        return NONE
    if rule.criterion in _OF_ENTRIES:
        raise UsageError(
            f"criterion = {rule.criterion!r} holds singular values against rounding or noise of the entries, which "
            "moments weight: choose another rule, or leave the moments out"
        )
    found = given if isinstance(given, Mapping) else load_moments(given)
    linear = {place.module: place for place in places if place.kind == "linear"}
    names = aligned(found, linear)
    if not names:
        raise UsageError(
            f"none of the moments of {listed(sorted(found))} belongs to a matrix that is to be extracted, "
            f"{listed(sorted(linear))} among them"
        )
    facts = {module: _looked_at(found[name]) for module, name in names.items()}
    for module, fact in facts.items():
        place = linear[module]
        assert place.delta is not None
        inputs = place.delta.shape[0 if place.transposed else 1]
        if fact.size != inputs:
            raise UsageError(
                f"the moments of {names[module]} are of {fact.size} inputs and {place.name} reads {inputs}: "
                "they were taken of another model"
            )
    plain = [place.name for place in places if place.module not in facts or place.kind != "linear"]
    if plain and rule.whole_model and rule.allocation != "uniform":
        raise UsageError(
            f"{len(plain)} of {len(places)} matrices have no moments, {listed(plain)} among them: weighted errors and "
            "plain ones cannot be allocated together; leave those out (--exclude, --embeddings save), or give a rule "
            "that looks at one matrix at a time (--energy or --rank without --global)"
        )
    silent = [names[module] for module, fact in facts.items() if not fact.trace > 0.0]
    if silent:
        raise UsageError(f"the moments of {listed(silent)} are all 0: their maps read nothing; leave them out")
    info: dict[str, Any] = {"file": None, "maps": len(found), "matrices": len(facts), "plain": plain}
    if not isinstance(given, Mapping):
        digest = digest_files([(Path(given).name, Path(given), 0)])[0]
        info |= {"file": str(given), "sha256": digest.sha256, "sampled": digest.sampled}
    info["inputs"] = max(fact.count for fact in facts.values())
    # One object for equal moments, so that a root is taken once for all maps that read one input.
    held: dict[_Fact, Inputs] = {}
    for module, fact in facts.items():
        held.setdefault(fact, Inputs(partial(found.__getitem__, names[module]), fact.size))
    largest = max(fact.size for fact in facts.values())
    roots = Roots(max(KEPT_BYTES, 2 * 8 * largest**2))
    return Weighting({linear[module].name: held[fact] for module, fact in facts.items()}, info, roots)


@dataclass(frozen=True)
class _Fact:
    """What tells moments from others, in a few bytes."""

    size: int
    count: int
    trace: float
    digest: bytes


def _looked_at(moments: Moments) -> _Fact:
    total = moments.total.contiguous()
    digest = hashlib.sha256(memoryview(total.numpy()).cast("B")).digest()  # type: ignore[arg-type]
    return _Fact(len(total), moments.count, float(total.trace()), digest)


def aligned(known: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Names of moments by module: equal, or but for one prefix that either side has everywhere.

    Parameters
    ----------
    known : iterable of str
        Names of moments.
    modules : iterable of str
        Paths of modules.

    Returns
    -------
    dict of str to str
        The prefix that most names agree on is taken; modules without a partner are left out.

    Examples
    --------
    >>> aligned(["bert.h.0.q", "bert.h.0.k", "classifier"], ["h.0.q", "h.0.k"])
    {'h.0.q': 'bert.h.0.q', 'h.0.k': 'bert.h.0.k'}
    >>> aligned(["h.0.q"], ["model.h.0.q", "model.h.1.q"])
    {'model.h.0.q': 'h.0.q'}
    """
    names, paths = set(known), list(modules)
    votes = Counter((name.removesuffix(path), "") for name in names for path in _endings(name) if path in set(paths))
    votes.update(
        ("", path.removesuffix(end)) for path in paths for end in _endings(path) if end != path and end in names
    )
    if not votes:
        return {}
    more, less = max(votes, key=lambda pair: (votes[pair], -len("".join(pair)), pair))
    partners = {path: more + path.removeprefix(less) for path in paths if path.startswith(less)}
    return {path: name for path, name in partners.items() if name in names}


def _endings(path: str) -> Iterator[str]:
    segments = path.split(".")
    return (".".join(segments[at:]) for at in range(len(segments)))


# Updates as their inputs see them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How singular vectors are found."""

    seed: int = 0
    device: str | None = None
    max_bytes: float = math.inf


class Seen(Protocol):
    """An update with the moments of its inputs; factors go in and come out as the base stores its matrix."""

    norm: float  # ‖ΔS‖

    def spectrum(self, count: int | None) -> Spectrum:
        """Singular values of ΔS, the largest `count` or all."""
        ...

    def best(self, rank: int) -> Factors:
        """Factors that leave least of ΔS."""
        ...

    def plain(self, rank: int) -> Factors:
        """Factors that leave least of Δ."""
        ...

    def errors(self, b: torch.Tensor, a: torch.Tensor) -> tuple[float, float]:
        """‖Δ − BA‖ and ‖(Δ − BA)S‖."""
        ...


class SeenMatrix:
    """A dense update.

    Parameters
    ----------
    matrix : Tensor of shape (rows, cols)
        Δ, as the base stores it.
    root : Tensor of shape (inputs, s)
        S.
    frobenius : float
        ‖Δ‖_F.
    transposed : bool
        Whether rows are inputs.
    options : Options

    Examples
    --------
    The larger direction is hardly used, and goes:

    >>> seen = SeenMatrix(torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 0.1])).double(), 10**0.5)
    >>> found = seen.best(1)
    >>> (found.b @ found.a).abs().round(decimals=9).tolist(), [round(e, 6) for e in seen.errors(found.b, found.a)]
    ([[1.0, 0.0], [0.0, 0.0]], [3.0, 0.3])
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        root: torch.Tensor,
        frobenius: float,
        *,
        transposed: bool = False,
        options: Options = Options(),  # frozen
    ) -> None:
        self.matrix, self.root, self.frobenius = matrix, root, frobenius
        self.transposed, self.options = transposed, options
        self.wide = matrix.T if transposed else matrix  # outputs by rows
        self.image = torch.cat([block.double() @ root for block in row_blocks(self.wide)])  # ΔS
        self.norm = float(torch.linalg.vector_norm(self.image))

    def spectrum(self, count: int | None) -> Spectrum:
        """Singular values of ΔS: min(rows, cols) of them where all are asked for, those past the rank of S being 0."""
        found = spectrum(self.image, rank=count, seed=self.options.seed, max_bytes=self.options.max_bytes, name="ΔS")
        return _padded(found, self.wide.shape)

    def best(self, rank: int) -> Factors:
        """Factors of U_rU_rᵀΔ."""
        found = leading_factors(
            self.image,
            min(rank, *self.image.shape),
            frobenius=self.norm,
            seed=self.options.seed,
            device=self.options.device,
            max_bytes=self.options.max_bytes,
        )
        left = _orthonormal(found, self.image.shape)
        blocks = row_blocks(self.wide)
        right = torch.zeros(left.shape[1], self.wide.shape[1], dtype=torch.float64)
        for part, block in zip(torch.split(left, blocks[0].shape[0]), blocks, strict=True):
            right.addmm_(part.T, block.double())
        return _balanced(found, left, right, transposed=self.transposed)

    def plain(self, rank: int) -> Factors:
        """Factors of Δ's own leading directions."""
        held = self.options
        return leading_factors(
            self.matrix, rank, frobenius=self.frobenius, seed=held.seed, device=held.device, max_bytes=held.max_bytes
        )

    def errors(self, b: torch.Tensor, a: torch.Tensor) -> tuple[float, float]:
        """‖Δ − BA‖ and ‖(Δ − BA)S‖, summed in float64 a block of rows at a time."""
        left, right = (a.T, b.T) if self.transposed else (b, a)
        wide, blocks = right.double(), row_blocks(self.wide)
        parts = torch.split(left.double(), blocks[0].shape[0])
        seen = (
            float(((block.double() - part @ wide) @ self.root).square_().sum())
            for block, part in zip(blocks, parts, strict=True)
        )
        return dense_error(self.matrix, b, a), math.sqrt(math.fsum(seen))


class SeenProduct:
    """An adapter's update scale·B·A, which is never multiplied out.

    Parameters
    ----------
    b, a : Tensor of shape (rows, R) and (R, cols)
        As the base stores its matrix.
    scale : float
    root : Tensor of shape (inputs, s)
        S.
    transposed : bool
        Whether rows are inputs.
    name : str
        How errors call the update.

    Examples
    --------
    >>> b, root = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 0.1]))
    >>> seen = SeenProduct(b, torch.eye(2), 2.0, root)
    >>> found = seen.best(1)
    >>> (found.b @ found.a).abs().round(decimals=9).tolist(), [round(e, 6) for e in seen.errors(found.b, found.a)]
    ([[2.0, 0.0], [0.0, 0.0]], [6.0, 0.6])
    """

    def __init__(
        self,
        b: torch.Tensor,
        a: torch.Tensor,
        scale: float,
        root: torch.Tensor,
        *,
        transposed: bool = False,
        name: str = "the update",
    ) -> None:
        self.b, self.a, self.scale, self.root = b, a, scale, root.double()
        self.transposed, self.name = transposed, name
        self.left, self.right = (a.T, b.T) if transposed else (b, a)  # outputs by rows
        self.image = self.right.double() @ self.root  # (R, s): ΔS is scale · left · image
        self._found = product_spectrum(self.left, self.image, scale=scale, vectors=True, name=name)
        self.norm = self._found.frobenius

    def spectrum(self, count: int | None) -> Spectrum:
        """Singular values of ΔS, all of them at any count."""
        return _padded(replace(self._found, left=None, right=None), (len(self.left), self.right.shape[1]))

    def best(self, rank: int) -> Factors:
        """Factors of U_rU_rᵀ·scale·B·A."""
        found = self._found
        assert found.left is not None
        kept = min(rank, int(np.sum(found.values > found.certificate.roundoff)))
        left = torch.from_numpy(np.ascontiguousarray(found.left[:, :kept]))
        right = (left.T @ self.left.double() * self.scale) @ self.right.double()
        values = np.array(found.values[:kept])
        plain = Factors(left, right, values, float(np.sum(values**2)), self.norm, found.certificate.method)
        return _balanced(plain, left, right, transposed=self.transposed)

    def plain(self, rank: int) -> Factors:
        """Factors of Δ's own leading directions."""
        return reranked_factors(self.b, self.a, rank, scale=self.scale, name=self.name)

    def errors(self, b: torch.Tensor, a: torch.Tensor) -> tuple[float, float]:
        """‖Δ − BA‖ and ‖(Δ − BA)S‖, from the factors stacked."""
        left, right = (a.T, b.T) if self.transposed else (b, a)
        seen = factored_error(self.left, self.image, self.scale, left, right.double() @ self.root)
        return factored_error(self.b, self.a, self.scale, b, a), seen


def _padded(found: Spectrum, shape: Sequence[int]) -> Spectrum:
    """The spectrum of ΔS as one of Δ's shape: the values that S or the factors leave no room for are 0."""
    rows, cols = int(shape[0]), int(shape[1])
    whole = found.complete or found.certificate.method.startswith("factors")
    values = np.append(found.values, np.zeros(min(rows, cols) - len(found.values))) if whole else found.values
    return replace(found, values=values, shape=(rows, cols), left=None, right=None)


def _orthonormal(found: Factors, shape: Sequence[int]) -> torch.Tensor:
    """Left vectors of the directions that are more than rounding, orthonormal in float64."""
    least = max(shape) * np.finfo(np.float64).eps * float(found.values[0])
    kept = int(np.sum(found.values > least))
    turn, triangle = torch.linalg.qr(found.b[:, :kept].double())
    signed: torch.Tensor = turn * torch.sign(triangle.diagonal())
    return signed


def _balanced(found: Factors, left: torch.Tensor, right: torch.Tensor, *, transposed: bool) -> Factors:
    """Split left · right into factors whose columns and rows have equal norms, as the base stores its matrix."""
    root = torch.linalg.vector_norm(right, dim=1).sqrt()
    left, right = left * root, right / root[:, None]
    b, a = (right.T.contiguous(), left.T.contiguous()) if transposed else (left, right)
    kept = left.shape[1]
    return replace(found, b=b, a=a, values=found.values[:kept], method=f"{found.method}, weighted by inputs")
