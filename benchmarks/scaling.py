"""Throughput of sample.py, fid.py and train.py with one and several processes of one thread.

    python -m benchmarks.scaling --processes=2 --repeats=5
    python -m benchmarks.scaling --processes=2 --repeats=5 --weak

Every command runs twice, with less and more work; the difference of the times excludes start-up.
Strong scaling splits the same work between more processes; weak scaling gives each process the work
of one. Repetitions alternate between the numbers of processes.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks import ROOT
from benchmarks.measuring import describe_machine, spread
from torch_utils.cli import Command
from torch_utils.markdown import table_line


def timed(processes: int, arguments: list) -> float:
    """Seconds of a command under torchrun. Its output is printed only if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def rate(processes: int, work: tuple[int, int], arguments, times: int = 1) -> float:
    """Units of work per second, from the difference between two amounts of work.

    processes: number of processes.
    work: the two amounts.
    arguments: function (amount, times) -> arguments of the command.
    times: factor of both amounts. Default 1.
    """
    few, many = (timed(processes, arguments(amount * times, times)) for amount in work)
    return (work[1] - work[0]) * times / (many - few)


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--processes", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--images", type=click.IntRange(min=256), default=1024, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--weak", is_flag=True, help="As much work for each process as for one alone (train.py: batch and samples)"
)
@click.option("--only", type=click.Choice(["sample", "fid", "train"]), multiple=True, help="Part of it [default: all]")
def main(dataset_name, processes, repeats, images, batch, weak, only):
    place = Path(tempfile.mkdtemp(prefix="scaling-"))
    network = f"--dataset_name={dataset_name}"

    def sample(count, times=1):
        folder = place / "images"
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--solver=ipndm", "--num_steps=6", f"--seeds=0-{count - 1}", f"--batch={batch}", f"--outdir={folder}"]
        return ["sample.py", network, *flags]

    def fid(count, times=1):
        return ["fid.py", "calc", f"--images={place / 'many'}", f"--ref={dataset_name}", f"--num_images={count}"]

    def train(count, times=1):
        flags = [
            f"--batch={batch * times}",
            f"--total_kimg={count / 1000}",
            "--tick=1000",
            "--seed=0",
            f"--outdir={place / 'exps'}",
        ]
        return ["train.py", network, *flags, "--num_steps=4", "--schedule_type=time_uniform", "--schedule_rho=1"]

    parts = {
        "sample.py (images/s)": ("sample", sample, (images // 4, images)),
        "fid.py calc (images/s)": ("fid", fid, (images // 4, 4 * images)),
        "train.py (samples/s)": ("train", train, (batch, batch + images // 4)),
    }
    try:
        if not only or "fid" in only:
            timed(
                1,
                [*sample((processes if weak else 1) * 4 * images)[:-1], "--num_steps=2", f"--outdir={place / 'many'}"],
            )
        print(
            f"{'weak' if weak else 'strong'} scaling, {dataset_name}, batch {batch} per call of sample.py and fid.py,"
            f" {batch} in all of train.py; {repeats} repeats; {describe_machine()}\n"
        )
        header = ["", "1 process", f"{processes} processes", "ratio, median (range)"]
        print(table_line(header), "|---|---|---|---|", sep="\n")
        for name, (part, arguments, work) in parts.items():
            if only and part not in only:
                continue
            times = processes if weak else 1
            pairs = [(rate(1, work, arguments), rate(processes, work, arguments, times)) for _ in range(repeats)]
            ratios = [several / one for one, several in pairs]
            one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(table_line([name, f"{one:.1f}", f"{several:.1f}", spread(ratios)]), flush=True)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
