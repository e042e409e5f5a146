"""Activation weighting: the optimum against Eckart–Young and random rivals, moments against all inputs kept."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.advice import advise
from spectra.errors import CheckpointNotFound, NonFiniteMatrix, UnsafeCheckpoint, UsageError
from spectra.moments import Moments, load_moments, save_moments, second_moments
from spectra.theory.allocation import allocate
from spectra.weighted import weighted_error, weighted_spectrum, weighted_truncation


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(width: int, count: int, *, rank: int | None = None, seed: int = 1) -> torch.Tensor:
    """Correlated inputs of very unlike sizes, in a subspace where `rank` is given."""
    mix = normal(rank or width, width, seed=seed) * torch.logspace(0, -3, rank or width, dtype=torch.float64)[:, None]
    return normal(count, rank or width, seed=seed + 1) @ mix


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x, len(x))


CASES = [(7, 10, None), (10, 7, None), (8, 12, 5), (12, 8, 3), (6, 9, 1)]


@pytest.mark.parametrize(("rows", "cols", "rank_of_inputs"), CASES)
def test_error_is_the_mean_over_the_inputs(rows: int, cols: int, rank_of_inputs: int | None) -> None:
    delta, x = normal(rows, cols), inputs(cols, 40, rank=rank_of_inputs)
    other = normal(rows, cols, seed=5)
    mean = float(((x @ (delta - other).T) ** 2).sum(dim=1).mean())
    assert weighted_error(delta, other, moments_of(x)) == pytest.approx(math.sqrt(mean), rel=1e-9)


@pytest.mark.parametrize(("rows", "cols", "rank_of_inputs"), CASES)
def test_optimum_is_that_of_eckart_and_young(rows: int, cols: int, rank_of_inputs: int | None) -> None:
    """‖XΔᵀ‖ over the inputs themselves, without their moments: the best of rank r loses its last singular values."""
    delta, x = normal(rows, cols), inputs(cols, 40, rank=rank_of_inputs)
    moments = moments_of(x)
    values = torch.linalg.svdvals(x @ delta.T) / math.sqrt(len(x))
    for rank in range(min(rows, cols) + 1):
        found = weighted_truncation(delta, moments, rank)
        assert found.left.shape[1] <= rank
        best = float(torch.linalg.norm(values[rank:]))
        # Eigenvalues of R below 1e-15 of the largest are not seen, so errors below √1e-15 of ‖ΔR^½‖ are rounding.
        room = 1e-7 * float(torch.linalg.norm(values))
        assert weighted_error(delta, found.left @ found.right, moments) == pytest.approx(best, rel=1e-9, abs=room)
        assert found.error == pytest.approx(best / float(torch.linalg.norm(values)), rel=1e-9, abs=1e-7)


def test_no_other_matrix_of_the_rank_does_better() -> None:
    delta, x = normal(7, 10), inputs(10, 40)
    moments = moments_of(x)
    found = weighted_truncation(delta, moments, 3)
    least = weighted_error(delta, found.left @ found.right, moments)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    assert weighted_error(delta, (u[:, :3] * s[:3]) @ vh[:3], moments) > 1.01 * least  # plain truncation is another
    for seed in range(50):
        size = 10.0 ** -(seed % 5)
        left, right = found.left + size * normal(7, 3, seed=seed), found.right + size * normal(3, 10, seed=seed + 99)
        assert weighted_error(delta, left @ right, moments) > least


def test_where_inputs_take_every_direction_the_optimum_is_the_one_with_the_inverse_root() -> None:
    """QERA's form, SVD_r(ΔR^½)R^−½."""
    delta, x = normal(7, 10), normal(60, 10, seed=3)
    moments = moments_of(x)
    values, vectors = torch.linalg.eigh(moments.matrix)
    root = (vectors * values.sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd(delta @ root, full_matrices=False)
    found = weighted_truncation(delta, moments, 4)
    theirs = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    assert torch.allclose(found.left @ found.right, theirs, rtol=0.0, atol=1e-10)  # R of condition below 10


def test_where_they_do_not_it_is_nearer_than_the_one_with_the_pseudoinverse() -> None:
    delta, x = normal(8, 12), inputs(12, 40, rank=5)
    moments = moments_of(x)
    root = moments.root
    u, s, vh = torch.linalg.svd(delta @ root, full_matrices=False)
    theirs = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.pinv(root)
    found = weighted_truncation(delta, moments, 3)
    ours = found.left @ found.right
    assert weighted_error(delta, theirs, moments) == pytest.approx(weighted_error(delta, ours, moments), rel=1e-6)
    assert float(torch.linalg.norm(delta - ours)) < 0.99 * float(torch.linalg.norm(delta - theirs))


def test_no_directions_are_kept_that_no_input_takes() -> None:
    delta, x = normal(8, 12), inputs(12, 40, rank=2)
    found = weighted_truncation(delta, moments_of(x), 6)
    assert found.left.shape == (8, 2)
    assert found.error < 1e-7


def test_white_inputs_give_the_plain_spectrum() -> None:
    delta = normal(7, 10)
    found = weighted_spectrum(delta, Moments(3.0 * torch.eye(10), 3))
    assert np.allclose(found.values, torch.linalg.svdvals(delta).numpy(), rtol=1e-12)


@pytest.mark.parametrize(("rows", "cols", "rank_of_inputs"), CASES)
def test_spectrum_is_what_the_inputs_see(rows: int, cols: int, rank_of_inputs: int | None) -> None:
    delta, x = normal(rows, cols), inputs(cols, 40, rank=rank_of_inputs)
    found = weighted_spectrum(delta, moments_of(x))
    values = torch.linalg.svdvals(x @ delta.T / math.sqrt(len(x))).numpy()
    assert found.shape == (rows, cols)
    assert found.complete
    assert np.allclose(found.values, values[: len(found.values)], rtol=1e-9, atol=1e-7 * values[0])
    assert found.frobenius == pytest.approx(weighted_error(delta, torch.zeros_like(delta), moments_of(x)), rel=1e-9)
    assert advise(found)["energy_99"].value <= (rank_of_inputs or min(rows, cols))
    assert allocate([found.values**2], [rows + cols], 10 * (rows + cols)).tolist()[0] <= min(rows, cols)


def test_inputs_of_nothing() -> None:
    delta, moments = normal(3, 4), Moments(torch.zeros(4, 4), 5)
    assert weighted_spectrum(delta, moments).frobenius == 0.0
    found = weighted_truncation(delta, moments, 2)
    assert found.left.shape == (3, 0)
    assert math.isnan(found.error)


@pytest.mark.parametrize("small", [1e-3, 1e-5])
def test_inputs_a_thousandth_as_large_still_count(small: float) -> None:
    """Massive activations do not hide the others: R has eigenvalues 1 and 1e-6, or 1e-10."""
    moments = Moments(torch.diag(torch.tensor([1.0, small**2], dtype=torch.float64)), 1)
    delta = torch.diag(torch.tensor([1.0, 1.0 / small], dtype=torch.float64))
    assert weighted_spectrum(delta, moments).values == pytest.approx([1.0, 1.0], rel=1e-6)


def test_what_does_not_match_is_refused() -> None:
    moments = Moments(torch.eye(4), 1)
    with pytest.raises(UsageError, match=r"\(4, 3\).*4 entries"):
        weighted_spectrum(torch.ones(4, 3), moments)
    with pytest.raises(UsageError, match="its approximation"):
        weighted_error(torch.ones(3, 4), torch.ones(4, 4), moments)
    with pytest.raises(UsageError, match="rank = -1"):
        weighted_truncation(torch.ones(3, 4), moments, -1)
    with pytest.raises(NonFiniteMatrix):
        weighted_spectrum(torch.full((3, 4), math.nan), moments)
    for total, count in ((torch.ones(3, 4), 1), (torch.eye(3), 0), (torch.ones(3), 1)):
        with pytest.raises(UsageError, match="square matrix"):
            Moments(total, count)
    with pytest.raises(UsageError, match="symmetric"):
        Moments(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1)
    with pytest.raises(NonFiniteMatrix, match="some input"):
        Moments(torch.tensor([[math.inf]]), 1)


# Moments of a model -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two maps of one input, one of another, and one called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.query, self.key = nn.Linear(6, 4), nn.Linear(6, 4)
        self.output = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.drop(self.words(input_ids))
        return self.output(input=torch.tanh(self.query(hidden) + self.key(hidden)))


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 11, (2, 7), generator=generator) for _ in range(count)]
    masks = [(torch.arange(7) < torch.tensor([[7], [3 + i]])).long() for i in range(count)]
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def test_moments_are_those_of_all_inputs_kept() -> None:
    torch.manual_seed(0)
    model = Attention().train()
    found = second_moments(model, iter(batches()), ["key", "output", "query"])
    assert list(found) == ["query", "key", "output"]  # the model's order
    assert model.training
    model.eval()
    hidden = torch.cat([model.words(b["input_ids"])[b["attention_mask"].bool()] for b in batches()]).double()
    read = torch.tanh(model.query(hidden.float()) + model.key(hidden.float())).double()
    for name, x in (("query", hidden), ("key", hidden), ("output", read)):
        assert found[name].count == len(x) == 7 * 3 + 3 + 4 + 5
        # Products of float32: each entry is a sum of 33 products.
        assert torch.allclose(found[name].matrix, (x.T @ x).detach() / len(x), rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sums_are_of_float64() -> None:
    """In float32, 2²⁴ + 1 is 2²⁴."""
    model = nn.Linear(1, 1)
    wrapped = nn.Sequential(model)
    data = [torch.tensor([[4096.0]]), *(torch.tensor([[1.0]]) for _ in range(50))]
    found = second_moments(wrapped, data, ["0"])["0"]
    assert float(found.total) == 2.0**24 + 50


def test_products_are_of_float64_where_the_inputs_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    x = torch.tensor([[1.0, 1e-9]], dtype=torch.float64) + 1.0 / 3.0
    assert torch.equal(second_moments(model, [x], "0")["0"].matrix, x.T @ x)


def test_half_precision_is_widened_before_it_is_multiplied() -> None:
    model = nn.Sequential(nn.Linear(1, 1)).bfloat16()
    x = torch.full((1000, 1), 3.0, dtype=torch.bfloat16)
    assert float(second_moments(model, [(x,)], "0")["0"].total) == 9000.0


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertModel(config).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), "attention_mask": mask}
    found = second_moments(model, [batch], r"(query|value|intermediate\.dense|pooler\.dense)$")
    assert len(found) == 7
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(2):
        x = states[layer][mask.bool()].double()
        for role in ("query", "value"):
            r = found[f"encoder.layer.{layer}.attention.self.{role}"]
            assert r.count == 6
            assert torch.allclose(r.matrix, x.T @ x / 6, rtol=1e-5, atol=1e-6)
    assert found["pooler.dense"].count == 2  # one a text: the mask is of another shape


def test_progress_counts_batches() -> None:
    seen: list[int] = []
    second_moments(Attention(), batches(), ["query"], progress=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["query", "nowhere"], "no module nowhere"),
        ([], "names none"),
        ("nowhere", "'nowhere' is found in no name"),
        ("(", "no regular expression"),
        (["words"], "words reads no vectors"),
        (["unused"], "never called unused"),
    ],
)
def test_modules_without_moments_are_refused(modules: Any, said: str) -> None:
    model = Attention().train()
    with pytest.raises(UsageError, match=said):
        second_moments(model, batches(), modules)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2))
    with pytest.raises(UsageError, match="no map of"):
        second_moments(model, [torch.ones(1, 3, 5)], ["0"])


def test_no_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="no batches"):
        second_moments(Attention(), [], ["query"])


def test_an_input_that_is_not_finite_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NonFiniteMatrix):
        second_moments(model, [torch.tensor([[1.0, math.nan]])], "0")


# Files ------------------------------------------------------------------------------------------------------------


def test_moments_are_read_back_as_they_were(tmp_path: Path) -> None:
    found = second_moments(Attention(), batches(), ["query", "output"])
    path = save_moments(found, tmp_path / "moments.safetensors")
    again = load_moments(path)
    assert {name: (one.count, one.total.tolist()) for name, one in again.items()} == {
        name: (one.count, one.total.tolist()) for name, one in found.items()
    }
    before = path.read_bytes()
    save_moments(dict(reversed(found.items())), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["moments.safetensors"]


def test_files_that_hold_no_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        load_moments(tmp_path / "nowhere")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.eye(2)}, other)
    with pytest.raises(UnsafeCheckpoint, match="other"):
        load_moments(other)
    save_file({"a": torch.ones(2, 3)}, other, {"spectra.moments": '{"a": 1}'})
    with pytest.raises(UnsafeCheckpoint, match="square"):
        load_moments(other)
    save_file({"a": torch.eye(2)}, other, {"spectra.moments": "[]"})
    with pytest.raises(UnsafeCheckpoint):
        load_moments(other)
    other.write_bytes(other.read_bytes()[:-3])
    with pytest.raises(UnsafeCheckpoint):
        load_moments(other)


def test_moments_of_a_file_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Opening reads none of them, and none that was read is kept."""
    found = {name: moments_of(inputs(6, 20, seed=i)) for i, name in enumerate("abc")}
    path = save_moments(found, tmp_path / "moments.safetensors")
    stored = load_moments(path)
    assert (len(stored), sorted(stored)) == (3, ["a", "b", "c"])
    one = weakref.ref(stored["b"].total)
    assert one() is None
    assert torch.equal(stored["b"].total, found["b"].total)
    with pytest.raises(KeyError):
        stored["d"]


def test_moments_that_are_none_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    save_file({"a": torch.eye(2), "b": torch.ones(2, 2).triu()}, path, {"spectra.moments": '{"a": 1, "b": 1}'})
    stored = load_moments(path)
    assert stored["a"].count == 1
    with pytest.raises(UnsafeCheckpoint, match="not hold moments"):
        stored["b"]
