"""Trains few-step sampling of a pretrained network: a learned solver, or the network itself.

    python train.py --dataset_name=cifar10 --num_steps=4 --sampler_stu=amed --sampler_tea=heun
    python train.py --dataset_name=cifar10 --num_steps=6 --sampler_stu=span
    python train.py --dataset_name=cifar10 --nfe=4 --sampler_stu=span --minutes=30
    python train.py --dataset_name=cifar10 --num_steps=4 --objective=sfd
    torchrun --standalone --nproc_per_node=8 train.py --dataset_name=imagenet64 ...
    python train.py --resume=7            # continue ./exps/00007-* where it stopped

An AMED predictor learns where a solver evaluates between its time steps, one interval at a time
(stepwise objective). A span solver learns its whole coefficient table from the final samples
(trajectory objective). SFD fine-tunes all weights of the network for a few Euler steps (sfd).
Ctrl-C ends a run after the current iteration, with everything saved.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("train")

import json
import sys

import click
from click.core import ParameterSource

from sampling.flags import schedule_file_flag, use_schedule
from torch_utils import distributed
from torch_utils.cli import PATH, Command, offline_flag
from torch_utils.distributed import on_main
from torch_utils.download import no_network
from torch_utils.errors import UserError
from torch_utils.options import flags
from torch_utils.session import session
from training.flags import FILES, OBJECTIVES, continued_options, new_options
from training.objectives import TRAINERS
from training.options import TRAINABLE, AMEDOptions, SFDOptions, SpanOptions
from training.run_folder import find_run, stored_options

GROUPS = {
    "What to train": "dataset_name sampler_stu nfe num_steps | model_path objective guidance_type guidance_rate"
    " prompt_path tokenizer_path images",
    "Teacher and schedule": "sampler_tea | M teacher_cache schedule schedule_type schedule_rho sigma_min sigma_max sigmas"
    " afs num_steps_tea schedule_tea rho_tea pairs val_pairs teacher_set",
    "Options of solvers": "| " + " ".join(TRAINABLE),
    "Few-step network": "| teacher rank dropout",
    "Span solver": "minutes | preset heads parallel sigma_scale_bound init init_pairs init_trial phases phase_rounds",
    "Optimisation": "total_kimg batch seed | batch_gpu lr lrs lr_factor lr_final warmup clip ema val_every scale_dir scale_time interval_loss loss"
    " feature_sigma w_dist w_anchor anchor w_delta",
    "Output": "outdir resume | desc nosubdir tick snap dump tensorboard dry_run",
    "Speed": "device | amp compile channels_last dtype tf32 checkpointing bench offline",
}


@click.command(cls=Command, groups=GROUPS)
@flags(AMEDOptions, {"final": SpanOptions, "sfd": SFDOptions})
@click.option(
    "--objective",
    type=click.Choice(list(OBJECTIVES)),
    help="per_step: a predictor, each interval compared with the teacher's; final: a span solver, by its final samples"
    " (default for span); sfd: the network itself, fine-tuned for a few Euler steps",
)
@click.option(
    "--nfe",
    type=click.IntRange(min=1),
    help="Network evaluations of the student, instead of --num_steps; what no other flag says is then recommended for"
    " the network (solvers/recommended.py)",
)
@schedule_file_flag
@click.option("--device", help="cpu, cuda or mps (default: the fastest available)")
@click.option(
    "--resume", type=PATH, metavar="RUN", help="Continue a run: its number, its folder, or True for the newest"
)
@click.option("-n", "--dry-run", "--dry_run", "dry_run", is_flag=True, help="Print the options and quit")
@offline_flag
@click.pass_context
def main(ctx, device, resume, dry_run, nfe, **values):
    """Trains an AMED predictor, a span solver or a few-step network."""
    given = {name for name in values if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    schedule = use_schedule(values, given)
    if schedule is not None and values.pop("sigmas_cond") is not None:
        raise UserError(
            "--schedule: this file has noise levels of its own for the network (sigmas_cond), which training cannot use"
        )
    with session(device) as device:
        folder = None
        if resume is None:
            options = new_options(values, given, nfe)
        elif nfe is not None:
            raise UserError("--nfe is that of the run; leave it out with --resume")
        else:
            folder = on_main(find_run, resume, values["outdir"])
            options = continued_options(on_main(stored_options, folder), values, given, folder)
            if not given & {"dataset_name", *FILES}:
                ctx.with_resource(no_network("--resume without --dataset_name"))
        options.check(distributed.world_size())
        for name in options.without_effect(given):
            distributed.print0(f"Note: --{name} has no effect with the other settings", file=sys.stderr)
        if dry_run:
            distributed.print0(json.dumps(options.to_dict(), indent=2))
            distributed.print0(f"Would run on {device}, in {folder or options.folder_name(0)}")
            return
        more = {} if isinstance(options, SpanOptions) else {"schedule": schedule}
        TRAINERS[type(options)](options, device, folder, resume=folder is not None, **more)


if __name__ == "__main__":
    main()
