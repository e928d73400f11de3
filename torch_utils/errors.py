"""Errors that are meant for the person at the keyboard."""

import json
import os

import click


class UserError(click.ClickException, ValueError):
    """A mistake that one line can explain: what was wrong and what to do about it.

    Raised anywhere in the code base, it reaches the user as a single line on stderr with exit code 2 when a command line
    is running, and as an ordinary ``ValueError`` when the library is imported.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

    def __str__(self) -> str:
        return self.message

    def show(self, file=None) -> None:
        rank = os.environ.get("RANK")
        where = f" [rank {rank}]" if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        click.echo(f"Error{where}: {self.message}", file=file, err=file is None)


def parse_json(text: str | bytes):
    """``json.loads`` for files of others: too deep a nesting is a ValueError like all else that is wrong."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class MissingExtra(UserError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': install it with  pip install -e '.[{extra}]'")
