"""The results of compare.py: results.csv, results.json, results.md, and a page, index.html."""

import csv
import html
import io
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.jackknife import CONFIDENCE, interval_text
from tools import page
from tools.compare_run import SCORES, Comparison, Job, add_differences, describe_settings, difference
from tools.page import Cell, Differences, Row, Strip
from torch_utils.errors import MissingExtra
from torch_utils.files import write_json, write_text
from torch_utils.markdown import table
from torch_utils.options import recorded
from torch_utils.plots import new_figure

DIGITS = {"fid": 2, "pixel": 4, "feature": 4}
COLUMNS = {  # of the page: key of a row, heading
    "method": "Method",
    "nfe": "NFE",
    "fid": "FID",
    "pixel": "Distance (pixels)",
    "feature": "Distance (features)",
    "images_per_second": "Images/s",
}
NO_BIAS = "The jackknife's estimate of the bias is subtracted, so differences may differ slightly from the difference of two cells."
CHOSEN = (
    "Minus baseline: row minus the method that is chosen above, at the same NFE and seeds, with the interval of the paired"
    " difference. Green and bold: the whole interval is below zero, so the row is better. Red: it is above zero. "
) + NO_BIAS
# Of the lines: each has a contrast of at least 3 to a white and to a black ground.
COLOURS = ["#3779b5", "#c96a12", "#2f8f3f", "#d34343", "#8a63bd", "#94684a", "#c7549b", "#7a8087", "#868421", "#1b8f9f"]


def make_facts(comparison: Comparison, command: str) -> dict:
    """What is needed to repeat the comparison."""
    net, detector, protocol, options = comparison.net, comparison.detector, comparison.protocol, comparison.options
    compute, target = options.compute, comparison.target
    last = protocol.first + protocol.num - 1
    solution = (
        f"{comparison.reference.solver}, {describe_settings(comparison.reference)}, {comparison.reference_nfe} evaluations,"
        f" of the first {protocol.num_reference} seeds"
    )
    texts = {
        name: text if isinstance(text, str) else f"{text['file']}, SHA-256 {text['sha256']}"
        for name, text in recorded(options.text).items()
    }
    return {
        "command": command,
        "dataset_name": options.network.dataset_name,
        **({"baseline": options.baseline} if options.baseline else {}),
        **texts,
        "network": f"{Path(net.source_path).name}, SHA-256 {net.weights_hash}",
        "detector": "none" if detector is None else f"{detector.name} ({detector.file}, SHA-256 {detector.digest})",
        "FID reference": "none"
        if target is None
        else f"{options.reference_name}, {target.num or 'unknown number of'} images",
        "seeds": f"{protocol.first}-{last}, {protocol.groups} groups (seed {protocol.first} + i is in group i mod"
        f" {protocol.groups})",
        "reference solution": solution if protocol.num_reference else "none",
        "sigma": f"{comparison.range[0]:g} to {comparison.range[1]:g}",
        "amp": compute.amp,
        "compile": compute.compile,
        "code": comparison.code,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "written": time.strftime("%Y-%m-%d"),
    }


def _fid_notes(comparison: Comparison) -> list[str]:
    """What the FIDs are and how far they can be trusted; nothing if there are none."""
    num, detector = comparison.protocol.num, comparison.detector
    if comparison.target is None:
        return []
    notes = [
        f"FID: all {num} images against the reference statistics, features of '{detector.name}'"
        + ("." if detector.name == "inception" else "; not comparable with Inception FIDs.")
    ]
    if num <= detector.feature_dim:
        notes.append(
            f"{num} images for {detector.feature_dim} features: all FIDs are far too large; their intervals and"
            " differences are rough."
        )
    elif num < 10_000:
        notes.append(
            f"The FID of {num} images is biased upwards; compare it only with FIDs of the same number of images."
        )
    return notes


def make_notes(comparison: Comparison, rows: list[dict]) -> list[str]:
    """What the numbers mean, and their limits."""
    protocol = comparison.protocol
    share, baseline = round(100 * CONFIDENCE), comparison.options.baseline
    notes = [
        "NFE: network evaluations spent per image. A method that cannot spend the requested number has the row of the"
        " nearest number below, or of its smallest.",
        *_fid_notes(comparison),
        f"±: half the {share}% confidence interval: Student's t with {protocol.groups - 1} degrees of freedom times the"
        f" standard error of the jackknife, which leaves out one of the {protocol.groups} groups of seeds at a time. It"
        " covers the choice of the seeds, not the bias of the FID. A score cannot be negative: (0 to b) is an interval"
        " that would reach below 0, cut off there.",
        "Bold: better than every other method at the same NFE by more than the interval of the paired difference."
        + (
            f" Differences to '{baseline}': row minus baseline at the same NFE and seeds. Negative is better, bold if the"
            f" whole interval is below zero. {NO_BIAS}"
            if baseline
            else ""
        ),
        "Images/s: images per second of sampling, per process; "
        + " | ".join(dict.fromkeys(row["timed_on"] for row in rows))
        + ".",
    ]
    if protocol.num_reference:
        notes.append(
            f"Distance: mean over the first {protocol.num_reference} seeds of the root mean square difference to the"
            " reference solution from the same noise, in pixels (images clipped to [-1, 1], not rounded)"
            + ("" if comparison.detector is None else " and in the detector's features (of the 8-bit images)")
            + ". Stochastic methods do not have one."
        )
    versions = list(dict.fromkeys(row["code"] for row in rows))
    if versions != [comparison.code]:
        notes.append(
            f"Some rows were computed by other versions of the code ({', '.join(versions)}; now {comparison.code}). To"
            " compute all rows with one version, delete their files in the folder cache and run again."
        )
    return notes


# --------------------------------------------------------------------------------------------------
# Tables


def with_interval(row: dict, score: str, digits: int | None = None, sign: str = "") -> str:
    """The text "1.234 ± 0.056"; empty without such a score. sign: "+" for a difference."""
    if row[score] is None:
        return ""
    digits = DIGITS[score.removesuffix("_difference")] if digits is None else digits
    value, width = row[score], row[f"{score}_ci95"]
    if score.endswith("_difference"):  # may be negative
        return f"{value:{sign}.{digits}f} ± {width:.{digits}f}"
    return interval_text(value, width, f".{digits}f")


def beats_baseline(row: dict, score: str) -> bool:
    value = row[f"{score}_difference"]
    return value is not None and value + row[f"{score}_difference_ci95"] < 0


def beats_all(row: dict, rows: list[dict], score: str) -> bool:
    """Whether a row beats all others at the same NFE by more than the paired interval."""
    others = [r for r in rows if r["nfe"] == row["nfe"] and r is not row and r[score] is not None]
    return bool(others) and all(difference(row, other, score).below_zero for other in others)


def csv_text(rows: list[dict]) -> str:
    """One line per row with all its fields. Lists are joined by spaces; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue()


def pivot(rows: list[dict], score: str, cell: Callable[[dict], str]) -> str:
    """Markdown table of a score: a line per method, a column per NFE."""
    rows = [row for row in rows if row[score] is not None]
    nfes = sorted({row["nfe"] for row in rows})
    found = {(row["method"], row["nfe"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append([method, *(cell(found[method, nfe]) if (method, nfe) in found else "" for nfe in nfes)])
    return table(["method", *nfes], lines)


def markdown_text(rows: list[dict], facts: dict, notes: list[str]) -> str:
    def bold(text: str, condition: bool) -> str:
        return f"**{text}**" if condition else text

    parts = []
    for score, title in SCORES.items():
        if all(row[score] is None for row in rows):
            continue
        digits = min(DIGITS[score], 3)
        table = pivot(rows, score, lambda r, s=score, d=digits: bold(with_interval(r, s, d), beats_all(r, rows, s)))
        parts.append(f"{title} by NFE:\n\n{table}")
        if "baseline" in facts:
            others = [row for row in rows if row["method"] != facts["baseline"]]
            name = f"{score}_difference"
            if any(row[name] is not None for row in others):
                table = pivot(
                    others,
                    name,
                    lambda r, s=score, n=name, d=digits: bold(with_interval(r, n, d, "+"), beats_baseline(r, s)),
                )
                parts.append(f"{title} minus that of {facts['baseline']}, by NFE:\n\n{table}")
    parts.append("\n".join(f"* {note}" for note in notes))
    parts.append("\n".join(f"* {name}: `{value}`" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------
# The page


def plot(rows: list[dict], score: str) -> str:
    """SVG of a score over NFE, one line with intervals per method. Raises MissingExtra."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = -(-len(methods) // 2)  # of the legend
    figure = new_figure("a plot", figsize=(6.4, 4 + 0.19 * lines), layout="constrained")
    axes = figure.add_subplot()
    for index, method in enumerate(methods):
        points = sorted(
            (r["nfe"], r[score], r[f"{score}_ci95"]) for r in rows if r["method"] == method and r[score] is not None
        )
        if points:
            x, y, interval = zip(*points, strict=True)
            style = {"color": COLOURS[index % 10], "marker": "osv^D*"[index // 10 % 6]}
            style["linestyle"] = "-:"[index // 10 % 2]
            below = [min(width, value) for width, value in zip(interval, y, strict=True)]  # a score is at least 0
            axes.errorbar(x, y, yerr=(below, interval), label=method, capsize=2, markersize=4, linewidth=1.2, **style)
    if any(row[score] for row in rows):  # the distance of the reference solution to itself is zero everywhere
        axes.set_yscale("log")
    axes.set_xticks(sorted({row["nfe"] for row in rows}))
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel(SCORES[score])
    axes.grid(True, which="both", alpha=0.25)
    legend = figure.legend(loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may have dollar signs
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue()


def plots_html(rows: list[dict]) -> str:
    """The plots, or a sentence that says why they are missing (a failure is printed)."""
    try:
        drawn = [
            page.plot(plot(rows, score), f"{title} over NFE")
            for score, title in SCORES.items()
            if any(row[score] is not None for row in rows)
        ]
    except MissingExtra as error:
        return f"<p>No plots: {html.escape(str(error))}</p>"
    except Exception as error:  # matplotlib may fail because of its fonts, cache or settings
        reason = " ".join(f"matplotlib failed ({type(error).__name__}: {error})".split())
        print(f"Warning: no plots in the page: {reason}", file=sys.stderr, flush=True)
        return f"<p>No plots: {html.escape(reason)}</p>"
    return f'<div class="plots">{"".join(drawn)}</div>'


def table_html(rows: list[dict], baseline: str | None = None) -> str:
    """The table of the page. baseline: label of the method that differences refer to at first."""
    columns = {key: title for key, title in COLUMNS.items() if not _missing(rows, key)}
    lines = []
    for row in rows:
        cells = {
            score: Cell(with_interval(row, score), row[score], row[score] is not None and beats_all(row, rows, score))
            for score in SCORES
        }
        speed = row["images_per_second"]
        cells["images_per_second"] = Cell(f"{speed:.1f}", speed)
        facts = {"settings": row["settings"], "asked for": ", ".join(map(str, row["nfe_requested"]))}
        commands = [row["command"]] if row["command"] else []
        lines.append(Row(row["method"], row["nfe"], cells, facts, commands))
    pairs = Differences(DIGITS, lambda i, j, score: difference(rows[i], rows[j], score), baseline)
    return page.table(columns, lines, pairs)


def _missing(rows: list[dict], key: str) -> bool:
    return key in SCORES and all(row[key] is None for row in rows)


def pictures_html(comparison: Comparison, jobs: list[Job], rows: list[dict]) -> str:
    """For every NFE the same seeds, one method per row, the reference solution first."""
    solution, first = comparison.reference_pictures(), comparison.protocol.first
    parts = []
    for nfe in sorted({job.nfe for job in jobs}):
        strips = []
        if solution is not None:
            strips.append(Strip("reference solution", f"{comparison.reference_nfe} evaluations", solution, None))
        for job, row in zip(jobs, rows, strict=True):
            if job.nfe == nfe:
                score = next((name for name in SCORES if row[name] is not None), None)
                note = "" if score is None else f"{SCORES[score]} {row[score]:.{DIGITS[score]}f}"
                strips.append(Strip(row["method"], note, comparison.pictures(job), row["method"]))
        parts.append(page.strips(nfe, strips, range(first, first + len(strips[0].images))))
    return "\n".join(parts)


def page_html(rows: list[dict], facts: dict, notes: list[str], plots: str, pictures: str) -> str:
    """The whole page, without links to other files."""
    chosen = [CHOSEN] if len({row["method"] for row in rows}) > 1 else []
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in [*notes, *chosen])
    parts = [
        "<p>Unfold a method for its settings and its command. Choose a heading to sort.</p>",
        table_html(rows, facts.get("baseline")),
        f"<h2>What the numbers mean</h2>\n<ul>{listed}</ul>",
        f"<h2>Plots</h2>\n{plots}" if plots else "",
        f"<h2>The same seeds side by side</h2>\n{pictures}" if pictures else "",
    ]
    repeat = f"<h2>How to repeat this comparison</h2>\n{page.facts(facts)}"
    return page.page(f"Samplers on {facts['dataset_name']}", page.results(*parts), repeat)


def write_report(comparison: Comparison, jobs: list[Job], command: str) -> str:
    """Writes the four files into the folder of the comparison. Returns the text of results.md."""
    rows = [comparison.row(job) for job in jobs]
    if comparison.options.baseline is not None:
        rows = add_differences(rows, comparison.options.baseline)
    facts, notes, folder = make_facts(comparison, command), make_notes(comparison, rows), comparison.folder
    markdown = markdown_text(rows, facts, notes)

    # The tables first, so that they exist even if the plots fail.
    write_text(folder / "results.csv", csv_text(rows))
    write_json(folder / "results.json", {"facts": facts, "notes": notes, "rows": rows})
    write_text(folder / "results.md", markdown)
    plots, pictures = plots_html(rows), pictures_html(comparison, jobs, rows)
    write_text(folder / "index.html", page_html(rows, facts, notes, plots, pictures))
    return markdown
