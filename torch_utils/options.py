"""Options declared once: the field of a dataclass makes the flag, its help text and the check of its value.

    @dataclass
    class Options:
        batch: int = option(512, "Samples per iteration", click.IntRange(min=1))
        amp: str = option("none", "Autocast of the network", ("none", "bf16"))

    @click.command(cls=Command)
    @flags(Options)
    def main(**values): ...

    check_options(Options(batch=0))  # UserError: batch=0 must be a whole number of at least 1

A subclass that only changes a default writes ``batch: int = 32``; help text and type are inherited.
Fields without ``option`` are not flags.
"""

import typing
from dataclasses import MISSING, dataclass, field, fields

import click

from torch_utils.cli import PATH, Number
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds, fits, kinds_of

_KEY = "option"
POSITIVE = Number(0, min_open=True)
COUNT = click.IntRange(min=1)


class AFSType(click.ParamType):
    """False, True or "data"."""

    name = "False|True|data"

    def convert(self, value, param, ctx):
        words = {"data": "data", **dict.fromkeys(("true", "1", "yes", "on"), True)}
        words |= dict.fromkeys(("false", "0", "no", "off"), False)
        word = str(value).strip().lower()
        if word not in words:
            self.fail(f"choose True, False or data, not '{value}'", param, ctx)
        return words[word]


class SigmaList(click.ParamType):
    """Comma-separated noise levels, as a list of numbers."""

    name = "S,S,..."

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"write decreasing noise levels like 80,10,1,0.002, not '{value}'", param, ctx)


@dataclass(frozen=True)
class Flag:
    """What a field says about its flag.

    help: text for the user.
    type: click type, which also checks the value; None: the annotation of the field, bool or str.
    aliases: further names on the command line.
    changeable: whether a run that is continued may have another value.
    more: further arguments of ``click.option``.
    """

    help: str
    type: click.ParamType | None
    aliases: tuple[str, ...]
    changeable: bool
    more: dict


def option(default, help, kind=None, *aliases, changeable=False, **more):
    """The dataclass field of an option; ``default`` MISSING makes it a required one. See ``Flag``.

    kind: click type, or a tuple of words to choose from; None for bool and plain text.
    """
    if kind is not None:
        kind = click.Choice(kind) if isinstance(kind, tuple) else click.types.convert_type(kind)
    flag = Flag(help, kind, aliases, changeable, more)
    return field(default=default, metadata={_KEY: flag})


def click_type(kind):
    """The click type of values of a Python type, or of the words of a tuple."""
    if isinstance(kind, tuple):
        return click.Choice(kind, case_sensitive=False)
    return {float: Number(infinite=True), str: PATH}.get(kind, kind)


def flags_of(cls) -> dict[str, Flag]:
    """The options of a dataclass by name, in the order of its fields."""
    found = {}
    for name in kinds_of(cls):
        for base in cls.__mro__:
            flag = vars(base).get("__dataclass_fields__", {}).get(name)
            if flag is not None and _KEY in flag.metadata:
                found[name] = flag.metadata[_KEY]
                break
    return found


def flags(cls, **others):
    """Decorator: one click option for each option of a dataclass, then for those that only others have.

    others: further dataclasses by label. The help text of an option that only one of them has
    begins with its label, and a default that differs from that of ``cls`` is named.
    """
    defaults = {field.name: field.default for field in fields(cls)}
    options = {name: (flag, flag.help, defaults[name], cls) for name, flag in flags_of(cls).items()}
    for label, other in others.items():
        own = {field.name: field.default for field in fields(other)}
        for name, flag in flags_of(other).items():
            if name not in options:
                options[name] = flag, f"{label}: {flag.help}", own[name], other
            elif own[name] not in (None, MISSING, defaults[name]):
                first, text, default, owner = options[name]
                options[name] = first, f"{text} ({label}: {own[name]})", default, owner

    def add(command):
        for name, (flag, text, default, owner) in reversed(options.items()):
            default = None if default is MISSING else default
            more = {"default": default, "show_default": default is not None, **flag.more}
            kind = kinds_of(owner)[name]
            kind = flag.type or next(iter(typing.get_args(kind)), kind)
            command = click.option(name, f"--{name}", *flag.aliases, type=kind, help=text, **more)(command)
        return command

    return add


def check_options(options) -> None:
    """Raises UserError for the first option whose value is of another type or outside its range."""
    kinds = kinds_of(type(options))
    for name, flag in flags_of(type(options)).items():
        value = getattr(options, name)
        check_kinds({name: value}, kinds)
        if flag.type is None or (value is None and fits(None, kinds[name])):
            continue
        if isinstance(flag.type, click.Choice):
            if value not in flag.type.choices:
                raise UserError(f"{name}={value}: choose from {', '.join(flag.type.choices)}")
            continue
        try:
            flag.type.convert(value, None, None)
        except click.BadParameter as error:
            wanted = _range_text(flag.type)
            reason = f"{name}={value!r}: {error.message}" if wanted is None else f"{name}={value} must be {wanted}"
            raise UserError(reason) from None


def _range_text(kind) -> str | None:
    """The range of a numeric click type in words: "a number above 0 and below 1"; None for others."""
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return None
    limits = [
        f"{'above' if kind.min_open else 'of at least'} {kind.min}" if kind.min is not None else "",
        f"{'below' if kind.max_open else 'at most'} {kind.max}" if kind.max is not None else "",
    ]
    number = "a whole number" if isinstance(kind, click.IntRange) else "a finite number"
    return f"{number} {' and '.join(filter(None, limits))}".strip()
