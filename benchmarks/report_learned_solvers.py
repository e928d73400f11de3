"""Tables and figures of benchmarks/learned_solvers_<network>.jsonl.

    python -m benchmarks.report_learned_solvers
    python -m benchmarks.report_learned_solvers --html=runs/learned_solvers.html
    python -m benchmarks.report_learned_solvers --moved_since=COMMIT

Writes benchmarks/learned_solvers.md, docs/learned_solvers.png and docs/span_tables_*.png. With
--moved_since, prints the rows that moved by more than their interval. With --html, writes the
tables as a page that sorts, filters and shows the differences to any method.

It also renews the tables between the markers in docs/span_solver.md. Needs matplotlib (extra
"plot") for the figures.

Intervals are 95 % intervals of the paired difference of two methods, which sample the same seeds.
The error is that of the jackknife over groups of seeds (evaluation/jackknife.py): the mean of the
Fréchet distances of small groups would be biased upwards. If a method has several training seeds,
their variance is added.
"""

import json
import math
import statistics
import subprocess
from collections import defaultdict
from functools import partial
from pathlib import Path

import click
import numpy as np
from scipy.special import stdtrit

from benchmarks.demo_settings import ROOT
from evaluation.jackknife import CONFIDENCE, Estimate, jackknife
from solvers.former_names import with_current_names
from tools import page as results_page
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.errors import UserError
from torch_utils.plots import new_figure

NETWORKS = ("digits", "cifar10-small")
ORDER = [
    *("plain, best fid", "plain, best distance", "gits", "ld3, own trainer", "AMED-Solver", "AMED-Plugin (iPNDM)"),
    *("ld3", "s4s", "dyweight", "dyweight, last sum one", "gs"),
    *("amed-table", "amed-table, rate 0.2", "epd", "epd, rate 0.2"),
    *("dyweight + spatial,time", "dyweight, last sum one + spatial,time"),
    *("full", "full + spatial", "full + spatial,time", "full + spatial,blocks"),
]
LEARNED = [method for method in ORDER if not method.startswith("plain")]
BASELINES = ("full + spatial,time", "AMED-Plugin (iPNDM)")  # of the tables of differences
EARLIER = "†"  # marks rows that were measured earlier
EARLIER_IMAGES = 1000  # test images of rows that do not store their number
WHOLE = [method for method in ORDER if method.startswith("full")]
SCORES = {"fid": ("FID", 2), "fid2": ("FID of the second classifier", 2), "distance": ("distance", 4)}
MORE = {"precision": ("precision", 3), "recall": ("recall", 3)}


def rows_file(network):
    return ROOT / "benchmarks" / f"learned_solvers_{network}.jsonl"


def read(network):
    """All rows of a network; see ``parse``."""
    file = rows_file(network)
    rows = parse(file.read_text(encoding="utf-8")) if file.exists() else []
    for row in rows:
        check_row(row)
    return rows


def parse(text):
    """The rows of a file's text.

    Sets "current" as in ``is_current``, for the largest number of test images. Raises UserError if
    a row did not spend the evaluations that it states.
    """
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        row.setdefault("images", EARLIER_IMAGES)
        for name in {"settings", "table"} & row.keys():
            row[name] = with_current_names(row[name] or {})
    most = max((row["images"] for row in rows), default=0)
    for row in rows:
        row["current"] = is_current(row, most)
    return rows


def check_row(row):
    """Raises UserError if a row did not spend the evaluations that it states."""
    if row.get("nfe_spent", row["nfe"]) != row["nfe"]:
        name = f"{row['part']}, {row['method']}, seed {row.get('seed')}"
        raise UserError(
            f"the row of {name} states {row['nfe']} evaluations but spent {row['nfe_spent']}: correct its settings"
        )


def is_current(row, images):
    """Whether a row has scores of groups on enough test images, or is of validation."""
    return row["part"] in ("plain", "choice") or ("fid_left_out" in row and row["images"] >= images)


def spread(values, digits):
    """Mean over the training seeds, with their standard deviation if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def collect(rows, part):
    """(method, nfe) -> rows of the training seeds with the most images.

    Of several rows of one seed, the one with scores of groups is used.
    """
    found = defaultdict(dict)
    for row in rows:
        if row["part"] == part:
            own, seed = found[row["method"], row["nfe"]], row.get("seed")
            if seed not in own or row["current"] or not own[seed]["current"]:
                own[seed] = row
    most = {key: max(row["images"] for row in own.values()) for key, own in found.items()}
    return {key: [row for row in own.values() if row["images"] == most[key]] for key, own in found.items()}


def with_groups(group):
    """The rows that allow an interval."""
    return [row for row in group if row["current"]]


def mean(group, score):
    return statistics.mean(row[score] for row in group)


def difference(group, other, score):
    """The paired difference of two methods in a score, the first minus the second.

    Its error has two sources: the sampled seeds, by the jackknife over their groups, and the
    training seeds of each method that has several (also those without scores of groups). The
    degrees of freedom are those of Welch and Satterthwaite.
    """
    pair = with_groups(group), with_groups(other)
    whole = mean(pair[0], score) - mean(pair[1], score)
    first, second = (np.mean([row[f"{score}_left_out"] for row in rows], axis=0) for rows in pair)
    images = jackknife(whole, first - second)
    parts = [(images.error**2, len(first) - 1)]
    for rows, used in zip((group, other), pair, strict=True):
        if len(rows) > 1:
            parts.append((statistics.variance(row[score] for row in rows) / len(used), len(rows) - 1))
    variance = sum(value for value, _ in parts)
    if variance == 0:
        return Estimate(images.value, 0.0, 0.0)
    freedom = variance**2 / sum(value**2 / count for value, count in parts)
    error = math.sqrt(variance)
    return Estimate(images.value, error, float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error)


def read_commit(network, commit):
    """The rows of a network in a commit, unchecked; the file may have its former name."""
    for name in ("learned_solvers", "students"):
        command = ["git", "show", f"{commit}:benchmarks/{name}_{network}.jsonl"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return parse(done.stdout)
    raise UserError(f"--moved_since={commit}: git has no rows of {network} there")


def moved(before, now):
    """Rows whose mean moved by more than their own interval, as lines of a table.

    before, now: rows; only those of ``part`` "main" count. The same training seeds are compared.
    The interval is that of the row of now alone: earlier rows may have none.
    """
    lines = ["| method | evaluations | score | before | now | interval |", "|---" * 6 + "|"]
    earlier = collect(before, "main")
    for (method, nfe), group in collect(now, "main").items():
        seeds = {row.get("seed") for row in with_groups(group)}
        old = [row for row in earlier.get((method, nfe), []) if row.get("seed") in seeds]
        kept = {row.get("seed") for row in old}
        group = [row for row in with_groups(group) if row.get("seed") in kept]
        for score, (title, digits) in SCORES.items() if group else ():
            apart = mean(group, score) - mean(old, score)
            interval = own_interval(group, score)
            if abs(apart) > interval:
                cells = [f"{mean(rows, score):.{digits}f}" for rows in (old, group)]
                lines.append(f"| {method} | {nfe} | {title} | {' | '.join(cells)} | ± {interval:.{digits}f} |")
    return lines


def own_interval(group, score):
    """Half the width of the interval of these rows' mean, not of a paired difference."""
    zeros = [0.0] * len(group[0][f"{score}_left_out"])
    exact = [{score: 0.0, f"{score}_left_out": zeros, "current": True}]
    return difference(group, exact, score).half_width


def best_of(found, nfe, score):
    """The learned method that beats all others by more than the interval, else None.

    A method without scores of groups has no paired difference: the best one's own interval must not
    reach its value.
    """
    groups = {method: found[method, nfe] for method in LEARNED if (method, nfe) in found}
    best = min(groups, key=lambda method: mean(groups[method], score), default=None)
    others = [group for method, group in groups.items() if method != best and with_groups(group)]
    if not others or not with_groups(groups[best]):
        return None
    reach = mean(groups[best], score) + own_interval(with_groups(groups[best]), score)
    if any(mean(group, score) <= reach for group in groups.values() if not with_groups(group)):
        return None
    return best if all(difference(groups[best], other, score).below_zero for other in others) else None


def seeds_of(groups):
    """Numbers of training seeds in the cells of a row."""
    counts = [len({row["seed"] for row in group} - {None}) for group in groups if group]
    return "-" if not any(counts) else "/".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def on_most_images(rows):
    """``collect`` of the main part, without methods that have fewer test images than others."""
    found = collect(rows, "main")
    most = max((group[0]["images"] for group in found.values()), default=0)
    return {key: group for key, group in found.items() if group[0]["images"] == most}


def main_table(rows, score, digits):
    """Scores of all methods. Numbers of evaluations without any interval are left out."""
    found = on_most_images(rows)
    nfes = sorted({nfe for (method, nfe), group in found.items() if method != "teacher" and with_groups(group)})
    lines = ["| evaluations | training seeds | " + " | ".join(map(str, nfes)) + " |", "|---" * (len(nfes) + 2) + "|"]
    best = {nfe: best_of(found, nfe, score) for nfe in nfes} if score in SCORES else {}
    for method in ORDER:
        groups = [found.get((method, nfe), []) for nfe in nfes]
        cells = []
        for nfe, group in zip(nfes, groups, strict=True):
            cell = spread([row[score] for row in group], digits) if group else ""
            cell += f" {EARLIER}" if group and not with_groups(group) else ""
            cells.append(f"**{cell}**" if best.get(nfe) == method else cell)
        if any(cells):
            lines.append(f"| {method} | {seeds_of(groups)} | " + " | ".join(cells) + " |")
    teacher = found.get(("teacher", 30))
    if teacher:
        cell = f"{teacher[0][score]:.{digits}f}" + ("" if teacher[0]["current"] else f" {EARLIER}")
        lines.append(f"| teacher, 30 evaluations | - | {cell} |" + " |" * (len(nfes) - 1))
    return lines


def difference_table(rows, score, digits, baseline):
    """Paired differences of all methods to a baseline, with 95 % intervals. Smaller is better."""
    found = collect(rows, "main")
    nfes = sorted({nfe for method, nfe in found if method == baseline and with_groups(found[method, nfe])})
    if not nfes:
        return [f"No row of {baseline} has scores of groups yet."]
    lines = [f"| minus {baseline} | " + " | ".join(map(str, nfes)) + " |", "|---" * (len(nfes) + 1) + "|"]
    for method in [*ORDER, "teacher"]:
        cells = []
        for nfe in nfes:
            group = found.get((method, 30 if method == "teacher" else nfe))
            if method == baseline or not with_groups(group or []):
                cells.append("")
                continue
            estimate = difference(group, found[baseline, nfe], score)
            cell = f"{estimate.value:+.{digits}f} ± {estimate.half_width:.{digits}f}"
            cells.append(f"**{cell}**" if estimate.below_zero else cell)
        if any(cells):
            lines.append(f"| {method}{', 30 evaluations' * (method == 'teacher')} | " + " | ".join(cells) + " |")
    return lines


def target_table(rows):
    """How much of AMED-Plugin's excess over the teacher remains, and for the best restriction.

    Uses rows on as many images as the teacher's.
    """
    found = collect(rows, "main")
    images = found["teacher", 30][0]["images"] if ("teacher", 30) in found else None
    found = {key: group for key, group in found.items() if group[0]["images"] == images}
    lines = [
        f"| evaluations | metric | excess of AMED-Plugin | {' | '.join(f'of {name} (ratio)' for name in WHOLE)} | best restriction | its excess |",
        "|---" * (5 + len(WHOLE)) + "|",
    ]
    for nfe in sorted({nfe for (method, nfe), group in found.items() if method in WHOLE and with_groups(group)}):
        for score, (title, _) in SCORES.items():
            if score == "distance" or ("AMED-Plugin (iPNDM)", nfe) not in found:
                continue
            zero = found["teacher", 30][0][score]
            excess = {
                method: mean(found[method, nfe], score) - zero
                for method in ORDER[ORDER.index("AMED-Plugin (iPNDM)") :]
                if found.get((method, nfe))
            }
            plugin = excess["AMED-Plugin (iPNDM)"]
            cells = [
                f"{excess[name]:.2f} ({excess[name] / plugin:.2f})" if name in excess and plugin > 0 else ""
                for name in WHOLE
            ]
            others = {m: v for m, v in excess.items() if m not in (*WHOLE, "AMED-Plugin (iPNDM)") and "+" not in m}
            rival = min(others, key=others.get) if others else ""
            rest = f"{others[rival]:.2f}" if others else ""
            lines.append(f"| {nfe} | {title} | {plugin:.2f} | {' | '.join(cells)} | {rival} | {rest} |")
    return lines


def budget_table(rows):
    """The cost of every row, for sampling and for training."""
    found = collect(rows, "main")
    nfes = sorted({nfe for method, nfe in found if method != "teacher"})
    title = " / ".join(map(str, nfes))
    lines = [
        f"| at {title} evaluations | training seeds | calls one after the other | trained parameters | pairs | CPU seconds |",
        "|---" * 6 + "|",
    ]
    for method in ORDER:
        groups = [found.get((method, nfe), []) for nfe in nfes]

        def entries(name, digits=0, groups=groups):
            values = [[row[name] for row in group if row.get(name) is not None] for group in groups]
            shown = [f"{statistics.mean(part):.{digits}f}" if part else "-" for part in values]
            return shown[0] if len(set(shown)) == 1 else " / ".join(shown)

        cells = [seeds_of(groups), *map(entries, ("calls", "parameters", "pairs", "training_seconds"))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def choice_table(rows):
    """Variants of the restrictions, which were chosen on validation seeds."""
    lines = [
        "| preset | variant | evaluations | loss on pairs of validation | FID | distance |",
        "|---" * 6 + "|",
    ]
    for row in sorted((row for row in rows if row["part"] == "choice"), key=lambda row: (row["method"], row["nfe"])):
        own = (row["method"], row["variant"], row["nfe"])
        loss = f"{row['validation']:.4f}" if "validation" in row else "-"
        lines.append(f"| {' | '.join(map(str, own))} | {loss} | {row['fid']:.2f} | {row['distance']:.4f} |")
    return lines


def ablation_table(rows):
    """The ablations with the most test images beside ``full``, for each number of evaluations."""
    found = collect(rows, "ablation")
    lines = []
    for nfe in sorted({nfe for _, nfe in found}):
        images = max(group[0]["images"] for (_, at), group in found.items() if at == nfe)
        base = defaultdict(list, collect([row for row in rows if row["images"] == images], "main"))
        names = ["full", *(name for (name, at), group in found.items() if at == nfe and group[0]["images"] == images)]
        mixed = any(with_groups(group) for (_, at), group in found.items() if at == nfe)
        lines += [
            "",
            f"{nfe} evaluations:" if mixed else f"{nfe} evaluations {EARLIER}:",
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
                mark = f" {EARLIER}" if mixed and not with_groups(group) else ""
                lines.append(f"| {name}{mark} | " + " | ".join(cells) + " |")
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
    lines = [
        "# Learned samplers, compared",
        "",
        "Written by `python -m benchmarks.report_learned_solvers`.",
        "",
        *explained(),
        "",
    ]
    for network, rows in networks.items():
        dates = sorted({row["date"] for row in rows})
        images = max(row["images"] for row in rows)
        lines += [f"## {network}", "", f"{len(rows)} rows, {dates[0]} to {dates[-1]}.", ""]
        lines += [f"Rows without {EARLIER}: {images:,} test images.", ""]
        for score, (title, digits) in (SCORES | MORE).items():
            lines += [f"### {title}", "", *main_table(rows, score, digits), ""]
            for baseline in BASELINES if score in SCORES else ():
                lines += [*difference_table(rows, score, digits, baseline), ""]
        lines += ["### Against the target", "", *target_table(rows), ""]
        lines += ["### Budgets", "", *budget_table(rows), ""]
        if any(row["part"] == "ablation" for row in rows):
            lines += ["### Ablations of full", *ablation_table(rows), ""]
        lines += ["### Solvers without training, on the validation seeds", "", *plain_table(rows), ""]
        lines += ["### Rates and variants of restrictions, on validation", "", *choice_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def html_page(networks):
    """The main table of every network as one page, with the differences to any method."""
    columns = {"method": "Method", "nfe": "NFE"}
    columns |= {score: title for score, (title, _) in (SCORES | MORE).items()} | {"seeds": "Training seeds"}
    digits = {score: digits for score, (_, digits) in SCORES.items()}
    parts = [f"<p>{' '.join(explained())}</p>"]
    for network, rows in networks.items():
        found = collect(rows, "main")
        keys = sorted(found, key=lambda key: ([*ORDER, "teacher"].index(key[0]), key[1]))

        def cell(method, nfe, score, found=found):
            group, shown = found[method, nfe], (SCORES | MORE)[score][1]
            text = spread([row[score] for row in group], shown) + ("" if with_groups(group) else f" {EARLIER}")
            return results_page.Cell(text, mean(group, score), score in SCORES and best_of(found, nfe, score) == method)

        def estimate(index, other, score, found=found, keys=keys):
            pair = found[keys[index]], found[keys[other]]
            return difference(*pair, score) if all(map(with_groups, pair)) else None

        lines = []
        for method, nfe in keys:
            cells = {score: cell(method, nfe, score) for score in SCORES | MORE}
            cells["seeds"] = results_page.Cell(seeds_of([found[method, nfe]]))
            lines.append(results_page.Row(method, nfe, cells))
        differences = results_page.Differences(digits, estimate, BASELINES[0])
        parts += [f"<h2>{network}</h2>", results_page.results(results_page.table(columns, lines, differences))]
    return results_page.page("Learned samplers, compared", *parts)


def explained():
    """What the marks in the tables mean."""
    return [
        "± in a table of scores: standard deviation of the training seeds. ± in a table of differences: 95 % interval of the",
        "paired difference, over 20 groups of the sampled seeds (jackknife) and over the training seeds, where both have",
        "several; with one training seed it speaks of that trained solver only. Bold: better by more than the interval, in a",
        "table of scores than every other learned method; where that one has no groups, by more than the own interval.",
        f"{EARLIER}: measured earlier, on {EARLIER_IMAGES:,} images and without",
        "groups of seeds: no interval. Fréchet distances of different numbers of images cannot be compared.",
    ]


def document_parts(networks):
    """The generated parts of the documents by name, and of each document the names that it has."""
    parts = {}
    for network, rows in networks.items():
        for score, (_, digits) in SCORES.items():
            short = min(digits, 3)
            parts[f"{network} {score}"] = lambda rows=rows, s=score, d=short: "\n".join(main_table(rows, s, d))
        for score in ("fid", "fid2"):
            table = partial(difference_table, rows, score, 2, BASELINES[0])
            parts[f"{network} {score} differences"] = lambda table=table: "\n".join(table())
        parts[f"{network} target"] = lambda rows=rows: "\n".join(target_table(rows))
        parts[f"{network} choices"] = lambda rows=rows: "\n".join(choice_table(rows))
        parts[f"{network} ablations"] = lambda rows=rows: "\n".join(ablation_table(rows)).strip()
    parts["marks"] = lambda: "\n".join(explained())
    return {ROOT / "docs" / "span_solver.md": parts}


def draw_scores(networks, dest):
    """FID over evaluations, of rows with intervals; one panel for each network and classifier."""
    shown = {
        "plain, best fid": ("best without training", "tab:gray"), "gits": ("GITS", "tab:olive"),
        "AMED-Solver": ("AMED-Solver", "tab:orange"), "AMED-Plugin (iPNDM)": ("AMED-Plugin", "tab:red"),
        "ld3": ("LD3", "tab:green"), "s4s": ("S4S", "tab:cyan"), "dyweight": ("DyWeight", "tab:purple"),
        "dyweight, last sum one": ("DyWeight, last sum one", "mediumpurple"), "gs": ("GS", "tab:brown"),
        "amed-table": ("AMED's table", "gold"), "epd": ("EPD", "tab:pink"), "full": ("span (full)", "tab:blue"),
        "full + spatial,time": ("span (full + spatial, time)", "black"),
        "full + spatial,blocks": ("span (full + spatial, blocks)", "black"),
    }  # fmt: skip
    figure = new_figure("the figures", figsize=(10, 3.6 * len(networks) + 0.6))
    grid = figure.subplots(len(networks), 2, squeeze=False)
    for line, (network, rows) in zip(grid, networks.items(), strict=True):
        found = {key: with_groups(group) for key, group in on_most_images(rows).items() if with_groups(group)}
        for axes, score in zip(line, ("fid", "fid2"), strict=True):
            for method, (label, colour) in shown.items():
                nfes = sorted(nfe for name, nfe in found if name == method)
                if not nfes:
                    continue
                values = [[row[score] for row in found[method, nfe]] for nfe in nfes]
                errors = [statistics.stdev(group) if len(group) > 1 else 0 for group in values]
                style = {"color": colour, "linewidth": 2.2 if method in WHOLE else 1.2, "markersize": 4}
                style["linestyle"] = "--" if method.endswith("blocks") else "-"
                axes.errorbar(nfes, list(map(statistics.mean, values)), errors, marker="o", label=label, **style)
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
    figure.legend(*grid[-1][0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="lower center")
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    figure.savefig(dest, dpi=100)


def draw_tables(rows, dest, nfe):
    """Learned noise levels, sigma_cond, and coefficients of every student of one
    seed.
    """
    chosen = [
        row for row in rows if row["part"] == "main" and row["nfe"] == nfe and row.get("table") and row["seed"] == 0
    ]
    found = {row["method"]: row for row in chosen}
    names = [name for name in ORDER if name in found and "+" not in name]
    if not names:
        return
    figure = new_figure("the figures", figsize=(11, 1 + 0.62 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    from matplotlib import colormaps

    for height, name in enumerate(reversed(names)):
        table = found[name]["table"]
        calls = [(s, t) for s, t in zip(table["sigmas"][:-1], table["sigmas_cond"][:-1], strict=True)]
        if table["first_step"] != "none":
            left.plot(calls[0][0], height, "o", color="white", markeredgecolor="black", markersize=6)
            calls = calls[1:]
        calls += [(point[0], point[1]) for points in table["substeps"] for point in points]
        left.plot(*zip(*[(s, height) for s, _ in calls], strict=True), "o", color="tab:blue", markersize=6)
        left.plot([t for _, t in calls], [height] * len(calls), "|", color="black", markersize=12)
        left.plot(table["sigmas"][-1], height, "x", color="tab:blue")
        last = table["steps"][-1][0]
        bottom = {1: 0.0, -1: 0.0}
        for k, value in enumerate(reversed(last)):
            sign = 1 if value >= 0 else -1
            right.barh(height, value, left=bottom[sign], color=colormaps["viridis"](min(k / 5, 1)), height=0.6)
            bottom[sign] += value
    left.set_yticks(range(len(names)), list(reversed(names)), fontsize=9)
    left.set_xscale("log")
    left.invert_xaxis()
    left.set_xlabel("sigma of the calls (bars: sigma_cond; open: free first step; x: the end)", fontsize=8)
    right.axvline(1, color="black", linewidth=0.6)
    right.set_xlabel("coefficients of the last step, newest slope first (dark to light)", fontsize=8)
    figure.suptitle(f"{nfe} evaluations", fontsize=10)
    figure.tight_layout()
    figure.savefig(dest, dpi=100)


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--nfe", type=int, default=5, show_default=True, help="Of the picture of the tables")
@click.option("--html", metavar="FILE", help="Also write a page with the tables")
@click.option("--moved_since", metavar="COMMIT", help="Print the rows that moved by more than their interval, no more")
def main(nfe, html, moved_since):
    if moved_since is not None:
        for name in NETWORKS:
            print("\n".join([f"{name}:", *moved(read_commit(name, moved_since), read(name)), ""]))
        return
    networks = {name: rows for name in NETWORKS if (rows := read(name))}
    (ROOT / "benchmarks" / "learned_solvers.md").write_text(page(networks), encoding="utf-8")
    for document, parts in document_parts(networks).items():
        renew(document, parts, check=False)
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        Path(html).write_text(html_page(networks), encoding="utf-8")
    draw_scores(networks, ROOT / "docs" / "learned_solvers.png")
    for name, rows in networks.items():
        draw_tables(rows, ROOT / "docs" / f"span_tables_{name}.png", nfe)
    print(f"benchmarks/learned_solvers.md: {', '.join(f'{name} {len(rows)} rows' for name, rows in networks.items())}")


if __name__ == "__main__":
    main()
