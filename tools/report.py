"""The results of compare.py: results.csv, results.json, results.md, and a page, index.html."""

import base64
import csv
import html
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.jackknife import CONFIDENCE, interval_text
from tools.compare_run import SCORES, Comparison, Job, add_differences, describe_settings, difference
from torch_utils.errors import MissingExtra
from torch_utils.files import atomic_path
from torch_utils.images import image_grid
from torch_utils.options import recorded
from torch_utils.plots import new_figure

DIGITS = {"fid": 2, "pixel": 4, "feature": 4}
COLUMNS = {  # of the page: key of a row, heading
    "method": "method",
    "nfe": "NFE",
    "nfe_requested": "asked for",
    "fid": "FID",
    "pixel": "distance (pixels)",
    "feature": "distance (features)",
    "images_per_second": "images/s",
    "settings": "settings",
    "command": "command",
}
STYLE = """body{font:15px sans-serif;margin:2em;max-width:1600px}table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #ccc;padding:3px 8px;text-align:left;vertical-align:middle}th{background:#eee}
#results th{cursor:pointer}#results td{white-space:nowrap}code{font-size:12px}
img.strip{image-rendering:pixelated;display:block}img.plot{max-width:48%}small{color:#555}"""
# Sorts by the clicked column, in reverse order on the second click. Empty cells stay at the end.
SCRIPT = """document.querySelectorAll('#results th').forEach((head, column) => head.addEventListener('click', () => {
const body = document.querySelector('#results tbody'), up = head.dataset.up = head.dataset.up === '1' ? '0' : '1';
const value = row => row.cells[column].dataset.value, number = text => text !== '' && !isNaN(text);
[...body.rows].sort((a, b) => { const x = value(a), y = value(b);
if (x === '' || y === '') return (x === '') - (y === '');
const order = number(x) && number(y) ? x - y : x.localeCompare(y);
return up === '1' ? order : -order; }).forEach(row => body.append(row)); }));"""


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
            " whole interval is below zero. The jackknife's estimate of the bias is subtracted, so they may differ slightly"
            " from the difference of two cells."
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
    lines = [["method", *map(str, nfes)], ["---"] * (len(nfes) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append([method, *(cell(found[method, nfe]) if (method, nfe) in found else "" for nfe in nfes)])
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


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


def embed(png: bytes, alt: str, kind: str, width: int | None = None) -> str:
    size = f' width="{width}"' if width else ""
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}"{size} src="data:image/png;base64,{data}">'


def strip(images: np.ndarray, alt: str) -> str:
    """uint8 [N,H,W,C] -> an <img> of all images side by side; small images are enlarged."""
    row = image_grid(images, columns=len(images))
    buffer = io.BytesIO()
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(buffer, format="PNG", optimize=True)
    return embed(buffer.getvalue(), alt, "strip", row.shape[1] * max(1, 64 // images.shape[1]))


def plot(rows: list[dict], score: str) -> bytes:
    """PNG of a score over NFE, one line with intervals per method. Raises MissingExtra."""
    figure = new_figure("a plot", figsize=(8, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted(
            (r["nfe"], r[score], r[f"{score}_ci95"]) for r in rows if r["method"] == method and r[score] is not None
        )
        if points:
            x, y, interval = zip(*points, strict=True)
            style = {"color": f"C{index % 10}", "marker": "osv^D*"[index // 10 % 6], "linestyle": "-:"[index // 10 % 2]}
            below = np.minimum(interval, y)  # a score is at least 0
            axes.errorbar(x, y, yerr=(below, interval), label=method, capsize=2, markersize=4, linewidth=1.2, **style)
    if any(row[score] for row in rows):  # the distance of the reference solution to itself is zero everywhere
        axes.set_yscale("log")
    axes.set_xticks(sorted({row["nfe"] for row in rows}))
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel(SCORES[score])
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plots_html(rows: list[dict]) -> str:
    """The plots as <img>, or a sentence that says why they are missing (a failure is printed)."""
    try:
        drawn = [
            embed(plot(rows, score), f"{title} over NFE", "plot")
            for score, title in SCORES.items()
            if any(row[score] is not None for row in rows)
        ]
    except MissingExtra as error:
        return f"<p>No plots: {html.escape(str(error))}</p>"
    except Exception as error:  # matplotlib may fail because of its fonts, cache or settings
        reason = " ".join(f"matplotlib failed ({type(error).__name__}: {error})".split())
        print(f"Warning: no plots in the page: {reason}", file=sys.stderr, flush=True)
        return f"<p>No plots: {html.escape(reason)}</p>"
    return "\n".join(drawn)


def table_html(rows: list[dict], baseline: str | None = None) -> str:
    """The table of the page. baseline: label of the method that differences refer to."""
    columns = {}
    for key, title in COLUMNS.items():
        if key in SCORES and all(row[key] is None for row in rows):
            continue
        columns[key] = title
        if baseline is not None and key in SCORES:
            columns[f"{key}_difference"] = f"{title} minus {baseline}"

    def cell(row: dict, key: str) -> str:
        value, better = row[key], False
        score = key.removesuffix("_difference")
        if key in SCORES:
            text, better = with_interval(row, key), value is not None and beats_all(row, rows, key)
        elif score in SCORES:
            text, better = with_interval(row, key, sign="+"), beats_baseline(row, score)
        elif key == "images_per_second":
            text = f"{value:.1f}"
        elif isinstance(value, list):
            value = text = ", ".join(map(str, value))
        else:
            text = str(value)
        text = html.escape(text)
        text = f"<code>{text}</code>" if key == "command" else f"<b>{text}</b>" if better else text
        return f'<td data-value="{html.escape("" if value is None else str(value))}">{text}</td>'

    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = "\n".join("<tr>" + "".join(cell(row, key) for key in columns) + "</tr>" for row in rows)
    return f'<table id="results"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def pictures_html(comparison: Comparison, jobs: list[Job], rows: list[dict]) -> str:
    """For every NFE the same seeds, one method per row, the reference solution first."""
    solution = comparison.reference_pictures()
    parts = []
    for nfe in sorted({job.nfe for job in jobs}):
        lines = []
        if solution is not None:
            title = f"reference solution<br><small>{comparison.reference_nfe} evaluations</small>"
            lines.append(f"<tr><th>{title}</th><td>{strip(solution, 'reference solution')}</td></tr>")
        for job, row in zip(jobs, rows, strict=True):
            if job.nfe == nfe:
                score = next((name for name in SCORES if row[name] is not None), None)
                small = "" if score is None else f"<br><small>{SCORES[score]} {row[score]:.{DIGITS[score]}f}</small>"
                label = html.escape(row["method"]) + small
                lines.append(f"<tr><th>{label}</th><td>{strip(comparison.pictures(job), row['method'])}</td></tr>")
        parts.append(f"<h3>{nfe} evaluations</h3>\n<table>{''.join(lines)}</table>")
    return "\n".join(parts)


def page(rows: list[dict], facts: dict, notes: list[str], plots: str, pictures: str) -> str:
    """The whole page, without links to other files."""
    about = "".join(
        f"<tr><th>{html.escape(k)}</th><td><code>{html.escape(str(v))}</code></td></tr>" for k, v in facts.items()
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    title = f"Samplers on {html.escape(facts['dataset_name'])}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>Click a heading to sort.</p>
{table_html(rows, facts.get("baseline"))}
<ul>{listed}</ul>
<h2>Plots</h2>
{plots}
<h2>The same seeds side by side</h2>
{pictures}
<h2>How to repeat this comparison</h2>
<table>{about}</table>
<script>{SCRIPT}</script>
</body></html>
"""


def write_report(comparison: Comparison, jobs: list[Job], command: str) -> str:
    """Writes the four files into the folder of the comparison. Returns the text of results.md."""
    rows = [comparison.row(job) for job in jobs]
    if comparison.options.baseline is not None:
        rows = add_differences(rows, comparison.options.baseline)
    facts, notes = make_facts(comparison, command), make_notes(comparison, rows)
    markdown = markdown_text(rows, facts, notes)

    def write(name: str, text: str) -> None:
        with atomic_path(comparison.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8

    # The tables first, so that they exist even if the plots fail.
    write("results.csv", csv_text(rows))
    write("results.json", json.dumps({"facts": facts, "notes": notes, "rows": rows}, indent=2) + "\n")
    write("results.md", markdown)
    write("index.html", page(rows, facts, notes, plots_html(rows), pictures_html(comparison, jobs, rows)))
    return markdown
