"""The command: folders that others open, comparisons, resumption, and what it says when it cannot."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import spectra
from spectra.errors import JournalBusy, MismatchError
from spectra.methods import load_adapter
from spectra.report.__main__ import main as report
from spectra.train import loop
from spectra.train.__main__ import main
from spectra.train.batches import held_out
from spectra.train.data import load_task
from spectra.train.evaluate import evaluate
from spectra.train.experiment import owned
from tests.train.saved import save_model, save_reviews

ROOT = Path(spectra.__file__).parent.parent
PEFT = ["lora", "rslora", "lora-plus", "adalora", "ia3", "prefix", "prompt"]


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """Its tables about heads that are fresh on purpose stay out of the output."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("base") / "bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv"))


@pytest.fixture
def flags(base: str, texts: str) -> list[str]:
    return ["--model", base, "--task", texts, "--steps", "4", "--batch", "8", "--length", "16", "--device", "cpu"]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def metrics_of(model: Any, tokenizer: Any, texts: str) -> dict[str, float]:
    """Metrics of a model on the held-out texts, by the trainer's own batches."""
    return evaluate(model, held_out(load_task(texts), tokenizer, size=8, length=16).once())


def test_full_leaves_a_model_that_transformers_and_the_report_open(
    flags: list[str], base: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "full"
    assert main(["--method", "full", *flags, "--out", str(out)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(out)
    record = record_of(out)
    assert metrics_of(model, AutoTokenizer.from_pretrained(out), texts) == pytest.approx(record["metrics"], rel=1e-6)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.use_cache
    assert record["parameters"]["trainable"] == record["parameters"]["total"] == model.num_parameters()
    assert record["bytes"]["result"] == (out / "model.safetensors").stat().st_size
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not (out / "checkpoint.pt").exists()
    assert "always the commonest label" in capsys.readouterr().out
    assert report([base, str(out), "--out", str(tmp_path / "report")]) == 0
    assert "classifier.weight" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("method", PEFT)
def test_an_adapter_opens_in_peft_with_the_metrics_that_were_told(
    method: str, flags: list[str], base: str, texts: str, tmp_path: Path
) -> None:
    assert main(["--method", method, *flags, "--lr", "0.05", "--out", str(tmp_path), "--quiet"]) == 0
    record = record_of(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    opened: Any = PeftModel.from_pretrained(plain, str(tmp_path))
    if method == "adalora":  # peft's own forward asks a loaded adapter for a penalty that only a trained one has
        opened = opened.base_model.model.eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # Sums of float32 in another order; the accuracy is a count.
    assert metrics_of(opened, tokenizer, texts)["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-4)
    assert record["trained_whole"] == ["classifier"]
    assert record["parameters"]["trainable"] < record["parameters"]["total"] / 2


@pytest.mark.parametrize("method", ["houlsby", "glora", "subspace"])
def test_a_method_that_peft_has_not_opens_here(
    method: str, flags: list[str], base: str, texts: str, tmp_path: Path
) -> None:
    assert main(["--method", method, *flags, "--lr", "0.05", "--out", str(tmp_path), "--quiet"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    load_adapter(model, tmp_path)
    told = pytest.approx(record_of(tmp_path)["metrics"]["loss"], rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert metrics_of(model, tokenizer, texts)["loss"] == told
    assert (tmp_path / "merged").exists() == (method != "houlsby")
    if method != "houlsby":
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert metrics_of(merged, tokenizer, texts)["loss"] == told


def test_qlora_holds_fewer_bytes_and_its_adapter_opens_in_peft(
    flags: list[str], base: str, texts: str, tmp_path: Path
) -> None:
    assert main(["--methods", "lora,qlora", *flags, "--lr", "0.05", "--out", str(tmp_path), "--quiet"]) == 0
    lora, qlora = (record_of(tmp_path / name) for name in ("lora", "qlora"))
    assert qlora["parameters"] == lora["parameters"]
    assert qlora["bytes"]["model"] < lora["bytes"]["model"]
    opened = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), str(tmp_path / "qlora")
    )
    # On the base before it was rounded to four bits: near, and not the same.
    told = metrics_of(opened, AutoTokenizer.from_pretrained(tmp_path / "qlora"), texts)["loss"]
    assert told == pytest.approx(qlora["metrics"]["loss"], rel=0.1)


def test_a_lora_adapter_in_the_report_and_merged(flags: list[str], base: str, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert main(["--method", "lora", "--rank", "2", "--merged", *flags, "--out", str(out), "--quiet"]) == 0
    # A model this small has a head large enough to count: the report wants to be told.
    assert report([base, str(out), "--out", str(tmp_path / "report"), "--allow-partial", "--quiet"]) == 0
    merged = load_file(out / "merged" / "model.safetensors")
    assert not any("lora" in name for name in merged)
    told = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert told["statuses"]["ok"] == 12


def test_a_decoder_learns_language(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    (tmp_path / "a.txt").write_text("the film was good and the plot was bright . " * 200)
    out = tmp_path / "out"
    said = ["--model", str(base), "--task", str(tmp_path / "a.txt"), "--steps", "12", "--batch", "4", "--length", "16"]
    assert main(["--method", "lora", *said, "--lr", "0.02", "--device", "cpu", "--out", str(out), "--quiet"]) == 0
    record = record_of(out)
    lines = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] < lines[0] - 0.1  # from about log 80
    assert record["metrics"]["perplexity"] == pytest.approx(2.718281828 ** record["metrics"]["loss"])
    assert record["task"]["majority"] is None
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    assert opened.peft_config["default"].task_type == "CAUSAL_LM"


def test_methods_side_by_side_start_from_one_head(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--methods", "full,lora,ia3", "--set", "lora.rank=2", "--lr", "full=1e-3"]
    assert main([*chosen, *flags, "--out", str(tmp_path), "--quiet"]) == 0
    text = capsys.readouterr().out
    with (tmp_path / "comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["full", "lora", "ia3"]
    assert [float(row["learning_rate"]) for row in rows] == [1e-3, 1e-3, 1e-2]
    assert [int(row["trainable"]) for row in rows] == [
        record_of(tmp_path / name)["parameters"]["trainable"] for name in ("full", "lora", "ia3")
    ]
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["method"] for row in told["rows"]] == ["full", "lora", "ia3"]
    assert (tmp_path / "comparison.md").read_text().splitlines()[-1] in text
    assert (tmp_path / "comparison.svg").read_text().count("ia3") == 1
    # Before the first update all methods answer alike, so that the first losses differ by dropout's draws alone.
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("lora", "ia3")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)


def test_one_seed_one_result_and_another_seed_another(flags: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main(["--method", "lora", *flags, "--seed", seed, "--out", str(tmp_path / name), "--quiet"]) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_an_interrupted_run_goes_on_to_the_same_adapter(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["--method", "lora", *flags, "--quiet"]
    assert main([*said, "--out", str(tmp_path / "whole")]) == 0
    update, done = loop._update, []

    def interrupted(run: Any, index: int) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        return update(run, index)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_update", interrupted)
        assert main([*said, "--out", str(tmp_path / "cut"), "--save-every", "1"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "training.json").exists()
    assert main([*said, "--out", str(tmp_path / "cut"), "--save-every", "1"]) == 0
    whole, cut = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_is_told_again_and_another_does_not_take_its_place(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["--method", "lora", *flags, "--out", str(tmp_path)]
    assert main([*said, "--quiet"]) == 0
    before = (tmp_path / "training.json").read_bytes()
    assert main(said) == 0
    assert "finished before" in capsys.readouterr().out
    assert main([*said, "--seed", "1"]) == MismatchError.exit_code
    assert "holds the result of another training (seed 0 then, 1 now)" in capsys.readouterr().err
    assert (tmp_path / "training.json").read_bytes() == before
    assert main([*said, "--seed", "1", "--no-resume", "--quiet"]) == 0
    assert record_of(tmp_path)["asked"]["seed"] == 1


def test_a_half_done_run_of_another_method_is_not_gone_on_with(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(run: Any, index: int) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return update(run, index)

    update = loop._update
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_update", stopped)
        assert main(["--method", "lora", *flags, "--save-every", "1", "--out", str(tmp_path), "--quiet"]) == 130
    capsys.readouterr()
    assert main(["--method", "ia3", *flags, "--save-every", "1", "--out", str(tmp_path)]) == MismatchError.exit_code
    assert "another" in capsys.readouterr().err


def test_two_runs_in_one_folder(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with owned(tmp_path, anew=False):
        assert main(["--method", "lora", *flags, "--out", str(tmp_path)]) == JournalBusy.exit_code
    assert "another run is training in it" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--methods", "full,lora,prompt", *flags, "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("memory of a step: weights") == 3
    assert text.count("activations at most") == 2
    assert not out.exists()


def test_json_alone_goes_to_stdout(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "lora", *flags, "--out", str(tmp_path), "--json", "-"]) == 0
    text, errors = capsys.readouterr()
    assert json.loads(text) == record_of(tmp_path)
    assert "LoRA at 12 modules" in errors


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ([], 2, "Give --method NAME, or --methods"),
        (["--method", "lora", "--methods", "full"], 2, "Give --method NAME, or --methods"),
        (["--methods", "lora,lora"], 2, "names a method twice"),
        (["--method", "lara"], 2, "no method is called 'lara'; did you mean 'lora'"),
        (["--method", "ia3", "--rank", "4"], 2, "no setting is called 'rank'"),
        (["--method", "lora", "--rank", "0"], 2, "rank of at least 1"),
        (["--method", "lora", "--rank", "99"], 2, "rank"),
        (["--method", "lora", "--lr", "fast"], 2, "write 1e-3"),
        (["--method", "lora", "--lr", "full=1e-3"], 2, "'full' is not among the methods"),
        (["--method", "lora", "--set", "rank"], 2, "write NAME=VALUE"),
        (["--method", "lora", "--target", "nowhere"], 2, "'nowhere' matches no module"),
        (["--method", "lora", "--target", "("], 2, "not a regular expression"),
        (["--method", "lora", "--labels", "pos,fresh"], 2, "unknown label 'fresh'"),
        (["--method", "lora", "--text-column", "words"], 2, "no column 'words'"),
        (["--method", "lora", "--model", "/nowhere/model"], 2, "no such folder"),
        (["--method", "houlsby", "--merged"], 2, "cannot be merged"),
        (["--method", "lora", "--json", "file"], 2, "--json takes only -"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    given: list[str], code: int, said: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, *given, "--out", str(tmp_path / "out"), "--quiet"]) == code
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "training.json").exists()


def test_a_loss_that_is_nan_stops_the_run(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "full", *flags, "--lr", "1e30", "--clip", "0", "--out", str(tmp_path), "--quiet"]) == 1
    assert "step 2" in capsys.readouterr().err
    assert not (tmp_path / "training.json").exists()


def test_out_is_needed(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "lora", *flags]) == 2
    assert "--out DIR is needed" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from spectra.train.__main__ import main; code = main(['--help']); "
        "loaded = {'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules); sys.exit(code or len(loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "python -m spectra.train --method lora" in done.stdout


@pytest.mark.slow
def test_two_processes_train_one_model(flags: list[str], texts: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "spectra.train",
            "--method", "lora", *flags[:-2], "--out", str(tmp_path / "out"), "--quiet",
        ],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| lora |") == 1
    assert record_of(tmp_path / "out")["parameters"]["trainable"] > 0
    assert torch.isfinite(
        load_file(tmp_path / "out" / "adapter_model.safetensors")[
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
        ]
    ).all()
