"""Adapters: what is read, what is refused and how it is said, and that a stranger's folder can do no harm."""

from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from spectra.checkpoints.adapter import Adapter, LowRankUpdate, RebasedUpdate, ReplacementUpdate
from spectra.checkpoints.adapter_config import AdapterConfig, parse_adapter_config
from spectra.checkpoints.adapter_keys import check_variants, understand_keys
from spectra.checkpoints.adapter_updates import find_updates
from spectra.checkpoints.module_patterns import PatternTable
from spectra.checkpoints.strict_json import parse_object
from spectra.errors import CheckpointNotFound, MismatchError, SpectraError, UnsafeCheckpoint, UnsupportedFormat

Q = "base_model.model.layers.0.q"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(out: int = 6, width: int = 5, rank: int = 2, path: str = Q) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_A.weight": random_tensor(rank, width, seed=1),
        f"{path}.lora_B.weight": random_tensor(out, rank, seed=2),
    }


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Adapter:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    return Adapter.open(folder)


def write_base(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    base = open_checkpoint(folder)
    assert isinstance(base, Checkpoint)
    return base


def test_it_is_a_lazy_picklable_mapping(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(), base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    again = pickle.loads(pickle.dumps(adapter))
    assert len(pickle.dumps(adapter)) < 10_000
    for one in (adapter, again, open_checkpoint(tmp_path / "adapter")):
        assert isinstance(one, Adapter)
        assert {name: tensor.tolist() for name, tensor in one.items()} == {k: v.tolist() for k, v in factors().items()}
        assert list(one.infos()) == list(one)
        assert one.info(f"{Q}.lora_A.weight").shape == (2, 5)
        assert (one.config.base_model, one.config.task_type, one.revision) == ("org/base", "CAUSAL_LM", None)
        assert {digest.name for digest in one.digests()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert adapter.ref == str(tmp_path / "adapter")


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_factors_agree_with_the_dense_delta(shape: tuple[int, int], tmp_path: Path) -> None:
    """B·A in float64 is ΔW to float64's rounding, in whichever orientation the base stores."""
    wide = {name: tensor.double() for name, tensor in factors().items()}
    adapter = write_adapter(tmp_path / "adapter", wide)
    base = write_base(tmp_path / "base", layers__0__q__weight=random_tensor(*shape))
    (update,) = adapter.updates(base.infos())
    assert isinstance(update, LowRankUpdate)
    assert (update.name, update.scale, update.transposed) == ("layers.0.q.weight", 2.0, shape == (5, 6))
    b, a = adapter.factors(update)
    delta = adapter.delta(update, base[update.name])
    assert delta.dtype == torch.float64
    assert (b.shape, a.shape, delta.shape) == ((shape[0], 2), (2, shape[1]), shape)
    torch.testing.assert_close(update.scale * b @ a, delta, rtol=1e-15, atol=1e-15)


def test_factors_keep_their_dtype_and_deltas_are_upcast_before_multiplying(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in factors().items()}
    adapter = write_adapter(tmp_path / "adapter", half)
    base = write_base(tmp_path / "base", layers__0__q__weight=random_tensor(6, 5, dtype=torch.bfloat16))
    (update,) = adapter.updates(base.infos())
    assert isinstance(update, LowRankUpdate)
    b, a = adapter.factors(update)
    assert b.dtype == a.dtype == torch.bfloat16
    delta = adapter.delta(update, base[update.name])
    assert delta.dtype == torch.float32
    # Products of bfloat16 entries are exact in float32; rounding in bfloat16 would be off by 2^-9.
    torch.testing.assert_close(delta.double(), update.scale * b.double() @ a.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ending", [".default", ".my-adapter"])
def test_keys_may_hold_the_adapters_name(ending: str, tmp_path: Path) -> None:
    named = {
        name.replace("lora_A", f"lora_A{ending}").replace("lora_B", f"lora_B{ending}"): t
        for name, t in factors().items()
    }
    adapter = write_adapter(tmp_path, named)
    (update,) = adapter.updates({"layers.0.q.weight": TensorInfo("layers.0.q.weight", "F32", (6, 5), "", 0)})
    assert update.name == "layers.0.q.weight"


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_a_prefix_of_the_base_is_found(prefix: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, factors())
    names = [f"{prefix}layers.{i}.q.weight" for i in range(3)]
    (update,) = adapter.updates({name: TensorInfo(name, "F32", (6, 5), "", 0) for name in names})
    assert update.name == names[0]


def test_square_layers_follow_their_siblings_and_then_the_configuration(tmp_path: Path) -> None:
    wide, square = factors(9, 6), factors(6, 6, path=f"{Q}uare")
    base = {"layers.0.q.weight": (6, 9), "layers.0.quare.weight": (6, 6)}
    infos = {name: TensorInfo(name, "F32", shape, "", 0) for name, shape in base.items()}
    both = write_adapter(tmp_path, wide | square, fan_in_fan_out=False).updates(infos)
    assert all(isinstance(update, LowRankUpdate) and update.transposed for update in both)
    for said in (True, False):
        (alone,) = write_adapter(tmp_path, square, fan_in_fan_out=said).updates(infos)
        assert isinstance(alone, LowRankUpdate)
        assert alone.transposed is said


def test_a_resized_embedding_is_rebased_on_the_common_rows(tmp_path: Path) -> None:
    path = "base_model.model.embed_tokens"
    table = random_tensor(10, 4, seed=3)
    tensors = {
        f"{path}.lora_embedding_A": random_tensor(2, 10, seed=1),
        f"{path}.lora_embedding_B": random_tensor(4, 2, seed=2),
        f"{path}.base_layer.weight": table,
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    base = write_base(tmp_path / "base", embed_tokens__weight=random_tensor(8, 4))
    (update,) = adapter.updates(base.infos())
    assert isinstance(update, RebasedUpdate)
    whole = table + 2.0 * (tensors[f"{path}.lora_embedding_B"] @ tensors[f"{path}.lora_embedding_A"]).T
    torch.testing.assert_close(adapter.delta(update, base[update.name]), whole[:8] - base[update.name])
    torch.testing.assert_close(adapter.merged(base)["embed_tokens.weight"], whole)


def test_a_tied_tensor_is_merged_under_both_names(tmp_path: Path) -> None:
    shared = random_tensor(6, 5)
    torch.save({"embed_tokens.weight": shared, "lm_head.weight": shared}, tmp_path / "base.pt")
    base = open_checkpoint(tmp_path / "base.pt", trust_pickle=True)
    assert isinstance(base, Checkpoint)
    merged = write_adapter(tmp_path / "adapter", factors(path="base_model.model.lm_head")).merged(base)
    assert not torch.equal(merged["lm_head.weight"], shared)
    assert torch.equal(merged["embed_tokens.weight"], merged["lm_head.weight"])
    saved = {"base_model.model.lm_head.weight": random_tensor(6, 5, seed=9)} | factors(
        path="base_model.model.embed_tokens"
    )
    with pytest.raises(UnsupportedFormat, match=r"stores once|twice"):
        write_adapter(tmp_path / "both", saved | factors(path="base_model.model.lm_head")).merged(base)


def test_a_replaced_head_of_another_shape_says_both(tmp_path: Path) -> None:
    tensors = factors() | {"base_model.model.score.weight": random_tensor(3, 5)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["score"])
    base = write_base(tmp_path / "base", layers__0__q__weight=random_tensor(6, 5), score__weight=random_tensor(2, 5))
    update = adapter.updates(base.infos())[1]
    assert isinstance(update, ReplacementUpdate)
    with pytest.raises(MismatchError, match=r"'score.weight' has shape \(3, 5\) in the adapter and \(2, 5\)"):
        adapter.delta(update, base["score.weight"])
    assert adapter.merged(base)["score.weight"].shape == (3, 5)


BASE = {"layers.0.q.weight": TensorInfo("layers.0.q.weight", "F32", (6, 5), "", 0)}


@pytest.mark.parametrize(
    ("tensors", "fields", "error", "said"),
    [
        (factors(rank=3), {}, MismatchError, r"rank 2.*have 3: .*\(3, 5\).*\(6, 3\)"),
        (factors(), {"rank_pattern": {r"layers\.0\.q": 4}}, MismatchError, "rank 4"),
        (factors() | {f"{Q}.lora_B.weight": random_tensor(6, 3)}, {}, MismatchError, r"\(2, 5\).*\(6, 3\)"),
        (factors(out=7), {}, MismatchError, r"\(7, 5\).*\(6, 5\)"),
        (factors() | {f"{Q}.lora_B.weight": random_tensor(6)}, {}, MismatchError, r"\(6,\)"),
        (factors(path="base_model.model.layers.0.qq"), {}, MismatchError, "layers.0.q.weight"),
        ({f"{Q}.lora_A.weight": random_tensor(2, 5)}, {}, MismatchError, "lora_B"),
        ({f"{Q}.lora_B.weight": random_tensor(2, 5)}, {}, MismatchError, "lora_A"),
        (factors() | {f"{Q}.lora_C.weight": random_tensor(2, 5)}, {}, UnsupportedFormat, "lora_C"),
        (factors() | {f"{Q}.lora_A.a.b.weight": random_tensor(2, 5)}, {}, UnsupportedFormat, "not understood"),
        (factors() | factors(path="base_model.model.k"), {}, MismatchError, "k.weight"),
        (factors() | {"surplus": random_tensor(2)}, {}, UnsupportedFormat, "surplus"),
        (factors() | {f"{Q}.hada_w1_a": random_tensor(2, 5)}, {}, UnsupportedFormat, "LoHa"),
        ({f"{Q}.lokr_w1": random_tensor(2, 5)}, {}, UnsupportedFormat, "LoKr"),
        ({"lora_unet_q.lora_down.weight": random_tensor(2, 5)}, {}, UnsupportedFormat, "kohya"),
        (factors() | {f"{Q}.lora_E": random_tensor(2, 1)}, {}, UnsupportedFormat, "AdaLoRA"),
        (factors(), {"use_dora": True}, MismatchError, "lora_magnitude_vector"),
        (factors() | {f"{Q}.lora_magnitude_vector": random_tensor(6)}, {}, MismatchError, "use_dora is false"),
        (
            factors() | {f"{Q}.lora_magnitude_vector": random_tensor(7)}, {"use_dora": True}, MismatchError,
            r"\(7,\).*6 outputs",
        ),
        (factors() | {f"{Q}.lora_B.bias": random_tensor(6)}, {}, MismatchError, "lora_bias is false"),
        (factors() | {f"{Q}.lora_B.bias": random_tensor(5)}, {"lora_bias": True}, MismatchError, r"\(5,\)"),
        (factors() | {f"{Q}.lora_B.bias": random_tensor(6)}, {"lora_bias": True}, MismatchError, "layers.0.q.bias"),
        ({name: t.int() for name, t in factors().items()}, {}, UnsupportedFormat, "I32"),
        (factors() | {f"{Q}.lora_A.default.weight": random_tensor(2, 5)}, {}, UnsafeCheckpoint, "twice"),
        (factors() | factors(path="layers.0.q"), {}, UnsafeCheckpoint, "twice"),
        (factors() | factors(path="module.layers.0.q"), {}, MismatchError, "wrappers"),
        (
            {f"{Q}.lora_A.one.weight": random_tensor(2, 5), f"{Q}.lora_B.two.weight": random_tensor(6, 2)}, {},
            UnsupportedFormat, "several adapters",
        ),
        (factors(), {"peft_type": "LOHA"}, UnsupportedFormat, "LOHA.*merge_and_unload"),
        (factors(), {"peft_type": None}, UnsupportedFormat, "peft_type"),
        (factors(), {"init_lora_weights": "pissa_niter_4"}, UnsupportedFormat, "pissa"),
        (factors(), {"target_parameters": ["w"]}, UnsupportedFormat, "target_parameters"),
        (factors(), {"trainable_token_indices": [1]}, UnsupportedFormat, "trainable tokens"),
        (factors(), {"r": 2.0}, UnsafeCheckpoint, "r is 2.0"),
        (factors(), {"r": True}, UnsafeCheckpoint, "positive integer"),
        (factors(), {"r": -1}, UnsafeCheckpoint, "positive integer"),
        (factors(), {"lora_alpha": "16"}, UnsafeCheckpoint, "lora_alpha"),
        (factors(), {"lora_alpha": float("inf")}, UnsafeCheckpoint, "lora_alpha"),
        (factors(), {"lora_alpha": float("nan")}, UnsafeCheckpoint, "lora_alpha"),
        (factors(), {"use_rslora": 1}, UnsafeCheckpoint, "use_rslora"),
        (factors(), {"bias": "some"}, UnsafeCheckpoint, "bias"),
        (factors(), {"rank_pattern": []}, UnsafeCheckpoint, "rank_pattern"),
        (factors(), {"rank_pattern": {"q": 0}}, UnsafeCheckpoint, "rank_pattern.*q"),
        (factors(), {"alpha_pattern": {"q": None}}, UnsafeCheckpoint, "alpha_pattern.*q"),
        (factors(), {"alpha_pattern": {"q(": 1}}, UnsafeCheckpoint, r"'q\(' is no regular expression"),
        (factors(), {"alpha_pattern": {"(?=q)q": 1}}, UnsupportedFormat, "needs more than groups"),
        (factors(), {"alpha_pattern": {r"(q)\2": 1}}, UnsupportedFormat, "needs more than groups"),
        (factors(), {"alpha_pattern": {"q" * 2000: 1}}, UnsafeCheckpoint, "2000 characters"),
        (factors(), {"alpha_pattern": {"((q{99}){99}){99}": 1}}, UnsafeCheckpoint, "repeats too much"),
        (factors(), {"modules_to_save": "score"}, UnsafeCheckpoint, "modules_to_save"),
        (factors(), {"target_modules": 3}, UnsafeCheckpoint, "target_modules"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    tensors: dict[str, torch.Tensor], fields: dict[str, Any], error: type[SpectraError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        write_adapter(tmp_path, tensors, **fields).updates(BASE)


def test_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, factors(path="base_model.model.layers.0.experts.1.w1"))
    stack = TensorInfo("layers.0.experts.w1", "F32", (2, 6, 5), "", 0)
    with pytest.raises(UnsupportedFormat, match=r"stacks its experts in 'layers\.0\.experts\.w1'"):
        adapter.updates({stack.name: stack})


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not valid JSON"), (b"[]", "not a JSON object"), (b"\xff", "not valid JSON"), (b"[" * 10**5, "nested|JSON")],
)
def test_a_malformed_configuration_names_the_file(content: bytes, said: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(UnsafeCheckpoint, match=f"adapter_config.json.*({said})"):
        Adapter.open(tmp_path)


def test_missing_large_and_pickled_files(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    (tmp_path / "adapter_config.json").write_bytes(b" " * 10_000_001)
    with pytest.raises(UnsafeCheckpoint, match="10000001 bytes"):
        Adapter.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"no adapter_model\.safetensors"):
        Adapter.open(tmp_path)
    torch.save(factors(), tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="trust-pickle"):
        Adapter.open(tmp_path)
    assert Adapter.open(tmp_path, trust_pickle=True).updates(BASE)[0].name == "layers.0.q.weight"


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", ".*.*.*.*.*.*b", "(.*)*b", "(a*)*(a*)*b", "a{1,99}a{1,99}b", "(a|a)" * 30],
)
def test_no_pattern_hangs(pattern: str) -> None:
    start = time.perf_counter()
    for name in ("a" * 200, "a." * 500, "a" * 20_000):
        try:
            PatternTable({pattern: 1}, source="test").find(name)
        except UnsafeCheckpoint:
            continue
    # Backtracking would take 2^200 steps; the bound on steps is about a second for each of the three names.
    assert time.perf_counter() - start < 20


VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 10**40, 2.5, 1e308, float("nan"), float("inf"), "", "LORA", "lora", "IA3", "all",
    "pissa", [], ["q"], [1], [[]], {}, {"q": 2}, {"q": "x"}, {"(a+)+": 2}, {"[": 1}, {"": 2}, {"q|": 4}, {"^q$": 2},
    {"\ud800": 2}, "x" * 5000, "ADALORA",
]  # fmt: skip
FIELDS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "lora_bias", "modules_to_save", "target_modules", "init_lora_weights", "target_parameters", "task_type", "surplus",
]  # fmt: skip
PIECES = [
    "base_model", "model", "layers", "0", "q", "experts", "lm_head", "embed_tokens", "module", "base_layer", "default",
    "modules_to_save", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight",
    "bias", "", "hada_w1_a", "\u202e", "a" * 3000, "lora_E", "original_module", "ia3_l", "ranknum",
]  # fmt: skip


def fuzz(cases: int, *, seed: int) -> dict[str, int]:
    """Random configurations and key sets, near enough to real ones to get far; returns how each case ended."""
    chance = random.Random(seed)
    ends: dict[str, int] = {}
    for _ in range(cases):
        fields = CONFIG | {
            chance.choice(FIELDS): chance.choice(VALUES) for _ in range(chance.choice([0, 0, 1, 1, 2, 5]))
        }
        data = json.dumps(fields).encode()
        if chance.random() < 0.1:
            data = data[: chance.randrange(len(data))] + bytes([chance.randrange(256)])
        start = time.perf_counter()
        end, said = "read", ""
        try:
            config = parse_adapter_config(parse_object(data, "fuzz", unique=False), source="fuzz")
            infos, base = _random_keys(chance), _random_base(chance)
            keys = understand_keys(infos, source="fuzz", peft_type=config.peft_type)
            check_variants(keys, config, source="fuzz")
            updates = find_updates(keys, config, infos, base, source="fuzz")
            assert len({update.name for update in updates}) == len(updates)
        except SpectraError as error:
            end, said = type(error).__name__, str(error)
        assert len(said) < 20_000
        assert time.perf_counter() - start < 1, (data, end)
        ends[end] = ends.get(end, 0) + 1
    return ends


def _random_keys(chance: random.Random) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}

    def put(name: str, *shape: int) -> None:
        wild = chance.random() < 0.05
        dims = tuple(chance.choice([0, 1, 2, 5, 2**40]) for _ in range(chance.randrange(5))) if wild else shape
        infos[name] = TensorInfo(name, chance.choice(["F32"] * 30 + ["BF16", "I64", "F4"]), dims, "", 0)

    for i in range(chance.randrange(3)):
        path = chance.choice(
            [f"base_model.model.layers.{i}.q", f"layers.{i}.q", "base_model.model.lm_head", "experts.0.w"]
        )
        put(f"{path}.lora_A.weight", 2, 5)
        put(f"{path}.lora_B.weight", 6, 2)
        if chance.random() < 0.2:
            put(f"{path}.{chance.choice(['lora_magnitude_vector', 'lora_B.bias', 'bias', 'base_layer.weight'])}", 6)
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        put(
            ".".join(chance.choices(PIECES, k=chance.randrange(1, 7))),
            *chance.choices([1, 2, 5, 6], k=chance.randrange(4)),
        )
    return infos


def _random_base(chance: random.Random) -> dict[str, TensorInfo]:
    prefix = chance.choice(["", "model.", "module."])
    names = [f"{prefix}layers.{i}.q.{last}" for i in range(3) for last in ("weight", "bias")]
    names += [".".join(chance.choices(PIECES, k=chance.randrange(1, 5))) for _ in range(3)]
    chosen = chance.sample(names, chance.choice([9, 9, 9, chance.randrange(9)]))
    return {name: TensorInfo(name, "F32", (6, 5) if name.endswith("weight") else (6,), "", 0) for name in chosen}


def test_only_our_own_errors_come_out() -> None:
    ends = fuzz(600, seed=0)
    # Cases must get past the first check to be worth anything.
    assert ends["read"] > 60
    assert {"MismatchError", "UnsupportedFormat", "UnsafeCheckpoint"} <= set(ends)


@pytest.mark.slow
def test_only_our_own_errors_come_out_of_many() -> None:
    assert sum(fuzz(50_000, seed=1).values()) == 50_000


def test_scales_are_peft_s() -> None:
    config = AdapterConfig(
        source="t", r=4, lora_alpha=8, rank_pattern={"q": 16, "layers.0.q": 2}, alpha_pattern={"k": 0.0}
    )
    scales = config.scales()
    assert (scales.rank("layers.0.q"), scales.rank("q"), scales.rank("xq")) == (16, 16, 4)
    assert (scales.scale("a.q"), scales.scale("k"), scales.scale("v")) == (0.5, 0.0, 2.0)
