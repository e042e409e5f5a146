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
    assert len(options) == 19
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
