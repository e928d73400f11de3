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

import click

from sampling.schedule_search import ScheduleOptions, run
from torch_utils.cli import Command, offline_flag
from torch_utils.options import flags, given_flags, read_flags
from torch_utils.session import session


@click.command(cls=Command)
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
