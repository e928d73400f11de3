r"""Optimises a time schedule for a network and a solver: at which noise levels to evaluate.

    python optimize_schedule.py --method=gits --dataset_name=digits --num_steps=6 --solver=ipndm \
        --dest=schedule.json
    python optimize_schedule.py --dataset_name=ms_coco --solver=dpmpp --prompt=captions.csv \
        --dest=schedule.json
    python optimize_schedule.py --method=dmn --dataset_name=digits --num_steps=9 --solver=dpmpp \
        --dest=schedule.json
    python optimize_schedule.py --method=evolution --dataset_name=digits --num_steps=6 \
        --solver=euler --dest=schedule.json
    torchrun --standalone --nproc_per_node=8 optimize_schedule.py --method=gits ... --batch=64

The result is a small JSON file (format: solvers/schedule_file.py). To resume an interrupted run,
give the same command again.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("optimize_schedule")

import click

from sampling.flags import solver_option_names
from sampling.schedule_search import ScheduleOptions, method_option_names, run
from torch_utils.cli import Command, offline_flag
from torch_utils.options import flags, given_flags, read_flags
from torch_utils.session import session

GROUPS = {
    "What to optimise": "method dataset_name solver num_steps dest | nfe model_path afs sigma_min sigma_max class_idx"
    " guidance_type guidance_rate prompt negative_prompt tokenizer_path seed overwrite",
    "Options of the methods": "| " + " ".join(method_option_names()),
    "Options of solvers": "| " + " ".join(n for n in solver_option_names() if n not in method_option_names()),
    "Speed": "batch device | amp dtype tf32 bench offline",
}


@click.command(cls=Command, groups=GROUPS)
@flags(ScheduleOptions)
@offline_flag
@click.pass_context
def main(ctx, **values):
    """Optimises the time schedule of a solver for a network and writes it to a file."""
    options = read_flags(ScheduleOptions, values, given_flags(ctx))
    with session(options.compute.device) as device:
        run(options, device)


if __name__ == "__main__":
    main()
