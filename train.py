"""Distil an AMED predictor: where a fast solver should look between its time stamps.

    python train.py --dataset_name=cifar10 --num_steps=4 --sampler_stu=amed --sampler_tea=heun --batch=128
    torchrun --standalone --nproc_per_node=8 train.py --dataset_name=imagenet64 ...
    python train.py --resume=7            # continue ./exps/00007-* where it stopped

Ctrl-C ends a run after the current iteration, with everything saved.
"""

import json
import sys
from dataclasses import fields

import click
from click.core import ParameterSource

from solvers import SCHEDULES
from solvers.schedule_file import schedule_file_flag, use_schedule
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import BatchSize
from torch_utils.session import session
from training.config import AUTOCAST, CHANGEABLE, STUDENTS, TEACHERS, TrainingOptions
from training.run_folder import find_run, on_main, stored_options
from training.training_loop import train_predictor

_DEFAULT = {field.name: field.default for field in fields(TrainingOptions)}


class AFSType(click.ParamType):
    """False, True or "data"."""

    name = "False|True|data"

    def convert(self, value, param, ctx):
        if isinstance(value, bool):
            return value
        if value.strip().lower() == "data":
            return "data"
        if value.strip().lower() in ("true", "1", "yes", "on"):
            return True
        if value.strip().lower() in ("false", "0", "no", "off"):
            return False
        self.fail(f"'{value}' is not one of False, True, data", param, ctx)


class FloatList(click.ParamType):
    """Comma-separated numbers."""

    name = "X,X,..."

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"'{value}' is not a comma-separated list of numbers", param, ctx)


def option(name, kind, text, *aliases, **more):
    """An option of TrainingOptions, with the default it has there."""
    default = _DEFAULT[name]
    more = {"default": default, "show_default": default is not None, **more}
    return click.option(name, f"--{name}", *aliases, type=kind, help=text, **more)


POSITIVE = click.FloatRange(0, min_open=True)
COUNT = click.IntRange(min=1)


@click.command()
# What is trained.
@option("dataset_name", str, "Network: digits, cifar10, ffhq, ... ('python -m models.zoo list')", default=None)
@option(
    "model_path",
    str,
    "File of the network, instead of the downloaded or embedded one; diffusers: a folder or hub id",
    metavar="FILE",
)
@option("num_steps", click.IntRange(min=2), "Time stamps; the student evaluates 2 (N - 1) times, one less with AFS")
@option("sampler_stu", click.Choice(STUDENTS), "Student solver")
@option("sampler_tea", click.Choice(TEACHERS), "Teacher solver")
@option("M", click.IntRange(min=0), "Points the teacher adds to every interval")
@option("guidance_type", click.Choice(["cg", "cfg", "uncond", "none"]), "Guidance of the network")
@option("guidance_rate", float, "Strength of the guidance (default: 7.5 for cfg, 1 for cg, else 0)")
@option("schedule_type", click.Choice(list(SCHEDULES)), "Time schedule")
@option("schedule_rho", POSITIVE, "Exponent of the schedule")
@option("sigma_min", POSITIVE, "Lowest noise level (default: the network's)")
@option("sigma_max", POSITIVE, "Highest noise level (default: the network's)")
@option("sigmas", FloatList(), "Explicit noise levels, descending; they replace num_steps and schedule_*")
@schedule_file_flag
@option("afs", AFSType(), "Analytical first step; 'data' uses the mean and spread of the training data")
@option("scale_dir", click.FloatRange(0, 1, max_open=True), "Directions are scaled by up to 1 +- this")
@option("scale_time", click.FloatRange(0, 1, max_open=True), "Noise levels shown to the network, by up to 1 +- this")
@option("max_order", click.IntRange(1, 4), "Order of ipndm (1-4) and dpmpp (1-3)")
@option("predict_x0", bool, "dpmpp: predict the data rather than the noise")
@option("lower_order_final", bool, "dpmpp: lower orders at the end")
@option("thresholding", bool, "dpmpp: dynamic thresholding under predict_x0")
@option(
    "prompt_path",
    str,
    "Captions for text-to-image networks, a .csv or .txt file; one is drawn per sample",
    metavar="FILE",
)
@option("tokenizer_path", str, "Tokenizer of Stable Diffusion (default: from the hub)", metavar="DIR")
# How.
@option("total_kimg", POSITIVE, "Length of the training, in thousands of samples")
@option("batch", COUNT, "Samples per iteration, over all processes")
@option(
    "batch_gpu",
    BatchSize(),
    "Samples per network call (default: all of a process's share; auto: as many as fit into memory)",
    "--batch-gpu",
)
@option("lr", POSITIVE, "Learning rate of Adam")
@option("seed", click.IntRange(0, (1 << 63) - 1), "Random seed (default: a random one, recorded)")
@option("amp", click.Choice(list(AUTOCAST)), "Autocast of the network")
@option("channels_last", bool, "Memory format of the network (default: True on the CPU)")
@option("bench", bool, "cuDNN benchmarking")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the best there is)")
# What is written, and where.
@option("outdir", str, "Folder of all runs", metavar="DIR")
@option("desc", str, "Text to add to the name of the run's folder")
@option("nosubdir", bool, "Write into outdir itself", is_flag=True)
@option("tick", POSITIVE, "kimg between lines of statistics")
@option("snap", COUNT, "Ticks between snapshots of the predictor (default: only at the end)")
@option("dump", COUNT, "Ticks between training states")
@click.option("--resume", metavar="RUN", help="Continue a run: its number, its folder, or True for the newest one")
@click.option("-n", "--dry-run", "--dry_run", "dry_run", is_flag=True, help="Print the options and quit")
@click.pass_context
def main(ctx, device, resume, dry_run, **values):
    """Distil an AMED predictor for a pretrained network."""
    given = {name for name in values if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    schedule = use_schedule(values, given)
    if schedule is not None and values.pop("sigmas_net") is not None:
        raise UserError("--schedule: it tells the network other noise levels than its own, which training cannot do")
    with session(device) as device:
        folder = None
        if resume is None:
            options = new_options(values, given)
        else:
            folder = on_main(find_run, resume, values["outdir"])
            options = continued_options(on_main(stored_options, folder), values, given)
        options.check(distributed.world_size())
        for name in options.without_effect(given):
            distributed.print0(f"Note: --{name} has no effect with the other settings", file=sys.stderr)
        if dry_run:
            distributed.print0(json.dumps(options.to_dict(), indent=2))
            distributed.print0(f"Would run on {device}, in {folder or options.folder_name(0)}")
            return
        train_predictor(options, device, folder, resume=folder is not None, schedule=schedule)


def new_options(values: dict, given: set[str]) -> TrainingOptions:
    if values["dataset_name"] is None:
        raise UserError("--dataset_name is missing: name a network ('python -m models.zoo list'), or --resume a run")
    if values["sigmas"] is not None:
        replaced = {"schedule_type", "schedule_rho", "sigma_min", "sigma_max"} & given
        if "num_steps" in given and values["num_steps"] != len(values["sigmas"]):
            replaced.add("num_steps")
        if replaced:
            raise UserError(f"--sigmas replaces --{min(replaced)}: give only one of them")
    return TrainingOptions.from_dict(values)


def continued_options(stored: dict, values: dict, given: set[str]) -> TrainingOptions:
    """The options of the run that is continued, with those changes that leave its results alone."""
    options = TrainingOptions.from_dict(stored)
    if values["guidance_type"] == "none" and options.guidance_type is None:  # the same, and stored so
        values["guidance_type"] = None
    for name in sorted(given - {"outdir"}):
        if name in CHANGEABLE:
            setattr(options, name, values[name])
        elif values[name] != getattr(options, name):
            changeable = ", ".join(f"--{key}" for key in CHANGEABLE)
            raise UserError(
                f"--resume: this run has {name}={getattr(options, name)}, not {values[name]}; leave --{name} out "
                f"(only {changeable} and --device may change)"
            )
    return options


if __name__ == "__main__":
    main()
