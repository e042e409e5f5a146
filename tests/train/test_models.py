"""Models from folders, with a head from the seed; what is refused; and where each method goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spectra.errors import (
    CheckpointError,
    CheckpointNotFound,
    MismatchError,
    SpectraError,
    UnsupportedFormat,
    UsageError,
)
from spectra.methods import inject
from spectra.train.data import Split, Task
from spectra.train.methods import METHODS, build_method, settings_of, spec_of, target_pattern
from spectra.train.models import load_model, resolve
from tests.train.saved import save_model

CLASSES = Task(
    "toy", "classification", Split(("good", "bad", "dull"), (1, 0, 0)), Split(("fine",), (1,)), ("no", "yes", "so")
)
LANGUAGE = Task("toy", "language", Split(("good bad",)), Split(("fine",)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in ("bert", "bert-lm", "llama", "gpt2")}


def test_a_classifier_with_the_tasks_labels_and_a_head_from_the_seed(folders: dict[str, Path]) -> None:
    one, two, other = (load_model(str(folders["bert"]), CLASSES, seed=seed) for seed in (0, 0, 1))
    assert one.family == "bert"
    assert one.task_type == "SEQ_CLS"
    assert one.fresh == ("classifier",)
    assert one.model.config.id2label == {0: "no", 1: "yes", 2: "so"}
    assert one.reference == str(folders["bert"].resolve())
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    stored = load_file(folders["bert"] / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(one.model.bert.get_parameter(name), stored[name])


def test_loading_leaves_the_callers_random_numbers_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(str(folders["bert"]), CLASSES)
    assert torch.equal(torch.rand(3), expected)


def test_a_pooler_that_a_language_model_lacks_is_fresh_too(folders: dict[str, Path]) -> None:
    assert load_model(str(folders["bert-lm"]), CLASSES).fresh == ("classifier", "bert.pooler")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_model_language_and_classify(family: str, folders: dict[str, Path]) -> None:
    speaker = load_model(str(folders[family]), LANGUAGE)
    assert (speaker.task_type, speaker.fresh) == ("CAUSAL_LM", ())
    judge = load_model(str(folders[family]), CLASSES)
    assert (judge.task_type, judge.fresh) == ("SEQ_CLS", ("score",))
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    judge.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 1]))  # knows its padding


def test_a_head_of_another_task_is_drawn_anew_and_one_of_the_same_shape_goes_on(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = load_model(str(folders["bert"]), CLASSES, seed=3)
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), CLASSES, seed=4)
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)
    assert again.fresh == ("classifier",)
    two = Task("two", "classification", CLASSES.train, CLASSES.test, ("no", "yes"))
    assert load_model(str(tmp_path), two).model.classifier.weight.shape == (2, 32)


def test_the_weights_of_another_model_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in folders["bert"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="not those of the BertForSequenceClassification that its configuration"):
        load_model(str(other), CLASSES)
    tensors = load_file(folders["bert"] / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"] = torch.zeros(32, 50)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"1 tensors are missing or of another shape, .*layer.1.output.dense"):
        load_model(str(other), CLASSES)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({}, CheckpointNotFound, "holds no config.json"),
        ({"adapter_config.json": "{}"}, UnsupportedFormat, "an adapter, not a model"),
        ({"config.json": "{"}, CheckpointError, "cannot be read"),
        ({"config.json": "{}"}, CheckpointError, "names no model_type"),
        (
            {"config.json": '{"model_type": "bert"}', "pytorch_model.bin": "x"},
            UnsupportedFormat,
            "no .safetensors file",
        ),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": "x"}, CheckpointError, "cannot be loaded"),
        ({"config.json": '{"model_type": "nonesuch"}', "model.safetensors": "x"}, CheckpointError, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_model(files: dict[str, str], error: type[SpectraError], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=said):
        load_model(str(tmp_path), CLASSES)


def test_names_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no such folder"):
        resolve(str(tmp_path / "absent"))
    with pytest.raises(UnsupportedFormat, match="example 'rotten-tomatoes' is no model that can be trained"):
        resolve("rotten-tomatoes")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(UnsupportedFormat, match="training needs the model's folder"):
        resolve(str(tmp_path / "model.safetensors"))
    assert resolve("org/name@v2").reference == "org/name@v2"
    with pytest.raises(CheckpointNotFound, match="org/none: no such folder, no example"):
        load_model("org/none", CLASSES, offline=True)


MATCHED = {  # two layers: matrices; keys, values and the feed-forward's inside; ends of the halves
    "bert": {"linear": 12, "keys": 6, "ends": 4, "embedding": 1},
    "llama": {"linear": 14, "keys": 6, "ends": 4, "embedding": 1},
    "gpt2": {"linear": 8, "keys": 4, "ends": 4, "embedding": 1},
}


@pytest.mark.parametrize("family", MATCHED)
@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.place != "everything"])
def test_every_method_goes_where_its_paper_puts_it(name: str, family: str, folders: dict[str, Path]) -> None:
    loaded = load_model(str(folders[family]), CLASSES)
    settings = {"rank": 2} if "rank" in spec_of(name).fields() else {}
    pattern = target_pattern(name, loaded.family, loaded.model)
    injection = inject(loaded.model, pattern, build_method(name, settings), also=f"^{loaded.fresh[0]}$")
    assert injection.matched == MATCHED[family][spec_of(name).place]
    assert injection.ignored == ()


def test_full_trains_every_parameter(folders: dict[str, Path]) -> None:
    loaded = load_model(str(folders["bert"]), CLASSES)
    injection = inject(loaded.model, target_pattern("full", "bert", loaded.model), build_method("full", {}))
    assert injection.trainable == injection.total


def test_an_unknown_architecture_gets_its_layers_linear_maps_or_asks() -> None:
    model = nn.Sequential()
    blocks = [nn.ModuleDict({"mix": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)]
    model.add_module("blocks", nn.ModuleList(blocks))
    model.add_module("head", nn.Linear(4, 2))
    pattern = target_pattern("lora", "nonesuch", model)
    assert inject(model, pattern, build_method("lora", {"rank": 2})).matched == 2
    with pytest.raises(UsageError, match="where ia3 goes in a 'nonesuch' model is not known here: give --target"):
        target_pattern("ia3", "nonesuch", model)
    with pytest.raises(UsageError, match="no numbered layers"):
        target_pattern("lora", "nonesuch", nn.Sequential())


def test_settings_are_read_as_the_fields_kinds() -> None:
    given = [("rank", "4"), ("lora.rslora", "yes"), ("adalora.beta1", "0.9"), ("lora.init", "gaussian")]
    assert settings_of(["lora", "adalora"], given) == {
        "lora": {"rank": 4, "rslora": True, "init": "gaussian"},
        "adalora": {"rank": 4, "beta1": 0.9},
    }
    assert settings_of(["adalora"], [("init_rank", "9")]) == {"adalora": {"init_rank": 9}}
    assert build_method("rslora", {}).rslora is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("bottleneck", "4"), "no setting is called 'bottleneck': lora has rank, alpha"),
        (("ia3.rank", "4"), "'ia3' is not among the methods lora"),
        (("rank", "four"), "rank=four: a whole number is needed"),
        (("rslora", "maybe"), "rslora=maybe: true or false is needed"),
        (("alpha", "x"), "alpha=x: a number is needed"),
    ],
)
def test_settings_that_cannot_be(given: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of(["lora"], [given])


def test_an_unknown_method_is_told_beside_near_ones() -> None:
    with pytest.raises(UsageError, match="no method is called 'adalara'; did you mean 'adalora'"):
        spec_of("adalara")


def test_the_folder_is_only_read(folders: dict[str, Path]) -> None:
    before = {file.name: file.read_bytes() for file in folders["bert"].iterdir()}
    load_model(str(folders["bert"]), CLASSES)
    assert {file.name: file.read_bytes() for file in folders["bert"].iterdir()} == before
    assert "num_labels" not in json.loads(before["config.json"])
