"""What all command lines share: mistakes in one line, numbers that are finite, the flag --offline.

@click.command(cls=Command)
@click.option("--strength", type=Number(0), help="...")
@offline_flag
def main(strength): ...
"""

import math
import os
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import click

from torch_utils.download import no_network
from torch_utils.errors import UserError, printable
from torch_utils.session import Interrupted

# Raised by click 8.2 and newer to print the help of a command without arguments; 8.1 raises
# nothing.
_NO_ARGS_IS_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())


@contextmanager
def _in_one_line(ctx: click.Context):
    """Turns click's usage errors of three lines into a UserError of one line, with exit code 2."""
    try:
        yield
    except _NO_ARGS_IS_HELP:
        raise
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        raise UserError(f"{message}; '{ctx.command_path} --help' explains the options") from None


class _Printable:
    """A text stream whose output cannot control the terminal, for names of foreign files.

    See ``printable``. Line ends, tabs and the two movements of progress bars pass: back to the
    start of the line, and one line up.
    """

    _UP = "\x1b[A"

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text.replace(self._UP, "").strip("\r\n"):
            body = text.lstrip("\r")
            text = text[: len(text) - len(body)] + printable(body, keep="\n\t")
        return self._stream.write(text)


@contextmanager
def _printable_output():
    with redirect_stdout(_Printable(sys.stdout)), redirect_stderr(_Printable(sys.stderr)):
        yield


SEED = click.IntRange(0, (1 << 63) - 1)  # accepted by the generators of both torch and numpy


@contextmanager
def _named_files():
    """Turns an OSError that names a file (permissions, full disk, long name) into a UserError.

    Ctrl-C becomes Interrupted: its exit code is 130 in shells, but 1 in click.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as error:
        raise Interrupted(signal.SIGINT) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"cannot use {str(error.filename)[:100]}: {error.strerror}; choose another place") from error


def never_fail_to_print() -> None:
    """Prints characters that stdout or stderr cannot encode as escapes (``\\u4e2d``).

    Such encodings are common: cp1252 if output goes to a file on Windows, ASCII in a container
    without a locale. Even UTF-8 cannot encode file names that are not valid UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of notebooks accept everything
            stream.reconfigure(errors="backslashreplace")


class _Program:
    """Mixin of the commands below: error handling of a whole program."""

    def main(self, *args, standalone_mode: bool = True, **more):
        never_fail_to_print()
        try:
            return super().main(*args, standalone_mode=standalone_mode, **more)
        except (UserError, Interrupted) as error:
            if not standalone_mode:
                raise
            error.show()
            sys.exit(error.exit_code)


class Command(_Program, click.Command):
    """A command whose usage errors are one line, like all mistakes of the user.

    Empty values are refused: "--model_path=$FILE" with FILE unset would otherwise mean the default,
    and "--grid=" False.
    may_be_empty: names of the parameters for which an empty text has a meaning of its own.
    """

    def __init__(self, *args, may_be_empty: tuple[str, ...] = (), **more):
        super().__init__(*args, **more)
        self.may_be_empty = may_be_empty

    def parse_args(self, ctx, args):
        self._refuse_empty(args)
        try:
            with _in_one_line(ctx), _named_files():
                return super().parse_args(ctx, args)
        except BaseException:
            ctx.close()  # closes what callbacks opened (--offline); click does so only after successful parsing
            raise

    def invoke(self, ctx):
        with _named_files(), _printable_output():
            return super().invoke(ctx)

    def _refuse_empty(self, args: list[str]) -> None:
        flags = {flag: param for param in self.params for flag in param.opts}
        for before, argument in zip([None, *args], args, strict=False):
            flag, _, value = argument.partition("=") if argument else (before, "", "")
            empty = argument in ("", f"{flag}=") and not value
            if empty and flag in flags and flags[flag].name not in self.may_be_empty:
                raise UserError(f"{flag} is empty: give it a value or leave it out")


class Group(_Program, click.Group):
    """A command with subcommands, which are ``Command``s."""

    command_class = Command

    def parse_args(self, ctx, args):
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        with _in_one_line(ctx):
            return super().resolve_command(ctx, args)


class PathText(click.types.StringParamType):
    """A file, a folder, or a number or address instead.

    ``~/x`` is in the home folder, even if the shell does not expand it, as in ``--outdir=~/x``.

    several: a comma-separated list. Default False.
    """

    def __init__(self, several: bool = False):
        self.several = several

    def convert(self, value, param, ctx):
        parts = str(value).split(",") if self.several else [str(value)]
        return ",".join(os.path.expanduser(part.strip() if self.several else part) for part in parts)


PATH = PathText()


class Number(click.FloatRange):
    """A finite number in a range.

    infinite: also allow infinity. Default False.
    """

    def __init__(self, *args, infinite: bool = False, **more):
        super().__init__(*args, **more)
        self.infinite = infinite

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value} is not a {'' if self.infinite else 'finite '}number", param, ctx)
        return number


def offline_flag(command):
    """Decorator: the flag --offline, for the whole command; its function does not get it."""

    def forbid(ctx, param, value):
        if value:
            ctx.with_resource(no_network("--offline"))

    return click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=forbid,
        help="Open no connection, use local files only (as AMED_OFFLINE=1)",
    )(command)
