"""Training in a subspace: θ₀ + Pθ_d through a real model, its gradients, SAID's scales, and what is saved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectra.errors import MismatchError, UnsafeCheckpoint, UsageError
from spectra.methods import LoRA, Subspace, inject, load_adapter, save_adapter
from spectra.methods.subspace import SubspaceCore, layer_of
from spectra.projections import PROJECTIONS, forward
from spectra.train.checkpoint import fingerprint
from spectra.train.config import TrainConfig
from spectra.train.optimizers import parameter_groups
from tests.methods.kinds import EVERYTHING, batch, in_float64, logits, make


def core_of(model: nn.Module) -> SubspaceCore:
    core = model.spectra_subspace
    assert isinstance(core, SubspaceCore)
    return core


def moved(model: nn.Module, seed: int = 0) -> None:
    """Coordinates and scales away from their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in core_of(model).parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def loss_of(model: nn.Module) -> torch.Tensor:
    return logits(model).square().mean()


@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("structure", ["did", "said"])
def test_weights_are_what_the_equation_says(kind: str, structure: str) -> None:
    """θ₀ + λ·Pθ_d by the projection's own product, in every parameter of a model, tied ones once."""
    plain = in_float64(make(kind))
    model = in_float64(make(kind))
    inject(model, "", Subspace(dimension=30, structure=structure))
    core = core_of(model)
    moved(model)
    logits(model)
    images = forward(core.projection, core.coordinates.detach())
    start = dict(plain.named_parameters(remove_duplicate=False))
    assert len(core.coordinates) == 30 - len(core.layers)
    for image, places in zip(images, core.places, strict=True):
        for name, key in places:
            scale = (
                1.0 if core.scales is None else float(core.scales.detach()[core.layers.index(layer_of(places[0][0]))])
            )
            weight = getattr(model.get_submodule(name), key)
            assert torch.allclose(weight, start[f"{name}.{key}"] + scale * image, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != "gradient"])
@pytest.mark.parametrize("structure", ["did", "said"])
def test_gradients(name: str, structure: str) -> None:
    """Through a whole model, by central differences in float64."""
    model = in_float64(make("bert"))
    inject(model, "", Subspace(dimension=25, projection=name, structure=structure))
    moved(model)
    loss_of(model).backward()
    for parameter in core_of(model).parameters():
        for index in (0, len(parameter) - 1):
            step, values = 1e-5, []
            for sign in (1, -1):
                parameter.data[index] += sign * step
                values.append(float(loss_of(model).detach()))
                parameter.data[index] -= sign * step
            # Truncation of order step², rounding of order ε/step: relative 1e-6 leaves room for both.
            assert float(parameter.grad[index]) == pytest.approx(
                (values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9
            )


def test_gradient_is_the_pulled_back_full_gradient() -> None:
    """Pᵀ∇θ, with ∇θ from the plain model at the same weights."""
    model, plain = in_float64(make("llama")), in_float64(make("llama"))
    inject(model, "", Subspace(dimension=17))
    loss_of(model).backward()
    loss_of(plain).backward()
    core = core_of(model)
    whole = torch.zeros(17, dtype=torch.float64)
    for piece, places in enumerate(core.places):
        name, key = places[0]
        whole += core.projection.adjoint(getattr(plain.get_submodule(name), key).grad, piece)
    assert torch.allclose(core.coordinates.grad, whole, rtol=1e-10, atol=1e-14)


def test_every_dimension_moves_the_model_as_far() -> None:
    """Columns have norm 1 and coordinates √(D/d) times the rate: Adam's first step is one length for every d."""
    lengths = []
    for dimension in (8, 64, 512):
        model = make("bert")
        inject(model, "", Subspace(dimension=dimension))
        (group,) = parameter_groups(model, 0.0)
        core = core_of(model)
        assert group["scale"] == pytest.approx(math.sqrt(core.total / dimension))
        core.coordinates.data.fill_(group["scale"])
        lengths.append(
            math.sqrt(sum(float(part.square().sum()) for part in forward(core.projection, core.coordinates.data)))
        )
        assert lengths[-1] == pytest.approx(math.sqrt(core.total), rel=0.15)


def test_nothing_is_computed_twice_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation fills the weights once for each value of the coordinates, whatever way these were changed."""
    model = make("bert")
    inject(model, "", Subspace(dimension=8))
    core, calls = core_of(model), []
    weights = core.weights
    monkeypatch.setattr(core, "weights", lambda: calls.append(True) or weights())
    with torch.no_grad():
        first = logits(model)
        assert torch.equal(logits(model), first)
        assert len(calls) == 0, "`inject` filled them"
        core.coordinates.data[3] += 1.0  # the version counter does not see this
        assert not torch.equal(logits(model), first)
        assert len(calls) == 1
    loss_of(model).backward()
    assert core.coordinates.grad is not None


def test_a_checkpoint_belongs_to_where_the_weights_started() -> None:
    """Coordinates alone are saved: on other weights they would be another model, so a resumed run is told."""
    prints = []
    for seed in (0, 0, 1):
        model = make("bert", seed)
        inject(model, "", Subspace(dimension=8))
        prints.append(fingerprint(model, TrainConfig(), batch(), 1))
    assert prints[0] == prints[1]
    assert prints[0]["frozen weights"] != prints[2]["frozen weights"]


def test_tied_weights_stay_tied() -> None:
    model = make("gpt2")
    inject(model, "", Subspace(dimension=8))
    core = core_of(model)
    assert any(len(places) == 2 for places in core.places)
    moved(model)
    logits(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    with core.plain():
        assert model.lm_head.weight is model.transformer.wte.weight
        assert isinstance(model.lm_head.weight, nn.Parameter)


def test_plain_is_the_model_that_others_save(tmp_path: Path) -> None:
    """Without our module, by its own names, with the moved weights; afterwards all is as before."""
    model, names = make("bert"), set(make("bert").state_dict())
    inject(model, "", Subspace(dimension=8, structure="said", projection="kronecker"))
    moved(model)
    expected = logits(model).detach()
    with core_of(model).plain():
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "model.safetensors")) <= names
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model).detach(), expected)
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(fresh), expected)


def test_a_copy_between_two_passes() -> None:
    """Torch copies no tensor with a graph; the copy trains by itself."""
    model = make("bert")
    inject(model, "", Subspace(dimension=8))
    moved(model)
    before = logits(model)  # its graph stands in the buffers now
    twin = copy.deepcopy(model)
    moved(twin, seed=1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_gradient_checkpointing() -> None:
    """Recomputed activations see weights that still carry their graph: the gradient is the same."""
    grads = []
    for checkpointing in (False, True):
        model = make("bert").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        inject(model, "", Subspace(dimension=8))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch()).logits.square().mean().backward()
        grads.append(core_of(model).coordinates.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-8)


def test_a_handful_of_numbers_is_the_adapter(tmp_path: Path) -> None:
    model = make("bert")
    injection = inject(model, "", Subspace(dimension=12, structure="said"), also="^classifier$", seed=4)
    assert injection.trainable == 12 + 3 * 32 + 3
    moved(model)
    save_adapter(injection, tmp_path, base_model="base", task_type="SEQ_CLS")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    ours = {name: tensor.numel() for name, tensor in stored.items() if "classifier" not in name}
    assert sorted(ours.values()) == [4, 8]
    fresh = make("bert")
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    other = make("llama")
    with pytest.raises(MismatchError):
        load_adapter(other, tmp_path)


def test_gradients_as_bases_cannot_be_a_seed(tmp_path: Path) -> None:
    model = make("bert")
    gradients = {name: torch.randn(tensor.shape) for name, tensor in model.named_parameters()}
    injection = inject(model, "", Subspace(dimension=40, projection="gradient", gradients=gradients))
    moved(model)
    assert loss_of(model).isfinite()
    with pytest.raises(UsageError, match="seed"):
        save_adapter(injection, tmp_path, base_model="base", task_type=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension": 0}, "at least 1"),
        ({"dimension": True}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"dimension": 10**7}, "above the"),
        ({"dimension": 4, "structure": "said"}, "at least 6 here, 5 layers' scales"),
        ({"dimension": 4, "projection": "lora"}, "one number a matrix"),
        ({"dimension": 50, "projection": "gradient"}, "needs gradients"),
        ({"structure": "dit"}, "none of did, said"),
        ({"projection": "fourier"}, "none of fastfood"),
        ({"head": "tail"}, "none of subspace, free"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    """A refusal leaves the model as it was: it takes the next method."""
    model = make("bert")
    before = logits(model)
    with pytest.raises(UsageError, match=message):
        inject(model, "", Subspace(**settings))
    assert torch.equal(logits(model), before)
    inject(model, "query$", LoRA(rank=2))


class Shared(nn.Module):
    """A weight in two modules, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.scale * self.embed(x))
        return found


@pytest.mark.parametrize("pattern", ["embed", "head"])
def test_a_tied_weight_moves_where_no_pattern_named_it(pattern: str, tmp_path: Path) -> None:
    model = Shared()
    injection = inject(model, pattern, Subspace(dimension=4))
    moved(model)
    x = torch.arange(5)
    expected = model(x).detach()
    assert torch.equal(model.embed.weight, model.head.weight)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.scale, nn.Parameter)
    save_adapter(injection, tmp_path, base_model="base", task_type=None)
    other = Shared()
    other.load_state_dict({name: core_start(model, name) for name in other.state_dict()})
    load_adapter(other, tmp_path)
    assert torch.allclose(other(x), expected, atol=1e-6)


def core_start(model: nn.Module, name: str) -> torch.Tensor:
    """What a tensor of the model was before it moved."""
    core = core_of(model)
    for piece, places in enumerate(core.places):
        if tuple(name.rpartition(".")[::2]) in places:
            return core.start(piece)
    return model.state_dict()[name]


def test_cast_after_injection() -> None:
    """P is computed in float32 even where the coordinates were cast with the model."""
    model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 30))
    inject(model, "", Subspace(dimension=50))
    moved(model)
    model.to(torch.bfloat16)
    model(torch.ones(1, 60, dtype=torch.bfloat16)).sum().backward()
    core = core_of(model)
    image = forward(core.projection, core.coordinates.detach().float())[0]
    assert torch.equal(model[0].weight, (core.start(0).float() + image).bfloat16())
    assert core.coordinates.grad is not None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"seed": -1}, UnsafeCheckpoint),
        ({"seed": "x"}, UnsafeCheckpoint),
        ({"seed": None}, UnsafeCheckpoint),
        ({"seed": 1.5}, UnsafeCheckpoint),
        ({"seed": True}, UnsafeCheckpoint),
        ({"dimension": 10**30}, UnsafeCheckpoint),
        ({"dimension": 29}, UnsafeCheckpoint),
        ({"dimension": "30"}, UnsafeCheckpoint),
        ({"structure": {}}, UnsafeCheckpoint),
        ({"structure": "said"}, MismatchError),
        ({"target_modules": ["embed"]}, MismatchError),
        ({"moved_parameters": 3}, MismatchError),
    ],
    ids=str,
)
def test_a_configuration_that_lies(changes: dict[str, object], error: type[Exception], tmp_path: Path) -> None:
    """Nothing of the size that it claims is made, and no other P is drawn in silence."""
    save_adapter(
        inject(nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3)), "", Subspace(dimension=30)),
        tmp_path,
        base_model="base",
        task_type=None,
    )
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    changes = {key: ["0"] if key == "target_modules" else value for key, value in changes.items()}
    path.write_text(json.dumps({**config, **changes, "gradients": {"0.weight": 1}}))
    with pytest.raises(error, match=str(tmp_path)):
        load_adapter(nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3)), tmp_path)


def test_another_vocabulary(tmp_path: Path) -> None:
    """The coordinates would fit, but P of more parameters is another one."""
    save_adapter(
        inject(nn.Sequential(nn.Embedding(20, 6)), "", Subspace(dimension=5)), tmp_path, base_model="b", task_type=None
    )
    with pytest.raises(MismatchError, match="move 120 parameters, and 180 of this Sequential"):
        load_adapter(nn.Sequential(nn.Embedding(30, 6)), tmp_path)


def test_merged_and_back_without_gradients() -> None:
    """Buffers that come back are filled anew, though the coordinates are what they were filled from before."""
    model = make("bert")
    injection = inject(model, "", Subspace(dimension=8))
    moved(model)
    with torch.no_grad():
        expected = logits(model)
        injection.merge()
        assert torch.equal(logits(model), expected)
        injection.unmerge()
        assert torch.equal(logits(model), expected)
