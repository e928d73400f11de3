"""Draw docs/architecture.png: the folders of the code and three paths through it.

    python -m tools.draw_architecture

Needs matplotlib (extra "plot").
"""

from pathlib import Path

import click

from torch_utils.cli import Command
from torch_utils.plots import new_figure

DESTINATION = Path(__file__).resolve().parent.parent / "docs" / "architecture.png"
# From top to bottom; folders of one line do not import each other.
ROOMS = (
    {"command lines": "flags and one call each", "tools": "demo, comparisons, data sets"},
    {"sampling": "seeds to images in a folder"},
    {"training": "teacher, losses, trainers"},
    {"solvers": "steps, schedules, search", "evaluation": "FID, CLIP score, verifiers"},
    {"models": "D(x; sigma), checkpoints"},
    {"torch_utils": "files, seeds, processes: no diffusion"},
)
# Title: (folder, file, what happens), in the order of a run.
JOURNEYS = {
    "From a seed to a PNG": (
        ("command lines", "sample.py", "flags"),
        ("sampling", "run.py, settings.py", "network, solver, schedule"),
        ("sampling", "generate.py", "noise and class per seed"),
        ("solvers", "sampler.py + a solver", "one step per interval"),
        ("models", "denoiser.py", "D(x; sigma), decode"),
        ("torch_utils", "images.py", "PNG, atomically"),
    ),
    "From a checkpoint to a denoiser": (
        ("models", "create_model", "name, guidance"),
        ("models", "zoo.py", "name to file, SHA-256"),
        ("models", "edm.py, adm.py, ...", "the family of the network"),
        ("torch_utils", "safe_pickle.py", "reads data, runs no code"),
        ("models", "building.py", "empty network, weights"),
        ("models", "compile.py", "precision, compilation"),
    ),
    "A training iteration": (
        ("training", "run.py", "next iteration"),
        ("training", "teacher.py", "seeds to noise, targets"),
        ("solvers", "sampler.py + a solver", "teacher, then student"),
        ("training", "loss.py, sample_loss.py", "student against teacher"),
        ("training", "amed_/span_trainer.py", "gradients, optimizer"),
        ("training", "checkpoint.py", "predictor, state"),
    ),
}
COLORS = {
    "command lines": "#e8e8e8",
    "tools": "#e8e8e8",
    "sampling": "#fde2c4",
    "training": "#fbd0d0",
    "solvers": "#d3e6fb",
    "evaluation": "#e4dbf5",
    "models": "#d5efd5",
    "torch_utils": "#f6efb8",
}


def draw(path: Path) -> None:
    """Writes the figure to ``path``."""
    from matplotlib.patches import FancyBboxPatch

    figure = new_figure("the figure of the architecture", figsize=(13, 6.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 130), ylim=(0, 66))
    axes.axis("off")

    def box(x, y, width, height, room, title, text):
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", facecolor=COLORS[room], edgecolor="#666666"
        )
        axes.add_patch(shape)
        axes.text(x + width / 2, y + 0.64 * height, title, ha="center", va="center", fontsize=9, weight="bold")
        axes.text(x + width / 2, y + 0.29 * height, text, ha="center", va="center", fontsize=7.5)

    def arrow(start, end):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444"})

    axes.text(1, 63, "Folders: each imports only from those below it", fontsize=10.5, weight="bold")
    for level, rooms in enumerate(ROOMS):
        y, width = 54 - 10.2 * level, 47 / len(rooms) - (len(rooms) - 1)
        for index, (room, text) in enumerate(rooms.items()):
            x = 1 + index * (width + 2)
            box(x, y, width, 7, room, room, text)
            if level:
                arrow((x + width / 2, y + 10.2), (x + width / 2, y + 7))
    for row, (title, steps) in enumerate(JOURNEYS.items()):
        top = 63 - 21.5 * row
        axes.text(54, top, title, fontsize=10.5, weight="bold")
        for index, (room, file, text) in enumerate(steps):
            column, line = index % 3, index // 3
            x, y = 54 + 25.5 * column, top - 9 - 9 * line
            box(x, y, 23.5, 7, room, file, text)
            if column < 2:
                arrow((x + 23.5, y + 3.5), (x + 25.5, y + 3.5))
            elif index + 1 < len(steps):
                axes.plot([x + 11.75, x + 11.75, 65.75], [y, y - 1, y - 1], color="#444444", linewidth=1)
                arrow((65.75, y - 0.9), (65.75, y - 2.1))
    figure.savefig(path, dpi=100)


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--dest", type=click.Path(path_type=Path), default=DESTINATION, help="Default: docs/architecture.png")
def main(dest):
    draw(dest)
    click.echo(f"{dest} drawn")


if __name__ == "__main__":
    main()
