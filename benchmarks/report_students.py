"""Tables and figures of benchmarks/students_<network>.jsonl.

    python -m benchmarks.report_students            # benchmarks/students.md, docs/students.png, docs/span_tables_*.png

It also renews the tables between the markers in README.md and docs/span_solver.md. Needs matplotlib (extra "plot") for the
figures.
"""

import json
import statistics
from collections import defaultdict

import click

from benchmarks.demo_settings import ROOT
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.plots import new_figure

NETWORKS = ("digits", "cifar10-small")
ORDER = [
    *("plain, best fid", "plain, best distance", "gits", "ld3, own trainer", "AMED-Solver", "AMED-Plugin (iPNDM)"),
    *("ld3", "s4s", "dyweight", "gs", "amed-table", "epd", "dyweight + spatial,time"),
    *("full", "full + spatial", "full + spatial,time"),
]
WHOLE = [method for method in ORDER if method.startswith("full")]
SCORES = {"fid": ("FID", 2), "fid2": ("FID of the second classifier", 2), "distance": ("distance", 4)}
MORE = {"precision": ("precision", 3), "recall": ("recall", 3)}


def read(network):
    file = ROOT / "benchmarks" / f"students_{network}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def spread(values, digits):
    """Mean of the training seeds, and their standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def collect(rows, part):
    """(method, nfe) -> rows of all training seeds."""
    found = defaultdict(list)
    for row in rows:
        if row["part"] == part:
            found[row["method"], row["nfe"]].append(row)
    return found


def main_table(rows, score, digits):
    found = collect(rows, "main")
    nfes = sorted({nfe for method, nfe in found if method != "teacher"})
    lines = ["| evaluations | " + " | ".join(f"{nfe}" for nfe in nfes) + " |", "|---" * (len(nfes) + 1) + "|"]
    learned = [method for method in ORDER if not method.startswith("plain")]
    best = {}
    for nfe in nfes:
        means = {m: statistics.mean(r[score] for r in found[m, nfe]) for m in learned if found.get((m, nfe))}
        if means:
            best[nfe] = (max if score in MORE else min)(means, key=means.get)
    for method in ORDER:
        cells = []
        for nfe in nfes:
            values = [row[score] for row in found.get((method, nfe), [])]
            cell = spread(values, digits) if values else ""
            cells.append(f"**{cell}**" if values and best.get(nfe) == method else cell)
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    teacher = found.get(("teacher", 30))
    if teacher:
        lines.append(f"| teacher, 30 evaluations | {teacher[0][score]:.{digits}f} |" + " |" * (len(nfes) - 1))
    return lines


def target_table(rows):
    """How much of AMED-Plugin's excess over the teacher is left, and what the best restriction has of it."""
    found = collect(rows, "main")
    if ("teacher", 30) not in found:
        return []
    lines = [
        f"| evaluations | metric | excess of AMED-Plugin | {' | '.join(f'of {name} (ratio)' for name in WHOLE)} | best restriction | its excess |",
        "|---" * (5 + len(WHOLE)) + "|",
    ]
    for nfe in sorted({nfe for method, nfe in found if method == "full"}):
        for score, (title, _) in SCORES.items():
            if score == "distance" or ("AMED-Plugin (iPNDM)", nfe) not in found:
                continue
            zero = found["teacher", 30][0][score]
            excess = {
                method: statistics.mean(row[score] for row in found[method, nfe]) - zero
                for method in ORDER[ORDER.index("AMED-Plugin (iPNDM)") :]
                if found.get((method, nfe))
            }
            others = {m: v for m, v in excess.items() if m not in (*WHOLE, "AMED-Plugin (iPNDM)") and "+" not in m}
            if not others:
                continue
            rival = min(others, key=others.get)
            plugin = excess["AMED-Plugin (iPNDM)"]
            cells = [
                f"{excess[name]:.2f} ({excess[name] / plugin:.2f})" if name in excess and plugin > 0 else ""
                for name in WHOLE
            ]
            lines.append(f"| {nfe} | {title} | {plugin:.2f} | {' | '.join(cells)} | {rival} | {others[rival]:.2f} |")
    return lines


def cost_table(rows):
    found = collect(rows, "main")
    nfes = sorted({nfe for method, nfe in found if method == "full"})
    title = " / ".join(map(str, nfes))
    lines = [f"| method | CPU seconds of training at {title} evaluations |", "|---|---|"]
    for method in ORDER[2:]:
        cells = []
        for nfe in nfes:
            values = [row["training_seconds"] for row in found.get((method, nfe), []) if row["training_seconds"]]
            cells.append(f"{statistics.mean(values):.0f}" if values else "-")
        lines.append(f"| {method} | {' / '.join(cells)} |")
    return lines


def ablation_table(rows):
    found, base = collect(rows, "ablation"), collect(rows, "main")
    nfes = sorted({nfe for _, nfe in found})
    lines = []
    for nfe in nfes:
        names = ["full", *(method for method, at in found if at == nfe)]
        lines += [
            "",
            f"{nfe} evaluations:",
            "",
            "| | FID | second FID | precision | recall | distance |",
            "|---" * 6 + "|",
        ]
        seeds = {row["seed"] for method, at in found if at == nfe for row in found[method, at]}
        for name in names:
            group = found.get((name, nfe)) or [row for row in base[name, nfe] if row["seed"] in seeds]
            if group:
                cells = [
                    spread([row[score] for row in group], digits)
                    for score, digits in (("fid", 2), ("fid2", 2), ("precision", 3), ("recall", 3), ("distance", 4))
                ]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plain_table(rows):
    found = [row for row in rows if row["part"] == "plain"]
    lines = ["| evaluations | least FID | | least distance | |", "|---|---|---|---|---|"]
    for nfe in sorted({row["nfe"] for row in found}):
        cells = []
        for score in ("fid", "distance"):
            row = min((row for row in found if row["nfe"] == nfe), key=lambda row: row[score])
            cells += [f"{row['method']} on {row['grid']}", f"{row[score]:g}"]
        lines.append(f"| {nfe} | " + " | ".join(cells) + " |")
    return lines


def page(networks):
    lines = ["# Learned samplers, compared", "", "Written by `python -m benchmarks.report_students`.", ""]
    for network, rows in networks.items():
        seeds = len({row["seed"] for row in rows if row["part"] == "main" and row["seed"] is not None})
        dates = sorted({row["date"] for row in rows})
        lines += [f"## {network}", "", f"{len(rows)} rows, {seeds} training seeds, {dates[0]} to {dates[-1]}.", ""]
        for score, (title, digits) in (SCORES | MORE).items():
            lines += [f"### {title}", "", *main_table(rows, score, digits), ""]
        lines += ["### Against the target", "", *target_table(rows), ""]
        lines += ["### Cost of training", "", *cost_table(rows), ""]
        if any(row["part"] == "ablation" for row in rows):
            lines += ["### Ablations of full", *ablation_table(rows), ""]
        lines += ["### Solvers without training, on the validation seeds", "", *plain_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def document_parts(networks):
    """The generated parts of the documents by name, and of each document the names that it has."""
    parts = {}
    for network, rows in networks.items():
        for score, (_, digits) in SCORES.items():
            short = min(digits, 3)
            parts[f"{network} {score}"] = lambda rows=rows, s=score, d=short: "\n".join(main_table(rows, s, d))
        parts[f"{network} target"] = lambda rows=rows: "\n".join(target_table(rows))
        parts[f"{network} ablations"] = lambda rows=rows: "\n".join(ablation_table(rows)).strip()
    readme, document = ROOT / "README.md", ROOT / "docs" / "span_solver.md"
    return {readme: {name: parts[name] for name in parts if name == "cifar10-small fid"}, document: parts}


def draw_scores(networks, dest):
    """FID over evaluations, one panel for each network and classifier."""
    shown = {
        "plain, best fid": ("best without training", "tab:gray"), "gits": ("GITS", "tab:olive"),
        "AMED-Solver": ("AMED-Solver", "tab:orange"), "AMED-Plugin (iPNDM)": ("AMED-Plugin", "tab:red"),
        "ld3": ("LD3", "tab:green"), "s4s": ("S4S", "tab:cyan"), "dyweight": ("DyWeight", "tab:purple"),
        "gs": ("GS", "tab:brown"), "epd": ("EPD", "tab:pink"), "full": ("span (full)", "tab:blue"),
        "full + spatial,time": ("span (full + spatial, time)", "black"),
    }  # fmt: skip
    figure = new_figure("the figures", figsize=(10, 3.6 * len(networks)))
    grid = figure.subplots(len(networks), 2, squeeze=False)
    for line, (network, rows) in zip(grid, networks.items(), strict=True):
        found = collect(rows, "main")
        for axes, score in zip(line, ("fid", "fid2"), strict=True):
            for method, (label, colour) in shown.items():
                nfes = sorted(nfe for name, nfe in found if name == method)
                values = [[row[score] for row in found[method, nfe]] for nfe in nfes]
                errors = [statistics.stdev(group) if len(group) > 1 else 0 for group in values]
                style = {"color": colour, "linewidth": 2.2 if method.startswith("full") else 1.2, "markersize": 4}
                axes.errorbar(nfes, list(map(statistics.mean, values)), errors, fmt="o-", label=label, **style)
            if ("teacher", 30) in found:
                axes.axhline(found["teacher", 30][0][score], color="black", linestyle=":", label="teacher, 30")
            axes.set_yscale("log")
            for kind in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                kind(lambda value, _: f"{value:g}")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.set_xticks(sorted({nfe for name, nfe in found if name != "teacher"}))
            axes.set_xlabel("network evaluations")
            axes.set_title(f"{network}: {SCORES[score][0]}", fontsize=10)
            axes.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(dest, dpi=100)


def draw_tables(rows, dest, nfe):
    """Learned noise levels, what the network is told, and coefficients of every student of one seed."""
    chosen = [
        row for row in rows if row["part"] == "main" and row["nfe"] == nfe and row.get("table") and row["seed"] == 0
    ]
    found = {row["method"]: row for row in chosen}
    names = [name for name in ORDER if name in found and "+" not in name]
    if not names:
        return
    figure = new_figure("the figures", figsize=(11, 1 + 0.62 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    from matplotlib import colormaps

    for height, name in enumerate(reversed(names)):
        table = found[name]["table"]
        calls = [(s, t) for s, t in zip(table["sigmas"][:-1], table["sigmas_net"][:-1], strict=True)]
        if table["first_step"] != "none":
            left.plot(calls[0][0], height, "o", color="white", markeredgecolor="black", markersize=6)
            calls = calls[1:]
        calls += [(point[0], point[1]) for points in table["inner"] for point in points]
        left.plot(*zip(*[(s, height) for s, _ in calls], strict=True), "o", color="tab:blue", markersize=6)
        left.plot([t for _, t in calls], [height] * len(calls), "|", color="black", markersize=12)
        left.plot(table["sigmas"][-1], height, "x", color="tab:blue")
        last = table["steps"][-1][0]
        bottom = {1: 0.0, -1: 0.0}
        for k, value in enumerate(reversed(last)):
            sign = 1 if value >= 0 else -1
            right.barh(height, value, left=bottom[sign], color=colormaps["viridis"](min(k / 5, 1)), height=0.6)
            bottom[sign] += value
    for axes in (left, right):
        axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=9)
    left.set_xscale("log")
    left.invert_xaxis()
    left.set_xlabel(
        "sigma of the calls (bars: what the network is told; open: free first step; x: the end)", fontsize=8
    )
    right.axvline(1, color="black", linewidth=0.6)
    right.set_xlabel("coefficients of the last step, newest slope first (dark to light), sum 1", fontsize=8)
    figure.suptitle(f"{nfe} evaluations", fontsize=10)
    figure.tight_layout()
    figure.savefig(dest, dpi=100)


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--nfe", type=int, default=5, show_default=True, help="Of the picture of the tables")
def main(nfe):
    networks = {name: rows for name in NETWORKS if (rows := read(name))}
    (ROOT / "benchmarks" / "students.md").write_text(page(networks), encoding="utf-8")
    for document, parts in document_parts(networks).items():
        renew(document, parts, check=False)
    draw_scores(networks, ROOT / "docs" / "students.png")
    for name, rows in networks.items():
        draw_tables(rows, ROOT / "docs" / f"span_tables_{name}.png", nfe)
    print(f"benchmarks/students.md: {', '.join(f'{name} {len(rows)} rows' for name, rows in networks.items())}")


if __name__ == "__main__":
    main()
