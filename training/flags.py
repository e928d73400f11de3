"""Options of a run from the flags of train.py, for a new run or a resumed one."""

import sys
from pathlib import Path

from solvers.recommended import merge, steps_for, training_recipe
from torch_utils.cli import PATH
from torch_utils.distributed import print0
from torch_utils.errors import UserError
from torch_utils.options import flags_of
from training.options import CHOSEN, AMEDOptions, RunOptions, SFDOptions, SpanOptions
from training.sample_loss import own_code

OBJECTIVES = {"per_step": AMEDOptions, "final": SpanOptions, "sfd": SFDOptions}
FILES = {  # options that name files or repositories of the hub
    name
    for kind in OBJECTIVES.values()
    for name, flag in flags_of(kind).items()
    if flag.kind is PATH and flag.changeable
}


def find_objective(values: dict, given: set[str]) -> str:
    """The objective, a key of ``OBJECTIVES``. UserError for flags that contradict each other."""
    span = values["sampler_stu"] == "span"
    objective = values["objective"] or ("final" if span else "per_step")
    if objective == "per_step" and span:
        raise UserError("--sampler_stu=span is trained on final samples: it needs --objective=final")
    if objective == "final" and not span and "sampler_stu" in given:
        raise UserError(f"--objective=final trains span solvers: use --sampler_stu=span, not {values['sampler_stu']}")
    if objective == "sfd" and "sampler_stu" in given:
        raise UserError("--objective=sfd trains the network, for Euler steps: leave --sampler_stu out")
    if objective != "sfd" and isinstance(values["num_steps"], str):
        raise UserError(f"--num_steps={values['num_steps']}: only --objective=sfd trains for several numbers of steps")
    if objective != "final" and "minutes" in given:
        raise UserError(
            "--minutes chooses the settings of a span solver: use --sampler_stu=span, or leave --minutes out"
        )
    for other in OBJECTIVES:
        foreign = sorted(given & flags_of(OBJECTIVES[other]).keys() - flags_of(OBJECTIVES[objective]).keys())
        if foreign:
            raise UserError(f"--{foreign[0]} belongs to --objective={other}: leave it out")
    return objective


def new_options(values: dict, given: set[str], nfe: int | None = None) -> RunOptions:
    """The options of a new run. values: all flags by name; given: the names of the user's flags."""
    if values["dataset_name"] is None:
        raise UserError("--dataset_name is missing: give a network ('python -m models.zoo list'), or --resume a run")
    if values["sigmas"] is not None:
        replaced = {"schedule_type", "schedule_rho", "sigma_min", "sigma_max"} & given
        if "num_steps" in given and values["num_steps"] != len(values["sigmas"]):
            replaced.add("num_steps")
        if replaced:
            raise UserError(f"--sigmas replaces --{min(replaced)}: give only one of them")
    kind = OBJECTIVES[find_objective(values, given)]
    written = {name: values[name] for name in given & flags_of(kind).keys()}
    if "minutes" in given:
        if "total_kimg" in given:
            raise UserError("--minutes decides how long the training is: leave --total_kimg out")
        written["open"] = sorted(set(CHOSEN) - given)
    return kind.from_dict(written if nfe is None else with_recipe(kind, written, nfe))


def with_recipe(kind, written: dict, nfe: int) -> dict:
    """The flags of a recommended recipe whose student spends ``nfe`` evaluations; what was written
    wins.
    """
    if {"num_steps", "sigmas"} & written.keys():
        raise UserError("--nfe chooses the number of steps: leave out --nfe, or --num_steps and --sigmas")
    student = "span" if kind is SpanOptions else written.get("sampler_stu", "amed")
    if kind is SFDOptions:
        recipe, source = {}, "published settings"
    else:
        recipe, source = training_recipe(written["dataset_name"], student)
    if "minutes" in written:  # chosen in the run instead
        recipe = {name: value for name, value in recipe.items() if name not in (*CHOSEN, "total_kimg")}
    chosen = merge(recipe, written)
    per_call = kind.from_dict(chosen).guess_evals_per_call()
    if kind is AMEDOptions and "afs" not in written and nfe // per_call % 2 == 0:
        chosen["afs"] = False  # two evaluations in each interval, of which the first step saves one

    def cost(intervals):
        return kind.from_dict({**chosen, "num_steps": intervals + 1}).calls * per_call

    hint = f"; two evaluations in each interval, one less with --afs={recipe.get('afs')}" if kind is AMEDOptions else ""
    what = "--objective=sfd" if kind is SFDOptions else f"--sampler_stu={student}"
    what += f" with --afs={chosen['afs']}" if "afs" in chosen else ""
    chosen["num_steps"] = steps_for(nfe, cost, what, hint)
    shown = " ".join(f"--{name}={value}" for name, value in chosen.items() if name not in written)
    print0(f"{nfe} evaluations: {shown} ({source})", file=sys.stderr)
    return chosen


def continued_options(stored: dict, values: dict, given: set[str], folder: Path) -> RunOptions:
    """The options of a resumed run, with changes that do not affect its results.

    stored: the recorded options.
    values, given: as in ``new_options``.
    folder: of the run.

    The folder may come from somebody else. Files that it names are read, but files are written only
    in it and in --outdir, and only what the command line names may be downloaded.
    """
    objective = stored.get("objective", "per_step")
    if objective not in OBJECTIVES:
        raise UserError(f"--resume: {folder} is a run with the unknown objective '{str(objective)[:40]}'")
    options = OBJECTIVES[objective].from_dict(stored)
    flags = flags_of(OBJECTIVES[objective])
    if values["guidance_type"] == "none" and options.guidance_type is None:  # stored as None
        values["guidance_type"] = None
    known = {**options.to_dict(), "objective": objective}
    for name in sorted(given - {"outdir"}):
        if name not in known:
            raise UserError(f"--resume: this run has --objective={objective}, without --{name}; leave it out")
        if name in flags and flags[name].changeable:
            setattr(options, name, values[name])
        elif values[name] != known[name]:
            changeable = ", ".join(f"--{key}" for key, flag in flags.items() if flag.changeable)
            raise UserError(
                f"--resume: this run has {name}={known[name]}, not {values[name]}; leave --{name} out "
                f"(only {changeable} and --device may change)"
            )
    if "total_kimg" in given and isinstance(options, SpanOptions):
        options.minutes = None  # the length is given now
    own = getattr(options, "loss", None)
    if own not in (None, "none") and own_code(own) and "loss" not in given:  # a file must not choose which code runs
        raise UserError(f"--resume: the loss of this run is your own code; repeat --loss='{own}' to run it")
    options.outdir = values["outdir"]
    for name in sorted(FILES & flags.keys() - given):
        path = getattr(options, name)
        if path is not None and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(
                f"--resume: {folder} names {name}={path[:200]}, which does not exist here; repeat --{name} to use it,"
                " or give another path"
            )
    return options
