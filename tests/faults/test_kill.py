"""A run that is killed, by -9 or by Ctrl-C, leaves a whole journal; the second run gives the same bytes."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

FILES = ("report.html", "spectra.parquet", "summary.json", "manifest.json", "figures/spectra.svg")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w.weight": torch.randn(640, 640, generator=generator) for i in range(40)}
    tuned = {name: w + 0.01 * torch.randn(640, 640, generator=generator) for name, w in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder


def command(pair, out):
    return [
        sys.executable,
        "-m",
        "spectra.report",
        "base.safetensors",
        "tuned.safetensors",
        "--out",
        str(out),
        "--jobs",
        "1",
    ]


def rows_in(out):
    try:
        with sqlite3.connect(f"file:{out / 'journal.sqlite'}?mode=ro", uri=True) as db:
            return db.execute("SELECT count(*) FROM rows").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def bytes_of(out):
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def undisturbed(pair):
    out = pair / "undisturbed"
    subprocess.run(command(pair, out), cwd=pair, check=True, capture_output=True)
    return bytes_of(out)


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_killed_and_resumed_to_identical_bytes(pair, undisturbed, name, code):
    out = pair / name
    process = subprocess.Popen(command(pair, out), cwd=pair, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while rows_in(out) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    done = rows_in(out)
    assert 5 <= done < 40, "the run was to be caught in the middle"
    assert "Traceback" not in said
    subprocess.run(command(pair, out), cwd=pair, check=True, capture_output=True)
    assert bytes_of(out) == undisturbed


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(pair, tmp_path):
    """The journal may grow no further: the file size limit of a process stands in for a disk."""
    out = tmp_path / "out"
    limited = ["bash", "-c", 'ulimit -f 96; exec "$@"', "bash", *command(pair, out)]  # 96 KiB
    run = subprocess.run(
        limited, cwd=pair, capture_output=True, text=True, env={**os.environ, "PYTHONFAULTHANDLER": ""}
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert "journal.sqlite cannot be written" in run.stderr
    done = rows_in(out)
    assert done > 0
    again = subprocess.run(command(pair, out), cwd=pair, capture_output=True, text=True, check=True)
    assert "report.html" in again.stdout
