"""What all command lines share: mistakes in one line, numbers that are finite, the flag --offline.

@click.command(cls=Command)
@click.option("--strength", type=Number(0), help="...")
@offline_flag
def main(strength): ...
"""

import inspect
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import click

from torch_utils.errors import Interrupted, UserError, did_you_mean, printable

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
        choices = getattr(getattr(getattr(error, "param", None), "type", None), "choices", ())
        if word := re.search(r"'([^']*)' is not one of", message):
            message += did_you_mean(word[1], choices, ()).rstrip("?")
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


_HELP = {"help_option_names": ["-h", "--help"]}


def _examples(callback, name: str | None = None) -> list[str]:
    """The first three commands of the indented blocks in the docstring of a callback's module.

    name: of a subcommand; only its own commands, if there are any.
    """
    text = getattr(inspect.getmodule(callback), "__doc__", None) if callback else None
    lines = [line[4:] for line in (text or "").splitlines() if line.startswith("    ")]
    commands = re.findall(r"(?:[^\n]*\\\n)*[^\n]+", "\n".join(lines))
    commands = [re.sub(r"\s{2,}#.*", "", command) for command in commands if re.match(r"python|torchrun", command)]
    commands = [command for command in commands if f" {name} " in f"{command} "] or commands
    return [re.sub(r"\s*\\?\s+", " ", command).strip() for command in commands[:3]]


def _write_examples(formatter, examples: list[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in "\n".join(examples).splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(_Program, click.Command):
    """A command whose usage errors are one line, like all mistakes of the user.

    The value of a flag may not be missing: "--outdir --seeds=0-3" is refused, and so is an empty
    one, "--model_path=$FILE" with FILE unset. Flags that are true or false can do without: "--grid"
    is "--grid=True".

    groups: headings of the help and the names of the flags below them, those that most people need
        before "|"; the others are shown by --help-all. A flag that is in no group is under "Other".
    examples: commands for the help. Default: those in the docstring of the callback's module.
    may_be_empty: names of the parameters for which an empty text has a meaning of its own.
    """

    def __init__(
        self,
        *args,
        groups: dict[str, str] | None = None,
        examples: list[str] | None = None,
        may_be_empty: tuple[str, ...] = (),
        **more,
    ):
        more["context_settings"] = _HELP | (more.get("context_settings") or {})
        super().__init__(*args, **more)
        self.groups, self.may_be_empty = groups or {}, may_be_empty
        self.examples = _examples(self.callback, self.name) if examples is None else examples

    def get_params(self, ctx):
        shown = super().get_params(ctx)
        if not self.groups:
            return shown
        hidden = {"is_flag": True, "is_eager": True, "expose_value": False, "hidden": True}
        return [*shown, click.Option(["--help-all"], callback=_print_all, **hidden)]

    def format_help(self, ctx, formatter):
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        _write_examples(formatter, self.examples)
        self.format_options(ctx, formatter)

    def format_options(self, ctx, formatter):
        if not self.groups:
            return super().format_options(ctx, formatter)
        records = {param.name: param.get_help_record(ctx) for param in self.params if isinstance(param, click.Option)}
        records = {name: record for name, record in records.items() if record is not None}
        everything, left = bool(ctx.meta.get("help_all")), dict(records)
        for title, names in self.groups.items():
            common, _, rare = names.partition("|")
            wanted = [*common.split(), *(rare.split() if everything else [])]
            for name in [*common.split(), *rare.split()]:
                left.pop(name, None)
            lines = [records[name] for name in wanted if name in records]
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines, col_max=26)
        if everything and left:
            with formatter.section("Other"):
                formatter.write_dl(list(left.values()), col_max=26)
        with formatter.section("Help"):
            hidden = len(records) - sum(len(names.partition("|")[0].split()) for names in self.groups.values())
            own = [self.get_help_option(ctx).get_help_record(ctx)]
            if hidden:
                own.append(("--help-all", f"Show {hidden} more flag{'s' * (hidden > 1)} too, and exit."))
            formatter.write_dl(own, col_max=26)

    def parse_args(self, ctx, args):
        args = self._with_values(args)
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

    def _flags(self) -> dict[str, click.Parameter]:
        return {flag: param for param in self.params for flag in param.opts}

    def _with_values(self, args: list[str]) -> list[str]:
        """The arguments with "=True" at flags that are true or false and have no value.

        Raises UserError for another flag without a value, which would take the next flag for it.
        """
        flags, found, waiting = self._flags(), [], None

        def close():
            if waiting is not None and flags[waiting].type is not click.BOOL:
                raise UserError(f"{waiting} needs a value: write {waiting}=VALUE")
            found.extend([] if waiting is None else [f"{waiting}=True"])

        for argument in args:
            name, equals, _ = argument.partition("=")
            if waiting is not None and name not in flags and name not in ("-h", "--help", "--help-all"):
                found += [waiting, argument]
                waiting = None
                continue
            close()
            param, waiting = flags.get(name), None
            if isinstance(param, click.Option) and not equals and _takes_value(param):
                waiting = argument
            else:
                found.append(argument)
        close()
        return found

    def _refuse_empty(self, args: list[str]) -> None:
        flags = self._flags()
        for before, argument in zip([None, *args], args, strict=False):
            flag, _, value = argument.partition("=") if argument else (before, "", "")
            empty = argument in ("", f"{flag}=") and not value
            if empty and flag in flags and flags[flag].name not in self.may_be_empty:
                raise UserError(f"{flag} is empty: give it a value or leave it out")


def _takes_value(option: click.Option) -> bool:
    return not option.is_flag and not isinstance(option.flag_value, str)  # a text: the value may be left out


def _print_all(ctx, param, value):
    if value and not ctx.resilient_parsing:
        ctx.meta["help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


class Group(_Program, click.Group):
    """A command with subcommands, which are ``Command``s."""

    command_class = Command

    def __init__(self, *args, examples: list[str] | None = None, **more):
        more["context_settings"] = _HELP | (more.get("context_settings") or {})
        super().__init__(*args, **more)
        self.examples = _examples(self.callback) if examples is None else examples

    def format_help(self, ctx, formatter):
        super().format_help(ctx, formatter)
        _write_examples(formatter, self.examples)

    def parse_args(self, ctx, args):
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        with _in_one_line(ctx):
            return super().resolve_command(ctx, args)


class Known(click.ParamType):
    """One of many names, whose list would be too long for the line of a flag in the help.

    message: of the error, with {} for what was written.
    """

    name = "NAME"

    def __init__(self, names, message: str = "'{}' is unknown"):
        self.names, self.message = tuple(names), message

    def convert(self, value, param, ctx):
        if value not in self.names:
            self.fail(self.message.format(value) + did_you_mean(value, self.names), param, ctx)
        return value


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
            from torch_utils.download import no_network  # needs torch, which help and usage errors do not

            ctx.with_resource(no_network("--offline"))

    return click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=forbid,
        help="Open no connection, use local files only (as AMED_OFFLINE=1)",
    )(command)
