"""The laws that every projection keeps: adjoint, column norms, expected norm, one P a seed, nothing cropped."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from spectra.errors import UsageError
from spectra.projections import (
    PROJECTIONS,
    Projection,
    adjoint,
    draws,
    fastfood,
    forward,
    low_rank,
    make_projection,
    moved,
    smallest_dimension,
    sparse,
)

# Odd sizes, a vector, a scalar, three axes, and a tensor smaller than Fastfood's blocks.
SHAPES = [(40, 30), (7,), (3, 5, 4), (), (64, 33)]
TOTAL = sum(math.prod(shape) for shape in SHAPES)
EVERY = pytest.mark.parametrize("name", PROJECTIONS)
DIMENSIONS = pytest.mark.parametrize("dimension", [2, 5, 64, 100])


def build(name: str, dimension: int, seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES) -> Projection:
    generator = torch.Generator().manual_seed(99)
    gradients = {piece: torch.randn(shape, generator=generator) for piece, shape in enumerate(shapes)}
    return make_projection(name, shapes, dimension=dimension, seed=seed, gradients=gradients)


def matrix(projection: Projection) -> torch.Tensor:
    """P, (D, d), column by column."""
    units = torch.eye(projection.dimension, dtype=torch.float64)
    return torch.stack([torch.cat([part.reshape(-1) for part in forward(projection, unit)]) for unit in units], dim=1)


@EVERY
@DIMENSIONS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adjoint(name: str, dimension: int, dtype: torch.dtype, tolerance: float) -> None:
    """⟨Px, y⟩ = ⟨x, Pᵀy⟩, with y = Px so that neither side is a small difference of large numbers."""
    projection = build(name, dimension)
    x = torch.randn(dimension, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = forward(projection, x)
    left = sum(float(part.double().square().sum()) for part in y)
    assert left > 0
    assert float(x.double() @ adjoint(projection, y).double()) == pytest.approx(left, rel=tolerance)


@EVERY
@DIMENSIONS
def test_columns(name: str, dimension: int) -> None:
    """Pᵀ is the transposed P entry by entry; the stated norms are its columns'; none of them is zero."""
    projection = build(name, dimension)
    p = matrix(projection)
    generator = torch.Generator().manual_seed(2)
    y = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    flat = torch.cat([part.reshape(-1) for part in y])
    assert torch.allclose(adjoint(projection, y), p.t() @ flat, rtol=1e-11, atol=1e-12)
    assert torch.allclose(projection.squared_norms(), p.square().sum(dim=0), rtol=1e-11)
    assert torch.linalg.matrix_rank(p) == dimension, "a coordinate was dropped"


@EVERY
def test_linear_and_added(name: str) -> None:
    """`add` adds, and its factor is a factor."""
    projection = build(name, 20)
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for piece, part in enumerate(forward(projection, x)):
        out = torch.ones_like(part)
        projection.add(x, piece, out, scale=-0.5)
        assert torch.allclose(out, 1.0 - 0.5 * part, rtol=1e-12)


@EVERY
def test_expected_norm(name: str) -> None:
    """E‖Px‖² = ‖x‖² over seeds, within four standard errors of 200 draws."""
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    shapes = [(9, 16), (40,)] if name not in ("lora", "gradient") else [(9, 16), (5, 4)]
    ratios = [
        float(sum(part.square().sum() for part in forward(build(name, 12, seed, shapes), x)) / x.square().sum())
        for seed in range(200)
    ]
    spread = np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1.0) <= 4.0 * spread + 1e-12


@EVERY
def test_gradients(name: str) -> None:
    """Both gradients of θ₀ + λ·Px, by finite differences in float64."""
    projection = build(name, 9)
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = torch.randn(SHAPES[0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, scale: moved(start, x, scale, projection, 0), (x, scale))
    assert torch.autograd.gradcheck(lambda x: moved(start, x, None, projection, 0), (x,))


@EVERY
def test_one_seed_one_projection(name: str) -> None:
    """Made again it is the same to the bit; another seed's is another, but where gradients decide."""
    x = torch.ones(30)
    first, again, other = (forward(build(name, 30, seed), x) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, other)) == (name == "gradient")


def test_threads() -> None:
    """P does not depend on the number of threads: Fastfood's products are the same bits, the others' to rounding."""
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from spectra.projections import adjoint, forward, make_projection\n"
        "for name in ('fastfood', 'sparse', 'kronecker', 'lora'):\n"
        "    p = make_projection(name, [(700, 900)], dimension=300, seed=1)\n"
        "    (found,) = forward(p, torch.ones(300, dtype=torch.float64))\n"
        "    print(*found.view(-1)[::5000].tolist(), *adjoint(p, [found]).tolist())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, threads], capture_output=True, text=True, check=True).stdout
        for threads in ("1", "3")
    ]
    assert runs[0].splitlines()[0] == runs[1].splitlines()[0]
    one, three = (np.array(text.split(), dtype=float) for text in runs)
    assert np.allclose(one, three, rtol=1e-11, atol=1e-14)


# Sum of all entries of the last tensor for x = (1, 2, …, 9), and with weights 0, 1, 2, …: an adapter in a subspace is
# kept as numbers and a seed, so that another P from the same seed would spoil every one of them.
KNOWN = {
    "fastfood": (-20.096956846022458, -28746.333799775763),
    "dense": (-9.04280626242803, -1355.6043884009796),
    "sparse": (-4.327975212762507, -4279.580580837984),
    "kronecker": (13.218685323687293, 15934.687009506612),
    "lora": (2.5825077701716577, 6071.645207561482),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_entries(name: str) -> None:
    """The seed gives this P, with every version of NumPy and torch: its draws are raw words and documented streams."""
    x = torch.arange(1.0, 10.0, dtype=torch.float64)
    found = forward(build(name, 9, seed=2024), x)[4].view(-1)
    assert [float(found.sum()), float(found @ torch.arange(len(found)).double())] == pytest.approx(
        KNOWN[name], rel=1e-9
    )


def _structured() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    rows, columns = torch.randn(96, 1, generator=generator), torch.randn(1, 64, generator=generator)
    one = torch.zeros(96, 64)
    one[3, 5] = 1.0
    return {
        "constant": torch.ones(96, 64),
        "along rows": rows.expand(96, 64),
        "along columns": columns.expand(96, 64),
        "rank one": rows * columns,
        "one row": torch.cat([columns, torch.zeros(95, 64)]),
        "one entry": one,
        "noise": torch.randn(96, 64, generator=generator),
    }


@pytest.mark.parametrize("kind", _structured())
@pytest.mark.parametrize("dimension", [24, 64, 300])
def test_fastfood_captures_as_a_random_subspace_does(kind: str, dimension: int) -> None:
    """‖Pᵀy‖²/‖y‖² over seeds: mean d/D and about the variance of Beta(d/2, (D − d)/2), whatever structure y has.

    The variance of so many draws has a relative standard error of √(2/400) = .07, and where y has one entry a block's
    row of P decides alone. Without S, "constant" had 30 times it.
    """
    y, seeds = _structured()[kind].double(), 400
    shares = np.array(
        [
            float(adjoint(make_projection("fastfood", [(96, 64)], dimension=dimension, seed=seed), [y]).square().sum())
            for seed in range(seeds)
        ]
    ) / float(y.square().sum())
    d, total = dimension, y.numel()
    variance = 2 * d * (total - d) / (total**2 * (total + 2))
    assert abs(shares.mean() - d / total) <= 4 * math.sqrt(variance / seeds)
    assert 0.3 * variance < shares.var(ddof=1) < 1.4 * variance


@pytest.mark.parametrize("dimension", [1, 2, 63, 64, 65, 700, 1200])
def test_fastfood_of_any_dimension(dimension: int) -> None:
    """A block is no smaller than d and no tensor is cut to it: the last coordinate of each d moves every tensor."""
    shapes = [(40, 30), (64,)]
    projection = make_projection("fastfood", shapes, dimension=dimension, seed=0)
    unit = torch.zeros(dimension)
    unit[-1] = 1.0
    assert all(bool(part.abs().min() >= 0) and bool(part.any()) for part in forward(projection, unit))
    assert int(torch.count_nonzero(forward(projection, torch.randn(dimension))[0])) == 1200


def test_fastfood_rows_are_nearly_normal() -> None:
    """Entries have variance 1/D and the kurtosis of sums of 256: 3 within its standard error."""
    projection = make_projection("fastfood", [(64, 64)], dimension=256, seed=3)
    p = matrix(projection) * math.sqrt(64 * 64)
    # Their mean square is that of G's 2¹² draws, whose fourth moment is 2.92.
    assert float(p.square().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(1.92 / 2**12))
    # 2²⁰ entries; those of a block share 256 draws, so count 2¹² · 256 / 256 blocks' worth of them as independent.
    assert float(p.pow(4).mean()) == pytest.approx(3.0, abs=4 * math.sqrt(96 / 2**12))


def test_sparse_density() -> None:
    """Of D·d entries a share 1/√D is not zero, within four standard errors."""
    projection = make_projection("sparse", [(100, 100)], dimension=50, seed=0)
    p = matrix(projection)
    expected = p.numel() / 100
    assert abs(int(torch.count_nonzero(p)) - expected) < 4 * math.sqrt(expected)
    assert torch.allclose(p[p != 0].abs(), torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["lora", "gradient"])
def test_low_rank_is_an_isometry(name: str) -> None:
    p = matrix(build(name, 37))
    assert torch.allclose(p.t() @ p, torch.eye(37, dtype=torch.float64), atol=1e-12)


def test_gradient_bases() -> None:
    """One number a matrix of rank 1 moves it along its leading singular pair."""
    gradient = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0])).double() * 2
    projection = make_projection("gradient", [(2, 3)], dimension=1, seed=0, gradients={0: gradient})
    (found,) = forward(projection, torch.ones(1, dtype=torch.float64))
    assert torch.allclose(found.abs(), gradient / 10, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dimension", [0, -1, TOTAL + 1, 2.0, True])
def test_refused_dimensions(name: str, dimension: int) -> None:
    with pytest.raises(UsageError, match="dimension"):
        build(name, dimension)


@EVERY
def test_no_parameters(name: str) -> None:
    with pytest.raises(UsageError):
        build(name, 1, shapes=[])


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"takes 48\.0 GB.*fastfood"):
        make_projection("dense", [(30522, 384)], dimension=1024, seed=0)
    with pytest.raises(UsageError, match="no projection is called"):
        make_projection("fastfod", [(4, 4)], dimension=2, seed=0)
    with pytest.raises(UsageError, match="needs gradients"):
        make_projection("gradient", [(4, 4)], dimension=2, seed=0)
    bad = {0: torch.full((4, 4), math.nan)}
    with pytest.raises(UsageError, match="holds NaN"):
        make_projection("gradient", [(4, 4)], dimension=2, seed=0, gradients=bad)
    with pytest.raises(UsageError, match="of shape"):
        make_projection("gradient", [(4, 4)], dimension=2, seed=0, gradients={0: torch.ones(4, 3)})
    with pytest.raises(UsageError, match="between 2 and 32"):
        make_projection("lora", [(4, 4), (4, 9)], dimension=33, seed=0)
    with pytest.raises(UsageError, match="needs matrices"):
        make_projection("lora", [(9,)], dimension=2, seed=0)
    projection = make_projection("fastfood", [(4, 4)], dimension=3, seed=0)
    with pytest.raises(UsageError, match="coordinates of shape"):
        forward(projection, torch.zeros(4))
    with pytest.raises(UsageError, match="float16"):
        forward(projection, torch.zeros(3, dtype=torch.float16))
    with pytest.raises(UsageError, match="shapes"):
        adjoint(projection, [torch.zeros(4, 5)])


def test_smallest() -> None:
    assert smallest_dimension("fastfood", SHAPES) == 1
    assert smallest_dimension("lora", SHAPES) == 2
    with pytest.raises(UsageError):
        build("lora", 1)


@pytest.mark.parametrize("name", ["fastfood", "dense", "sparse", "kronecker", "lora"])
def test_tensors_without_entries(name: str) -> None:
    shapes = [(0, 5), (5, 0), (6, 7), (0,)]
    projection = make_projection(name, shapes, dimension=3, seed=0)
    parts = forward(projection, torch.ones(3))
    assert [tuple(part.shape) for part in parts] == shapes
    assert float(adjoint(projection, parts).sum()) == pytest.approx(float(parts[2].square().sum()), rel=1e-5)
    assert bool((projection.squared_norms() > 0).all())


@EVERY
def test_autocast_leaves_it_alone(name: str) -> None:
    """P is the same matrix whatever the precision that a model is trained in: to the bit, forward and back."""
    projection = build(name, 50)
    x = torch.randn(50, requires_grad=True, generator=torch.Generator().manual_seed(5))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            image = moved(torch.zeros(SHAPES[4]), x, None, projection, 4)
            (gradient,) = torch.autograd.grad(image.square().sum(), x)
        found.append((image.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_inference_first() -> None:
    """A thread whose memory is first made under inference mode trains afterwards."""
    projection, ended = build("fastfood", 50), []

    def work() -> None:
        with torch.inference_mode():
            forward(projection, torch.ones(50))
        forward(projection, torch.ones(50))
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


@pytest.mark.parametrize("dimension", [60, 64, 250])
def test_fastfood_over_several_groups(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few blocks: every group has draws of its own, is where it belongs, and Pᵀ is P's transpose."""
    monkeypatch.setattr(fastfood, "_GROUP", 256)
    projection = make_projection("fastfood", [(40, 30), (64, 33)], dimension=dimension, seed=0)
    p = matrix(projection)
    y = torch.randn(len(p), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    pulled = adjoint(projection, [y[:1200].view(40, 30), y[1200:].view(64, 33)])
    assert torch.allclose(pulled, p.t() @ y, rtol=1e-11, atol=1e-12)
    assert torch.allclose(projection.squared_norms(), p.square().sum(dim=0), rtol=1e-11)
    assert torch.linalg.matrix_rank(p) == dimension
    # Rows of two groups are of independent draws: none repeats another, and they are nearly orthogonal on the whole.
    rows = torch.nn.functional.normalize(p, dim=1)
    cosines = (rows[:256] @ rows[256:512].t()).flatten()
    assert float(cosines.square().mean()) == pytest.approx(1 / dimension, rel=0.1)


@pytest.mark.parametrize("name", ["fastfood", "dense", "sparse", "kronecker", "lora"])
def test_places_have_draws_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors of one shape, and two groups within a tensor, move by different rows of P."""
    monkeypatch.setattr(fastfood, "_GROUP", 128)
    monkeypatch.setattr(sparse, "_TOGETHER", 91)  # 128 rows of 16 entries, one in √512 of them not zero
    p = matrix(make_projection(name, [(16, 16), (16, 16)], dimension=16, seed=0)).view(4, 128, 16)
    whole = p.view(2, 256, 16)
    if name == "lora":  # each has coordinates of its own: compare the images of both halves
        whole = torch.stack([whole[0, :, :8], whole[1, :, 8:]])
    assert not torch.allclose(whole[0].abs(), whole[1].abs())
    for first in range(4 if name in ("fastfood", "sparse") else 0):
        assert not any(torch.allclose(p[first].abs(), p[other].abs()) for other in range(first))


def test_low_rank_cores_grow_from_their_corner() -> None:
    """A square number of coordinates fills a square: no rank is spent before it is needed."""
    rows, columns = low_rank._corner(6)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]


def test_places_are_not_padded() -> None:
    """NumPy takes zeros at the end of a seed for nothing: a place is not the one that has a zero more."""
    first = [draws.stream(7, *place).random() for place in ((), (0,), (0, 0), (1,), (1, 0))]
    assert len(set(first)) == 5
