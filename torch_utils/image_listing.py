"""Lists the images of a folder or archive, and counts the files of other kinds."""

import os
import re
import stat
import zipfile
from collections import Counter
from pathlib import Path

from torch_utils.errors import UserError
from torch_utils.image_decoding import image_extensions

# Thumbnails and deleted files: of network drives (Synology), recycle bins, file systems.
_SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})
_TO_PNG, _TO_IMAGES = "convert these to PNG", "make single images of these"
_ADVICE = {
    **dict.fromkeys(("heic", "heif", "jxl", "svg", "eps", "pdf", "exr", "hdr", "fits"), _TO_PNG),
    **dict.fromkeys(("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf"), _TO_PNG),
    **dict.fromkeys(("zip", "tar", "gz", "tgz", "7z", "rar"), "unpack these"),
    **dict.fromkeys(("npz", "npy", "parquet", "tfrecord", "mp4", "mov", "avi", "mkv", "webm"), _TO_IMAGES),
}


def kind_of(name: str) -> str | None:
    """None for the relative name of an image; else the kind of the file, in words."""
    *folders, file = name.split("/")
    if "__MACOSX" in folders or file.startswith("._"):
        return "of macOS (AppleDouble)"
    if any(part.startswith(".") and part not in (".", "..") for part in (*folders, file)):
        return "hidden"
    if any(folder.lower() in _SYSTEM_FOLDERS for folder in folders):
        return "in system folders"
    extension = os.path.splitext(file)[1].lower()
    if extension in image_extensions():
        return None
    if not extension:
        return "without extension"
    return extension if re.fullmatch(r"\.\w{1,12}", extension, re.ASCII) else "of other kinds"


def describe(ignored: Counter) -> str:
    """A text like "12 files ignored: 10 .txt, 2 hidden"; empty if there are none."""
    total = ignored.total()
    if not total:
        return ""
    parts = []
    for kind, count in sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:20]:
        advice = _ADVICE.get(kind.removeprefix("."))
        parts.append(f"{count} {kind}" + (f" ({advice} to use them)" if advice else ""))
    return f"{total} file{'s' if total > 1 else ''} ignored: {', '.join(parts)}{', ...' if len(ignored) > 20 else ''}"


def list_folder(root: Path) -> tuple[list[str], Counter]:
    """Relative names of all files, with forward slashes, and counts of ignored links, by kind.

    Links are followed, but no folder and no image is listed twice. Raises UserError for a folder
    that cannot be read.
    """
    found, file_links, ignored = [], [], Counter()
    folders, folder_links, visited = [""], [], set()
    while folders or folder_links:  # folders before links, so that each has its own name
        prefix = folders.pop() if folders else folder_links.pop()
        try:
            status = os.stat(root / prefix)
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except OSError as exc:
            raise UserError(f"{root / prefix}: cannot be read ({exc.strerror or exc})") from None
        unwanted = kind_of(f"{prefix}x.png")  # hidden folders are only searched to count their files
        if unwanted is None:
            if (status.st_dev, status.st_ino) in visited:
                ignored["links to folders that are read already"] += 1
                continue
            visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink() and unwanted:
                ignored[unwanted] += 1
            elif entry.is_dir():
                (folder_links if entry.is_symlink() else folders).append(f"{name}/")
            elif entry.is_file():
                (file_links if entry.is_symlink() else found).append(name)
            else:
                ignored["broken links" if entry.is_symlink() else "no regular files"] += 1
    if file_links:
        own = {os.path.realpath(root / name) for name in found if kind_of(name) is None}
        once = [name for name in file_links if os.path.realpath(root / name) not in own]
        if len(once) < len(file_links):
            ignored["links to images that are read already"] += len(file_links) - len(once)
        found += once
    return found, ignored


def list_zip(archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], Counter]:
    """``list_folder`` for a zip: entries by name. Of several with one name, the last counts."""
    found, ignored = {}, Counter()
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")  # some programs on Windows write these
        if name.endswith("/"):
            continue
        if stat.S_ISLNK(entry.external_attr >> 16):
            ignored["links"] += 1
            continue
        if name in found:
            ignored["replaced by later ones of the same name"] += 1
        found[name] = entry
    return found, ignored
