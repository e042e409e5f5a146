"""The command that takes moments: equal to sums by hand, over the texts asked for, fit for an extraction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

from spectra.errors import CheckpointNotFound
from spectra.extract import extract
from spectra.moments import load_moments
from spectra.train.batches import batches
from spectra.train.data import load_task
from spectra.train.models import load_model
from spectra.train.moments import main, moments_of
from tests.train.tiny import bert, llama

WORDS = [f"w{i}" for i in range(95)]


def tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"bert": bert(), "tuned": bert(), "llama": llama()}
    with torch.no_grad():
        for i, parameter in enumerate(made["tuned"].parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts of unlike length: batches are padded."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    draw = torch.Generator().manual_seed(0)
    lines = ["text,label"]
    for i in range(40):
        words = torch.randint(95, (3 + i % 9,), generator=draw).tolist()
        lines.append(" ".join(f"w{j}" for j in words) + f",{i % 2}")
    path.write_text("\n".join(lines))
    return path


def by_hand(model: torch.nn.Module, name: str, rows: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Σ xxᵀ of one map, a text at a time and without padding."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.eval()
    with torch.no_grad():
        for ids in rows:
            model(input_ids=ids[None])
    handle.remove()
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).double()
    return x.T @ x, len(x)


def test_sums_over_the_texts_asked_for(models: dict[str, Path], texts: Path) -> None:
    task = load_task(str(texts))
    loaded = load_model(str(models["bert"]), task)
    found = moments_of(loaded, task, limit=11, length=8, batch=4)
    stream = batches(task, loaded.tokenizer, size=1, length=8)
    rows = [torch.tensor(stream.rows[i]) for i in range(11)]
    for name in ("bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense", "bert.pooler.dense"):
        total, count = by_hand(loaded.model, name, rows)
        assert found[name].count == count
        # Products are of float32, and a padded row is summed in another order.
        assert torch.allclose(found[name].total, total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))
    assert not [name for name in found if "embeddings" in name or name.startswith("classifier")]


def test_windows_of_a_language_task(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text(" ".join(WORDS * 20))
    task = load_task(str(path))
    loaded = load_model(str(models["llama"]), task)
    found = moments_of(loaded, task, limit=5, length=16, batch=2)
    assert found["model.layers.0.self_attn.q_proj"].count == 5 * 16
    assert torch.equal(found["model.layers.1.mlp.gate_proj"].total, found["model.layers.1.mlp.up_proj"].total)
    assert "lm_head" in found


def test_from_texts_to_a_weighted_adapter(
    models: dict[str, Path], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "moments.safetensors"
    words = ["--model", str(models["bert"]), "--task", str(texts), "--out", str(file), "--limit", "30"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "moments of 13 linear maps" in told
    assert str(file) in told
    assert len(load_moments(file)) == 13
    before = file.read_bytes()
    assert main([*words, "--quiet"]) == 0
    assert file.read_bytes() == before
    found = extract(models["bert"], models["tuned"], out=tmp_path / "out", rank=2, moments=file)
    assert found.totals["weighted_matrices"] == 13
    assert found.totals["weighted_error"] < found.totals["weighted_error_of_plain"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--limit", "0"], 2, "--limit"),
        (["--length", "1"], 2, "--length"),
        (["--device", "warp"], 2, "cannot be used"),
        (["--out", "{folder}"], 2, "name a file"),
        (["--out", "{folder}/none/file"], 2, "in a folder that is there"),
        (["--task", "none.csv"], 2, "no such file"),
        (["--model", "{folder}/none"], CheckpointNotFound.exit_code, "no such folder"),
    ],
)
def test_bad_input(
    words: list[str],
    code: int,
    told: str,
    models: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--model": str(models["bert"]), "--task": str(texts), "--out": str(tmp_path / "m")}
    given |= {words[0]: words[1].format(folder=tmp_path)}
    assert main([word for pair in given.items() for word in pair]) == code
    assert told in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_an_interrupt_leaves_no_file(
    models: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectra.moments.second_moments", interrupted)
    assert main(["--model", str(models["bert"]), "--task", str(texts), "--out", str(tmp_path / "m")]) == 130
    assert "begins anew" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
