"""Downloads against a local server that misbehaves on purpose: whatever happens, a file is whole or absent."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torch_utils import download
from torch_utils.download import download_file, sha256_of
from torch_utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = hashlib.shake_256(b"a file").digest(3_000_017)
OTHER = hashlib.shake_256(b"another file").digest(3_000_017)


class Server(ThreadingHTTPServer):
    """Serves DATA under every path; the path's name says how it misbehaves. ``log`` holds (path, Range) per request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def count(self, name: str) -> int:
        return sum(path == f"/{name}" for path, _ in self.log)

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes, sent: int | None = None, **headers) -> None:
        self.send_response(status)
        for key, value in {"Content_Type": "application/octet-stream", **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        if "Content_Length" not in headers and "no_length" not in self.path:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if sent is None else body[:sent])

    def do_GET(self):
        self.server.log.append((self.path, self.headers["Range"]))
        name, visit = self.path[1:], self.server.count(self.path[1:])
        if name == "missing":
            return self.answer(404, b"no")
        if name == "page":
            return self.answer(200, b"<html>please log in</html>", Content_Type="text/html; charset=utf-8")
        if name == "empty":
            return self.answer(200, b"")
        if name == "busy_once" and visit == 1:
            return self.answer(503, b"later")
        if name == "liar":  # promises more than it ever sends
            return self.answer(200, DATA, Content_Length=len(DATA) + 1000)
        data, etag = DATA, '"one"'
        if name == "changes" and visit > 1:
            data, etag = OTHER, '"two"'
        headers = {} if name in ("no_validator", "drops_no_validator") else {"ETag": etag}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        valid = self.headers["If-Range"] in (None, etag)
        drops_once = name in ("drops", "changes", "drops_no_range", "drops_no_validator")
        drops = drops_once and visit == 1 or name == "always_drops"
        if asked and valid and name != "drops_no_range":
            start = int(asked[1])
            if start >= len(data):
                return self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            if name == "wrong_range":
                start = 0
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            return self.answer(206, body, sent=len(body) // 2 if drops else None, **headers)
        return self.answer(200, data, sent=len(data) // 2 if drops else None, **headers)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_BACKOFF_S", 0.01)
    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def assert_clean(dest: Path, data: bytes = DATA) -> None:
    """The file is whole and alone: no part, no lock."""
    assert dest.read_bytes() == data
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]


def leave_part(dest: Path, url: str, data: bytes) -> None:
    """What an interrupted program leaves behind."""
    dest.with_name(dest.name + ".part").write_bytes(data)
    dest.with_name(dest.name + ".part.json").write_text(json.dumps({"url": url, "validator": '"one"'}))


def test_whole_file(server, tmp_path):
    dest = tmp_path / "new" / "folder" / "net.pkl"
    assert download_file([server.url("plain")], dest, hashlib.sha256(DATA).hexdigest(), len(DATA)) == dest
    assert_clean(dest)
    assert sha256_of(dest) == hashlib.sha256(DATA).hexdigest()


def test_an_existing_file_is_not_fetched_again(server, tmp_path):
    dest = tmp_path / "net.pkl"
    dest.write_bytes(DATA)
    download_file([server.url("plain")], dest)
    download_file([server.url("plain")], dest, hashlib.sha256(DATA).hexdigest().upper(), len(DATA))
    assert server.log == []


@pytest.mark.parametrize("expect", [{"size": len(DATA) + 1}, {"sha256": "0" * 64}])
def test_an_existing_other_file_is_kept(server, tmp_path, expect):
    dest = tmp_path / "net.pkl"
    dest.write_bytes(DATA)
    with pytest.raises(UserError, match="move it away"):
        download_file([server.url("plain")], dest, **expect)
    assert_clean(dest)


def test_a_broken_connection_is_continued(server, tmp_path):
    dest = tmp_path / "net.pkl"
    download_file([server.url("drops")], dest)
    assert_clean(dest)
    (_, first), (_, second) = server.log
    assert first is None and int(re.fullmatch(r"bytes=(\d+)-", second)[1]) > len(DATA) // 2 - 100_000


def test_many_breaks_with_progress_are_survived(server, tmp_path):
    """Every reply breaks after half of the rest: more breaks than the attempts without progress that are allowed."""
    dest = tmp_path / "net.pkl"
    with pytest.raises(UserError, match="the connection broke"):  # the last piece never comes
        download_file([server.url("always_drops")], dest)
    assert len(server.log) > 2 * download._ATTEMPTS and not dest.exists()
    part = (tmp_path / "net.pkl.part").read_bytes()
    assert DATA.startswith(part) and len(part) > 0.98 * len(DATA)


def test_an_interrupted_program_is_continued(server, tmp_path):
    dest = tmp_path / "net.pkl"
    leave_part(dest, server.url("plain"), DATA[:1000])
    download_file([server.url("plain")], dest)
    assert_clean(dest)
    assert server.log == [("/plain", "bytes=1000-")]


def test_a_part_that_was_whole_already(server, tmp_path):
    dest = tmp_path / "net.pkl"
    leave_part(dest, server.url("plain"), DATA)
    download_file([server.url("plain")], dest, size=len(DATA))
    assert_clean(dest)
    assert len(server.log) == 1


@pytest.mark.parametrize("length", [1000, len(DATA), len(DATA) + 5])
def test_a_part_of_unknown_origin_is_not_trusted(server, tmp_path, length):
    dest = tmp_path / "net.pkl"
    (tmp_path / "net.pkl.part").write_bytes(b"x" * length)
    download_file([server.url("plain")], dest)
    assert_clean(dest)


@pytest.mark.parametrize("length", [1000, len(DATA), len(DATA) + 5])
def test_a_wrong_part_is_found_by_the_checksum(server, tmp_path, length):
    dest = tmp_path / "net.pkl"
    (tmp_path / "net.pkl.part").write_bytes(b"x" * length)
    download_file([server.url("plain")], dest, hashlib.sha256(DATA).hexdigest())
    assert_clean(dest)


@pytest.mark.parametrize("name", ["drops_no_range", "drops_no_validator"])
def test_restart_where_continuing_is_impossible(server, tmp_path, name):
    dest = tmp_path / "net.pkl"
    download_file([server.url(name)], dest)
    assert_clean(dest)


def test_a_range_that_was_not_asked_for(server, tmp_path):
    dest = tmp_path / "net.pkl"
    leave_part(dest, server.url("wrong_range"), DATA[:1000])
    download_file([server.url("wrong_range")], dest)
    assert_clean(dest)


def test_a_file_that_changes_in_between_is_not_mixed(server, tmp_path):
    dest = tmp_path / "net.pkl"
    download_file([server.url("changes")], dest)
    assert_clean(dest, OTHER)


def test_no_content_length(server, tmp_path):
    dest = tmp_path / "net.pkl"
    download_file([server.url("no_length")], dest)
    assert_clean(dest)


def test_a_busy_server_is_asked_again(server, tmp_path):
    dest = tmp_path / "net.pkl"
    download_file([server.url("busy_once")], dest)
    assert_clean(dest)


@pytest.mark.parametrize("first", ["missing", "page", "empty", "liar"])
def test_mirrors(server, tmp_path, first):
    dest = tmp_path / "net.pkl"
    download_file([server.url(first), server.url("plain")], dest)
    assert_clean(dest)


@pytest.mark.parametrize(
    "name, kwargs, reason",
    [
        ("missing", {}, "HTTP 404"),
        ("page", {}, "a web page instead of the file"),
        ("empty", {}, "an empty file"),
        ("liar", {}, "the connection broke"),
        ("plain", {"size": 17}, f"{len(DATA)} bytes there, 17 expected"),
        ("no_length", {"size": 17}, f"{len(DATA)} bytes sent, 17 expected"),
        ("plain", {"sha256": "0" * 64}, "its SHA-256 is not 0000"),
        ("drops", {"sha256": "0" * 64}, "its SHA-256 is not 0000"),
    ],
)
def test_refusals_leave_nothing_under_the_name(server, tmp_path, name, kwargs, reason):
    dest = tmp_path / "net.pkl"
    with pytest.raises(UserError) as error:
        download_file([server.url(name)], dest, **kwargs)
    message = str(error.value)
    assert message.startswith(f"could not download {server.url(name)} ({reason}")
    assert message.endswith(f": put the file at {dest} or pass --model_path") and "\n" not in message
    assert not dest.exists() and not (tmp_path / "net.pkl.lock").exists()


def test_nobody_there(server, tmp_path):
    unused = Server()
    unused.server_close()
    with pytest.raises(UserError, match=r"\(connection refused\): put the file at .* or pass --detector"):
        download_file([unused.url("plain")], tmp_path / "net.pkl", hint="pass --detector")
    with pytest.raises(UserError, match="not a usable address"):
        download_file(["no-address"], tmp_path / "net.pkl")


def test_offline_is_obeyed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AMED_OFFLINE", "1")
    with pytest.raises(UserError, match=r"\(AMED_OFFLINE is set\): put the file at"):
        download_file([server.url("plain"), server.url("mirror")], tmp_path / "net.pkl")
    assert server.log == [] and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="needs 3 MiB, but the disk has 0 MiB left"):
        download_file([server.url("plain")], tmp_path / "net.pkl")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_destination(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        download_file([server.url("plain")], tmp_path / "file" / "net.pkl")
    (tmp_path / "net.pkl").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        download_file([server.url("plain")], tmp_path / "net.pkl")


def test_threads_share_one_download(server, tmp_path):
    dest = tmp_path / "net.pkl"
    threads = [threading.Thread(target=download_file, args=([server.url("plain")], dest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_clean(dest)
    assert len(server.log) == 1


def test_processes_share_one_download(server, tmp_path):
    dest = tmp_path / "net.pkl"
    code = "import sys; from torch_utils.download import download_file; download_file([sys.argv[1]], sys.argv[2])"
    command = [sys.executable, "-c", code, server.url("drops"), str(dest)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    assert_clean(dest)
    assert len(server.log) == 2  # the broken one and its continuation


def test_a_lock_left_by_a_dead_process_does_not_block(server, tmp_path):
    dest = tmp_path / "net.pkl"
    (tmp_path / "net.pkl.lock").write_text("4242")
    download_file([server.url("plain")], dest)
    assert_clean(dest)
