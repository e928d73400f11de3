"""Downloads that appear under their name only when they are complete.

A download goes to ``<name>.part`` beside its destination. It survives broken connections and
interrupted programs (HTTP ranges, RFC 9110 section 14), falls back to mirrors, and is renamed after
a check of its size and, if known, its SHA-256. Checksums can be stored beside files, so that
gigabytes are not read again at every start.
"""

import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests

from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import _CHUNK, atomic_path, sha256_of
from torch_utils.locks import locked
from torch_utils.progress import progress_bar
from torch_utils.zip_file import BadMember, check_member

_TIMEOUT_S = (15, 60)  # to connect, and between two chunks
_ATTEMPTS = 3  # per mirror, consecutive ones without progress
_BACKOFF_S = 1.0  # doubled after each attempt without progress
_SLOW_TO_READ = 1 << 28  # bytes; the checksum of a smaller file takes less than a second
_UNANNOUNCED = 1 << 30  # bytes of a reply of unknown length, if the size is not known either
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Refused(Exception):
    """This mirror does not give the file: try the next one."""


class _Broken(Exception):
    """The transfer failed; another attempt may continue it."""


class _Session(requests.Session):
    """Follows redirects, but not from HTTPS to an unencrypted address."""

    def get_redirect_target(self, resp):
        target = super().get_redirect_target(resp)
        if target:
            resp.close()  # requests would read the redirect's body, of any length
            if urlsplit(resp.url).scheme == "https" != urlsplit(urljoin(resp.url, target)).scheme:
                raise _Refused("it redirects from HTTPS to an unencrypted address")
        return target


def record_of(path: Path) -> Path:
    """The file with the checksum of ``path``: ``<path>.sha256``, as for ``sha256sum -c``."""
    return path.with_name(path.name + ".sha256")


def recorded_sha256(path: Path) -> tuple[str, bool] | None:
    """(the recorded SHA-256 of a file, whether its size and time are as recorded).

    None without a record. Raises UserError for an unreadable record.
    """
    record = record_of(path)
    try:
        text = record.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"{record} cannot be read ({exc}): move it away") from None
    digest = re.search(r"^([0-9a-f]{64})\b", text, re.MULTILINE)
    if not digest:
        raise UserError(f"{record} holds no SHA-256: move it away, and it will be made again")
    noted = re.match(r"# (\d+) bytes, modified at (\d+) ns\n", text)
    now = path.stat() if path.exists() else None
    same = bool(noted and now and (int(noted[1]), int(noted[2])) == (now.st_size, now.st_mtime_ns))
    return digest[1], same


def known_sha256(path: Path, pinned: bool = False) -> str:
    """SHA-256 of a file. Not read if the record beside it has its size and time.

    path: the file.
    pinned: record every file, and raise UserError if it changes later. Default False: record only
        files that take long to read.

    Records need a writable folder.
    """
    path = Path(path)
    known = recorded_sha256(path)
    if known is not None and known[1]:
        return known[0]
    before = path.stat()
    digest = sha256_of(path)
    if pinned and known is not None and known[0] != digest:
        raise UserError(
            f"{path} has changed since its first use (SHA-256 {digest[:16]}..., recorded {known[0][:16]}...): move it "
            f"away to download it again, or move away {record_of(path).name} if the change was meant"
        )
    if (pinned or known is not None or before.st_size >= _SLOW_TO_READ) and os.access(path.parent, os.W_OK):
        with atomic_path(record_of(path)) as temporary:
            noted = f"# {before.st_size} bytes, modified at {before.st_mtime_ns} ns"
            temporary.write_text(f"{noted}\n{digest}  {path.name}\n", encoding="utf-8")
    return digest


def offline() -> bool:
    """Whether AMED_OFFLINE=1 or the flag --offline forbids downloads."""
    return os.environ.get("AMED_OFFLINE", "") not in ("", "0")


def _why_offline() -> str:
    reason = os.environ["AMED_OFFLINE"]
    return f"{reason} was given" if reason.startswith("--") else "AMED_OFFLINE is set"


@contextmanager
def no_network(reason: str = "1"):
    """Context without downloads, here and in child processes, also for the Hugging Face hub.

    reason: value of AMED_OFFLINE; a flag is named in messages about missing files.
    """
    before = {name: os.environ.get(name) for name in ("AMED_OFFLINE", "HF_HUB_OFFLINE")}
    os.environ |= {"AMED_OFFLINE": reason, "HF_HUB_OFFLINE": "1"}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def download_file(
    urls: list[str],
    dest: Path,
    sha256: str | None = None,
    size: int | None = None,
    desc: str | None = None,
    hint: str = "pass --model_path",
) -> Path:
    """Makes sure that the file ``dest`` exists and is complete. Returns its path.

    urls: mirrors of one file, tried in order.
    dest: the file. An existing one is never overwritten.
    sha256, size: checked if given, also for an existing file. Default None.
    desc: label of the progress bar. Default None: the file's name.
    hint: what the user can do instead of putting the file at ``dest``.

    Several processes may ask for one file at the same time: one downloads, the others wait. Raises
    UserError if no mirror gives the file (or AMED_OFFLINE=1 forbids asking), if an existing file is
    not the expected one, and if ``dest`` cannot be written.
    """
    dest = Path(dest)
    job = _Job(dest, sha256.lower() if sha256 else None, size, desc or dest.name)
    if job.is_done():
        return dest
    if offline():
        raise _on_failure([(url, _why_offline()) for url in urls[:1]], dest, hint)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest.with_name(dest.name + ".lock"), f"another process is downloading {dest}; waiting for it"):
            if job.is_done():
                return dest
            reasons = []
            for url in urls:
                try:
                    job.fetch(url)
                    return dest
                except (_Refused, _Broken) as exc:
                    reasons.append((url, str(exc)))
    except OSError as exc:
        raise UserError(f"could not write {dest}: {exc.strerror or exc}; choose another place or free it") from None
    raise _on_failure(reasons, dest, hint)


def download_member(
    urls: list[str], dest: Path, member: str, desc: str | None = None, hint: str = "pass --model_path"
) -> Path:
    """``download_file`` for one file of a zip archive, which is removed afterwards.

    urls: mirrors of the archive. An archive beside ``dest`` is used instead of a download.
    dest: the file.
    member: its name in the archive.
    desc, hint: see ``download_file``.
    """
    dest = Path(dest)
    if dest.exists():
        return dest
    archive = dest.with_name(urls[0].rpartition("/")[2])
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest.with_name(dest.name + ".lock"), f"another process is fetching {dest}; waiting for it"):
            if not dest.exists():
                extract_member(download_file(urls, archive, desc=desc, hint=hint), member, dest)
                archive.unlink()
    except OSError as exc:
        raise UserError(f"could not write {dest}: {exc.strerror or exc}; choose another place or free it") from None
    return dest


def extract_member(archive: Path, member: str, dest: Path) -> None:
    """Writes the file ``member`` of a zip archive to ``dest``, and ignores the others.

    Raises UserError if there is not exactly one such file, or if it is damaged or does not fit on
    the disk.
    """
    again = f"move {archive} away, and it will be downloaded again"
    try:
        with zipfile.ZipFile(archive) as source:
            found = [info for info in source.infolist() if info.filename == member]
            if len(found) != 1 or found[0].is_dir() or stat.S_ISLNK(found[0].external_attr >> 16):
                there = ", ".join(info.filename[:60] for info in source.infolist()[:5]) or "nothing"
                raise UserError(f"{archive} holds no single file '{member}', but {there}: {again}")
            size = found[0].file_size
            check_member(source, found[0])
            dest.parent.mkdir(parents=True, exist_ok=True)
            _check_free(dest, size)
            with atomic_path(dest) as temporary:
                with source.open(found[0]) as packed, open(temporary, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)  # which ends after ``size`` bytes at the latest
                if temporary.stat().st_size != size:
                    raise UserError(
                        f"{archive} is damaged: '{member}' has not the {size} bytes it should have; {again}"
                    )
    except (BadMember, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        # RuntimeError: encrypted
        raise UserError(f"{archive} is damaged or not a zip archive ({str(exc)[:200]}): {again}") from None
    except OSError as exc:
        raise UserError(f"could not unpack {archive}: {exc.strerror or exc}") from None


def _check_free(dest: Path, need: int) -> None:
    """Raises UserError if ``need`` more bytes do not fit beside ``dest``."""
    free = shutil.disk_usage(dest.parent).free
    if need > free:
        need, free = need / 2**20, free / 2**20
        raise UserError(f"{dest} needs {need:.0f} MiB, but the disk has {free:.0f} MiB left: free some space")


def _on_failure(reasons: list[tuple[str, str]], dest: Path, hint: str) -> UserError:
    tried = ", ".join(f"{url} ({reason})" for url, reason in reasons) or f"{dest.name} (no URL is known)"
    return UserError(f"could not download {tried}: put the file at {dest} or {hint}")


@dataclass
class _Job:
    """One file to download; holds the lock of its destination while ``fetch`` runs."""

    dest: Path
    sha256: str | None
    size: int | None
    desc: str

    @property
    def part(self) -> Path:
        return self.dest.with_name(self.dest.name + ".part")

    @property
    def meta(self) -> Path:
        return self.dest.with_name(self.dest.name + ".part.json")

    def is_done(self) -> bool:
        """Whether the destination exists. Raises UserError if it is not the expected file."""
        if not self.dest.exists():
            return False
        problem = None
        if not self.dest.is_file():
            problem = "is not a file"
        elif self.size is not None and self.dest.stat().st_size != self.size:
            problem = f"has {self.dest.stat().st_size} bytes instead of {self.size}"
        elif self.sha256 is not None and sha256_of(self.dest) != self.sha256:
            problem = f"does not have the SHA-256 {self.sha256}"
        if problem:
            raise UserError(f"{self.dest} {problem}: move it away, and it will be downloaded again")
        return True

    def offset(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def fetch(self, url: str) -> None:
        """Downloads the whole file from one mirror and renames it. Raises _Refused or _Broken."""
        idle, furthest, restarted = 0, self.offset(), False
        while True:
            try:
                resumed = self._transfer(url)
                if self._finish():
                    return
                # A continued part may be wrong, so try once more from the start.
                if not resumed or restarted:
                    raise _Refused(f"its SHA-256 is not {self.sha256}")
                restarted = True
                continue
            except _Broken:
                idle = 0 if self.offset() > furthest else idle + 1
                furthest = max(furthest, self.offset())
                if idle >= _ATTEMPTS:
                    raise
            time.sleep(_BACKOFF_S * 2 ** max(idle - 1, 0))

    def _finish(self) -> bool:
        """Renames the complete part. Removes it and returns False if its checksum is wrong."""
        if self.sha256 is not None and sha256_of(self.part) != self.sha256:
            self._forget()
            return False
        os.replace(self.part, self.dest)
        self.meta.unlink(missing_ok=True)
        return True

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.meta.unlink(missing_ok=True)

    def _resume_headers(self, url: str) -> dict[str, str]:
        """Range headers to continue the part; {} if it may not be a part of the file at ``url``."""
        if not self.offset():
            return {}
        try:
            known = json.loads(self.meta.read_text(encoding="utf-8"))
            same, validator = known["url"] == url, known["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            same, validator = False, None
        # A checksum would reveal a mixture of two files. Without it, the server has to confirm that
        # its file is the same.
        if not (same and validator) and self.sha256 is None:
            return {}
        headers = {"Range": f"bytes={self.offset()}-"}
        if same and validator:
            headers["If-Range"] = validator
        return headers

    def _transfer(self, url: str) -> bool:
        """One request that completes the part. Returns whether it continued an existing part."""
        headers = {"Accept-Encoding": "identity", **self._resume_headers(url)}
        try:
            with _Session() as session, session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as reply:
                start, total = self._check_reply(reply)
                if total == 0:
                    raise _Refused("an empty file")
                if start == total:
                    return True
                self._check_space(start, total)
                self._receive(reply, url, start, total)
                return start > 0
        except UserError:
            raise
        except ValueError:  # requests.exceptions.InvalidURL and others, of urllib, and of numbers in headers
            raise _Refused("not a usable address or reply") from None
        except requests.RequestException as exc:
            raise _Broken(_short_reason(exc)) from None

    def _check_reply(self, reply) -> tuple[int, int | None]:
        """(position of the reply's first byte, size of the whole file or None)."""
        offset = self.offset()
        if reply.status_code == 416:
            if reply.headers.get("Content-Range", "") == f"bytes */{offset}" and self.size in (None, offset):
                return offset, offset
            self._forget()
            raise _Broken("the server has no such range")
        if reply.status_code in _RETRY_STATUS:
            raise _Broken(f"HTTP {reply.status_code}")
        if reply.status_code not in (200, 206):
            raise _Refused(f"HTTP {reply.status_code}")
        if reply.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml")):
            raise _Refused("a web page instead of the file")
        if reply.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _Refused("sent in a compressed form that was not asked for")
        if reply.status_code == 200:
            start, total = 0, reply.headers.get("Content-Length", "")
        else:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
            if not match or int(match[1]) != offset:
                self._forget()
                raise _Broken("the server sent another range than asked for")
            start, total = offset, match[2]
        total = int(total) if total.isdigit() else None
        if self.size is not None and total not in (None, self.size):
            raise _Refused(f"{total} bytes there, {self.size} expected")
        return start, self.size if total is None else total

    def _check_space(self, start: int, total: int | None) -> None:
        if total is not None:  # a part to start again is removed first
            _check_free(self.dest, total - start - (self.offset() if start == 0 else 0))

    def _receive(self, reply, url: str, start: int, total: int | None) -> None:
        if start == 0:
            validator = reply.headers.get("ETag", "")
            if not validator.startswith('"'):  # If-Range does not accept weak tags
                validator = reply.headers.get("Last-Modified")
            self._forget()
            self.meta.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
        bar = progress_bar(
            total,
            desc=self.desc,
            initial=start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=distributed.local_rank() != 0,
        )
        got, most = start, _UNANNOUNCED if total is None else total
        with bar, open(self.part, "ab", buffering=1 << 20) as file:
            for chunk in reply.iter_content(_CHUNK):
                got += len(chunk)
                if got > most:
                    break
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if got > most:
            self._forget()
            expected = f"{total} expected" if total is not None else "without saying how many"
            raise _Refused(f"more than {most} bytes sent, {expected}")
        if self.offset() == 0:
            raise _Refused("an empty file")
        if total is not None and self.offset() < total:
            raise _Broken(f"the connection broke after {self.offset()} of {total} bytes")


def _short_reason(exc: requests.RequestException) -> str:
    """A few words for the nested text of a connection error."""
    text = str(exc)
    if isinstance(exc, requests.Timeout):
        return "timed out"
    if isinstance(exc, requests.exceptions.SSLError):
        return "the certificate or the encryption was refused"
    if isinstance(exc, requests.exceptions.ProxyError):
        return "the proxy was refused or not reached"
    if "NameResolution" in text or "getaddrinfo" in text:
        return "host name not found; no network?"
    if "refused" in text:
        return "connection refused"
    if isinstance(exc, (requests.exceptions.ChunkedEncodingError, requests.ConnectionError)):
        return "the connection broke"
    return type(exc).__name__
