"""From the flags of train.py to the options of a run: a new one, or one that is continued."""

from pathlib import Path

from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.options import flags_of
from training.options import AMEDOptions, SpanOptions
from training.sample_loss import own_code

OBJECTIVES = {"per_step": AMEDOptions, "final": SpanOptions}
FILES = {  # options that name files, or parts of the hub
    name
    for kind in OBJECTIVES.values()
    for name, flag in flags_of(kind).items()
    if flag.kind is PATH and flag.changeable
}


def find_objective(values: dict, given: set[str]) -> str:
    """ "per_step" or "final"; UserError for flags that contradict each other."""
    span = values["sampler_stu"] == "span"
    objective = values["objective"] or ("final" if span else "per_step")
    if objective == "per_step" and span:
        raise UserError("--sampler_stu=span is trained on its final samples: it needs --objective=final")
    if objective == "final" and not span and "sampler_stu" in given:
        raise UserError(f"--objective=final trains span students: use --sampler_stu=span, not {values['sampler_stu']}")
    (other,) = set(OBJECTIVES) - {objective}
    foreign = sorted(given & flags_of(OBJECTIVES[other]).keys() - flags_of(OBJECTIVES[objective]).keys())
    if foreign:
        raise UserError(f"--{foreign[0]} belongs to --objective={other}: leave it out")
    return objective


def new_options(values: dict, given: set[str]) -> AMEDOptions | SpanOptions:
    """The options of a new run. values: all flags by name; given: those that the user wrote."""
    if values["dataset_name"] is None:
        raise UserError("--dataset_name is missing: name a network ('python -m models.zoo list'), or --resume a run")
    if values["sigmas"] is not None:
        replaced = {"schedule_type", "schedule_rho", "sigma_min", "sigma_max"} & given
        if "num_steps" in given and values["num_steps"] != len(values["sigmas"]):
            replaced.add("num_steps")
        if replaced:
            raise UserError(f"--sigmas replaces --{min(replaced)}: give only one of them")
    kind = OBJECTIVES[find_objective(values, given)]
    return kind.from_dict({name: values[name] for name in given & flags_of(kind).keys()})


def continued_options(stored: dict, values: dict, given: set[str], folder: Path) -> AMEDOptions | SpanOptions:
    """The options of the run that is continued, with those changes that leave its results alone.

    The folder may come from somebody else. What it names is read, but written is only below it and
    --outdir, and only what the command line names may be downloaded.
    """
    objective = "final" if stored.get("objective") == "final" else "per_step"
    options = OBJECTIVES[objective].from_dict(stored)
    flags = flags_of(OBJECTIVES[objective])
    if values["guidance_type"] == "none" and options.guidance_type is None:  # the same, and stored so
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
    own = getattr(options, "loss", None)
    if own is not None and own_code(own) and "loss" not in given:  # a file must not choose what code is run
        raise UserError(f"--resume: the loss of this run is code of your own; repeat --loss='{own}' to run it")
    options.outdir = values["outdir"]
    for name in sorted(FILES & flags.keys() - given):
        path = getattr(options, name)
        if path is not None and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(
                f"--resume: {folder} names {name}={path[:200]}, which is not here; repeat --{name} to use it, or name"
                " another place"
            )
    return options
