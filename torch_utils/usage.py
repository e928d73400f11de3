"""Help and usage errors of a command line in a moment, before torch is imported.

    from torch_utils.usage import check_usage  # before anything that needs torch

    check_usage("sample")

The flags themselves are declared where they are used, in modules that need torch. ``python -m
tools.make_docs`` writes what a user can see of them to commands.json beside this file; a test says
when it is stale.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from torch_utils.cli import Command, Group, Known, Number
from torch_utils.errors import UserError

FILE = Path(__file__).with_name("commands.json")
_NUMBERS = {"int": click.IntRange, "number": Number}
_LIMITS = ("min", "max", "min_open", "max_open")
_PLAIN = {"bool": click.BOOL, "int": click.INT, "float": click.FLOAT}


def _describe_type(kind: click.ParamType):
    if isinstance(kind, click.Choice):
        return {"choice": list(kind.choices), "case_sensitive": kind.case_sensitive}
    if isinstance(kind, Known):
        return {"known": list(kind.names), "message": kind.message}
    for name, cls in _NUMBERS.items():
        if isinstance(kind, cls):
            more = {"infinite": kind.infinite} if isinstance(kind, Number) else {}
            return {name: {limit: getattr(kind, limit) for limit in _LIMITS} | more}
    return next((name for name, plain in _PLAIN.items() if kind is plain), "text")


def _type_of(described) -> click.ParamType:
    if isinstance(described, str):
        return _PLAIN.get(described, click.STRING)
    if "choice" in described:
        return click.Choice(described["choice"], case_sensitive=described["case_sensitive"])
    if "known" in described:
        return Known(described["known"], described["message"])
    ((name, limits),) = described.items()
    return _NUMBERS[name](**limits)


def describe(command: click.Command) -> dict:
    """What a user can see of a command, as JSON values."""
    if isinstance(command, click.Group):
        parts = {name: describe(part) for name, part in command.commands.items()}
        return {"help": command.help, "examples": command.examples, "commands": parts}
    context = click.Context(command, info_name="command")
    options = []
    for option in command.params:
        own = {"names": option.opts, "name": option.name}
        if isinstance(option, click.Argument):
            options.append({**own, "argument": True, "required": option.required, "nargs": option.nargs})
            continue
        own |= {"type": _describe_type(option.type), "record": option.get_help_record(context)}
        own |= {name: True for name in ("required", "is_flag") if getattr(option, name)}
        if not option.is_flag and isinstance(option.flag_value, str):
            own["flag_value"] = option.flag_value
        options.append(own)
    return {
        "help": command.help,
        "examples": command.examples,
        "groups": command.groups,
        "may_be_empty": list(command.may_be_empty),
        "options": options,
    }


class _Option(click.Option):
    """An option whose line in the help is known."""

    def __init__(self, *args, record, **more):
        super().__init__(*args, **more)
        self.record = record

    def get_help_record(self, ctx):
        return tuple(self.record)


def _parameter(described: Mapping) -> click.Parameter:
    if "argument" in described:
        return click.Argument([described["name"]], required=described["required"], nargs=described["nargs"])
    names, record = [*described["names"], described["name"]], described["record"]
    if described.get("is_flag"):
        return _Option(names, record=record, is_flag=True)
    optional = {"is_flag": False, "flag_value": described["flag_value"]} if "flag_value" in described else {}
    required = bool(described.get("required"))
    return _Option(names, record=record, type=_type_of(described["type"]), required=required, **optional)


def build(described: Mapping, name: str | None = None) -> click.Command:
    """The command of ``describe``: it checks its arguments and returns True."""
    if "commands" in described:
        parts = {part: build(own, part) for part, own in described["commands"].items()}
        return Group(name, help=described["help"], examples=described["examples"], commands=parts)
    return Command(
        name,
        help=described["help"],
        examples=described["examples"],
        groups=described["groups"],
        may_be_empty=tuple(described["may_be_empty"]),
        params=[_parameter(option) for option in described["options"]],
        callback=lambda **values: True,
    )


def _is_newer(message: str) -> bool:
    """Whether a name that a message calls unknown is in the code, such as a solver of yours.

    The declarations themselves decide then.
    """
    found = re.search(
        r"No such option:? '?-+([\w-]+)|'([^']+)' is (?:not one of|unknown)|unknown solver '([^']+)'", message
    )
    if found is None:
        return False
    word = re.escape(next(filter(None, found.groups())))
    declared = re.compile(rf"[\"']-*{word}[\"']|^    {word}: ", re.MULTILINE)
    root = FILE.parents[1]
    files = [
        path for room in ("solvers", "models", "training", "sampling", "tools") for path in root.glob(f"{room}/*.py")
    ]
    return any(declared.search(path.read_text(encoding="utf-8")) for path in [*files, *root.glob("*.py")])


def check_usage(name: str, program: str | None = None) -> None:
    """Ends the program with its help or a usage error, if that is what its arguments ask for.

    name: of the command in commands.json. program: its name in messages. Default: as it was called.
    """
    if not FILE.is_file():
        return
    described = json.loads(FILE.read_text(encoding="utf-8"))[name]
    try:
        fine = build(described).main(prog_name=program, standalone_mode=False)
    except UserError as error:
        if _is_newer(str(error)):
            return
        error.show()
        sys.exit(error.exit_code)
    if fine is not True:  # the help was printed
        sys.exit(fine)
