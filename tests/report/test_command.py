"""The command: options, exit codes, where text goes, and what it costs to ask for help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file

import spectra.__main__
import spectra.comparison
from spectra.command import run
from spectra.errors import CheckpointNotFound, JournalMismatch, MismatchError, SpectraError, UnsafeCheckpoint
from spectra.report.__main__ import _coloured, command, default_out, main

ROOT = Path(spectra.__file__).parent.parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two small checkpoints: two matrices and a vector changed, one matrix did not."""
    folder = tmp_path_factory.mktemp("pair")
    draw = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.query.weight": torch.randn(24, 16, generator=draw) for i in range(3)}
    base["layer.0.query.bias"] = torch.randn(24, generator=draw)
    tuned = {name: t + 0.01 * torch.randn(t.shape, generator=draw) for name, t in base.items()}
    tuned["layer.2.query.weight"] = base["layer.2.query.weight"].clone()
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / f"{name}.safetensors")
    return str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


@pytest.fixture(scope="module")
def broken(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tuned checkpoint with a NaN."""
    from safetensors.torch import load_file

    tensors = load_file(pair[1])
    tensors["layer.1.query.weight"][0, 0] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "tuned.safetensors"
    save_file(tensors, path)
    return str(path)


def called(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "spectra.report", *arguments], capture_output=True, text=True, cwd=cwd, env=variables
    )


def test_a_report_from_two_checkpoints(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, "--out", str(tmp_path / "out")]) == 0
    text, errors = capsys.readouterr()
    assert "by role" in text
    assert "2 of 3 matrices changed" in " ".join(text.split())
    assert str(tmp_path / "out" / "report.html") in text
    assert errors == ""
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["statuses"] == {"ok": 2, "unchanged": 1, "vector": 1}


def test_a_second_run_goes_on_and_gives_the_same_bytes(pair: tuple[str, str], tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        assert main([*pair, "--out", str(tmp_path), "--quiet"]) == 0
        kept.append({p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".html", ".json", ".svg")})
    assert kept[0] == kept[1]


def test_other_flags_under_an_old_journal_are_refused(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, "--out", str(tmp_path), "--quiet"]) == 0
    assert main([*pair, "--out", str(tmp_path), "--quiet", "--seed", "1"]) == JournalMismatch.exit_code
    assert "error: " in capsys.readouterr().err
    assert main([*pair, "--out", str(tmp_path), "--quiet", "--seed", "1", "--no-resume"]) == 0


def test_json_alone_goes_to_stdout(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", str(tmp_path), "--json", "-"]) == 0
    text, errors = capsys.readouterr()
    assert json.loads(text)["schema"] == 1
    assert text == (tmp_path / "summary.json").read_text()
    assert "verdict" in errors


def test_quiet_is_the_verdict_and_the_files(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, "--out", str(tmp_path), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "by role" not in text
    assert "report.html" in text


def test_a_nan_ends_with_one_and_a_report(
    pair: tuple[str, str], broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([pair[0], broken, "--out", str(tmp_path)]) == 1
    assert "could not be analysed" in capsys.readouterr().err
    assert "nonfinite" in (tmp_path / "report.html").read_text()


def test_a_dry_run_writes_nothing(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "4 of 4 tensors match" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_options_reach_the_comparison(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def plan(base: str, tuned: str, **options: Any) -> None:
        seen.update(options, base=base, tuned=tuned)
        raise MismatchError("stop here")

    monkeypatch.setattr(spectra.comparison, "plan", plan)
    flags = ["--rank", "7", "--include", "a|b", "--exclude", "c", "--max-memory", "500MiB", "--device", "cpu"]
    flags += ["--seed", "5", "--offline", "--trust-pickle", "--allow-partial"]
    assert main(["a", "b", *flags]) == 3
    assert seen == {
        "base": "a", "tuned": "b", "rank": 7, "exact": False, "include": "a|b", "exclude": "c", "device": "cpu",
        "max_memory": 500 * 1024**2, "seed": 5, "trust_pickle": True, "offline": True, "allow_partial": True,
        "quantized": "auto",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rank", "3", "--exact"], "give one of them"),
        (["--json", "summary.json"], "takes only -"),
        (["--json", "-", "--dry-run"], "no summary"),
        (["--max-memory", "lots"], "no amount of memory"),
        (["--max-memory", "0GB"], "no amount of memory"),
        (["--max-memory", "-5"], "no amount of memory"),
        (["--include", "("], "no regular expression"),
        (["--rank", "0"], "--rank"),
        (["--energy", "0.5"], "--energy says how large the adapter of --export-lora DIR is to be"),
        (["--export-rank", "4"], "--export-rank says how large"),
        (["--parameters", "400"], "--parameters says how large"),
        (["--export-lora", "c", "--energy", "0.5", "--export-rank", "4"], "--energy and --export-rank both say"),
        (["--export-lora", "c", "--export-rank", "0"], "--export-rank"),
        (["--export-lora", "c", "--base", "d"], "compares two or more"),
        (["--export-lora", "c", "--also", "d"], "compares two or more"),
        (["--seed", "-1"], "--seed"),
        (["--nonsense"], "No such option"),
    ],
)
def test_usage_errors_end_with_two(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a", "b", *flags]) == 2
    text, errors = capsys.readouterr()
    assert told in errors
    assert text == ""


@pytest.mark.parametrize("error", [CheckpointNotFound, MismatchError, UnsafeCheckpoint, SpectraError])
def test_every_error_is_one_clean_message(
    error: type[SpectraError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise error("no tensor \x1b[2J\u202ehere\nlook again")

    monkeypatch.setattr(spectra.comparison, "plan", plan)
    assert main(["a", "b"]) == error.exit_code
    assert capsys.readouterr().err == "error: no tensor \\x1b[2J\\u202ehere\nlook again\n"
    assert main(["a", "b", "-v"]) == error.exit_code
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(spectra.comparison, "plan", plan)
    assert main(["a", "b"]) == 1
    told = capsys.readouterr().err
    assert "this is a bug in spectra" in told
    assert "-v" in told
    assert told.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spectra.comparison, "plan", plan)
    assert main(["a", "b"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def adapter_of(folder: Path) -> dict[str, Any]:
    """Its record, where a whole adapter stands there."""
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in folder.iterdir()}
    record: dict[str, Any] = json.loads((folder / "extraction.json").read_text())
    return record


def test_an_adapter_beside_the_report(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default 90 % of the energy of the whole model, with the parameters that the report says it takes."""
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    assert main([*pair, "--out", str(out), "--export-lora", str(adapter)]) == 0
    record, text = adapter_of(adapter), capsys.readouterr().out
    assert record["totals"]["matrices_energy_kept"] >= 0.9
    shares = json.loads((out / "summary.json").read_text())["directions"]["shares"]
    assert record["totals"]["factor_parameters"] == next(s for s in shares if s["share"] == 0.9)["global_parameters"]
    assert "adapter: the fewest parameters that keep 90\xa0% of the energy of the whole model" in text
    assert str(adapter / "adapter_model.safetensors") in text
    assert text.index("report.html") < text.index("adapter:")


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        (["--export-rank", "3"], 3 * 2 * 40),
        (["--parameters", "200"], 200),
        (["--energy", "1"], 2 * 16 * 40),
    ],
)
def test_the_size_of_the_adapter(flags: list[str], parameters: int, pair: tuple[str, str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert main([*pair, "--out", str(tmp_path / "out"), "--quiet", "--export-lora", str(adapter), *flags]) == 0
    assert adapter_of(adapter)["totals"]["factor_parameters"] == parameters


def test_a_factored_update_is_exported_too(pair: tuple[str, str], tmp_path: Path) -> None:
    first, second = tmp_path / "r4", tmp_path / "r2"
    assert main([*pair, "--out", str(tmp_path / "a"), "-q", "--export-lora", str(first), "--export-rank", "4"]) == 0
    again = [pair[0], str(first), "--out", str(tmp_path / "b"), "-q", "--export-lora", str(second)]
    assert main([*again, "--export-rank", "2"]) == 0
    assert {t["rank"] for t in adapter_of(second)["tensors"] if t["treatment"] == "factors"} == {2}
    budgets = json.loads((tmp_path / "b" / "summary.json").read_text())["directions"]["budgets"]
    assert [b["uniform_rank"] for b in budgets] == [1, 2, 4]


def test_json_stays_alone_on_stdout_beside_an_adapter(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "out"), "--json", "-", "--export-lora", str(tmp_path / "adapter")]
    assert main([*pair, *flags]) == 0
    text, errors = capsys.readouterr()
    assert json.loads(text)["schema"] == 1
    assert "adapter: " in errors


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--energy", "1.5"], "at most 1"),
        (["--parameters", "3"], "one direction of the cheapest matrix"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_before_the_work(
    flags: list[str], told: str, pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*pair, "--out", str(out), "--export-lora", str(tmp_path / "adapter"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_report_and_adapter_share_no_folder(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "one", tmp_path / "one" / "report"):
        assert main([*pair, "--out", str(out), "--export-lora", str(tmp_path / "one")]) == 2
        assert "a folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()
    assert main([*pair, "--out", str(tmp_path / "r"), "-q", "--export-lora", str(tmp_path / "r" / "adapter")]) == 0
    adapter_of(tmp_path / "r" / "adapter")


def test_two_adapters_are_no_one_update_to_export(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base" / "model.safetensors"  # a folder of its own: an adapter names its base by its folder
    base.parent.mkdir()
    base.write_bytes(Path(pair[0]).read_bytes())
    sides = [str(tmp_path / name) for name in "ab"]
    for side, rank in zip(sides, "12", strict=True):
        assert (
            main([str(base), pair[1], "--out", str(tmp_path / "r"), "-q", "--export-lora", side, "--export-rank", rank])
            == 0
        )
    assert main([*sides, "--out", str(tmp_path / "two"), "--export-lora", str(tmp_path / "c")]) == 2
    assert "compares two or more" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_a_dry_run_tells_of_the_adapter(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    assert main([*pair, "--out", str(tmp_path / "out"), "--export-lora", str(adapter), "--dry-run"]) == 0
    assert f"the adapter would go to {adapter}: the fewest parameters" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_nan_is_told_of_by_report_and_adapter(
    pair: tuple[str, str], broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([pair[0], broken, "--out", str(tmp_path / "out"), "--export-lora", str(tmp_path / "adapter")]) == 1
    errors = capsys.readouterr().err
    assert "some tensors could not be analysed" in errors
    assert "error: layer.1.query.weight" in errors
    adapter_of(tmp_path / "adapter")


def test_an_interrupted_export_leaves_the_report_and_says_so(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectra.extract.extraction.measure_model", interrupted)
    assert main([*pair, "--out", str(tmp_path / "out"), "--export-lora", str(tmp_path / "adapter")]) == 130
    assert "the report is whole; the adapter was not written" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "adapter").exists()


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "out/report.html")

    monkeypatch.setattr(spectra.comparison, "plan", plan)
    assert main(["a", "b"]) == 1
    assert capsys.readouterr().err == "error: No space left on device: out/report.html\n"


def test_the_group_has_the_same_verbs(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spectra.__main__.main(["--help"]) == 0
    assert "report" in capsys.readouterr().out
    assert spectra.__main__.main(["report", *pair, "--out", str(tmp_path), "--quiet"]) == 0
    assert spectra.__main__.main(["report", *pair, "--rank", "1", "--exact"]) == 2
    assert spectra.__main__.main(["nonsense"]) == 2
    assert spectra.__main__.main(["--version"]) == 0


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("models/tuned/", "spectra-tuned"),
        ("org/name@v1.0", "spectra-name"),
        ("x/model-00001.safetensors", "spectra-model-00001"),
        ("../../..", "spectra-"),
        ("$(rm -rf)", "spectra-rm_-rf"),
        ("..hidden", "spectra-hidden"),
        ("\x1b[2J", "spectra-2J"),
        ("日本", "spectra-report"),
    ],
)
def test_the_default_folder_is_a_tame_name(given: str, folder: str) -> None:
    made = default_out(given)
    assert made.startswith(folder)
    assert "/" not in made
    assert made.isprintable()


def test_help_teaches_and_is_quick() -> None:
    """Best of three: the time is that of importing, not of a machine that was busy with something else."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = called("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert min(times) < 0.6
    for told in ("Examples:", "Exit codes:", "--dry-run", "report.html", "130 interrupted", "A B --base BASE"):
        assert told in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_help_says_what_each_option_is_for() -> None:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert len(options) == 24
    for option in options:
        assert option.help, option.name
        said = option.help.split("  [")[0]
        assert said[0].isupper(), option.name
        assert said.endswith("."), option.name


@pytest.mark.parametrize("reader", ["true", "head -n 1", "head -n 9"])
def test_a_reader_that_leaves_early_is_no_error(reader: str, pair: tuple[str, str], tmp_path: Path) -> None:
    """Whether it leaves before the first line or in the middle, the report is what was asked for."""
    out = tmp_path / "out"
    line = f"{sys.executable} -m spectra.report {pair[0]} {pair[1]} --out {out} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (out / "report.html").exists()


def test_no_colour_in_a_pipe(pair: tuple[str, str], tmp_path: Path) -> None:
    done = called(*pair, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert (tmp_path / "spectra-tuned" / "report.html").exists()


def test_run_passes_an_exit_code_on() -> None:
    assert run(click.Command("x", callback=lambda: 7), [], name="x") == 7


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    terminal: bool, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def isatty(self) -> bool:
            return terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(_coloured(Stream())) is coloured
