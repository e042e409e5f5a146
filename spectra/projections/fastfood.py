r"""Fastfood: Gaussian-like rows from two Walsh–Hadamard transforms, no entry of P ever stored."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spectra.linalg.hadamard import transform_between, walsh_hadamard
from spectra.projections.draws import coarse_normal, signs, stream
from spectra.projections.protocol import check_shapes

# Entries worked on at a time: a few such arrays of float32 fit the caches, and matrix products are long enough.
_GROUP = 1 << 18
# The last bits of an index within a block stand last in a group's layout, for one matrix product from the right.
_LAST = 5


@dataclass(frozen=True)
class _Group:
    """Some blocks of one piece: entries [first, first + count) of it, laid out as (n/q, blocks, q) with q = 32."""

    piece: int
    number: int
    first: int
    count: int
    blocks: int


class FastfoodProjection:
    r"""P of stacked blocks c·H G Π H B, with H Walsh–Hadamard of order n, the power of two at d or next above it.

    B are random signs, Π a random permutation, G a diagonal of (coarsely) normal numbers, and c = 1/√(nD). Coordinates
    past d are zero, so every d up to D is as good as a power of two. Blocks that are worked on together, `_GROUP`
    entries, share B and Π, which turn the coordinates, and each has its own G: their product ΠHBx is then made once for
    all of them, and one transform an entry remains of two. Π is one random permutation, shifted for each group. B and
    G are drawn again in each pass.

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
    for intrinsic dimension, Li et al. 2018, appendix. The columns of a block have one norm, c·√n·‖G‖, so that P's
    columns differ in norm only by the rows that the last blocks of a tensor lack. E‖Pᵀy‖² is right for every y; its
    spread is that of a uniformly random subspace for unstructured y (one entry, rank one, noise), and several times
    wider where y is constant along rows, columns or altogether, which H gathers in a few entries.

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
        self._factor = 1.0 / math.sqrt(self.order * total)
        self._permutation = torch.from_numpy(stream(seed).permutation(self.order))

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        flat, padded = out.view(-1), x.new_zeros(self.order)
        padded[: self.dimension] = x
        for group in self._groups(piece):
            turn, permutation, diagonal, spare = self._draws(group, x)
            inner = walsh_hadamard(turn.mul_(padded))[permutation].mul_(self._factor * scale)
            rows = _transform(diagonal.mul_(inner.view(-1, 1, self._last)), spare)[0].view(-1)
            flat[group.first : group.first + group.count] += rows[: group.count]

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        flat = y.reshape(-1)
        found = y.new_zeros(self.order)
        for group in self._groups(piece):
            turn, permutation, diagonal, spare = self._draws(group, y)
            rows, room = spare.view(-1), _room(y).third[: spare.numel()].view(spare.shape)
            rows[: group.count] = flat[group.first : group.first + group.count]
            rows[group.count :] = 0.0
            sums = _transform(spare, room)[0].mul_(diagonal).sum(dim=1).view(-1)
            found += walsh_hadamard(torch.zeros_like(sums).index_copy_(0, permutation, sums)).mul_(turn)
        return found[: self.dimension].mul_(self._factor)

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns: those of whole blocks, less the rows that are not there."""
        like = torch.zeros((), dtype=torch.float64)
        whole, lost = 0.0, torch.zeros(self.order, dtype=torch.float64)
        for piece in range(len(self.shapes)):
            for group in self._groups(piece):
                turn, permutation, diagonal, _ = self._draws(group, like)
                whole += self.order * float(diagonal.square().sum())
                for block, absent in self._absent(group):
                    # Row i of H G Π H B, for the absent i at once: transform the rows of H G, put back by Π.
                    units = torch.zeros(self.order, len(absent), dtype=torch.float64)
                    units[absent, torch.arange(len(absent))] = 1.0
                    inner = walsh_hadamard(units, dim=0).mul_(diagonal[:, block].reshape(-1, 1))
                    entries = walsh_hadamard(torch.zeros_like(inner).index_copy_(0, permutation, inner), dim=0)
                    lost += entries.mul_(turn[:, None]).square().sum(dim=1)
        return (whole - lost)[: self.dimension] * self._factor**2

    def _groups(self, piece: int) -> Iterator[_Group]:
        entries = math.prod(self.shapes[piece])
        most = max(1, _GROUP // self.order) * self.order
        for number, first in enumerate(range(0, entries, most)):
            count = min(most, entries - first)
            yield _Group(piece, number, first, count, -(-count // self.order))

    def _draws(self, group: _Group, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """B (n,), Π as an index (n,), the group's G, (n/q, blocks, q), and as much room; the last two are for now."""
        generator = stream(self.seed, group.piece, group.number)
        turn = signs(generator, self.order, like)
        permutation = self._permutation.roll(int(generator.integers(self.order))).to(like.device)
        room, size = _room(like, self.order), self.order * group.blocks
        coarse_normal(generator, room.first[:size], room.codes[:size])
        shape = (-1, group.blocks, self._last)
        return turn, permutation, room.first[:size].view(shape), room.second[:size].view(shape)

    def _absent(self, group: _Group) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows, by block, that the group's last ones lack: entries of the layout past the tensor's end."""
        missing = torch.arange(group.count, self.order * group.blocks)
        rows = missing // (group.blocks * self._last) * self._last + missing % self._last
        blocks = missing // self._last % group.blocks
        for block in range(group.blocks):
            for part in torch.split(rows[blocks == block], max(1, _GROUP // self.order)):
                if len(part):
                    yield block, part


@dataclass(frozen=True)
class _Room:
    """Memory that groups are worked on in, again and again: fresh memory costs as much as the work."""

    codes: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor


_rooms = threading.local()


def _room(like: torch.Tensor, order: int = 0) -> _Room:
    """Room of the calling thread for a dtype and device, of at least a block."""
    held: dict[str, _Room] = _rooms.__dict__
    key, size = f"{like.dtype} {like.device}", max(_GROUP, order)
    if key not in held or len(held[key].first) < size:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            codes = torch.empty(size, dtype=torch.int32, device=like.device)
            held[key] = _Room(codes, *(torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(3)))
    return held[key]


def _transform(x: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H over the two axes that make up an index within a block; see `transform_between`."""
    return transform_between(*transform_between(x, spare, dim=0), dim=2)
