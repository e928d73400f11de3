"""Flags of command lines, made from the fields of option dataclasses.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        text: TextOptions
        batch: int = flag("Images per network call", 64, click.IntRange(min=1))

    @click.command(cls=Command)
    @flags_of(Options)
    @click.pass_context
    def main(ctx, **flags):
        options = read_flags(Options, flags, given_flags(ctx))

A field declares its flag once: name, type, default, range, help, and whether the value belongs to
the record of a run.
"""

import click

from solvers.schedule_file import Schedule, load_schedule
from solvers.schedules import SCHEDULE_NAMES
from solvers.solver import solver_options
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.options import click_type


def solver_option_names() -> tuple[str, ...]:
    """Names of the options of all solvers."""
    return tuple(solver_options())


def solver_flags(command):
    """Decorator: one click option per solver option. None: not given by the user."""
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
    """Decorator: the flag --schedule. Its value is a Schedule or None."""

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
    """Replaces --schedule by --sigmas (and sigmas_cond) with the noise levels of its file.

    Solver options that belong to the schedule are those of the file, unless the user wrote them.

    flags: flags of a command line by name; changed in place.
    given: names of the flags that the user wrote; changed in place.

    Returns the Schedule or None. Raises UserError if another flag of the schedule was given as
    well.
    """
    schedule = flags.pop("schedule")
    given.discard("schedule")
    if schedule is None:
        return None
    extra = [name for name in (*SCHEDULE_NAMES, "sigmas") if name in given]
    if extra:
        raise UserError(f"--schedule sets the whole schedule: leave out --{extra[0]}")
    flags["sigmas"], flags["sigmas_cond"] = list(schedule.sigmas), schedule.sigmas_cond
    given.add("sigmas")
    for name, value in schedule.own_options(flags.get("solver")).items():
        if name not in given:
            flags[name] = value
            given.add(name)
    return schedule
