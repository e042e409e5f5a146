"""Hub ids: the cache's own layout built by hand, and a stand-in for the hub's answers on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from spectra.checkpoints import Checkpoint, open_checkpoint
from spectra.checkpoints.hub import is_hub_id
from spectra.errors import CheckpointNotFound, UnsafeCheckpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
WEIGHT = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def test_ids_are_told_from_paths() -> None:
    accepted = ["gpt2", "org/name", "org/name@main", "org/name@refs/pr/3", f"org/name@{COMMIT}", "org/name-1.5_x"]
    refused = [
        "",
        ".",
        "..",
        "./name",
        "../name",
        "/name",
        "a/b/c",
        "~/name",
        "a\\b",
        "org/name@",
        "org/na me",
        "a/../b",
    ]
    refused += ["folder/model.safetensors", "pytorch_model.bin", "C:/name", "org/name\n", "-x/name", "org/é"]
    assert [ref for ref in accepted if not is_hub_id(ref)] == []
    assert [ref for ref in refused if is_hub_id(ref)] == []


# --- the cache, offline -------------------------------------------------------------------------------------------


def cached(cache: Path, files: dict[str, bytes], *, repo: str = "org/name", commit: str = COMMIT) -> Path:
    """Build a repository in the hub's cache layout; returns its snapshot folder."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


SHARDED = {
    "model-00001-of-00002.safetensors": save({"a": WEIGHT}),
    "model-00002-of-00002.safetensors": save({"b": WEIGHT + 1}),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "config.json": b'{"model_type": "bert"}',
}


def test_cache_is_read_offline_through_its_links(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, SHARDED)
    checkpoint = open_checkpoint("org/name", offline=True, cache_dir=tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.ref, checkpoint.revision, checkpoint.root) == ("org/name", COMMIT, snapshot)
    assert checkpoint.config == {"model_type": "bert"}
    assert torch.equal(checkpoint["b"], WEIGHT + 1)
    assert [digest.name for digest in checkpoint.digests()] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ]


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_cache_is_read_offline_at_a_revision(tmp_path: Path, revision: str) -> None:
    cached(tmp_path, {"model.safetensors": save({"a": WEIGHT})})
    checkpoint = open_checkpoint(f"org/name@{revision}", offline=True, cache_dir=tmp_path)
    assert checkpoint.revision == COMMIT


@pytest.mark.parametrize("ref", ["org/other", "org/name@v2", f"org/name@{OLD_COMMIT}"])
def test_what_the_cache_lacks_says_how_to_get_it(tmp_path: Path, ref: str) -> None:
    cached(tmp_path, {"model.safetensors": save({"a": WEIGHT})})
    with pytest.raises(CheckpointNotFound, match=r"hf download org/"):
        open_checkpoint(ref, offline=True, cache_dir=tmp_path)


def test_the_environment_can_switch_looking_up_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached(tmp_path, {"model.safetensors": save({"a": WEIGHT})})
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path)
    assert (checkpoint.revision, checkpoint.notes) == (COMMIT, ())


def test_shard_missing_from_the_cache_is_named(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, SHARDED)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint("org/name", offline=True, cache_dir=tmp_path)


def test_link_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(save({"a": WEIGHT}))
    snapshot = cached(tmp_path / "cache", {"config.json": b"{}"})
    (snapshot / "model.safetensors").symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match="leads out of its folder"):
        open_checkpoint("org/name", offline=True, cache_dir=tmp_path / "cache")


def test_link_into_another_repository_is_refused(tmp_path: Path) -> None:
    other = cached(tmp_path, {"model.safetensors": save({"a": WEIGHT})}, repo="org/private")
    snapshot = cached(tmp_path, {"config.json": b"{}"})
    (snapshot / "model.safetensors").symlink_to((other / "model.safetensors").resolve())
    with pytest.raises(UnsafeCheckpoint, match="leads out of its folder"):
        open_checkpoint("org/name", offline=True, cache_dir=tmp_path)


def test_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "model.safetensors").write_bytes(save({"a": WEIGHT}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it would now fail
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.revision is None
    assert torch.equal(checkpoint["a"], WEIGHT)


@pytest.mark.parametrize("ref", ["missing/model.safetensors", "./org", "/nowhere/at/all", Path("org/name")])
def test_what_can_only_be_a_path_is_never_looked_up(
    ref: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        open_checkpoint(ref)


# --- a stand-in for the hub ---------------------------------------------------------------------------------------


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    error: tuple[int, str] | None = None  # status and X-Error-Code of every answer


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what the hub says to GET, as far as huggingface_hub asks."""
        api = path.startswith("/api/models/")
        repo, _, rest = path.removeprefix("/api/models/").strip("/").partition("/revision/" if api else "/resolve/")
        repo, tree, tree_revision = repo.partition("/tree/")
        found = self.repositories.get(repo)
        if found is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if found.error is not None:
            return found.error[0], {"X-Error-Code": found.error[1]}, b"{}"
        revision, _, name = (tree_revision or rest or "main").partition("/")
        if revision not in ("main", found.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if tree:
            return 200, {}, json.dumps([self._entry(name, found.files[name]) for name in found.files]).encode()
        if api:
            siblings = [{"rfilename": name} for name in found.files]
            return 200, {}, json.dumps({"id": repo, "sha": found.commit, "siblings": siblings}).encode()
        if name not in found.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.commit}, b"{}"
        content = found.files[name]
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found.commit}, content

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def do_GET(self) -> None:
            self._reply(with_body=True)

        def _reply(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


# huggingface_hub reads its endpoint when it is imported, hence a process of its own for each.
SCRIPT = """
import json, sys
from spectra.checkpoints import open_checkpoint
from spectra.errors import SpectraError
results = []
for ref, options in json.loads(sys.argv[1]):
    try:
        found = open_checkpoint(ref, **options)
        results.append({"revision": found.revision, "names": list(found), "notes": found.notes, "root": str(found.root),
                        "sum": sum(float(found[name].sum()) for name in found)})
    except SpectraError as error:
        results.append({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
print(json.dumps(results))
"""


def open_all(url: str, home: Path, *refs: str | tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    calls = [(ref, {}) if isinstance(ref, str) else ref for ref in refs]
    hidden = ("HF_", "HUGGINGFACE", "TRANSFORMERS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    results: list[dict[str, Any]] = json.loads(run.stdout)
    return results


def test_only_what_is_needed_is_fetched_and_the_commit_is_known(hub: Hub, tmp_path: Path) -> None:
    extra = {"pytorch_model.bin": b"pickle", "tokenizer.json": b"{}", "onnx/model.onnx": b"x"}
    hub.repositories["org/sharded"] = Repository(SHARDED | extra)
    hub.repositories["single"] = Repository({"model.safetensors": save({"a": WEIGHT})} | extra, commit=OLD_COMMIT)
    sharded, single, again, offline = open_all(
        hub.url, tmp_path, "org/sharded", "single@main", f"single@{OLD_COMMIT}", ("org/sharded", {"offline": True})
    )
    assert (sharded["revision"], sharded["names"], sharded["sum"]) == (COMMIT, ["a", "b"], 15.0 + 21.0)
    assert (single["revision"], single["names"]) == (OLD_COMMIT, ["a"])
    assert (again["revision"], offline["revision"]) == (OLD_COMMIT, COMMIT)
    fetched = {
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "resolve" in request
    }
    assert fetched == {*SHARDED, "model.safetensors"}

    shutil.rmtree(tmp_path / "hub" / "models--single")  # one is kept: without a hub, the cache answers and says so
    kept, lost = open_all("http://127.0.0.1:9", tmp_path, "org/sharded", "single")
    assert kept["revision"] == COMMIT
    assert "the hub gave no answer" in kept["notes"][0]
    assert (lost["error"], lost["exit_code"]) == ("CheckpointError", 2)
    assert "Check the connection" in lost["message"]


def test_each_refusal_has_its_error_and_a_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/gated"] = Repository({}, error=(401, "GatedRepo"))
    hub.repositories["org/private"] = Repository({}, error=(401, "RepoNotFound"))
    hub.repositories["org/broken"] = Repository({}, error=(400, ""))
    hub.repositories["org/pickle"] = Repository({"pytorch_model.bin": b"pickle"})
    hub.repositories["org/adapter"] = Repository({"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    hub.repositories["org/gguf"] = Repository({"model-q4.gguf": b"GGUF"})
    index = {"weight_map": {"a": "../../../x.safetensors"}}
    hub.repositories["org/hostile"] = Repository({"model.safetensors.index.json": json.dumps(index).encode()})
    results = open_all(
        hub.url,
        tmp_path,
        "org/missing",
        "org/gated",
        "org/private",
        "org/broken",
        "org/pickle",
        "org/adapter",
        "org/gguf",
        "org/hostile",
        "org/gguf@v9",
    )
    expected = [
        ("CheckpointNotFound", "neither a path on this machine nor a model on the hub"),
        ("CheckpointError", "ask for access"),
        ("CheckpointNotFound", "If it is private, log in"),
        ("CheckpointError", "the hub gave no answer"),
        ("UnsafeCheckpoint", "--trust-pickle"),
        ("UnsafeCheckpoint", "--trust-pickle"),
        ("UnsafeCheckpoint", "does not begin as a GGUF file"),
        ("UnsafeCheckpoint", "no file of this folder"),
        ("CheckpointNotFound", "no revision 'v9'"),
    ]
    assert [
        (result["error"], part in result["message"]) for result, (_, part) in zip(results, expected, strict=True)
    ] == [(error, True) for error, _ in expected], results
    assert not [request for request in hub.requests if request.endswith(".bin") or "x.safetensors" in request]
