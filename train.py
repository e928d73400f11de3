"""Distil an AMED predictor: where a fast solver should look between its time stamps. Or train a span student, a whole
solver as a learned table, on its final samples.

    python train.py --dataset_name=cifar10 --num_steps=4 --sampler_stu=amed --sampler_tea=heun --batch=128
    python train.py --dataset_name=cifar10 --num_steps=6 --sampler_stu=span
    torchrun --standalone --nproc_per_node=8 train.py --dataset_name=imagenet64 ...
    python train.py --resume=7            # continue ./exps/00007-* where it stopped

Ctrl-C ends a run after the current iteration, with everything saved.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import click
from click.core import ParameterSource

from models.compile import AUTOCAST, COMPILE_MODES
from sampling.flags import POSITIVE, schedule_file_flag, use_schedule
from solvers import SCHEDULES
from solvers.span_table import PRESETS
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Command, Number, offline_flag
from torch_utils.download import no_network
from torch_utils.errors import UserError
from torch_utils.memory import BatchSize
from torch_utils.session import session
from training.amed_trainer import train_predictor
from training.options import CHANGEABLE, CHANGEABLE_FINAL, STUDENTS, TEACHERS, AMEDOptions, SpanOptions
from training.run_folder import find_run, on_main, stored_options
from training.sample_loss import own_code
from training.span_run import train_span
from training.teacher import teachers

PATHS = ("model_path", "prompt_path", "tokenizer_path", "teacher_set")  # options that name files, or parts of the hub
OPTIONS = {"per_step": AMEDOptions, "final": SpanOptions}
_DEFAULTS = {objective: {field.name: field.default for field in fields(kind)} for objective, kind in OPTIONS.items()}
_DEFAULT = {**_DEFAULTS["final"], **_DEFAULTS["per_step"]}


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
    """An option of a run, with the default that it has there; where the objectives differ, both are in the text."""
    default = _DEFAULT[name]
    of_final = _DEFAULTS["final"].get(name)
    if name in _DEFAULTS["per_step"] and of_final is not None and of_final != default:
        text = f"{text} (final: {of_final})"
    more = {"default": default, "show_default": default is not None, **more}
    return click.option(name, f"--{name}", *aliases, type=kind, help=text, **more)


COUNT = click.IntRange(min=1)
WEIGHT = click.FloatRange(min=0)


@click.command(cls=Command)
# What is trained.
@option("dataset_name", str, "Network: digits, cifar10, ffhq, ... ('python -m models.zoo list')", default=None)
@option(
    "model_path",
    PATH,
    "File of the network, instead of the downloaded or embedded one; diffusers: a folder or hub id",
    metavar="FILE",
)
@option("num_steps", click.IntRange(min=2), "Time stamps; the student evaluates 2 (N - 1) times, one less with AFS")
@click.option(
    "--objective",
    type=click.Choice(list(OPTIONS)),
    default=None,
    help="per_step: each interval against the teacher's; final: the final samples of a span student (default for span)",
)
@option("sampler_stu", click.Choice([*STUDENTS, "span"]), "Student solver")
@option("sampler_tea", click.Choice(list(dict.fromkeys([*TEACHERS, *teachers()]))), "Teacher solver")
@option("M", click.IntRange(min=0), "Points the teacher adds to every interval")
@option("guidance_type", click.Choice(["cg", "cfg", "uncond", "none"]), "Guidance of the network")
@option("guidance_rate", Number(), "Strength of the guidance (default: 7.5 for cfg, 1 for cg, else 0)")
@option("schedule_type", click.Choice(list(SCHEDULES)), "Time schedule")
@option("schedule_rho", POSITIVE, "Exponent of the schedule")
@option("sigma_min", POSITIVE, "Lowest noise level (default: the network's)")
@option("sigma_max", POSITIVE, "Highest noise level (default: the network's)")
@option("sigmas", FloatList(), "Explicit noise levels, descending; they replace num_steps and schedule_*")
@schedule_file_flag
@option("afs", AFSType(), "Analytical first step; 'data' uses the mean and spread of the training data")
@option("scale_dir", Number(0, 1, max_open=True), "Directions are scaled by up to 1 +- this")
@option("scale_time", Number(0, 1, max_open=True), "Noise levels shown to the network, by up to 1 +- this")
@option("max_order", click.IntRange(1, 4), "Order of ipndm (1-4) and dpmpp (1-3)")
@option("predict_x0", bool, "dpmpp: predict the data rather than the noise")
@option("lower_order_final", bool, "dpmpp: lower orders at the end")
@option("thresholding", bool, "dpmpp: dynamic thresholding under predict_x0")
@option(
    "prompt_path",
    PATH,
    "Captions for text-to-image networks, a .csv or .txt file, or coco30k; one is drawn per sample",
    metavar="FILE",
)
@option("tokenizer_path", PATH, "Tokenizer of Stable Diffusion (default: from the hub)", metavar="DIR")
# Only under --objective=final.
@option("preset", click.Choice(list(PRESETS)), "final: kind of span student, what it learns")
@option(
    "heads",
    str,
    "final: networks beside the table, of sample,spatial,time, or none (default: spatial,time for full)",
    metavar="NAME,...",
)
@option("parallel", COUNT, "final: calls of the network in one batch, per interval (default: the preset's)")
@option("time_bound", POSITIVE, "final: bound of |ln a| of the time scales (default: the preset's)")
@option(
    "init", str, "final: starts that are tried, base@grid,... or preset (default: several for full)", metavar="LIST"
)
@option("init_pairs", COUNT, "final: pairs that each start is tried on")
@option(
    "init_trial", click.FloatRange(0, 1), "final: share of the run that the three best of them are trained for first"
)
@option(
    "loss",
    str,
    "final: weighted sum of l2, huber, features, lpips, module:function (default: features+0.2*huber)",
    metavar="W*TERM+...",
)
@option("feature_sigma", POSITIVE, "final: noise level at which the denoiser's features are compared")
@option("w_dist", WEIGHT, "final: weight of the energy distance between the distributions of features")
@option("w_anchor", WEIGHT, "final: weight of the distance to the teacher's states at the beginning of the run")
@option("anchor", click.FloatRange(0, 1), "final: share of the run over which that weight falls to 0")
@option("w_delta", WEIGHT, "final: weight of the squared corrections of the coefficients")
@option("num_steps_tea", click.IntRange(min=3), "final: time stamps of the teacher")
@option("schedule_tea", click.Choice(list(SCHEDULES)), "final: schedule of the teacher")
@option("rho_tea", POSITIVE, "final: exponent of that schedule")
@option("pairs", COUNT, "final: teacher pairs to train on")
@option("val_pairs", COUNT, "final: teacher pairs to validate with")
@option("teacher_set", PATH, "final: file that keeps them (default: one in outdir/teacher-sets)", metavar="FILE")
@option("lrs", str, "final: learning rates of groups, labels=0.01,corrections=0.02,...", metavar="GROUP=RATE,...")
@option("lr_final", click.FloatRange(0, 1), "final: share of the rates that is left at the end")
@option("warmup", click.IntRange(min=0), "final: iterations over which the rates rise")
@option("clip", POSITIVE, "final: largest norm of the gradient")
@option("ema", click.FloatRange(0, 1, max_open=True), "final: decay of the average that is validated and saved")
@option("val_every", COUNT, "final: iterations between validations")
@option("phases", str, "final: what is trained when, labels+time:0.2,all:0.8", metavar="GROUPS:SHARE,...")
@option("phase_rounds", COUNT, "final: how often the phases take turns")
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
@option(
    "teacher_cache",
    COUNT,
    "Trajectories of the teacher that are kept and used again, a multiple of the batch (default: always new ones)",
)
@option("checkpointing", bool, "Less memory: activations of the network are computed again for the gradient")
@option("seed", SEED, "Random seed (default: a random one, recorded)")
@option("amp", click.Choice(list(AUTOCAST)), "Autocast of the network")
@option(
    "compile",
    click.Choice(COMPILE_MODES[:2]),
    "torch.compile of the network (--compile is --compile=default); minutes to start",
    is_flag=False,
    flag_value="default",
)
@option("channels_last", bool, "Memory format of the network (default: True on the CPU in float32)")
@option("bench", bool, "cuDNN benchmarking")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the best there is)")
# What is written, and where.
@option("outdir", PATH, "Folder of all runs", metavar="DIR")
@option("desc", str, "Text to add to the name of the run's folder")
@option("nosubdir", bool, "Write into outdir itself", is_flag=True)
@option("tick", POSITIVE, "kimg between lines of statistics")
@option("snap", COUNT, "Ticks between snapshots of the predictor (default: only at the end)")
@option("dump", COUNT, "Ticks between training states")
@click.option(
    "--resume", type=PATH, metavar="RUN", help="Continue a run: its number, its folder, or True for the newest one"
)
@click.option("-n", "--dry-run", "--dry_run", "dry_run", is_flag=True, help="Print the options and quit")
@offline_flag
@click.pass_context
def main(ctx, device, resume, dry_run, **values):
    """Distil an AMED predictor, or train a span student, for a pretrained network."""
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
            options = continued_options(on_main(stored_options, folder), values, given, folder)
            if not given & {"dataset_name", *PATHS}:
                ctx.with_resource(no_network("--resume without --dataset_name"))
        options.check(distributed.world_size())
        for name in options.without_effect(given):
            distributed.print0(f"Note: --{name} has no effect with the other settings", file=sys.stderr)
        if dry_run:
            distributed.print0(json.dumps(options.to_dict(), indent=2))
            distributed.print0(f"Would run on {device}, in {folder or options.folder_name(0)}")
            return
        if isinstance(options, SpanOptions):
            train_span(options, device, folder, resume=folder is not None)
        else:
            train_predictor(options, device, folder, resume=folder is not None, schedule=schedule)


def find_objective(values: dict, given: set[str]) -> str:
    """ "per_step" or "final"; UserError for flags that contradict each other."""
    span = values["sampler_stu"] == "span"
    objective = values["objective"] or ("final" if span else "per_step")
    if objective == "per_step" and span:
        raise UserError("--sampler_stu=span is trained on its final samples: it needs --objective=final")
    if objective == "final" and not span and "sampler_stu" in given:
        raise UserError(f"--objective=final trains span students: use --sampler_stu=span, not {values['sampler_stu']}")
    (other,) = set(OPTIONS) - {objective}
    foreign = sorted(name for name in given if name in _DEFAULTS[other] and name not in _DEFAULTS[objective])
    if foreign:
        raise UserError(f"--{foreign[0]} belongs to --objective={other}: leave it out")
    return objective


def new_options(values: dict, given: set[str]) -> AMEDOptions | SpanOptions:
    if values["dataset_name"] is None:
        raise UserError("--dataset_name is missing: name a network ('python -m models.zoo list'), or --resume a run")
    if values["sigmas"] is not None:
        replaced = {"schedule_type", "schedule_rho", "sigma_min", "sigma_max"} & given
        if "num_steps" in given and values["num_steps"] != len(values["sigmas"]):
            replaced.add("num_steps")
        if replaced:
            raise UserError(f"--sigmas replaces --{min(replaced)}: give only one of them")
    if find_objective(values, given) == "final":  # its defaults are others
        return SpanOptions.from_dict({name: values[name] for name in given if name in _DEFAULTS["final"]})
    options = AMEDOptions.from_dict({name: values[name] for name in _DEFAULTS["per_step"]})
    if options.sampler_tea not in TEACHERS:
        raise UserError(f"--sampler_tea={options.sampler_tea} can only make the pairs of --objective=final")
    return options


def continued_options(stored: dict, values: dict, given: set[str], folder: Path) -> AMEDOptions | SpanOptions:
    """The options of the run that is continued, with those changes that leave its results alone.

    The folder may come from somebody else. What it names is read, but written is only below it and
    --outdir, and only what the command line names may be downloaded.
    """
    final = stored.get("objective") == "final"
    options = OPTIONS["final" if final else "per_step"].from_dict(stored)
    if values["objective"] is None:
        given = given - {"objective"}
    if values["guidance_type"] == "none" and options.guidance_type is None:  # the same, and stored so
        values["guidance_type"] = None
    known = {**options.to_dict(), "objective": "final" if final else "per_step"}
    allowed = (*CHANGEABLE, *(CHANGEABLE_FINAL if final else ()))
    for name in sorted(given - {"outdir"}):
        if name not in known:
            raise UserError(f"--resume: this run has --objective={known['objective']}, without --{name}; leave it out")
        if name in allowed:
            setattr(options, name, values[name])
        elif values[name] != known[name]:
            changeable = ", ".join(f"--{key}" for key in allowed)
            raise UserError(
                f"--resume: this run has {name}={known[name]}, not {values[name]}; leave --{name} out "
                f"(only {changeable} and --device may change)"
            )
    if final and own_code(options.loss) and "loss" not in given:  # a file must not choose what code is run
        raise UserError(f"--resume: the loss of this run is code of your own; repeat --loss='{options.loss}' to run it")
    options.outdir = values["outdir"]
    for name in PATHS:
        path = getattr(options, name, None)
        if path is not None and name not in given and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(
                f"--resume: {folder} names {name}={path[:200]}, which is not here; repeat --{name} to use it, or name"
                " another place"
            )
    return options


if __name__ == "__main__":
    main()
