"""Progress bars: alive on a terminal, and one line every 30 seconds where the output goes to a file."""

import sys
import time

from tqdm import tqdm

from torch_utils import distributed

QUIET_S = 30.0  # between two lines


class _Lines(tqdm):
    """For files and pipes: whole lines, at most one in QUIET_S seconds, none of what is done within that time."""

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
        """Nothing to wipe away."""

    def close(self):
        if not self.disable and self._lines:  # how it ended, where it was told how it went
            self._print()
        self.disable = True

    def _print(self, msg=None):
        self._lines += 1
        self.fp.write((msg or str(self)).strip() + "\n")
        self.fp.flush()


def progress_bar(total: float | None = None, *, disable: bool | None = None, **more) -> tqdm:
    """A tqdm bar on stderr. disable: by default on all processes but the first; more: as of tqdm (unit, desc, ...)."""
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(total=total, disable=distributed.rank() != 0 if disable is None else disable, **more)


def say(text: str) -> None:
    """A line on stdout, above the bar if there is one."""
    tqdm.write(text)
