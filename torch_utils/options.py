"""Options declared once: a dataclass field makes the flag, its help and the check of its value.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        text: TextOptions = part()
        batch: int = flag("Images per network call", 64, click.IntRange(min=1))
        amp: str = flag("Autocast of the network", "none", ("none", "bf16"), record=ALWAYS)

    @click.command(cls=Command)
    @flags(Options)
    @click.pass_context
    def main(ctx, **values):
        options = read_flags(Options, values, given_flags(ctx))

    check_options(Options(batch=0))  # UserError: batch=0 must be a whole number of at least 1

A subclass that only changes a default writes ``batch: int = 32`` and inherits the rest. Fields
without ``flag`` are not flags.
"""

import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import NoneType

import click
from click.core import ParameterSource

from torch_utils.cli import PATH, Number
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds, fits, kinds_of

REQUIRED = MISSING
ALWAYS, CHANGED = "always", "changed"
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
    kind: click type, which also checks the value. None: by the annotation of the field.
    called: name on the command line and in records. None: that of the field.
    aliases: further names on the command line.
    changeable: a resumed run may have another value.
    record: ALWAYS: the value is in the record of a run. CHANGED: only if it is not the default.
    record_as: function from the value to what is recorded. None: the value.
    more: further arguments of ``click.option``.
    """

    help: str
    kind: click.ParamType | None = None
    called: str | None = None
    aliases: tuple[str, ...] = ()
    changeable: bool = False
    record: str | None = None
    record_as: Callable | None = None
    more: dict = field(default_factory=dict)

    def with_changes(self, **changes) -> "Flag":
        own = {name: changes.pop(name) for name in [*changes] if name in _OWN}
        if isinstance(own.get("kind"), tuple):
            own["kind"] = click.Choice(own["kind"])
        elif own.get("kind") is not None:
            own["kind"] = click.types.convert_type(own["kind"])
        return replace(self, **own, more=self.more | changes)


_OWN = {entry.name for entry in fields(Flag)} - {"more"}


def flag(help, default=None, kind=None, **arguments):
    """A field of a dataclass that is also a flag of a command line.

    help: text for the user.
    default: default value, or REQUIRED if the user has to give one.
    kind: click type, or a tuple of words to choose from. Default None: bool or plain text.
    arguments: other fields of ``Flag``, and further arguments of ``click.option``.
    """
    return field(default=default, metadata={"flag": Flag(help).with_changes(kind=kind, **arguments)})


def like(cls, name: str, **changes):
    """A field with the flag of another dataclass's field.

    cls, name: the dataclass and its field.
    changes: arguments of ``flag`` to replace.
    """
    (known,) = (entry for entry in fields(cls) if entry.name == name)
    default = changes.pop("default", known.default)
    return field(default=default, metadata={"flag": known.metadata["flag"].with_changes(**changes)})


def part(**changes):
    """A field that is itself an option dataclass.

    changes: {field name: arguments of ``flag`` to replace}. None removes the flag.
    """
    return field(metadata={"changes": changes})


def derived(read: Callable | None = None, *, flags: Callable | None = None, record=None, **default):
    """A field that is not a single flag.

    read: function (values, given) -> value of the field. values: the flags by name; given: names of
        the flags that the user wrote. None: the caller of ``read_flags`` passes the value.
    flags: decorator that adds the flags which ``read`` needs.
    record: as in ``Flag``.
    default: ``default`` or ``default_factory`` of the field, if any.
    """
    return field(**default, metadata={"read": read, "flags": flags, "record": record})


def names_of_written():
    """A field with the names of the flags that the user wrote."""
    return derived(lambda values, given: frozenset(given), default=frozenset())


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
            entry = vars(base).get("__dataclass_fields__", {}).get(name)
            if entry is not None and "flag" in entry.metadata:
                found[name] = entry.metadata["flag"]
                break
    return found


def flag_kind(cls, name: str) -> click.ParamType:
    """The click type of an option of a dataclass."""
    annotation = kinds_of(cls)[name]
    of_field = next((kind for kind in typing.get_args(annotation) if kind is not NoneType), annotation)
    return flags_of(cls)[name].kind or click.types.convert_type(of_field)


def _click_option(cls, name: str, flag: Flag) -> Callable:
    default = _defaults(cls)[name]
    arguments = {"default": default, "show_default": default is not None} | flag.more
    if default is REQUIRED or arguments.get("required"):
        arguments = {"required": True} | flag.more
    kind = flag.kind or flag_kind(cls, name)
    return click.option(f"--{flag.called or name}", *flag.aliases, name, help=flag.help, type=kind, **arguments)


def _defaults(cls) -> dict:
    return {entry.name: entry.default for entry in fields(cls)}


def flags(cls, others: dict | None = None, **changes) -> Callable:
    """Decorator: the flags of all options of a dataclass, in the order of its fields.

    others: further dataclasses by label. The help text of an option that only they have begins with
        the label, and a default that differs from that of ``cls`` is named.
    changes: as of ``part``.
    """
    own, found = flags_of(cls), []
    known = {name: (cls, flag.help) for name, flag in own.items()}  # option -> its first dataclass, help
    differing: dict[str, list[str]] = {}  # option -> other defaults
    for label, other in (others or {}).items():
        for name, flag in flags_of(other).items():
            home, help = known.setdefault(name, (other, f"{label}: {flag.help}"))
            if home is not cls and flag.help != flags_of(home)[name].help:
                known[name] = (home, f"{help}; {label}: {flag.help}")
            default = _defaults(other)[name]
            if default not in (None, MISSING, _defaults(home)[name]):
                differing.setdefault(name, []).append(f"{label}: {default}")
    for name, notes in differing.items():
        home, help = known[name]
        known[name] = (home, f"{help} ({', '.join(notes)})")
    changes |= {name: {"help": known[name][1]} for name in differing if name in own}
    more = [
        _click_option(home, name, flags_of(home)[name].with_changes(help=help))
        for name, (home, help) in known.items()
        if home is not cls
    ]
    for entry in fields(cls):
        change = changes.get(entry.name, {})
        if change is None:
            continue
        if entry.metadata.get("flags") is not None:
            found.append(entry.metadata["flags"])
        elif is_dataclass(entry.type):
            found.append(flags(entry.type, **entry.metadata.get("changes", {})))
        elif entry.name in own:
            found.append(_click_option(cls, entry.name, own[entry.name].with_changes(**change)))

    def decorate(command):
        for add in reversed(found + more):
            command = add(command)
        return command

    return decorate


def given_flags(ctx: click.Context) -> set[str]:
    """Names of the flags that the user wrote."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}


def read_flags(cls, values: dict, given: set[str], **more):
    """The dataclass with the values of its flags.

    cls: the dataclass.
    values: values of the flags by name.
    given: names of the flags that the user wrote.
    more: fields whose values are already known.
    """
    for entry in fields(cls):
        if entry.name in more:
            continue
        if entry.metadata.get("read") is not None:
            more[entry.name] = entry.metadata["read"](values, given)
        elif is_dataclass(entry.type):
            left_out = [name for name, change in entry.metadata.get("changes", {}).items() if change is None]
            defaults = {name: _defaults(entry.type)[name] for name in left_out}
            more[entry.name] = read_flags(entry.type, values, given, **defaults)
        elif "flag" in entry.metadata:
            more[entry.name] = values[entry.name]
    return cls(**more)


def changed(options, but=()) -> dict:
    """The fields of a dataclass that differ from their defaults. but: names to leave out."""
    values = {name: getattr(options, name) for name in _defaults(type(options)) if name not in but}
    return {name: value for name, value in values.items() if value != _defaults(type(options))[name]}


def recorded(*parts) -> dict:
    """What option dataclasses add to the record of a run, by flag name."""
    found = {}
    for options in parts:
        flags = flags_of(type(options))
        for entry in fields(options):
            flag = flags.get(entry.name, Flag("", record=entry.metadata.get("record")))
            value = getattr(options, entry.name)
            if flag.record == ALWAYS or (flag.record == CHANGED and value != entry.default):
                found[flag.called or entry.name] = value if flag.record_as is None else flag.record_as(value)
    return found


def check_options(options) -> None:
    """Raises UserError for the first option of the wrong type or outside its range."""
    kinds = kinds_of(type(options))
    for name, flag in flags_of(type(options)).items():
        value = getattr(options, name)
        check_kinds({name: value}, kinds)
        if flag.kind is None or (value is None and fits(None, kinds[name])):
            continue
        if isinstance(flag.kind, click.Choice):
            if value not in flag.kind.choices:
                raise UserError(f"{name}={value}: choose from {', '.join(flag.kind.choices)}")
            continue
        try:
            flag.kind.convert(value, None, None)
        except click.BadParameter as error:
            wanted = _range_text(flag.kind)
            reason = f"{name}={value!r}: {error.message}" if wanted is None else f"{name}={value} must be {wanted}"
            raise UserError(reason) from None


def _range_text(kind) -> str | None:
    """The range of a numeric click type: "a number above 0 and below 1"; None for others."""
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return None
    limits = [
        f"{'above' if kind.min_open else 'of at least'} {kind.min}" if kind.min is not None else "",
        f"{'below' if kind.max_open else 'at most'} {kind.max}" if kind.max is not None else "",
    ]
    number = "a whole number" if isinstance(kind, click.IntRange) else "a finite number"
    return f"{number} {' and '.join(filter(None, limits))}".strip()
