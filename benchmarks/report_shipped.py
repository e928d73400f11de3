"""What learned solvers and the best plain solvers reach, as tables and a figure.

    python -m benchmarks.report_shipped --measure    # measures the plain solvers first (3 minutes)
    python -m benchmarks.report_shipped              # reports

Natural images: the scores of the shipped predictors are in their files
(benchmarks/make_predictors.py); those of the best plain solver, with its recommended settings, go
to ``benchmarks/shipped_plain.jsonl``. All are of 1,000 images, seeds 0-999, which chose nothing.
Digits: those of the same methods in benchmarks/learned_solvers_digits.jsonl, of 5,000 images.
Renews the tables between the markers in README.md and docs/choosing.md, and draws
docs/choosing.png (extra "plot").
"""

from functools import partial

import click

from benchmarks.demo_settings import ROOT, Bench
from benchmarks.make_predictors import EVALUATIONS, IMAGES, NEAR
from benchmarks.measuring import measured, read_rows
from benchmarks.report_learned_solvers import mean, on_most_images, read
from evaluation.detectors import EMBEDDED
from solvers.recommended import recommend
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.plots import new_figure
from training.checkpoint import load_predictor, shipped_predictors

ROWS = ROOT / "benchmarks" / "shipped_plain.jsonl"
METHODS = {"amed": "AMED-Solver", "plugin": "AMED-Plugin (iPNDM)", "span": "span solver"}
PLAIN = "best plain solver"
NATURAL = "cifar10-small"
# Rows of benchmarks/learned_solvers_digits.jsonl.
LEARNED = {PLAIN: "plain, best fid", "span solver": "full + spatial,time"}


def measure() -> None:
    """Appends the rows of plain solvers that are missing, or have other settings than today's."""
    bench = Bench(NATURAL, IMAGES, first=0, num_reference=NEAR)
    for nfe in EVALUATIONS:
        settings = recommend(bench.net, nfe).settings
        key = {"network": NATURAL, "nfe": nfe, "settings": settings}
        measured(ROWS, key, partial(measure_plain, bench, settings, nfe))


def measure_plain(bench: Bench, settings: dict, nfe: int) -> dict:
    x, spent = bench.solve(**settings)
    if spent != nfe:
        raise RuntimeError(f"{settings} spent {spent} evaluations instead of {nfe}")
    return bench.score(x)


def scores(dataset_name: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Method -> evaluations -> (FID*, distance)."""
    found = {PLAIN: {}, **{name: {} for name in METHODS.values()}}
    if dataset_name != NATURAL:
        rows = on_most_images(read(dataset_name))
        for method, by_nfe in found.items():
            for nfe in EVALUATIONS:
                group = rows[LEARNED.get(method, method), nfe]
                by_nfe[nfe] = (mean(group, "fid"), mean(group, "distance"))
        return found
    for row in read_rows(ROWS):  # the latest settings are the last
        found[PLAIN][row["nfe"]] = (row["fid"], row["distance"])
    for name, path in shipped_predictors().items():
        network, kind, nfe = name.rsplit("-", 2)
        if network == dataset_name:
            shipped = load_predictor(path).provenance["shipped"]
            found[METHODS[kind]][int(nfe)] = (shipped["fid"], shipped["distance"])
    return found


def table(dataset_name: str) -> str:
    """One line per method, FID* / distance at each number of evaluations."""
    lines = [f"| evaluations | {' | '.join(map(str, EVALUATIONS))} |", "|---|" + "---|" * len(EVALUATIONS)]
    for method, found in scores(dataset_name).items():
        cells = [f"{found[nfe][0]:.2f} / {found[nfe][1]:.3f}" if nfe in found else "" for nfe in EVALUATIONS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document_parts() -> dict:
    """The generated parts of each document."""
    parts = {f"{name} shipped": partial(table, name) for name in EMBEDDED}
    readme = {"cifar10-small shipped": parts["cifar10-small shipped"]}
    return {ROOT / "README.md": readme, ROOT / "docs" / "choosing.md": parts}


def draw(dest) -> None:
    """FID* and distance over evaluations, a row of panels for each network."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    colours = dict(zip((PLAIN, *METHODS.values()), ("tab:gray", "tab:orange", "tab:red", "black"), strict=True))
    figure = new_figure("the figure", figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = {"cifar10-small": "natural images", "digits": "digits"}
    for row, name in zip(panels, titles, strict=True):
        for panel, place, label in zip(row, (0, 1), ("FID*", "distance"), strict=True):
            ends = []
            for method, found in scores(name).items():
                numbers = sorted(found)
                values = [found[nfe][place] for nfe in numbers]
                panel.plot(numbers, values, marker="o", linewidth=2.5, markersize=7, color=colours[method])
                if numbers:
                    ends.append((numbers[0], values[0], method))
            spread(panel, ends, colours)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.set_xlim(0.6, 6.2)
            panel.set_xticks(EVALUATIONS)
            panel.tick_params(labelsize=14, which="both")
            panel.set_title(f"{label}, {titles[name]}", fontsize=15)
            panel.set_xlabel("network evaluations", fontsize=15)
            panel.grid(alpha=0.3, which="both")
    figure.savefig(dest, dpi=100)


def spread(panel, ends, colours) -> None:
    """Names of the lines at their left ends; evenly apart, in the order of the ends."""
    high = max(value for _, value, _ in ends)
    low = min(high / 2, *(value for _, value, _ in ends))  # names of near lines do not overlap
    for number, (first, value, method) in enumerate(sorted(ends, key=lambda end: end[1])):
        place = low * (high / low) ** (number / max(len(ends) - 1, 1))
        panel.annotate(
            method.replace(" (iPNDM)", "").replace("best plain solver", "best plain"),
            (first, value),
            (2.75, place),
            fontsize=13,
            color=colours[method],
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[method], "alpha": 0.4},
        )


@click.command(cls=Command)
@click.option("--measure", "measured", is_flag=True, help="Measure the plain solvers first")
def main(measured):
    """Tables and figure of the shipped predictors and the recommended plain solvers."""
    if measured:
        measure()
    for document, parts in document_parts().items():
        renew(document, parts, check=False)
    draw(ROOT / "docs" / "choosing.png")


if __name__ == "__main__":
    main()
