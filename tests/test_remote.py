"""Predictors and networks at an address: a local web server, and a stand-in of the hub."""

import hashlib
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_k_sampler import span

from models import create_model
from torch_utils.errors import UserError
from torch_utils.remote import cache_dir, fetch, is_remote
from training.checkpoint import find_predictor, load_predictor, save_predictor

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ROOT / "models" / "pretrained" / "digits-edm.safetensors"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(folder, address, paths asked for) of a web server."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_a_predictor_from_the_web(served, monkeypatch):
    """Downloaded once, found again without the network, and checked."""
    folder, address, asked = served
    save_predictor(span(), folder / "p.safetensors")
    url = f"{address}/p.safetensors"
    digest = hashlib.sha256((folder / "p.safetensors").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="SHA-256 is not 000"):
        find_predictor(f"{url}#sha256={'0' * 64}")
    path = find_predictor(f"{url}#sha256={digest}")
    assert path.name == "p.safetensors" and cache_dir() in path.parents
    assert load_predictor(path).config["num_steps"] == 5
    count = len(asked)
    monkeypatch.setenv("AMED_OFFLINE", "1")
    assert find_predictor(url) == path and len(asked) == count
    with pytest.raises(UserError, match=rf"could not download {address}/other.safetensors \(AMED_OFFLINE is set\)"):
        find_predictor(f"{address}/other.safetensors")
    path.write_bytes(path.read_bytes() + b" ")  # somebody changed the kept file
    with pytest.raises(UserError, match="has changed since its first use"):
        find_predictor(url)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://host/predictor.pkl", "https://host/predictor.pkl: only .safetensors files are read"),
        ("https://host/", "https://host/: only .safetensors files are read"),
        ("http://example.org/p.safetensors", "unencrypted addresses are not read; use https"),
        ("https://host/p.safetensors#v2", "after # a checksum is expected"),
        ("hf:name", "hf:name is not an address of the hub"),
        ("hf:owner/name/../p.safetensors", "is not an address of the hub"),
        ("hf:owner/name/model.ckpt", "only .safetensors files are read"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(UserError, match=message):
        fetch(address)
    assert is_remote(address) and not is_remote("7") and not is_remote(Path("a/b"))


def test_a_network_from_the_web(served):
    """With the file that describes it, if there is one; the address is shown as it was given."""
    folder, address, asked = served
    shutil.copy(NETWORK, folder / "net.safetensors")
    net = create_model("custom", f"{address}/net.safetensors")
    assert net.source_path == f"{address}/net.safetensors" and net.img_resolution == 32
    assert "/net.safetensors.json" in asked
    (folder / "net.safetensors.json").write_text('{"family": "nothing"}')
    (fetch(f"{address}/net.safetensors")).unlink()
    with pytest.raises(UserError, match="does not describe the network"):
        create_model("custom", f"{address}/net.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a repository owner/fast; ``snapshot_download`` gives it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    folder, calls = tmp_path / "fast", []
    folder.mkdir()

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        calls.append((name, revision, allow_patterns, local_files_only))
        if name != "owner/fast":
            raise OSError(f"Repository Not Found for {name}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder, calls


def test_the_hub(hub, monkeypatch):
    folder, calls = hub
    with pytest.raises(UserError, match="hf:owner/fast: there is no predictor.safetensors or"):
        find_predictor("hf:owner/fast")
    for name in ("predictor-000010.safetensors", "predictor-000200.safetensors"):
        save_predictor(span(), folder / name)
    assert find_predictor("hf:owner/fast").name == "predictor-000200.safetensors"
    save_predictor(span(), folder / "predictor.safetensors")
    assert find_predictor("hf:owner/fast@v1").name == "predictor.safetensors"
    assert calls[-1][:2] == ("owner/fast", "v1") and all("pkl" not in pattern for pattern in calls[-1][2])
    assert find_predictor("hf:owner/fast/predictor-000010.safetensors").name == "predictor-000010.safetensors"
    with pytest.raises(UserError, match=r"hf:owner/other cannot be downloaded \(Repository Not Found"):
        find_predictor("hf:owner/other")
    monkeypatch.setenv("AMED_OFFLINE", "1")
    find_predictor("hf:owner/fast")
    assert calls[-1][3] is True
    shutil.copy(NETWORK, folder / "digits.safetensors")
    net = create_model("custom", "hf:owner/fast")
    assert net.source_path == "hf:owner/fast"
    shutil.copy(NETWORK, folder / "other.safetensors")
    with pytest.raises(UserError, match="hf:owner/fast has several such files: digits.safetensors, other"):
        create_model("custom", "hf:owner/fast")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package 'huggingface_hub': install it with"):
        find_predictor("hf:owner/fast")
