"""Rules of the house that no linter knows: what an import costs, how long a file is, what it is called.

ruff, mypy and import-linter are steps of ``make test``, not tests: they report every finding at once, and
they run before the first test is collected.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spectra

ROOT = Path(spectra.__file__).parent.parent
SOURCES = sorted(path for folder in ("spectra", "tests") for path in (ROOT / folder).rglob("*.py"))
LONGEST = 500  # lines; about 450 is the aim, and past this a file is two rooms

OPTIONAL = {"transformers", "peft", "bitsandbytes", "dask", "distributed", "accelerate", "sklearn", "gguf"}
HEAVY = OPTIONAL | {"torch", "pandas", "pyarrow", "matplotlib", "huggingface_hub"}


def packages_after(code: str) -> set[str]:
    """Top-level packages loaded by a fresh interpreter that has run `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    program = f"import atexit\natexit.register(lambda: exec({report!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.splitlines()[-1].split())


def help_of(module: str) -> str:
    return f"import runpy, sys; sys.argv = ['{module}', '--help']; runpy.run_module('{module}', run_name='__main__')"


def test_the_probe_sees_what_is_loaded() -> None:
    assert "decimal" not in packages_after("pass")
    assert "decimal" in packages_after("import decimal")


def test_import_spectra_loads_nothing_heavy() -> None:
    """Names are looked up when they are first used, so that every command answers --help at once."""
    assert not packages_after("import spectra") & HEAVY


def test_examples_command_loads_nothing_heavy() -> None:
    assert not packages_after(help_of("spectra.examples")) & HEAVY


def test_report_command_needs_no_optional_package() -> None:
    assert not packages_after(help_of("spectra.report")) & OPTIONAL


@pytest.mark.parametrize("name", spectra.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(spectra, name).__doc__


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_file_keeps_to_the_house(path: Path) -> None:
    text = path.read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST or path.is_relative_to(ROOT / "tests")
    assert path.stem not in {"utils", "util", "helpers", "common", "manager", "handler", "core", "misc"}
    if lines:
        assert lines[0].startswith(('"""', 'r"""')), "the first line says what lives here"
    marks = [f"line {number}" for number, line in enumerate(lines, 1) if "TO" + "DO" in line or "FIX" + "ME" in line]
    assert not marks
