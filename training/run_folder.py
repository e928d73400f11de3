"""The folder of a run: its number, its log, its training states."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from torch_utils import distributed
from torch_utils.errors import UserError, parse_json
from torch_utils.files import atomic_path, read_json
from torch_utils.progress import say
from torch_utils.safe_pickle import safe_load
from torch_utils.tensor_file import write_state
from training.events import EventFile

OPTIONS_FILE = "training_options.json"
_STATE = re.compile(r"training-state-(\d+)\.pt")
_KEEP_STATES = 2
_LONGEST_LINE = 1 << 20  # of stats.jsonl, in bytes


def numbered_runs(outdir) -> list[tuple[int, Path]]:
    """(number, folder) of all ``<number>-...`` folders, in order."""
    outdir = Path(outdir)
    folders = outdir.iterdir() if outdir.is_dir() else []
    found = [(int(m[1]), f) for f in folders if (m := re.match(r"([0-9]{1,9})-", f.name)) and f.is_dir()]
    return sorted(found, key=lambda entry: (entry[0], entry[1].name))


def create_run_folder(outdir, name_of_number) -> Path:
    """Makes ``outdir/<name_of_number(number)>`` with the next free number. One process calls it.

    Several runs may start at the same moment. A number is claimed by an exclusive mkdir, then
    checked again, since its owner may have finished between our check and our claim.
    """
    outdir = Path(outdir)
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            number = max([number, *(n + 1 for n, _ in numbered_runs(outdir))])
            claim = outdir / f".{number:05d}.claim"
            try:
                claim.mkdir()
            except FileExistsError:
                number += 1
                continue
            try:
                if number not in (n for n, _ in numbered_runs(outdir)):
                    folder = outdir / name_of_number(number)
                    folder.mkdir()
                    return folder
            finally:
                claim.rmdir()
    except OSError as error:
        raise UserError(f"cannot make a folder in {outdir}: {error.strerror or error}") from None


def use_folder(folder) -> Path:
    """The folder for a new run. UserError if it holds a run."""
    folder = Path(folder)
    if _is_run(folder):
        raise UserError(f"{folder} already holds a run: continue it with --resume={folder}, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    return folder


def find_run(resume: str, outdir) -> Path:
    """The folder of the run to continue.

    resume: a folder, the number of a run in outdir, or "true" for the newest one.
    outdir: the folder of the runs.
    """
    text = str(resume).strip()
    runs = numbered_runs(outdir)
    if text.lower() == "true":
        candidates = [Path(outdir)] if _is_run(outdir) else [folder for _, folder in runs if _is_run(folder)]
        if not candidates:
            raise UserError(f"--resume={text}: no run in {outdir} can be continued; choose another run")
        return candidates[-1]
    if re.fullmatch(r"[0-9]{1,9}", text):
        matches = [folder for number, folder in runs if number == int(text)]
        if len(matches) > 1:
            raise UserError(f"--resume={text} is ambiguous: {', '.join(f.name for f in matches)}; give the folder")
        if matches:
            return matches[0]
    if not Path(text).is_dir():
        there = ", ".join(folder.name for _, folder in runs) or "no runs"
        raise UserError(f"--resume={text}: no such run; {outdir} holds {there}")
    return Path(text)


def _states(folder) -> list[tuple[int, Path]]:
    folder = Path(folder)
    names = folder.iterdir() if folder.is_dir() else []
    return sorted((int(m[1]), path) for path in names if (m := _STATE.fullmatch(path.name)))


def _is_run(folder) -> bool:
    """Whether a run has begun here. One that was killed early has options but no state."""
    return (Path(folder) / OPTIONS_FILE).is_file() or bool(_states(folder))


def stored_options(folder) -> dict:
    """The options of a run: those of its newest state, else those at its beginning."""
    if _states(folder):
        return load_newest_state(folder)["options"]
    path = Path(folder) / OPTIONS_FILE
    try:
        options = read_json(path)
        return {name: value for name, value in options.items() if name != "provenance"}
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no training state (training-state-*.pt) to continue from: --resume needs a run that wrote one"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def newest_state(folder) -> dict | None:
    """The newest ``save_state``; None if the run was killed before its first state."""
    return load_newest_state(folder) if _states(folder) or not _is_run(folder) else None


def save_state(folder, kimg: int, state: dict) -> Path:
    """Writes ``training-state-<kimg>.pt`` atomically and keeps the newest two."""
    path = Path(folder) / f"training-state-{kimg:06d}.pt"
    write_state(path, state)
    for _, old in _states(folder)[:-_KEEP_STATES]:
        old.unlink(missing_ok=True)
    return path


def load_newest_state(folder) -> dict:
    """The newest ``save_state``, on the CPU. UserError if it is missing or damaged."""
    states = _states(folder)
    if not states:
        raise UserError(
            f"{folder} has no training state (training-state-*.pt) to continue from: give --resume another run"
        )
    path = states[-1][1]
    try:
        state = read_state(path, {"predictor", "optimizer", "iteration", "options"})
        if not isinstance(state["options"], dict) or not all(isinstance(name, str) for name in state["options"]):
            raise UserError(f"cannot read {path} (its options are damaged)")
    except UserError as error:
        older = f"; delete it to continue from {states[-2][1].name}" if len(states) > 1 else ""
        raise UserError(f"{error}{older}") from None
    return state


def read_state(path: Path, entries: set[str]) -> dict:
    """The training state in a file, on the CPU.

    path: the file.
    entries: names that the state must have.

    Raises UserError if it is damaged or lacks an entry.
    """
    try:
        state = safe_load(path)
        if not isinstance(state, dict) or not entries <= state.keys():
            raise ValueError("it is not a training state")
    except Exception as error:  # a damaged file may raise anything in torch
        raise UserError(f"cannot read {path} ({str(error).strip().removeprefix(f'{path} ')[:160]})") from None
    return state


def _value(line: bytes, key: str) -> float:
    try:
        return float(parse_json(line)[key])
    except (ValueError, KeyError, TypeError, OverflowError):  # written when the disk was full
        return math.inf


class RunLog:
    """log.txt and stats.jsonl of a run. Only the first process writes them.

    Attributes: ``events``, an event file that receives the statistics as well, or None.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.active = distributed.rank() == 0
        self.events: EventFile | None = None

    def say(self, text: str) -> None:
        """Writes a line to the screen (beside the progress bar) and to the log."""
        if self.active:
            say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Writes a line to the log."""
        self._append("log.txt", text)

    def stats(self, record: dict) -> None:
        self._append("stats.jsonl", json.dumps(record))
        if self.events is not None:
            self.events.scalars(record)

    @contextmanager
    def event_file(self, wanted: bool, kimg: float) -> Iterator[None]:
        """Context in which an event file of TensorBoard is written, if wanted.

        kimg: see ``EventFile``.
        """
        if not (wanted and self.active):
            yield
            return
        self.events = EventFile(self.folder, kimg)
        try:
            yield
        finally:
            self.events.close()
            self.events = None

    def images(self, draw: Callable[[], np.ndarray], kimg: float) -> None:
        """Writes a picture, uint8 [H,W,C], to the event file. Without one, it is not drawn."""
        if self.events is not None:
            self.events.image("samples", draw(), kimg)

    def rewind(self, key: str, limit: float) -> None:
        """Drops incomplete lines of stats.jsonl, and those beyond ``limit`` (for a resumed run)."""
        path = self.folder / "stats.jsonl"
        if not self.active or not path.exists():
            return
        with atomic_path(path) as temporary, temporary.open("wb") as kept, path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if line.endswith(b"\n") and _value(line, key) <= limit:
                    kept.write(line)

    def _append(self, name: str, line: str) -> None:
        if not self.active:
            return
        path = self.folder / name
        if path.is_symlink():  # writing would change a file outside the folder
            raise UserError(f"{path} is a link; replace it by the file itself, or remove it")
        try:
            # File names may contain bytes that are not UTF-8.
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
