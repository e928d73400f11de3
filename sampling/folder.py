"""The output folder of sample.py: paths of images, their record, what a rerun may replace."""

import hashlib
import json
import math
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sampling.search import ScoreFile
from solvers.former_names import with_current_names
from solvers.schedules import SCHEDULE_NAMES
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import read_json, remove_leftovers, write_json
from torch_utils.images import decode_image, image_grid, is_whole_png, save_image
from torch_utils.locks import held, is_held, locked
from torch_utils.seeds import among, parse_ranges, parse_seeds

RECORD = "sampling.json"
GRID_LIMIT = 100


@dataclass(frozen=True)
class Folder:
    """Paths of the images of a run and of the files beside them.

    path: the folder.
    subdirs: one folder for every 1000 seeds.
    inters: also strips of denoised images.
    names: of the images by seed, without ending. Default: none, the numbers of the seeds.
    """

    path: Path
    subdirs: bool
    inters: bool
    names: tuple[str, ...] = ()

    def image(self, seed: int) -> Path:
        if self.names:
            return self.path / f"{self.names[seed]}.png"
        parent = self.path / f"{seed - seed % 1000:06d}" if self.subdirs else self.path
        return parent / f"{seed:06d}.png"

    def strip(self, seed: int) -> Path:
        return self.path / "inters" / (f"{self.names[seed]}.png" if self.names else f"{seed:06d}.png")

    @property
    def grid(self) -> Path:
        return self.path / "grid.png"

    def scores(self) -> ScoreFile:
        """The file with the choices of the noise search."""
        return ScoreFile(self.path, distributed.rank())

    def done(self, seed: int) -> bool:
        return is_whole_png(self.image(seed)) and (not self.inters or is_whole_png(self.strip(seed)))

    def begun(self) -> list[int]:
        """The seeds that have images or strips."""
        if self.names:
            seeds = range(len(self.names))
            return [seed for seed in seeds if self.image(seed).exists() or self.strip(seed).exists()]
        parents = [self.path, self.path / "inters"]
        if self.subdirs and self.path.is_dir():
            parents += [path for path in self.path.iterdir() if re.fullmatch("[0-9]{6,10}", path.name)]
        files = {path for parent in parents if parent.is_dir() for path in parent.iterdir()}
        numbers = {int(path.stem) for path in files if re.fullmatch(r"[0-9]{6,10}\.png", path.name)}
        return sorted(seed for seed in numbers if not files.isdisjoint((self.image(seed), self.strip(seed))))

    def record(self) -> dict | None:
        """The contents of ``sampling.json``; None if it does not exist."""
        path = self.path / RECORD
        if not path.exists():
            return None
        try:
            record = read_json(path)
            parse_ranges(record["seeds"])
            dict(record["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a record of sample.py; choose another --outdir") from None
        return record


def format_seeds(seeds: Sequence[int]) -> str:
    """The inverse of ``parse_seeds``: [0, 1, 2, 7] -> "0-2,7" (sorted, repetitions dropped)."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class OtherSettings(UserError):
    """The folder holds images of other settings, or another command is writing such images."""


def prepare_folder(
    folder: Folder, record: dict, seeds: list[int], overwrite: bool, *, busy: bool = False, keep_others: bool = False
) -> list[int]:
    """Checks that the folder holds images of one kind only, and writes its record.

    folder: the output folder.
    record: of this run; its "settings" decide whether images are of one kind.
    seeds: the seeds asked for.
    overwrite: replace images that exist.
    busy: another command is writing images there.
    keep_others: do not replace images of other settings, not even with ``overwrite``.

    Returns the seeds still to sample. Raises OtherSettings, or UserError if the folder holds images
    of unknown origin.
    """
    old = folder.record()
    made: list[int] = []
    if old is not None:
        before = Folder(folder.path, bool(old["settings"].get("subdirs")), inters=False, names=folder.names)
        made = parse_seeds(old["seeds"]) if busy else among(before.begun(), parse_ranges(old["seeds"]))
        different = _difference(old["settings"], record["settings"])
        if different and busy:
            raise OtherSettings(
                f"another command is writing images with other settings to {folder.path} ({different});"
                " choose another --outdir"
            )
        if made and different:
            _check_replacement(folder, seeds, made, different, overwrite and not keep_others)
            _remove(before, made)
            made = []
    elif not overwrite and any(folder.image(seed).exists() for seed in seeds):
        raise UserError(
            f"{folder.path} holds images but no {RECORD}, so their settings are unknown;"
            " choose another --outdir, or --overwrite=True to replace them"
        )
    record = record | {"seeds": format_seeds([*made, *seeds])}
    write_json(folder.path / RECORD, record)
    todo = seeds if overwrite else [seed for seed in seeds if not folder.done(seed)]
    for parent in {folder.path, *(place(seed).parent for seed in todo for place in (folder.image, folder.strip))}:
        remove_leftovers(parent)
    return todo


def default_folder(
    dataset_name: str, solver: str, nfe: int, inserted: bool = False, candidates: int | None = None
) -> Path:
    """Where images go if the user names no folder: ``samples/<dataset_name>/<solver>_nfe<NFE>``.

    inserted: whether a predictor is inserted into a plain solver, which is named after it.
    candidates: images per seed of a search; default: no search.
    """
    plugin, best_of = "-plugin" if inserted else "", "" if candidates is None else f"_best{candidates}"
    return Path("samples") / dataset_name / f"{solver}{plugin}_nfe{nfe}{best_of}"


class Place:
    """The output folder during a run. Only the first process of a run uses it.

    Several commands with the same settings may write to one folder at the same time, each its own
    seeds. The record is changed under a lock. Every command holds a lock of its own while it
    writes, so that a command with other settings is refused.

    folder: the folder.
    locks: stack that holds the lock and releases it at the end.
    """

    def __init__(self, folder: Folder, locks: ExitStack):
        self.folder, self._locks = folder, locks
        self._mark = folder.path / f".writing-{secrets.token_hex(6)}.lock"

    def _locked(self):
        path = self.folder.path
        return locked(path / ".record.lock", f"another command is starting or ending in {path}; waiting for it")

    def _busy(self) -> bool:
        # A list, not a generator, since is_held also removes old files.
        return any([is_held(path) for path in self.folder.path.glob(".writing-*.lock")])

    def begin(self, *arguments, **more) -> list[int]:
        """``prepare_folder``; merges the score files that a killed run left."""
        with self._locked():
            busy = self._busy()
            todo = prepare_folder(self.folder, *arguments, busy=busy, **more)
            if not busy:
                self.folder.scores().merge()
            self._locks.enter_context(held(self._mark, f"{self._mark} is in use"))
        return todo

    def note(self, entries: dict) -> None:
        """Adds entries to the record."""
        with self._locked():
            write_json(self.folder.path / RECORD, (self.folder.record() or {}) | entries)

    def end(self) -> None:
        """Call this when all images are written."""
        with self._locked():
            self._locks.close()
            if not self._busy():
                self.folder.scores().merge()


def begin_folder(
    folder: Folder, default: bool, locks: ExitStack, record: dict, seeds: list[int], overwrite: bool
) -> tuple:
    """Chooses and prepares the output folder of a run.

    folder: the folder asked for, or the default one.
    default: the user named no folder. If the default folder holds images of other settings, a
        folder beside it is used, named after a hash of the settings.
    locks: see ``Place``.
    record, seeds, overwrite: see ``prepare_folder``.

    Returns (place, seeds to sample).
    """
    if not default:
        place = Place(folder, locks)
        return place, place.begin(record, seeds, overwrite)
    settings = {name: value for name, value in _meaning(record["settings"]).items() if name != "subdirs"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    own = Place(replace(folder, path=folder.path.with_name(f"{folder.path.name}_{digest}")), locks)
    if own.folder.record() is not None:
        return own, own.begin(record, seeds, overwrite)
    usual = Place(folder, locks)
    try:
        return usual, usual.begin(record, seeds, overwrite, keep_others=True)
    except OtherSettings as error:
        print(f"Note: {str(error).partition(';')[0]}; writing to {own.folder.path}", file=sys.stderr)
    return own, own.begin(record, seeds, overwrite)


def _check_replacement(folder: Folder, seeds: list[int], made: list[int], different: str, overwrite: bool) -> None:
    """Raises UserError unless the user asked to replace all images made with other settings."""
    if not overwrite:
        raise OtherSettings(
            f"{folder.path} holds images made with other settings ({different});"
            " choose another --outdir, or --overwrite=True to replace them"
        )
    rest = sorted(set(made) - set(seeds))
    if rest:
        raise UserError(
            f"{folder.path} also holds seeds {format_seeds(rest)[:60]} made with other settings ({different});"
            f" choose another --outdir, or overwrite all of them (--seeds={format_seeds(made)[:60]})"
        )


def _remove(folder: Folder, seeds: list[int]) -> None:
    """Removes the images of all seeds, so that an interrupted rerun does not leave a mixture."""
    for seed in seeds:
        folder.image(seed).unlink(missing_ok=True)
        folder.strip(seed).unlink(missing_ok=True)
    folder.grid.unlink(missing_ok=True)
    folder.scores().remove()


def _meaning(settings: dict) -> dict:
    """The recorded settings that the images depend on.

    These are the noise levels, not the flags that led to them, and the guidance rate if there is
    guidance.
    """
    found = with_current_names(json.loads(json.dumps(settings)))
    found = {name: value for name, value in found.items() if value is not None}
    if "sigmas" in found:
        found = {name: value for name, value in found.items() if name not in SCHEDULE_NAMES}
    found.pop("guidance_type", None)
    if not found.get("guidance_rate"):
        found.pop("guidance_rate", None)
    if "sigmas_cond" not in found or found.get("direction_sigma") == "point":  # as in records without it
        found.pop("direction_sigma", None)
    return found


def _difference(old: dict, new: dict) -> str:
    """The first setting that differs and changes the images; "" if none does."""
    before, now = _meaning(old), _meaning(new)
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if "sigmas" in names:  # name the flags instead
        names += [name for name in SCHEDULE_NAMES if old.get(name) != new.get(name)]
    if "predictor_sha256" in names:
        if None in (old.get("predictor_sha256"), new.get("predictor_sha256")):
            return (
                "without a predictor there, with one now"
                if new.get("predictor_sha256")
                else "with a predictor there, without one now"
            )
        return "by another predictor"
    if "network_sha256" in names:
        return "with other weights of the network"
    first = ("solver", *SCHEDULE_NAMES)
    for name in [*(name for name in first if name in names), *names]:
        return f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} now"
    return ""


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write_grid(folder: Folder, seeds: Sequence[int]) -> None:
    """Writes one picture of the images of the first seeds, in seed order, read from their files."""
    chosen = sorted(seeds)[:GRID_LIMIT]
    images = [decode_image(folder.image(seed).read_bytes(), str(folder.image(seed))) for seed in chosen]
    stacked = np.stack(images).transpose(0, 2, 3, 1)
    save_image(image_grid(stacked, columns=math.ceil(math.sqrt(len(chosen)))), folder.grid)
