"""Downloads against a local server that misbehaves: a file is whole or absent, always."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from torch_utils import download
from torch_utils.download import download_file, download_member, extract_member, known_sha256, recorded_sha256
from torch_utils.errors import UserError
from torch_utils.files import sha256_of

ROOT = Path(__file__).resolve().parents[1]
DATA = hashlib.shake_256(b"a file").digest(3_000_017)
ENDLESS = 200  # MiB
OTHER = hashlib.shake_256(b"another file").digest(3_000_017)


class Server(ThreadingHTTPServer):
    """Serves DATA under every path, whose name says how to misbehave. log: (path, Range) pairs."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[str, str | None]] = []
        self.sent = 0  # MiB of an endless reply

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
        if name.startswith("redirect:"):
            return self.answer(302, b"", Location=name.partition(":")[2])
        if name == "endless_redirect":
            self.send_response(302)
            self.send_header("Location", "/plain")
            self.end_headers()
            with contextlib.suppress(OSError):  # the client closes the connection
                for _ in range(ENDLESS):
                    self.wfile.write(bytes(1 << 20))
                    self.server.sent += 1
            return None
        if name == "absurd_length":
            return self.answer(200, DATA, Content_Length="9" * 5000)
        if name == "archive.zip":
            return self.answer(200, self.server.archive, Content_Type="application/zip")
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
    """Replies break after half of the rest, more often than the limit without progress."""
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
        ("no_length", {"size": 17}, "more than 17 bytes sent, 17 expected"),
        ("absurd_length", {}, "not a usable address or reply"),
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


def test_a_reply_that_does_not_say_its_length_is_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_UNANNOUNCED", 1 << 20)
    with pytest.raises(UserError, match="more than 1048576 bytes sent, without saying how many"):
        download_file([server.url("no_length")], tmp_path / "net.pkl")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(download, "_UNANNOUNCED", len(DATA))
    assert download_file([server.url("no_length")], tmp_path / "net.pkl").read_bytes() == DATA


def test_what_comes_with_a_redirect_is_not_read(server, tmp_path):
    assert download_file([server.url("endless_redirect")], tmp_path / "net.pkl").read_bytes() == DATA
    assert server.sent < ENDLESS // 4  # what the buffers of the connection hold


@pytest.fixture
def https(server, monkeypatch):
    """Addresses https://HOST/NAME, answered by the server. TLS itself is the library's."""
    send = requests.adapters.HTTPAdapter.send

    def plain_send(self, request, **options):
        asked = request.url
        if asked.startswith("https://"):
            request.url = server.url(asked.split("/", 3)[3])
        reply = send(self, request, **options)
        reply.url = request.url = asked
        return reply

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", plain_send)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/plain", "HTTP://127.0.0.1:{port}/plain", "ftp://127.0.0.1/plain"]
)
def test_https_does_not_become_http(server, https, tmp_path, target):
    target = target.format(port=server.server_address[1])
    with pytest.raises(UserError, match=r"\(it redirects from HTTPS to an unencrypted address\): put the file at"):
        download_file([f"https://files/redirect:{target}"], tmp_path / "net.pkl")
    with pytest.raises(UserError, match="from HTTPS to an unencrypted address"):  # at the second redirect
        download_file([f"https://files/redirect:https://other/redirect:{target}"], tmp_path / "net.pkl")
    assert server.count("plain") == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["https://other/plain", "//other/plain", "/plain", "HTTPS://other/plain"])
def test_https_may_move(server, https, tmp_path, target):
    assert download_file([f"https://files/redirect:{target}"], tmp_path / "net.pkl").read_bytes() == DATA


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
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    assert_clean(dest)
    assert len(server.log) == 2  # the broken one and its continuation


def test_a_lock_left_by_a_dead_process_does_not_block(server, tmp_path):
    dest = tmp_path / "net.pkl"
    (tmp_path / "net.pkl.lock").write_text("4242")
    download_file([server.url("plain")], dest)
    assert_clean(dest)


# --------------------------------------------------------------------------------------------------
# Room on the disk, archives, checksums


def disk_with(monkeypatch, free: int) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_file_that_does_not_fit_is_not_begun(server, tmp_path, monkeypatch):
    disk_with(monkeypatch, len(DATA) - 1)
    with pytest.raises(UserError, match="file.bin needs 3 MiB, but the disk has 3 MiB left: free some space"):
        download_file([server.url("good")], tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []
    disk_with(monkeypatch, len(DATA))
    assert download_file([server.url("good")], tmp_path / "file.bin").read_bytes() == DATA


def make_zip(path: Path, *entries: tuple[str, bytes], kind=zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", kind) as archive:
        warnings.simplefilter("ignore")  # about a name that is there twice
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_one_file_of_a_hostile_archive(tmp_path):
    """Only the wanted file is written, wherever the names of the others point."""
    inside = tmp_path / "inside"
    inside.mkdir()
    traps = [(name, b"trap") for name in ("../model.ckpt", "/model.ckpt", "../../evil", "a/../../model.ckpt", "x/")]
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    archive = make_zip(inside / "a.zip", *traps, ("model.ckpt", DATA), (link, b"/etc/passwd"))
    extract_member(archive, "model.ckpt", inside / "deep" / "weights.ckpt")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["inside/a.zip", "inside/deep/weights.ckpt"]
    assert (inside / "deep" / "weights.ckpt").read_bytes() == DATA


def link_called(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def damaged(path: Path, *changes: tuple[bytes, bytes]) -> Path:
    data = path.read_bytes()
    for old, new in changes:
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)
    return path


def understated(path: Path) -> Path:
    """Both headers say that the file has 10 bytes."""
    size = len(DATA).to_bytes(4, "little")
    make_zip(path, ("model.ckpt", DATA), kind=zipfile.ZIP_STORED)
    return damaged(path, (size + size, size + (10).to_bytes(4, "little")))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: make_zip(path, ("../model.ckpt", b"x")), r"no single file 'model.ckpt', but ../model.ckpt: move"),
        (lambda path: make_zip(path), "but nothing: move"),
        (lambda path: make_zip(path, ("model.ckpt", b"a"), ("model.ckpt", b"b")), "no single file 'model.ckpt'"),
        (lambda path: make_zip(path, (link_called("model.ckpt"), b"/etc/passwd")), "no single file 'model.ckpt'"),
        (lambda path: damaged(make_zip(path, ("model.ckpt", b"abcabc"), kind=0), (b"abcabc", b"abcabd")), "Bad CRC-32"),
        (understated, "Bad CRC-32"),
        (lambda path: path.write_bytes(DATA), "damaged or not a zip archive"),
        (lambda path: path.write_bytes(make_zip(path, ("model.ckpt", DATA)).read_bytes()[:-50]), "not a zip"),
    ],
)
def test_archives_that_are_refused(make, message, tmp_path):
    archive = tmp_path / "a.zip"
    make(archive)
    with pytest.raises(UserError, match=message):
        extract_member(archive, "model.ckpt", tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_that_does_not_fit_unpacked(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", ("model.ckpt", bytes(5 << 20)))
    disk_with(monkeypatch, 2 << 20)
    with pytest.raises(UserError, match="model.ckpt needs 5 MiB, but the disk has 2 MiB left"):
        extract_member(archive, "model.ckpt", tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_from_the_web_goes_when_it_is_unpacked(server, tmp_path):
    server.archive = make_zip(tmp_path / "source.zip", ("model.ckpt", OTHER)).read_bytes()
    place = tmp_path / "new" / "model.ckpt"
    assert download_member([server.url("archive.zip")], place, "model.ckpt") == place
    assert place.read_bytes() == OTHER and [path.name for path in place.parent.iterdir()] == ["model.ckpt"]
    download_member([server.url("archive.zip")], place, "model.ckpt")
    assert server.count("archive.zip") == 1


def test_recorded_checksums(tmp_path, monkeypatch):
    """A record spares reading the file until its size or its time changes."""
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    expected = hashlib.sha256(DATA).hexdigest()
    assert known_sha256(path) == expected and list(tmp_path.iterdir()) == [path]  # read in no time
    monkeypatch.setattr(download, "_SLOW_TO_READ", len(DATA))
    assert known_sha256(path) == expected and recorded_sha256(path) == (expected, True)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--status", "weights.sha256"], cwd=tmp_path, check=True)
    reads = []
    monkeypatch.setattr(download, "sha256_of", lambda path: reads.append(path) or sha256_of(path))
    assert known_sha256(path) == expected and not reads
    path.write_bytes(OTHER)
    os.utime(path, ns=(0, 10**18))
    assert recorded_sha256(path) == (expected, False)
    with pytest.raises(UserError, match="has changed since its first use .*or move away weights.sha256 if the change"):
        known_sha256(path, pinned=True)
    changed = hashlib.sha256(OTHER).hexdigest()
    assert known_sha256(path) == changed and recorded_sha256(path) == (changed, True)
    assert known_sha256(path, pinned=True) == changed and len(reads) == 2
    (tmp_path / "weights.sha256").write_text("nothing")
    with pytest.raises(UserError, match="weights.sha256 holds no SHA-256: move it away"):
        known_sha256(path)


def test_a_folder_that_cannot_be_written_costs_the_reading_only(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    monkeypatch.setattr(download.os, "access", lambda folder, mode: False)
    assert known_sha256(path, pinned=True) == hashlib.sha256(DATA).hexdigest()
    assert list(tmp_path.iterdir()) == [path]
