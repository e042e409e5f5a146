"""Merged checkpoints: against plain arithmetic and peft, in any order the same bytes, and what bad input gets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from spectra.compose import Merge, merged
from spectra.compose.model import RECORD, compose
from spectra.compose.pairs import Interference, interference
from spectra.compose.products import Product
from spectra.errors import MismatchError, NonFiniteMatrix, UsageError

TENSORS = {"a.weight": (12, 8), "b.weight": (8, 12), "a.bias": (12,), "scalar": ()}


def save(path: Path, seed: int, *, base: dict[str, torch.Tensor] | None = None, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: ((0.0 if base is None else base[name].float()) + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in TENSORS.items()
    }
    tensors["steps"] = torch.tensor(seed)
    save_file(tensors, path)
    return tensors


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path], list[dict[str, torch.Tensor]]]:
    base = save(tmp_path / "base.safetensors", 0)
    paths = [tmp_path / f"task{k}.safetensors" for k in (1, 2, 3)]
    return tmp_path / "base.safetensors", paths, [base, *(save(p, k, base=base) for k, p in enumerate(paths, 1))]


def test_task_arithmetic(tmp_path: Path, models) -> None:
    base, paths, (w, *tasks) = models
    found = compose(base, paths, out=tmp_path / "m", coefficients=[0.5, -1.0, 2.0], progress=False)
    out = load_file(tmp_path / "m" / "base.safetensors")
    for name in TENSORS:
        moved = sum(a * (t[name].double() - w[name].double()) for a, t in zip((0.5, -1.0, 2.0), tasks, strict=True))
        assert torch.allclose(out[name].double(), w[name].double() + moved, atol=1e-7), "an ulp of float32"
    assert torch.equal(out["steps"], w["steps"])
    rows = {row.name: row for row in found.tensors}
    assert rows["steps"].status == "unchanged"
    assert rows["a.weight"].tasks == pytest.approx(
        [float((t["a.weight"] - w["a.weight"]).norm()) for t in tasks], rel=1e-6
    )
    record = json.loads((tmp_path / "m" / RECORD).read_text())
    assert record["coefficients"] == [0.5, -1.0, 2.0]
    assert len(record["tensors"]) == len(TENSORS) + 1
    assert 0.0 < found.merge_loss < 1e-5
    assert "3 of" in repr(found) or "4 of" in repr(found)


@pytest.mark.parametrize("method", ["sum", "ties", "dare", "tsv", "knots", "iso"])
def test_any_order_of_tasks(tmp_path: Path, models, method: str) -> None:
    """The same bytes, but for methods by singular vectors, whose rounding the order may change."""
    base, paths, _ = models
    first = None
    for k, order in enumerate(itertools.permutations(range(3))):
        out = tmp_path / f"m{k}"
        compose(base, [paths[i] for i in order], out=out, how=Merge(method, density=0.5), progress=False)
        tensors = load_file(out / "base.safetensors")
        first = first or tensors
        for name in tensors:
            if method in ("sum", "ties", "dare"):
                assert torch.equal(tensors[name], first[name])
            else:
                assert torch.allclose(tensors[name].float(), first[name].float(), atol=1e-6)


def test_methods_on_matrices(tmp_path: Path, models) -> None:
    """Every matrix is what `merged` makes of the dense updates; vectors take the sum where there are no directions."""
    base, paths, (w, *tasks) = models
    compose(base, paths, out=tmp_path / "m", how=Merge("tsv", scale=0.5), progress=False)
    out = load_file(tmp_path / "m" / "base.safetensors")
    updates = [Product.of(t["a.weight"] - w["a.weight"]) for t in tasks]
    expected = w["a.weight"].double() + merged(updates, Merge("tsv", scale=0.5)).dense()
    assert torch.allclose(out["a.weight"].double(), expected, atol=1e-7)
    assert torch.allclose(out["a.bias"], w["a.bias"] + 0.5 * sum(t["a.bias"] - w["a.bias"] for t in tasks), atol=1e-6)


def test_include(tmp_path: Path, models) -> None:
    base, paths, (w, *_) = models
    found = compose(base, paths, out=tmp_path / "m", include="^b", progress=False)
    out = load_file(tmp_path / "m" / "base.safetensors")
    assert torch.equal(out["a.weight"], w["a.weight"])
    assert not torch.equal(out["b.weight"], w["b.weight"])
    assert {row.status for row in found.tensors if not row.name.startswith("b")} == {"left out"}


def test_shards(tmp_path: Path) -> None:
    """Shards and index are the base's own; configuration goes along."""
    folder = tmp_path / "base"
    folder.mkdir()
    w = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    for k, name in enumerate(w, 1):
        save_file({name: w[name]}, folder / f"model-0000{k}-of-00002.safetensors")
    weight_map = {name: f"model-0000{k}-of-00002.safetensors" for k, name in enumerate(w, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({name: tensor + 1.0 for name, tensor in w.items()}, tmp_path / "t.safetensors")
    compose(folder, [tmp_path / "t.safetensors"], out=tmp_path / "m", progress=False)
    assert json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"] == weight_map
    assert (tmp_path / "m" / "config.json").exists()
    for name, file in weight_map.items():
        assert torch.allclose(load_file(tmp_path / "m" / file)[name], w[name] + 1.0)


def test_adapters_as_peft(tmp_path: Path) -> None:
    """peft's concatenation of two adapters gives the same model; its `linear` has cross terms as large as the sum."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=20, **sizes))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]), adapter_name="one")
    tuned.add_adapter("two", LoraConfig(r=2, lora_alpha=2, target_modules=["query", "dense"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path)
    inputs, weights = [tmp_path / "one", tmp_path / "two"], [0.7, 0.4]
    compose(tmp_path / "base", inputs, out=tmp_path / "m", coefficients=weights, progress=False)
    ours = dict(BertModel.from_pretrained(tmp_path / "m").named_parameters())
    base = dict(BertModel.from_pretrained(tmp_path / "base").named_parameters())
    apart = []
    for kind in ("cat", "linear"):
        tuned.add_weighted_adapter(["one", "two"], weights, kind, combination_type=kind)
        for name, module in tuned.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                theirs = module.get_delta_weight(kind).detach()
                moved = (ours[f"{name}.weight"] - base[f"{name}.weight"]).detach()
                if kind == "cat":
                    assert torch.allclose(moved, theirs, atol=1e-7), name
                else:
                    apart.append(float((moved - theirs).norm() / moved.norm()))
    assert min(apart) > 0.2


def test_overflow_of_the_dtype(tmp_path: Path) -> None:
    base = {"w": torch.full((4, 4), 60000.0, dtype=torch.float16)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": torch.full((4, 4), 65000.0, dtype=torch.float16)}, tmp_path / "t.safetensors")
    inputs = [tmp_path / "t.safetensors"] * 2
    with pytest.raises(NonFiniteMatrix, match=r"w: 16 of 16 merged entries leave the range of F16"):
        compose(tmp_path / "base.safetensors", inputs, out=tmp_path / "m", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "t.safetensors"}, "nothing half is left"


def test_a_failure_in_the_second_shard_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for k in (1, 2):
        value = torch.full((2, 2), 60000.0 if k == 2 else 1.0, dtype=torch.float16)
        save_file({f"w{k}": value}, folder / f"model-0000{k}-of-00002.safetensors")
    weight_map = {f"w{k}": f"model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"w1": torch.ones(2, 2), "w2": torch.full((2, 2), 65000.0)}, tmp_path / "t.safetensors")
    for _ in range(2):
        with pytest.raises(NonFiniteMatrix, match="w2"):
            compose(folder, [tmp_path / "t.safetensors"] * 2, out=tmp_path / "m", progress=False)
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / ".m.part").exists()


def test_cosine_of_whole_updates(tmp_path: Path) -> None:
    """Matrices that only one of the two changes count in its norm."""
    base = {name: torch.zeros(4, 4) for name in "abc"}
    save_file(base, tmp_path / "base.safetensors")
    same = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for k, other in enumerate("bc"):
        save_file(base | {"a": same, other: 3.0 * same}, tmp_path / f"{k}.safetensors")
    found = interference([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "base.safetensors")
    assert found.matrix("cosine")[0, 1] == pytest.approx(0.1, rel=1e-6)
    assert Interference.load(found.save(tmp_path / "i")).matrix("cosine")[0, 1] == found.matrix("cosine")[0, 1]
    with pytest.raises(UsageError, match="no measure"):
        found.matrix("harm")


def test_merge_loss_in_half_precision(tmp_path: Path) -> None:
    """An update of a hundredth of an ulp is lost whole, and the row says so."""
    base = {"w": torch.ones(8, 8, dtype=torch.bfloat16)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": torch.ones(8, 8) + 1e-4}, tmp_path / "t.safetensors")
    found = compose(tmp_path / "base.safetensors", [tmp_path / "t.safetensors"], out=tmp_path / "m", progress=False)
    assert found.tensors[0].merge_loss == pytest.approx(1.0)


def test_bad_input(tmp_path: Path, models) -> None:
    base, paths, _ = models
    with pytest.raises(UsageError, match="2 coefficients for 3 updates"):
        compose(base, paths, out=tmp_path / "m", coefficients=[1.0, 2.0], progress=False)
    with pytest.raises(UsageError, match="0 coefficients for 0 updates"):
        compose(base, [], out=tmp_path / "m", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="holds something"):
        compose(base, paths, out=tmp_path / "full", progress=False)
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError):
        compose(base, [tmp_path / "other.safetensors"], out=tmp_path / "m", progress=False)


def test_tied_weights_that_an_update_unties(tmp_path: Path) -> None:
    """One stored tensor cannot become two: said, and not decided by which comes last."""
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "base.safetensors")
    tuned = {"model.embed_tokens.weight": embedding + 1.0, "lm_head.weight": embedding + 2.0}
    save_file(tuned, tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match=r"stores once as model\.embed_tokens\.weight"):
        compose(tmp_path / "base.safetensors", [tmp_path / "t.safetensors"], out=tmp_path / "m", progress=False)


def test_a_quantized_base_is_written_plain(tmp_path: Path) -> None:
    """Its weights are read dequantized; a configuration that called them codes would not load."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    folder = tmp_path / "base"
    folder.mkdir()
    stored = {"w": codes} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert", "quantization_config": {"load_in_4bit": true}}')
    plain = functional.dequantize_4bit(codes, state)
    save_file({"w": plain + 1.0}, tmp_path / "t.safetensors")
    compose(folder, [tmp_path / "t.safetensors"], out=tmp_path / "m", progress=False)
    assert torch.allclose(load_file(tmp_path / "m" / "model.safetensors")["w"], plain + 1.0, atol=1e-6)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"model_type": "bert"}


def test_a_pickled_base_becomes_what_loaders_look_for(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save({"w": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "t.safetensors")
    compose(folder, [tmp_path / "t.safetensors"], out=tmp_path / "m", trust_pickle=True, progress=False)
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["w"], torch.ones(2, 2))
