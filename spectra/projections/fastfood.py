r"""Fastfood: Gaussian-like rows from two Walsh–Hadamard transforms, no entry of P ever stored."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from spectra.linalg.hadamard import transform_between, walsh_hadamard
from spectra.linalg.threads import each_in_threads
from spectra.projections.draws import random_bytes, signs, stream
from spectra.projections.protocol import check_shapes

_T = TypeVar("_T")

# Entries worked on at a time, which is part of what P is: a few such arrays of float32 fit the caches, and matrix
# products are long enough.
_GROUP = 1 << 19
# The last bits of an index within a block stand last in a group's layout, for one matrix product from the right.
_LAST = 5
# Second moment of the bytes −127.5, −126.5, …, 127.5.
_VARIANCE = (256**2 - 1) / 12


@dataclass(frozen=True)
class _Group:
    """Some blocks of one piece: entries [first, first + count) of it, laid out as (n/q, blocks, q) with q = 32.

    Its S begins at `signs` in the table, and its G is drawn by a generator in `state`: to seed one takes longer than to
    put it in a state.
    """

    first: int
    count: int
    blocks: int
    signs: int
    state: Mapping[str, Any]


@dataclass(frozen=True)
class _Draws:
    """G of a group, (n/q, blocks, q), and S, (count,), with as much room as G; all but S are the thread's, for now."""

    diagonal: torch.Tensor
    signs: torch.Tensor
    spare: torch.Tensor
    third: torch.Tensor


class FastfoodProjection:
    r"""P of stacked blocks c·S H G Π H B, with H Walsh–Hadamard of order n, the power of two at d or next above it.

    B are random signs, Π is a random permutation, G a diagonal of uniform numbers, S are random signs, and c scales
    columns to an expected norm of 1. Coordinates past d are zero, so every d up to D is as good as a power of two. All
    blocks share B and Π, which only turn the coordinates, so that ΠHBx is made once and one transform an entry remains
    of two; each has its own G, made again in each pass, and its own place in a table of random signs for S. Blocks are
    worked on in groups, each by one thread.

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the tensors that P moves.
    dimension : int
        d.
    seed : int
        Of all draws.

    Raises
    ------
    UsageError
        If there is no parameter, or d is not between 1 and D.

    Notes
    -----
    Q. Le, T. Sarlós and A. Smola, "Fastfood: Approximating Kernel Expansions in Loglinear Time", ICML 2013, equation 7;
    for intrinsic dimension, Li et al. 2018, appendix. Theirs has no S and a normal G. Without S, ‖Pᵀy‖² of an update
    that is constant along rows, or altogether, varied 5 to 40 times as much from seed to seed as a random subspace's
    does, since H gathers such a y in a few entries; with S it varies as much as theirs for every y. Entries of P are
    sums of n terms, so that G's own distribution is seen in none of them but for the smallest d; uniform bytes are the
    cheapest to draw. PᵀP is close to the identity: (ΠHB)ᵀ times the sum of all G², which is nearly constant, times ΠHB.

    Examples
    --------
    >>> from spectra.projections import forward
    >>> projection = FastfoodProjection([(640, 480), (480,)], dimension=100, seed=0)
    >>> x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    >>> moved = forward(projection, x)
    >>> float(sum(tensor.square().sum() for tensor in moved) / x.square().sum()).__round__(1)
    1.0
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, dimension: int, seed: int) -> None:
        self.shapes, total = check_shapes(shapes, dimension)
        self.dimension = dimension
        self.seed = seed
        self.order = 1 << (dimension - 1).bit_length()
        self._last = min(self.order, 1 << _LAST)
        self._factor = 1.0 / math.sqrt(_VARIANCE * self.order * total)
        generator, like = stream(seed), torch.zeros(())
        self._turn = signs(generator, self.order, like)
        self._permutation = torch.from_numpy(generator.permutation(self.order))
        # A group takes its S from anywhere in the first half on, so that groups differ.
        self._signs = signs(generator, 2 * max(_GROUP, self.order), like)
        self._groups = [list(self._cut(piece, math.prod(shape))) for piece, shape in enumerate(self.shapes)]

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        self.add_all(x, {piece: out}, {piece: scale})

    def add_all(self, x: torch.Tensor, outs: Mapping[int, torch.Tensor], scales: Mapping[int, float]) -> None:
        """Add to several tensors; see `Projection.add_all`."""
        self._settle(x)
        padded = x.new_zeros(self.order)
        padded[: self.dimension] = x
        inner = walsh_hadamard(padded.mul_(self._turn))[self._permutation].mul_(self._factor)
        inner = inner.view(-1, 1, self._last)

        def work(at: tuple[int, _Group]) -> None:
            piece, group = at
            drawn = self._draws(group, x)
            rows = _transform(drawn.diagonal.mul_(inner), drawn.spare)[0].view(-1)[: group.count]
            entries = outs[piece].view(-1)[group.first : group.first + group.count]
            entries.addcmul_(rows, drawn.signs, value=scales.get(piece, 1.0))

        _share(work, [(piece, group) for piece in outs for group in self._groups[piece]], x)

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        return self.adjoint_all({piece: y})

    def adjoint_all(self, ys: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Sum over several pieces; see `Projection.adjoint_all`."""
        like = next(iter(ys.values()))
        self._settle(like)
        items = [(y.reshape(-1), group) for piece, y in ys.items() for group in self._groups[piece]]
        sums = like.new_zeros(len(items), self.order)  # a group's own, so that they are summed in one order

        def work(number: int) -> None:
            flat, group = items[number]
            drawn = self._draws(group, like)
            rows = drawn.spare.view(-1)
            torch.mul(flat[group.first : group.first + group.count], drawn.signs, out=rows[: group.count])
            rows[group.count :] = 0.0
            within = _transform(drawn.spare, drawn.third)[0].mul_(drawn.diagonal)
            torch.sum(within, dim=1, out=sums[number].view(-1, self._last))

        _share(work, range(len(items)), like)
        found = like.new_empty(self.order).index_copy_(0, self._permutation, sums.sum(dim=0))
        return walsh_hadamard(found).mul_(self._turn)[: self.dimension].mul_(self._factor)

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns: those of whole blocks, less the rows that are not there."""
        like = torch.zeros((), dtype=torch.float64)
        whole, lost = 0.0, torch.zeros(self.order, dtype=torch.float64)
        self._settle(like)
        for group in (group for groups in self._groups for group in groups):
            diagonal = self._draws(group, like).diagonal
            whole += self.order * float(diagonal.square().sum())
            for block, absent in self._absent(group):
                # Row i of H G Π H B, for the absent i at once: transform the rows of H G, put back by Π.
                units = torch.zeros(self.order, len(absent), dtype=torch.float64)
                units[absent, torch.arange(len(absent))] = 1.0
                inner = walsh_hadamard(units, dim=0).mul_(diagonal[:, block].reshape(-1, 1))
                entries = walsh_hadamard(torch.zeros_like(inner).index_copy_(0, self._permutation, inner), dim=0)
                lost += entries.square().sum(dim=1)
        return (whole - lost)[: self.dimension] * self._factor**2

    def _cut(self, piece: int, entries: int) -> Iterator[_Group]:
        """Groups of a piece, of about as many blocks each; two at least where it is worth a second thread."""
        blocks = -(-entries // self.order)
        parts = 2 * -(-entries // (2 * _GROUP)) if entries > _GROUP // 2 else 1
        each = max(1, -(-blocks // parts)) * self.order
        for number, first in enumerate(range(0, entries, each)):
            count, generator = min(each, entries - first), stream(self.seed, piece, number)
            signs = int(generator.integers(len(self._signs) // 2))
            yield _Group(first, count, -(-count // self.order), signs, generator.bit_generator.state)

    def _draws(self, group: _Group, like: torch.Tensor) -> _Draws:
        size, shape = self.order * group.blocks, (-1, group.blocks, self._last)
        _room.generator.bit_generator.state = group.state
        drawn = torch.from_numpy(random_bytes(_room.generator, size).view(np.int8)).view(shape)
        diagonal, spare, third = (tensor[:size].view(shape) for tensor in _room.tensors(like, size))
        torch.add(drawn.to(like.device), 0.5, out=diagonal)
        return _Draws(diagonal, self._signs[group.signs : group.signs + group.count], spare, third)

    def _settle(self, like: torch.Tensor) -> None:
        """Have what every pass needs where it is needed."""
        if (self._turn.dtype, self._turn.device) != (like.dtype, like.device):
            self._turn, self._signs = self._turn.to(like), self._signs.to(like)
            self._permutation = self._permutation.to(like.device)

    def _absent(self, group: _Group) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows, by block, that the group's last ones lack: entries of the layout past the tensor's end."""
        missing = torch.arange(group.count, self.order * group.blocks)
        rows = missing // (group.blocks * self._last) * self._last + missing % self._last
        blocks = missing // self._last % group.blocks
        for block in range(group.blocks):
            for part in torch.split(rows[blocks == block], max(1, _GROUP // self.order)):
                if len(part):
                    yield block, part


class _Room(threading.local):
    """What a thread works with again and again: fresh memory costs as much as the work."""

    def __init__(self) -> None:
        self.generator = stream(0)
        self._held: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}

    def tensors(self, like: torch.Tensor, size: int) -> list[torch.Tensor]:
        """Three vectors of that size at least, of the dtype and device of another tensor."""
        held = self._held.get((like.dtype, like.device), [])
        if not held or len(held[0]) < size:
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                held = [torch.empty(max(_GROUP, size), dtype=like.dtype, device=like.device) for _ in range(3)]
            self._held[like.dtype, like.device] = held
        return held


_room = _Room()


def _share(work: Callable[[_T], None], items: Sequence[_T], like: torch.Tensor) -> None:
    """Groups to threads on a CPU; one after the other elsewhere."""
    if like.device.type == "cpu":
        each_in_threads(work, items)
    else:
        for item in items:
            work(item)


def _transform(x: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H over the two axes that make up an index within a block; see `transform_between`."""
    return transform_between(*transform_between(x, spare, dim=0), dim=2)
