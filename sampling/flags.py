"""Flags of command lines, and dataclasses of options whose fields make them.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        text: TextOptions
        batch: int = flag("Images per network call", 64, click.IntRange(min=1))

    @click.command(cls=Command)
    @flags_of(Options)
    @click.pass_context
    def main(ctx, **flags):
        options = read_flags(Options, flags, given_flags(ctx))

A field says everything about its flag once: name, type, default and range, help, and whether the value
belongs to the record of a run.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType
from typing import get_args

import click
from click.core import ParameterSource

from solvers.schedule_file import Schedule, load_schedule
from solvers.schedules import SCHEDULE_NAMES
from solvers.solver import solver_options
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.options import click_type

REQUIRED = MISSING
ALWAYS, CHANGED = "always", "changed"


def flag(help, default=None, kind=None, *, names=(), record=None, record_as=None, **arguments):
    """A field of a dataclass of options that is a flag of a command line as well.

    help: one line for --help and the documentation.
    default: REQUIRED where the user has to give a value.
    kind: click's type (default: the type of the field).
    names: of the flag, the first one also in records (default: -- and the name of the field).
    record: whether the value is in the record of a run, ALWAYS or where it is not the default (CHANGED).
    record_as: function from the value to what the record has.
    arguments: further ones of ``click.option``.
    """
    arguments = {"help": help, "type": kind, **arguments}
    return field(default=default, metadata={"flag": arguments, "names": names, "record": (record, record_as)})


def like(cls, name: str, **changes):
    """A field with the flag of another dataclass's field; changes: to the arguments of ``flag``."""
    (known,) = (entry for entry in fields(cls) if entry.name == name)
    metadata = known.metadata
    arguments = metadata["flag"] | {"default": known.default, "names": metadata["names"]} | changes
    record, record_as = metadata["record"]
    return flag(**{"kind": arguments.pop("type"), "record": record, "record_as": record_as, **arguments})


def part(**changes):
    """A field that is a dataclass of options itself.

    changes: by the name of its field the other arguments of a flag, or None where the command line lacks it.
    """
    return field(metadata={"changes": changes})


def derived(read: Callable | None = None, *, flags: Callable | None = None, record=None, **default):
    """A field that is no single flag.

    read(values, given): its value, from the flags by name and the names of those that the user wrote
        (None: who calls ``read_flags`` knows it).
    flags: decorator with the flags that it is read from.
    record: as of ``flag``.
    default: ``default`` or ``default_factory``, if it has one.
    """
    return field(**default, metadata={"read": read, "flags": flags, "names": (), "record": (record, None)})


def names_of_written():
    """A field with the names of the flags that the user wrote."""
    return derived(lambda values, given: frozenset(given), default=frozenset())


def flag_kind(entry: Field) -> click.ParamType:
    """The click type of a field with a flag."""
    of_field = next((kind for kind in get_args(entry.type) if kind is not NoneType), entry.type)
    return click.types.convert_type(entry.metadata["flag"]["type"] or of_field)


def _decorator(entry: Field, changes: dict) -> Callable:
    metadata = entry.metadata
    if metadata.get("flags") is not None:
        return metadata["flags"]
    if is_dataclass(entry.type):
        return flags_of(entry.type, **metadata.get("changes", {}))
    if "flag" not in metadata:
        return lambda command: command
    value = {"default": entry.default, "show_default": entry.default is not None}
    arguments = value | metadata["flag"] | {"type": flag_kind(entry)} | changes
    if entry.default is REQUIRED or arguments.get("required"):
        arguments |= {"required": True, "show_default": False}
        del arguments["default"]
    return click.option(*(metadata["names"] or [f"--{entry.name}"]), entry.name, **arguments)


def flags_of(cls, **changes) -> Callable:
    """Decorator: the flags of all fields of a dataclass, in their order. changes: as of ``part``."""

    def decorate(command):
        for entry in reversed(fields(cls)):
            if changes.get(entry.name, {}) is not None:
                command = _decorator(entry, changes.get(entry.name, {}))(command)
        return command

    return decorate


def given_flags(ctx: click.Context) -> set[str]:
    """Names of the flags that the user wrote."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}


def read_flags(cls, values: dict, given: set[str], **more):
    """The dataclass with the values of its flags. more: fields that are known already."""
    for entry in fields(cls):
        if entry.name in more:
            continue
        if entry.metadata.get("read") is not None:
            more[entry.name] = entry.metadata["read"](values, given)
        elif is_dataclass(entry.type):
            left_out = [name for name, change in entry.metadata.get("changes", {}).items() if change is None]
            defaults = {other.name: other.default for other in fields(entry.type) if other.name in left_out}
            more[entry.name] = read_flags(entry.type, values, given, **defaults)
        elif "flag" in entry.metadata:
            more[entry.name] = values[entry.name]
    return cls(**more)


def changed(options, but=()) -> dict:
    """The fields of a dataclass that differ from their defaults, by name; but: names to leave out."""
    return {
        entry.name: getattr(options, entry.name)
        for entry in fields(options)
        if entry.name not in but and getattr(options, entry.name) != entry.default
    }


def recorded(*parts) -> dict:
    """What dataclasses of options add to the record of a run, by the names of the flags."""
    found = {}
    for options in parts:
        for entry in fields(options):
            when, record_as = entry.metadata.get("record", (None, None))
            value = getattr(options, entry.name)
            if when == ALWAYS or (when == CHANGED and value != entry.default):
                name = entry.metadata["names"][0].strip("-") if entry.metadata["names"] else entry.name
                found[name] = value if record_as is None else record_as(value)
    return found


def solver_option_names() -> tuple[str, ...]:
    """The options of all solvers, each once."""
    return tuple(solver_options())


def solver_flags(command):
    """Decorator: one click option per option of the registered solvers; None where the user does not give it."""
    for name, users in reversed(solver_options().items()):
        first = next(iter(users.values()))
        texts: dict[str, list[str]] = {}
        for solver, option in users.items():
            texts.setdefault(option.help, []).append(f"{solver} {option.default}")
        text = "; ".join(f"{help} (default: {', '.join(defaults)})" for help, defaults in texts.items())
        names = [f"--{name}", *first.aliases, name]
        command = click.option(*names, type=click_type(first.kind), help=text)(command)
    return command


def schedule_file_flag(command):
    """Decorator: the flag --schedule of a command line; its value is a Schedule, or None."""

    def load(ctx, param, value):
        return None if value is None else load_schedule(value)

    return click.option(
        "--schedule",
        type=PATH,
        metavar="FILE",
        callback=load,
        help="Optimised noise levels (optimize_schedule.py makes them)",
    )(command)


def use_schedule(flags: dict, given: set[str]) -> Schedule | None:
    """Takes --schedule out of the flags and puts its noise levels in the place of --sigmas (and sigmas_cond).

    flags: of a command line by name, changed here.
    given: names of those that the user wrote, changed here.
    UserError where another flag of the schedule was given as well.
    """
    schedule = flags.pop("schedule")
    given.discard("schedule")
    if schedule is None:
        return None
    extra = [name for name in (*SCHEDULE_NAMES, "sigmas") if name in given]
    if extra:
        raise UserError(f"--schedule is the whole schedule: leave out --{extra[0]}")
    flags["sigmas"], flags["sigmas_cond"] = list(schedule.sigmas), schedule.sigmas_cond
    given.add("sigmas")
    return schedule
