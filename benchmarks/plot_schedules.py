r"""Draws schedules in ln sigma: files of optimize_schedule.py, fixed ones, grids of the literature.

    python -m benchmarks.plot_schedules --nfe=5 --dest=docs/schedules.png \
        runs/schedules-digits/files/*-5.json

Needs matplotlib (extra "plot").
"""

from pathlib import Path

import click

from solvers import get_schedule
from solvers.schedule_file import load_schedule
from torch_utils.cli import Command
from torch_utils.plots import new_figure

FIXED = {"polynomial, rho 7": ("polynomial", 7), "time_uniform, rho 1": ("time_uniform", 1), "logsnr": ("logsnr", 1)}
# Noise levels at which trained samplers call the CIFAR-10 network of EDM (decoded from the
# checkpoints of DyWeight, with a free first step at 80), and GITS' six-step grid as its README
# gives it.
PUBLISHED = {
    "DyWeight, CIFAR-10, 4": [16.9, 3.96, 1.53, 0.35],
    "DyWeight, CIFAR-10, 5": [22.7, 6.1, 2.5, 1.02, 0.22],
    "DyWeight, CIFAR-10, 6": [35, 10.3, 3.3, 1.73, 0.65, 0.13],
    "DyWeight, FFHQ, 5": [27.8, 8.1, 3.0, 1.05, 0.24],
    "DyWeight, ImageNet-64, 5": [25.8, 6.7, 2.9, 1.09, 0.30],
    "GITS, CIFAR-10, 6": [80, 10.98, 3.88, 1.58, 0.57, 0.17, 0.002],
}


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--nfe", type=click.IntRange(min=2), default=5, show_default=True, help="Evaluations of the fixed schedules"
)
@click.option("--sigma_min", type=float, default=0.002, show_default=True)
@click.option("--sigma_max", type=float, default=80.0, show_default=True)
@click.option("--dest", type=click.Path(path_type=Path), required=True)
def main(files, nfe, sigma_min, sigma_max, dest):
    rows = [("literature", name, levels, None) for name, levels in PUBLISHED.items()]
    for name, (kind, rho) in FIXED.items():
        rows.append(("fixed", name, get_schedule(nfe + 1, sigma_min, sigma_max, kind, rho).tolist(), None))
    for path in files:
        schedule = load_schedule(path)
        label = f"{schedule.method}, {schedule.solver} ({path.stem})"
        rows.append(("optimised", label, schedule.sigmas, schedule.sigmas_cond))
    colours = {"literature": "tab:gray", "fixed": "tab:blue", "optimised": "tab:red"}
    figure = new_figure("the picture", figsize=(10, 1.2 + 0.26 * len(rows)))
    axes = figure.add_subplot()
    for height, (kind, _, levels, sigma_cond) in enumerate(reversed(rows)):
        axes.plot(levels, [height] * len(levels), "o-", color=colours[kind], markersize=5, linewidth=0.8)
        if sigma_cond is not None:
            axes.plot(sigma_cond, [height] * len(sigma_cond), "|", color="black", markersize=9)
    axes.set_yticks(range(len(rows)), [name for _, name, *_ in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("sigma (bars: sigma_cond, where that is learned apart)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(dest, dpi=110)
    print(f"{dest}: {len(rows)} schedules")


if __name__ == "__main__":
    main()
