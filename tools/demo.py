"""The whole pipeline on the embedded digits, as a user would run it: train -> sample -> FID -> table and pictures.

    python -m tools.demo            # or ./launch.sh demo

Trains AMED-Solver and AMED-Plugin (on iPNDM and on DPM-Solver++) with train.py, samples every method at the same number of network evaluations and
with the same seeds with sample.py, and compares them by FID-digits and by their distance to a converged solution of the
same ODE from the same noise. Writes demo/table.json, demo/figure.png and demo/index.html.
"""

import base64
import html
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fid import calculate_fid
from torch_utils.errors import UserError
from torch_utils.image_data import ImageSource, load_array
from torch_utils.image_writer import image_grid, save_image
from training.config import code_version

ROOT = Path(__file__).resolve().parent.parent

# Five evaluations everywhere. Every method, plain or learned, has the settings that served it best on validation seeds
# 100000-100255, which the table below never uses; docs/digits.md tells how they were chosen.
COMMON = {"schedule_type": "time_uniform", "schedule_rho": 1, "afs": "data"}
PLAIN = {
    "Euler": {"solver": "euler", "num_steps": 7, **COMMON},
    "DPM-Solver-2": {"solver": "dpm", "num_steps": 4, **COMMON, "schedule_rho": 2},
    "DPM-Solver++": {"solver": "dpmpp", "num_steps": 7, **COMMON, "max_order": 3, "thresholding": False},
    "iPNDM": {"solver": "ipndm", "num_steps": 7, **COMMON, "max_order": 3},
}
TRAINING = {
    **{"dataset_name": "digits", "num_steps": 4, **COMMON, "schedule_rho": 1.4, "sampler_tea": "ipndm", "M": 4},
    **{"scale_dir": 0.2, "scale_time": 0.3, "total_kimg": 1.5, "batch": 16, "seed": 0},
}
PAPER = {"sampler_tea": "heun", "M": 1, "schedule_rho": 1, "scale_dir": 0.01, "scale_time": 0}  # all but its AFS
LEARNED = {
    "AMED-Solver": {**TRAINING, "sampler_stu": "amed", **PAPER},
    "AMED-Plugin (iPNDM)": {**TRAINING, "sampler_stu": "ipndm", "max_order": 2},
    "AMED-Plugin (DPM++)": {**TRAINING, "sampler_stu": "dpmpp", "max_order": 3, "thresholding": False},
}
REFERENCE = {"solver": "heun", "num_steps": 51, "schedule_type": "polynomial", "schedule_rho": 7}
REFERENCE_SEEDS = 256
MARKER = ".amed-demo"


def run(*command, quiet_stdout=True):
    """Runs one of our scripts and returns the seconds it took; its progress bars go to the screen."""
    started = time.perf_counter()
    shown = [str(part) for part in command]
    result = subprocess.run(
        [sys.executable, *shown], cwd=ROOT, stdout=subprocess.PIPE if quiet_stdout else None, text=True
    )
    if result.returncode:
        raise UserError(f"this step failed: python {' '.join(shown)}")
    return time.perf_counter() - started


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train_all(out, extra):
    """Trains the learned methods; name -> (predictor folder, seconds)."""
    trained = {}
    for index, (name, settings) in enumerate(LEARNED.items()):
        print(f"\n== training {name}", flush=True)
        outdir = out / "exps" / str(index)
        seconds = run("train.py", *flags({**settings, **extra}), f"--outdir={outdir}")
        trained[name] = (next(path for path in sorted(outdir.iterdir()) if path.is_dir()), seconds)
    return trained


def sample_all(out, trained, images, extra):
    """Samples every method; rows of the table without their scores."""
    jobs = {name: (flags({"dataset_name": "digits", **s}), images) for name, s in PLAIN.items()}
    jobs.update({name: ([f"--predictor_path={folder}"], images) for name, (folder, _) in trained.items()})
    jobs["Reference"] = (flags({"dataset_name": "digits", **REFERENCE}), REFERENCE_SEEDS)
    rows = []
    for name, (arguments, count) in jobs.items():
        print(f"\n== sampling {name}", flush=True)
        folder = out / "samples" / name.lower().replace(" ", "-").replace("(", "").replace(")", "")
        chosen = [*arguments, f"--seeds=0-{count - 1}", "--batch=100", f"--outdir={folder}", *flags(extra)]
        seconds = run("sample.py", *chosen)
        record = json.loads((folder / "sampling.json").read_text())
        row = {"method": name, "nfe": record["nfe"], "images": count, "seconds": round(seconds, 1), "folder": folder}
        row["training_seconds"] = round(trained[name][1], 1) if name in trained else None
        row["command"] = "python sample.py " + " ".join(arguments)
        rows.append(row)
    return rows


def score(rows, detector_ref="digits"):
    """Adds FID-digits and the mean distance to the reference (root mean square over pixels in [-1, 1], first seeds)."""
    scaled = {row["method"]: load_array(ImageSource(row["folder"])).astype(np.float32) / 127.5 for row in rows}
    reference = scaled["Reference"]
    for row in rows:
        row["fid"] = round(calculate_fid(row["folder"], detector_ref).fid, 3)
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
        scores = f"FID-digits {row['fid']:.2f}, distance {row['distance']:.3f}"
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
        "| method | NFE | FID-digits | distance to reference | seconds | training s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        training = "" if row["training_seconds"] is None else f"{row['training_seconds']:.0f}"
        fid = f"{row['fid']:.2f}" + (f" ({row['images']} images)" if row["method"] == "Reference" else "")
        cells = [row["method"], row["nfe"], fid, f"{row['distance']:.3f}", f"{row['seconds']:.0f}", training]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_page(rows, facts, figure, path):
    cells = ("method", "nfe", "images", "fid", "distance", "seconds", "training_seconds", "command")
    head = "".join(f"<th>{cell}</th>" for cell in cells)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str('' if row[c] is None else row[c]))}</td>" for c in cells) + "</tr>"
        for row in rows
    )
    picture = base64.b64encode(figure.read_bytes()).decode()
    about = " · ".join(f"{key}: {value}" for key, value in facts.items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AMED on digits</title>
<style>body{{font:15px sans-serif;margin:2em;max-width:1500px}}table{{border-collapse:collapse}}
td,th{{border:1px solid #ccc;padding:4px 8px;text-align:left}}img{{max-width:100%}}</style>
<h1>Digits in five network evaluations</h1>
<p>Same seeds in every panel. FID-digits uses a small digit classifier: it is not comparable with Inception FIDs.
Distance: root mean square pixel difference (images in [-1, 1]) to the converged solution from the same noise.</p>
<img alt="samples of all methods" src="data:image/png;base64,{picture}">
<table><tr>{head}</tr>{body}</table><p>{html.escape(about)}</p></html>"""
    path.write_text(page, encoding="utf-8")


def prepare_folder(out):
    """An empty folder, or an earlier demo whose products are removed; nothing else is touched."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--outdir={out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--outdir={out} exists and is not an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by tools/demo.py, which may replace its products here\n")
    for name in ("exps", "samples"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("table.json", "figure.png", "index.html"):
        (out / name).unlink(missing_ok=True)


@click.command()
@click.option("--outdir", default="demo", show_default=True, help="Replaced if it is an earlier demo")
@click.option("--images", type=click.IntRange(REFERENCE_SEEDS), default=1000, show_default=True, help="Per method")
@click.option("--amp", type=click.Choice(["none", "bf16"]), default="none", show_default=True)
def main(outdir, images, amp):
    """Train, sample, score and picture AMED and the plain solvers on the embedded digits."""
    out = Path(outdir).resolve()
    prepare_folder(out)
    started = time.perf_counter()
    extra = {"amp": amp}
    trained = train_all(out, extra)
    rows = score(sample_all(out, trained, images, extra))
    total = time.perf_counter() - started
    draw_figure(rows, out / "figure.png")
    facts = {
        "total seconds": round(total),
        "date": time.strftime("%Y-%m-%d"),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "amp": amp,
        "training": json.dumps(LEARNED),
    }
    for row in rows:
        row["folder"] = str(row["folder"].relative_to(out))
    (out / "table.json").write_text(json.dumps({"rows": rows, **facts}, indent=2))
    write_page(rows, facts, out / "figure.png", out / "index.html")
    print("\n" + table_text(rows))
    print(f"\n{total:.0f} s in all. Pictures: {out / 'figure.png'} and {out / 'index.html'}")


if __name__ == "__main__":
    main()
