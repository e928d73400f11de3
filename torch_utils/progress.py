"""Progress bars: animated on a terminal, else one line every 30 seconds."""

import sys
import time

from tqdm import tqdm

from torch_utils import distributed

QUIET_S = 30.0  # between two lines


class _Lines(tqdm):
    """Progress for files and pipes: at most one line in QUIET_S seconds, none for shorter work."""

    def __init__(self, *args, **more):
        self._printed_at = time.monotonic()
        self._lines = 0
        super().__init__(*args, **{**more, "mininterval": QUIET_S, "maxinterval": QUIET_S, "ncols": 100, "ascii": True})

    def display(self, msg=None, pos=None):
        now = time.monotonic()
        if now - self._printed_at < QUIET_S:
            return
        self._print(msg)
        self._printed_at = now

    def clear(self, nolock=False):
        """Nothing to erase."""

    def close(self):
        if not self.disable and self._lines:  # a last line if there were others
            self._print()
        self.disable = True

    def _print(self, msg=None):
        self._lines += 1
        self.fp.write((msg or str(self)).strip() + "\n")
        self.fp.flush()


def progress_bar(total: float | None = None, *, disable: bool | None = None, **more) -> tqdm:
    """A tqdm bar on stderr.

    total: number of steps. Default None.
    disable: default None: on all processes but the first.
    more: keyword arguments of tqdm (unit, desc, ...).
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(total=total, disable=distributed.rank() != 0 if disable is None else disable, **more)


def say(text: str) -> None:
    """Prints a line to stdout, above a progress bar."""
    tqdm.write(text)
