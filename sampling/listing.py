"""What there is to sample with: networks, predictors that come with the repository, solvers."""

from collections.abc import Sequence

import click

from models import zoo
from solvers import SOLVERS
from training.checkpoint import load_predictor, shipped_predictors


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _network(card: zoo.Card) -> tuple[str, ...]:
    state = "embedded" if card.embedded else "there" if (card.folder / card.file).is_file() else "download"
    return card.name, f"{card.channels}x{card.resolution}x{card.resolution}", state, card.licence, card.notes


def _predictor(name: str) -> tuple[str, ...]:
    shipped = load_predictor(shipped_predictors()[name]).provenance["shipped"]
    return name, str(shipped["nfe"]), f"{shipped['fid']:.2f}", f"{shipped['distance']:.3f}"


def listing() -> str:
    """Networks, predictors and solvers as three tables of text."""
    networks = [("name", "sampled", "file", "licence", ""), *map(_network, zoo.CARDS.values())]
    predictors = [("name", "NFE", "FID*", "distance"), *map(_predictor, shipped_predictors())]
    solvers = [(name, solver.summary) for name, solver in SOLVERS.items() if not solver.needs_predictor]
    return "\n".join(
        [
            *("networks (--dataset_name):", _table(networks), ""),
            "predictors for the embedded networks (--predictor_path), FID* of 1,000 images, distance to the converged",
            *("solution; your own: experiment number, folder or file:", _table(predictors), ""),
            *("solvers (--solver):", _table(solvers)),
        ]
    )


def list_flag(command):
    """Decorator: the flag --list of a command line, which prints ``listing`` and ends."""

    def show(ctx, param, value):
        if value and not ctx.resilient_parsing:
            click.echo(listing())
            ctx.exit()

    return click.option(
        "--list",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Print the networks, predictors and solvers, and quit",
    )(command)
