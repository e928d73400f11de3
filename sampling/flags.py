"""Flags that several command lines share."""

import click

from models import zoo
from models.compile import COMPILE_MODES
from solvers.schedule_file import Schedule, load_schedule
from solvers.schedules import SCHEDULE_NAMES, SCHEDULES
from solvers.solver import solver_options
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.options import POSITIVE, click_type


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


def parse_sigmas(ctx, param, value):
    """Callback of --sigmas: "80,10,1" -> [80.0, 10.0, 1.0]; None stays None."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise UserError(f"--sigmas={value}: write decreasing noise levels like 80,10,1,0.002") from None


def parse_afs(ctx, param, value):
    """Callback of --afs: False, True or "data"."""
    choices = {"data": "data", **dict.fromkeys(("false", "0", "no", "off"), False)}
    choices.update(dict.fromkeys(("true", "1", "yes", "on"), True))
    if str(value).strip().lower() not in choices:
        raise UserError(f"--afs={value}: choose True, False or data")
    return choices[str(value).strip().lower()]


def schedule_flags(command):
    """Decorator: the flags of the time schedule and of AFS."""
    options = (
        click.option("--num_steps", type=click.IntRange(min=2), default=6, show_default=True, help="Intervals + 1"),
        click.option(
            "--schedule_type",
            type=click.Choice(list(SCHEDULES)),
            default="polynomial",
            show_default=True,
            help="Time schedule",
        ),
        click.option("--schedule_rho", type=POSITIVE, default=7, show_default=True, help="Its exponent"),
        click.option("--sigma_min", type=POSITIVE, help="Last noise level (default: the network's)"),
        click.option("--sigma_max", type=POSITIVE, help="First noise level (default: the network's)"),
        click.option(
            "--sigmas", metavar="S,S,...", callback=parse_sigmas, help="Explicit noise levels instead of a schedule"
        ),
        click.option(
            "--afs",
            default="False",
            show_default=True,
            metavar="True|False|data",
            callback=parse_afs,
            help="Free first step",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def text_flags(which_caption: str):
    """Decorator: the flags of text-to-image networks. which_caption: what decides between the captions of a file."""
    options = (
        click.option(
            "--prompt",
            type=PATH,
            metavar="TEXT|FILE",
            help="Text-to-image networks: a text for all images, or a .txt (one a line) or .csv file of captions,"
            f" {which_caption}; {zoo.COCO_30K}: the 30,000 captions of MS-COCO, downloaded",
        ),
        click.option(
            "--negative_prompt", metavar="TEXT", help="What the guidance leads away from (default: an empty text)"
        ),
        click.option(
            "--tokenizer_path", type=PATH, metavar="DIR", help="Tokenizer of Stable Diffusion (default: from the hub)"
        ),
    )

    def add(command):
        for option in reversed(options):
            command = option(command)
        return command

    return add


def compile_flag(command):
    """Decorator: the flag --compile of commands that only run the network forwards."""
    return click.option(
        "--compile",
        type=click.Choice(COMPILE_MODES),
        default="none",
        show_default=True,
        is_flag=False,
        flag_value="default",
        help="torch.compile of the network (--compile is --compile=default); minutes to start. reduce-overhead records CUDA"
        " graphs, for small batches",
    )(command)


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


def use_schedule(options: dict, given: set[str]) -> Schedule | None:
    """Takes --schedule out of the flags and puts its noise levels in the place of --sigmas (and sigmas_net).

    options: all flags of a command line by name, changed here; given: those that the user wrote. UserError where
    another flag of the schedule was given as well.
    """
    schedule = options.pop("schedule")
    given.discard("schedule")
    if schedule is None:
        return None
    extra = [name for name in (*SCHEDULE_NAMES, "sigmas") if name in given]
    if extra:
        raise UserError(f"--schedule is the whole schedule: leave out --{extra[0]}")
    options["sigmas"], options["sigmas_net"] = list(schedule.sigmas), schedule.sigmas_net
    given.add("sigmas")
    return schedule
