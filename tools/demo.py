"""The whole pipeline on the embedded networks, as a user would run it: train -> sample -> FID -> tables and pictures.

    python -m tools.demo            # or ./launch.sh demo

Two halves: handwritten digits and a small network of natural images. Each trains AMED-Solver and
AMED-Plugin with train.py, samples every method at the same number of network evaluations and with
the same seeds with sample.py, and compares them by Fréchet distance and by their distance to a
converged solution of the same ODE from the same noise. Writes table.json, index.html and one figure
for each half into --outdir.
"""

import base64
import html
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.fid import calculate_fid
from torch_utils.cli import PATH, Command
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, image_grid, load_array, save_image
from torch_utils.version import code_version

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Half:
    """One network of the demo and the settings of the methods: plain ones for sample.py, learned
    ones for train.py.
    """

    dataset_name: str
    title: str
    about: str
    plain: dict
    learned: dict


# Five evaluations everywhere. Every method, plain or learned, has the settings that served it best
# on validation seeds 100000-100255, which the tables below never use; docs/digits.md,
# docs/cifar10-small.md and docs/span_solver.md tell how they were chosen.
COMMON = {"schedule_type": "time_uniform", "schedule_rho": 1, "afs": "data"}
POLYNOMIAL = {"schedule_type": "polynomial", "afs": "data"}
TRAINING = {
    **{"num_steps": 4, **COMMON, "schedule_rho": 1.4, "sampler_tea": "ipndm", "M": 4},
    **{"scale_dir": 0.2, "scale_time": 0.3, "total_kimg": 1, "batch": 16, "seed": 0},
}
PAPER = {"sampler_tea": "heun", "M": 1, "schedule_rho": 1, "scale_dir": 0.01, "scale_time": 0}  # all but its AFS
SPAN = {"sampler_stu": "span", "num_steps": 7, "batch": 8, "total_kimg": 1, "pairs": 384, "val_pairs": 64, "seed": 0}
DIGITS = Half(
    dataset_name="digits",
    title="Digits in five network evaluations",
    about="Handwritten digits, the embedded network 'digits'.",
    plain={
        "Euler": {"solver": "euler", "num_steps": 7, **COMMON},
        "DPM-Solver-2": {"solver": "dpm", "num_steps": 4, **COMMON, "schedule_rho": 2},
        "DPM-Solver++": {"solver": "dpmpp", "num_steps": 7, **COMMON, "max_order": 3, "thresholding": False},
        "iPNDM": {"solver": "ipndm", "num_steps": 7, **COMMON, "max_order": 3},
    },
    learned={
        "AMED-Solver": {**TRAINING, "sampler_stu": "amed", **PAPER},
        "AMED-Plugin (iPNDM)": {**TRAINING, "sampler_stu": "ipndm", "max_order": 2},
        "Span solver": SPAN,
    },
)
CIFAR10 = Half(
    dataset_name="cifar10-small",
    title="Natural images in five network evaluations",
    about="Natural images, the embedded network 'cifar10-small'.",
    plain={
        "Euler": {"solver": "euler", "num_steps": 6, "schedule_type": "time_uniform", "schedule_rho": 1},
        "DPM-Solver-2": {"solver": "dpm", "num_steps": 4, **POLYNOMIAL, "schedule_rho": 7},
        "DPM-Solver++": {
            **{"solver": "dpmpp", "num_steps": 7, **POLYNOMIAL, "schedule_rho": 7},
            **{"max_order": 2, "thresholding": False},
        },
        "iPNDM": {"solver": "ipndm", "num_steps": 7, **POLYNOMIAL, "schedule_rho": 5, "max_order": 4},
    },
    learned={
        "AMED-Solver": {**TRAINING, **PAPER, "sampler_stu": "amed", "M": 3},
        "AMED-Plugin (iPNDM)": {
            **{**TRAINING, **POLYNOMIAL, "schedule_rho": 5, "sampler_stu": "ipndm", "M": 2},
            **{"scale_dir": 0.01, "scale_time": 0.2, "max_order": 4, "total_kimg": 1.5},
        },
        "Span solver": SPAN,
    },
)
HALVES = {half.dataset_name: half for half in (DIGITS, CIFAR10)}
REFERENCE = {"solver": "heun", "num_steps": 51, "schedule_type": "polynomial", "schedule_rho": 7}
REFERENCE_SEEDS = 256
MARKER = ".amed-demo"


def run(*command, quiet_stdout=True):
    """Runs one of our scripts and returns the seconds it took; its progress bars go to the screen."""
    started = time.perf_counter()
    shown = [str(part) for part in command]
    result = subprocess.run([sys.executable, *shown], cwd=ROOT, stdout=subprocess.DEVNULL if quiet_stdout else None)
    if result.returncode:
        raise UserError(f"this step failed: python {' '.join(shown)}")
    return time.perf_counter() - started


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train_all(half, out, extra):
    """Trains the learned methods; name -> (predictor folder, seconds)."""
    trained = {}
    for index, (name, settings) in enumerate(half.learned.items()):
        print(f"\n== {half.dataset_name}: training {name}", flush=True)
        outdir = out / "exps" / half.dataset_name / str(index)
        chosen = {"dataset_name": half.dataset_name, **settings, **extra}
        seconds = run("train.py", *flags(chosen), f"--outdir={outdir}")
        trained[name] = (next(path for path in sorted(outdir.iterdir()) if path.is_dir()), seconds)
    return trained


def sample_all(half, out, trained, images, extra):
    """Samples every method; rows of the table without their scores."""
    network = {"dataset_name": half.dataset_name}
    jobs = {name: (flags({**network, **settings}), images) for name, settings in half.plain.items()}
    jobs.update({name: ([f"--predictor_path={folder}"], images) for name, (folder, _) in trained.items()})
    jobs["Reference"] = (flags({**network, **REFERENCE}), REFERENCE_SEEDS)
    rows = []
    for name, (arguments, count) in jobs.items():
        print(f"\n== {half.dataset_name}: sampling {name}", flush=True)
        folder = out / "samples" / half.dataset_name / name.lower().replace(" ", "-").replace("(", "").replace(")", "")
        chosen = [*arguments, f"--seeds=0-{count - 1}", "--batch=100", f"--outdir={folder}", *flags(extra)]
        seconds = run("sample.py", *chosen)
        record = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
        row = {"method": name, "nfe": record["nfe"], "images": count, "seconds": round(seconds, 1), "folder": folder}
        row["training_seconds"] = round(trained[name][1], 1) if name in trained else None
        row["command"] = "python sample.py " + " ".join(arguments)
        rows.append(row)
    return rows


def score(rows, reference_name):
    """Adds the Fréchet distance in the features of the network's own classifier and the mean
    distance to the reference (root mean square over pixels in [-1, 1], first seeds).
    """
    scaled = {row["method"]: load_array(ImageSource(row["folder"])).astype(np.float32) / 127.5 for row in rows}
    reference = scaled["Reference"]
    for row in rows:
        row["fid"] = round(calculate_fid(row["folder"], reference_name).fid, 3)
        apart = scaled[row["method"]][: len(reference)] - reference
        row["distance"] = round(float(np.sqrt((apart**2).mean(axis=(1, 2, 3))).mean()), 4)
    return rows


def draw_figure(rows, path, columns=8, zoom=2):
    """The same seeds for every method, side by side, with its name and scores above."""
    panels = []
    font = ImageFont.load_default(15)
    for row in rows:
        images = load_array(ImageSource(row["folder"]))[: columns * columns].transpose(0, 2, 3, 1)
        grid = image_grid(images, columns)
        grid = Image.fromarray(grid.squeeze()).convert("RGB")
        grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST)
        panel = Image.new("RGB", (grid.width, grid.height + 44), "white")
        panel.paste(grid, (0, 44))
        text = f"{row['method']}, {row['nfe']} evaluations"
        scores = f"FID* {row['fid']:.2f}, distance {row['distance']:.3f}"
        if row["method"] == "Reference":
            text, scores = f"Reference: Heun, {row['nfe']} evaluations", "converged solution, same seeds"
        draw = ImageDraw.Draw(panel)
        draw.text((4, 4), text, fill="black", font=font)
        draw.text((4, 23), scores, fill="black", font=font)
        panels.append(panel)
    across = (len(panels) + 1) // 2
    gap, (width, height) = 12, panels[0].size
    figure = Image.new("RGB", (across * (width + gap) - gap, 2 * height + gap), "white")
    for index, panel in enumerate(panels):
        figure.paste(panel, ((index % across) * (width + gap), (index // across) * (height + gap)))
    save_image(np.asarray(figure), path)


def table_text(rows):
    lines = [
        "| method | NFE | FID* | distance to reference | seconds | training s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        training = "" if row["training_seconds"] is None else f"{row['training_seconds']:.0f}"
        fid = f"{row['fid']:.2f}" + (f" ({row['images']} images)" if row["method"] == "Reference" else "")
        cells = [row["method"], row["nfe"], fid, f"{row['distance']:.3f}", f"{row['seconds']:.0f}", training]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_page(halves, facts, path):
    """One self-contained page. halves: (Half, rows, figure) of each."""
    cells = ("method", "nfe", "images", "fid", "distance", "seconds", "training_seconds", "command")
    head = "".join(f"<th>{cell}</th>" for cell in cells)
    parts = []
    for half, rows, figure in halves:
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str('' if row[c] is None else row[c]))}</td>" for c in cells) + "</tr>"
            for row in rows
        )
        picture = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f"""<h1>{html.escape(half.title)}</h1><p>{html.escape(half.about)}</p>
<img alt="samples of all methods" src="data:image/png;base64,{picture}">
<table><tr>{head}</tr>{body}</table>""")
    about = " · ".join(f"{key}: {value}" for key, value in facts.items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AMED in five network evaluations</title>
<style>body{{font:15px sans-serif;margin:2em;max-width:1500px}}table{{border-collapse:collapse}}
td,th{{border:1px solid #ccc;padding:4px 8px;text-align:left}}img{{max-width:100%}}</style>
<p>Same seeds in every panel. FID*: Fréchet distance in the features of a small classifier of the same kind of images; it is
not comparable with Inception FIDs. Distance: root mean square pixel difference (images in [-1, 1]) to the converged
solution from the same noise.</p>
{"".join(parts)}<p>{html.escape(about)}</p></html>"""
    path.write_text(page, encoding="utf-8")


def prepare_folder(out):
    """An empty folder, or an earlier demo whose products are removed; nothing else is touched."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--outdir={out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--outdir={out} exists and is not an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by tools/demo.py, which may replace its products here\n", encoding="utf-8")
    for name in ("exps", "samples"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("table.json", "index.html", *(f"{name}.png" for name in HALVES)):
        (out / name).unlink(missing_ok=True)


@click.command(cls=Command)
@click.option("--outdir", type=PATH, default="demo", show_default=True, help="Replaced if it is an earlier demo")
@click.option("--only", type=click.Choice(list(HALVES)), help="One network instead of both")
@click.option("--images", type=click.IntRange(REFERENCE_SEEDS), default=1000, show_default=True, help="Per method")
@click.option("--amp", type=click.Choice(["none", "bf16"]), default="none", show_default=True)
def main(outdir, only, images, amp):
    """Train, sample, score and picture AMED and the plain solvers on the embedded networks."""
    out = Path(outdir).resolve()
    prepare_folder(out)
    extra = {"amp": amp}
    done, seconds = [], {}
    for half in [HALVES[only]] if only else HALVES.values():
        started = time.perf_counter()
        trained = train_all(half, out, extra)
        rows = score(sample_all(half, out, trained, images, extra), half.dataset_name)
        figure = out / f"{half.dataset_name}.png"
        draw_figure(rows, figure)
        done.append((half, rows, figure))
        seconds[half.dataset_name] = round(time.perf_counter() - started)
    facts = {
        "seconds": json.dumps(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "amp": amp,
    }
    for _, rows, _ in done:
        for row in rows:
            row["folder"] = str(row["folder"].relative_to(out))
    halves = {half.dataset_name: {"rows": rows, "training": half.learned} for half, rows, _ in done}
    (out / "table.json").write_text(json.dumps({"halves": halves, **facts}, indent=2), encoding="utf-8")
    write_page(done, facts, out / "index.html")
    for half, rows, figure in done:
        print(f"\n{half.title} ({figure})\n\n{table_text(rows)}")
    print(f"\n{sum(seconds.values())} s in all. FID*: in the features of the network's own small classifier.")
    print(f"The whole on one page: {out / 'index.html'}")


if __name__ == "__main__":
    main()
