"""The command on a tiny model: its files, its exit codes, going on, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from spectra.__main__ import VERBS
from spectra.intrinsic.__main__ import main, smallest_that_reached
from spectra.intrinsic.objective import Objective
from spectra.intrinsic.result import IntrinsicDimension
from spectra.intrinsic.searching import SearchConfig
from spectra.intrinsic.trial import Trial
from spectra.report.__main__ import main as report
from tests.intrinsic.synthetic import Synthetic, found
from tests.train.saved import save_model, save_reviews


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("base") / "bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv"))


@pytest.fixture
def flags(base: str, texts: str) -> list[str]:
    small = ["--steps", "4", "--batch", "8", "--length", "16", "--device", "cpu", "--seeds", "1", "--rates", "1"]
    return ["--model", base, "--task", texts, *small]


def test_files_and_going_on(
    flags: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the help names is there and opens; the same command again trains nothing."""
    out = tmp_path / "d90"
    wanted = [*flags, "--projection", "kronecker", "--dimensions", "20,60", "--out", str(out), "--share", "0.5"]
    assert main(wanted) == 0
    told = capsys.readouterr().out
    result = IntrinsicDimension.load(out)
    assert result.sentence() in told
    assert [point.dimension for point in result.curve] == [20, 60]
    for name in ("intrinsic.html", "intrinsic.json", "trials.csv", "figures/intrinsic.svg", "figures/intrinsic.png"):
        assert (out / name).stat().st_size > 0
        assert name in told or name.startswith("figures")
    assert result.sentence().split(":")[0] in (out / "intrinsic.html").read_text()
    AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert (out / "subspace" / "adapter_config.json").exists()
    assert report([base, str(out / "model"), "--out", str(tmp_path / "rep"), "--allow-partial", "--quiet"]) == 0
    capsys.readouterr()

    kept = json.loads((out / "kept.json").read_text())
    saved: list[int] = []
    monkeypatch.setattr(Objective, "__call__", lambda self, ask: pytest.fail("trained again"))
    monkeypatch.setattr(Objective, "save", lambda self, dimension, **k: saved.append(dimension))
    pages = {path: path.read_bytes() for path in out.glob("**/*.*") if "model" not in str(path)}
    assert main([*wanted, "--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == result.verdict
    assert {path: path.read_bytes() for path in pages} == pages
    assert not saved

    # A model of another training, and one whose saving was cut short, are not taken for what was found.
    (out / "kept.json").write_text(json.dumps({**kept, "dimension": 1}))
    assert main([*wanted, "--quiet"]) == 0
    assert saved == [kept["dimension"]]
    assert not (out / "model").exists()
    assert json.loads((out / "kept.json").read_text()) == kept
    (out / "kept.json").unlink()
    assert main([*wanted, "--quiet"]) == 0
    assert saved == [kept["dimension"]] * 2


def test_another_search_in_the_folder(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [*flags, "--dimensions", "20", "--out", str(tmp_path), "--projection", "lora", "--no-model", "--quiet"]
    assert main([*wanted, "--dimensions", "40"]) == 0
    assert not (tmp_path / "model").exists()
    capsys.readouterr()
    assert main([*wanted, "--dimensions", "40", "--batch", "4"]) == 3
    assert "batch" in capsys.readouterr().err
    assert main([*wanted, "--dimensions", "40", "--lr", "1e-4"]) == 3
    assert "learning_rate" in capsys.readouterr().err
    assert main([*wanted, "--dimensions", "40", "--batch", "4", "--no-resume"]) == 0


def test_a_dry_run(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none"
    assert main([*flags, "--dry-run", "--out", str(out), "--head", "free"]) == 0
    told = capsys.readouterr().out
    assert "weights move" in told
    assert "1 of the head alone" in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--share", "1.5"], "share = 1.5"),
        (["--dimensions", "0"], "0"),
        (["--dimensions", "99999999"], "99"),
        (["--dimensions", "1.5"], "no whole number"),
        (["--dimensions", "nan"], "no whole number"),
        (["--dimensions", "inf"], "no whole number"),
        (["--start", "99999999"], "start"),
        (["--ratio", "1"], "ratio"),
        (["--rates", "a,b"], "numbers with commas"),
        (["--structure", "said", "--dimensions", "2"], "2"),
        (["--json", "file"], "takes only -"),
        (["--task", "/no/such/file.csv"], "no/such"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    flags: list[str], more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_out_is_needed(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert "--out DIR is needed" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from spectra.intrinsic.__main__ import main; main(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas', 'matplotlib')))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "fastfood" in told.stdout
    assert "intrinsic" in VERBS


def test_the_smallest_that_reached() -> None:
    """The smallest dimension whose mean reached wins, then the first seed: a lucky seed of a smaller one does not."""
    result = found(Synthetic(), SearchConfig(steps=100, seeds=3, dimensions=(16, 4096, 16384)))
    assert [point.mean >= result.target for point in result.curve] == [False, True, True]
    best = smallest_that_reached(result)
    assert best is not None
    assert best[:2] == (4096, 0)

    def changed(trial: Trial) -> Trial:
        metric = {(16, 1): 0.99, (4096, 0): result.target - 1e-3}.get((trial.ask.dimension or 0, trial.ask.seed))
        return trial if metric is None else replace(trial, metric=metric)

    result = replace(result, trials=tuple(map(changed, result.trials)))
    assert [point.mean >= result.target for point in result.curve] == [False, True, True]
    best = smallest_that_reached(result)
    assert best is not None
    assert best[:2] == (4096, 1)
    assert smallest_that_reached(replace(result, target=2.0)) is None
