"""Errors for users, and functions that make their texts safe."""

import difflib
import json
import os
import reprlib
import signal
import sys
from collections.abc import Iterable

_MOST_DIGITS = 300  # of a whole number in JSON; float64 ends at 10^308, Python prints up to 4,300
_MOST_VALUES = 8_000_000  # of a JSON text; the labels of a million images need half of it
_DEEPEST = 200  # nesting of lists and objects


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters, bidirectional marks and the like as escapes.

    Names in a foreign file may contain sequences that erase the screen or reverse the text.

    keep: characters to leave unchanged. Default "".
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 60


def brief(value) -> str:
    """The beginning of a value from a file, at most 60 characters, without reading all of it."""
    return (value[:60] if isinstance(value, str) else _BRIEF.repr(value))[:60]


def did_you_mean(word: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """The end of a message about an unknown word: the nearest known ones, and what there is.

    known: what the word could have been. listed: what is named as the choice; default: known.
    """
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=2, cutoff=0.6)
    near += [name for name in known if str(word).lower() == name.lower() and name not in near]
    choice = ", ".join(known if listed is None else listed)
    text = f"; did you mean {' or '.join(near[:2])}?" if near else ""
    return text + (f" Choose from {choice}" if choice and near else f"; choose from {choice}" if choice else "")


class UserError(ValueError):
    """A mistake that one line explains: what was wrong and what to do.

    Command lines show it as one line on stderr, with exit code 2. If the library is imported, it is
    an ordinary ``ValueError``.
    """

    exit_code = 2

    def __init__(self, message: str):
        self.message = printable(" ".join(str(message).split()))
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def show(self, file=None) -> None:
        rank = os.environ.get("RANK")
        where = f" [rank {rank}]" if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"Error{where}: {self.message}", file=file or sys.stderr, flush=True)


class Interrupted(Exception):
    """A signal ended the program, with its output in order. Shown to the user as one line.

    number: the signal; ``exit_code`` is 128 + signal, as in shells.
    note: text after "interrupted by SIGTERM". Default "".
    """

    def __init__(self, number: int, note: str = ""):
        self.message = f"interrupted by {signal.Signals(number).name}{note}"
        super().__init__(self.message)
        self.exit_code = 128 + number

    def show(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(self.message[:1].upper() + self.message[1:], file=file or sys.stderr, flush=True)


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def parse_json(text: str | bytes):
    """``json.loads`` for files from others, in bounded time and memory.

    Raises ValueError if anything is wrong: not JSON, numbers beyond float64, millions of values, or
    deep nesting.
    """
    kinds = (b"[", b"{", b",") if isinstance(text, bytes) else ("[", "{", ",")
    if sum(text.count(kind) for kind in kinds) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values")
    try:
        content = json.loads(text, parse_int=_whole)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    level = [content]
    for _ in range(_DEEPEST):
        containers = [part for part in level if isinstance(part, dict | list)]
        level = [child for part in containers for child in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


class MissingExtra(UserError):
    """An optional dependency is missing."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': install it with  pip install -e '.[{extra}]'")
