"""A first picture in a minute; then the whole pipeline: train, sample, FID, page.

    python -m tools.demo            # or ./launch.sh demo: about 5 minutes on 2 CPU cores
    python -m tools.demo --full     # both networks, every learned method trained here, 1,000 images
    python -m tools.demo --only=digits --images=100 --outdir=demo-digits

The first picture needs no training: the same seeds by plain solvers and by shipped predictors, with
three evaluations each. Then every method samples natural images (and, with --full, digits) with
five evaluations, scored by Fréchet distance and by the distance to the converged solution from the
same noise. Solvers have their recommended settings (solvers/recommended.py). Predictors are trained
by train.py or, without --full, partly taken from the repository.

Writes first.png, table.json, index.html and one figure per network to --outdir.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.demo")

import html
import json
import re
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

from amed.commands import script
from evaluation.fid import calculate_fid
from models import create_model
from models.inputs import draw_noise
from sampling.settings import Settings, settings_of
from solvers import recommended, sample
from tools import page
from tools.page import Cell, Row, Strip
from torch_utils.cli import PATH, Command
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, image_grid, load_array, save_image, to_uint8
from torch_utils.markdown import table
from torch_utils.seeds import SeededGenerators
from torch_utils.version import code_version, cpu_name
from training.checkpoint import find_predictor, load_predictor

ROOT = Path(__file__).resolve().parent.parent
NFE = 5  # of the table; settings were chosen on seeds 100000-100255, which it never uses
PLAIN = {"Euler": "euler", "DPM-Solver-2": "dpm", "DPM-Solver++": "dpmpp", "UniPC": "unipc", "iPNDM": "ipndm"}
LEARNED = {"AMED-Solver": "amed", "AMED-Plugin (iPNDM)": "ipndm", "Span solver": "span"}  # --sampler_stu
SHIPPED = {"amed": "amed", "ipndm": "plugin", "span": "span"}  # the same in the names of predictors
TITLES = {"cifar10-small": "Natural images", "digits": "Handwritten digits"}
REFERENCE = {"solver": "heun", "num_steps": 51, "schedule_type": "polynomial", "schedule_rho": 7}
REFERENCE_SEEDS = 256
MARKER = ".amed-demo"
FIRST_NFE, FIRST_SEEDS = 3, range(12)


@dataclass(frozen=True)
class Scale:
    """How much a demo does.

    networks: names of the networks, in order.
    images: images per method.
    reference: seeds with a converged solution.
    trained: learned methods to train; the others are shipped with the repository.
    """

    networks: tuple[str, ...]
    images: int
    reference: int
    trained: frozenset[str]


SHORT = Scale(("cifar10-small",), 500, 128, frozenset({"Span solver"}))
FULL = Scale(("digits", "cifar10-small"), 1000, REFERENCE_SEEDS, frozenset(LEARNED))


def first_picture(path):
    """Draws the same seeds by plain solvers and shipped predictors, one row per method."""
    name = "cifar10-small"
    net = create_model(name)
    latents = draw_noise(net, SeededGenerators(FIRST_SEEDS))
    jobs = {"Euler": recommended(net, FIRST_NFE, "euler"), "iPNDM": recommended(net, FIRST_NFE, "ipndm")}
    for method in ("AMED-Plugin (iPNDM)", "Span solver"):
        predictor = load_predictor(find_predictor(f"{name}-{SHIPPED[LEARNED[method]]}-{FIRST_NFE}"))
        settings = settings_of(predictor, Settings(dataset_name=name))
        jobs[method] = {**settings.arguments(), "predictor": predictor}
    jobs["Converged"] = REFERENCE
    rows = []
    for method, arguments in jobs.items():
        images, info = sample(net, latents, return_info=True, **arguments)
        rows.append((method, f"{info.nfe} evaluations", to_uint8(images)))
    draw_rows(rows, path)


def draw_rows(rows, path, zoom=3):
    """Draws a row of images per method. rows: (method, evaluations, images [N,H,W,C])."""
    font, small, label = ImageFont.load_default(30), ImageFont.load_default(24), 330
    height, width = rows[0][2].shape[1] * zoom, rows[0][2].shape[2] * zoom
    gap, count = 6, len(rows[0][2])
    figure = Image.new("RGB", (label + count * width, len(rows) * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(figure)
    for number, (method, spent, images) in enumerate(rows):
        top = number * (height + gap)
        draw.text((4, top + height // 2 - 36), method, fill="black", font=font)
        draw.text((4, top + height // 2 + 2), spent, fill="dimgray", font=small)
        line = np.concatenate(list(images), axis=1)
        line = Image.fromarray(line.squeeze()).convert("RGB").resize((count * width, height), Image.NEAREST)
        figure.paste(line, (label, top))
    save_image(np.asarray(figure), path)


def run(*command, quiet_stdout=True):
    """Runs one of our scripts, with progress bars on the screen. Returns the seconds it took."""
    started = time.perf_counter()
    shown = [str(part) for part in command]
    program = [str(script(Path(shown[0]).stem)), *shown[1:]]
    result = subprocess.run([sys.executable, *program], cwd=ROOT, stdout=subprocess.DEVNULL if quiet_stdout else None)
    if result.returncode:
        raise UserError(f"this step failed: python {' '.join(shown)}")
    return time.perf_counter() - started


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train_all(dataset_name, scale, out, extra):
    """Learned methods: name -> (--predictor_path, seconds of training or None, command or None)."""
    found = {}
    for name, student in LEARNED.items():
        if name not in scale.trained:
            found[name] = (f"{dataset_name}-{SHIPPED[student]}-{NFE}", None, None)
            continue
        print(f"\n== {dataset_name}: training {name}", flush=True)
        outdir = out / "exps" / dataset_name / student
        chosen = {"dataset_name": dataset_name, "sampler_stu": student, "nfe": NFE, "seed": 0, **extra}
        seconds = run("train.py", *flags(chosen), f"--outdir={outdir}")
        folder = next(path for path in sorted(outdir.iterdir()) if path.is_dir())
        found[name] = (folder, seconds, "python train.py " + " ".join(flags(chosen)))
    return found


def sample_all(dataset_name, scale, out, learned, extra):
    """Samples every method. Returns the rows of the table, without scores."""
    network = {"dataset_name": dataset_name}
    jobs = {
        name: (flags({**network, "solver": solver, "nfe": NFE}), scale.images, None, None)
        for name, solver in PLAIN.items()
    }
    for name, (predictor, seconds, command) in learned.items():
        jobs[name] = ([f"--predictor_path={predictor}"], scale.images, seconds, command)
    jobs["Reference"] = (flags({**network, **REFERENCE}), scale.reference, None, None)
    rows = []
    for name, (arguments, count, training, command) in jobs.items():
        print(f"\n== {dataset_name}: sampling {name}", flush=True)
        folder = out / "samples" / dataset_name / re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-")
        chosen = [*arguments, f"--seeds=0-{count - 1}", "--batch=100", f"--outdir={folder}", *flags(extra)]
        seconds = run("sample.py", *chosen)
        record = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
        row = {"method": name, "nfe": record["nfe"], "images": count, "seconds": round(seconds, 1), "folder": folder}
        row["training_seconds"] = None if training is None else round(training, 1)
        row["command"] = "python sample.py " + " ".join(arguments)
        row["training_command"] = command
        rows.append(row)
    return rows


def score(rows, reference_name):
    """Adds FID* and mean distance to the reference (root mean square over pixels in [-1, 1])."""
    scaled = {row["method"]: load_array(ImageSource(row["folder"])).astype(np.float32) / 127.5 for row in rows}
    reference = scaled["Reference"]
    for row in rows:
        row["fid"] = round(calculate_fid(row["folder"], reference_name).fid, 3)
        apart = scaled[row["method"]][: len(reference)] - reference
        row["distance"] = round(float(np.sqrt((apart**2).mean(axis=(1, 2, 3))).mean()), 4)
    return rows


def draw_figure(rows, path, columns=8, zoom=2):
    """Draws the same seeds for every method side by side, with names and scores above."""
    panels = []
    font, small = ImageFont.load_default(28), ImageFont.load_default(24)
    for row in rows:
        images = load_array(ImageSource(row["folder"]))[: columns * columns].transpose(0, 2, 3, 1)
        grid = image_grid(images, columns)
        grid = Image.fromarray(grid.squeeze()).convert("RGB")
        grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST)
        panel = Image.new("RGB", (grid.width, grid.height + 72), "white")
        panel.paste(grid, (0, 72))
        text, scores = row["method"], f"FID* {row['fid']:.2f}, distance {row['distance']:.3f}"
        if row["method"] == "Reference":
            text, scores = "Converged solution", f"Heun, {row['nfe']} evaluations"
        draw = ImageDraw.Draw(panel)
        draw.text((4, 4), text, fill="black", font=font)
        draw.text((4, 40), scores, fill="dimgray", font=small)
        panels.append(panel)
    across = (len(panels) + 2) // 3
    gap, (width, height) = 16, panels[0].size
    figure = Image.new("RGB", (across * (width + gap) - gap, 3 * (height + gap) - gap), "white")
    for index, panel in enumerate(panels):
        figure.paste(panel, ((index % across) * (width + gap), (index // across) * (height + gap)))
    save_image(np.asarray(figure), path)


def table_text(rows):
    lines = []
    for row in rows:
        fid = f"{row['fid']:.2f}" + (f" ({row['images']} images)" if row["method"] == "Reference" else "")
        cells = [row["method"], row["nfe"], fid, f"{row['distance']:.3f}", f"{row['seconds']:.0f}", _training(row)]
        lines.append(cells)
    return table(["method", "NFE", "FID*", "distance", "seconds", "training s"], lines)


def _training(row):
    if row["training_seconds"] is not None:
        return f"{row['training_seconds']:.0f}"
    return "comes with the repository" if "--predictor_path" in row["command"] else ""


FIRST = """<p>Each column starts from the same noise, and each image took THREE evaluations of the network; those of the
last row took a hundred. The last row is what the network would draw with unlimited time, so a good method looks like it.
Euler and iPNDM are solvers without training. The AMED-Plugin and the span solver were trained for one to two minutes;
the predictors of this picture came with the repository.</p>
"""
EXPLANATION = """<p>What to look for: blur and washed-out colours (too few evaluations for the solver), wrong shapes
(the method left the path of the exact solution).</p><ul>
<li><b>FID*</b>: distance between the images and real ones, in the features of a small classifier; lower is better. It is
not comparable with FIDs from the Inception network.</li>
<li><b>Distance</b>: how far the images are from the converged solution from the same noise (root mean square over pixels
in [-1, 1]); lower is better.</li>
<li><b>NFE</b>: evaluations of the network per image, which is nearly all of the cost.</li></ul>
"""
COLUMNS = {
    "method": "Method",
    "nfe": "NFE",
    "images": "Images",
    "fid": "FID*",
    "distance": "Distance",
    "seconds": "Seconds",
    "training": "Training (s)",
}
PICTURED = 16  # seeds on the page


def write_page(done, facts, first, path):
    """Writes the page. done: (network, rows, figure) of each. first: the first picture."""
    words = {3: "three"}
    introduction = FIRST.replace("THREE", words.get(FIRST_NFE, str(FIRST_NFE)))
    parts = [introduction, page.picture(first.read_bytes(), "the same seeds by five methods")]
    for dataset_name, rows, _ in done:
        parts += [
            f"<h2>{html.escape(TITLES[dataset_name])}, {NFE} evaluations</h2>",
            f"<p>The network <code>{dataset_name}</code>; the same {rows[0]['images']} seeds for every method.</p>",
            EXPLANATION if dataset_name == done[0][0] else "",
            page.results(page.table(COLUMNS, [_line(row) for row in rows]), _pictures(rows)),
        ]
    about = f"<h2>About</h2>{page.facts(facts)}"
    text = page.page("Sampling in a few network evaluations", *parts, about)
    path.write_text(text, encoding="utf-8")


def _line(row):
    cells = {
        "images": Cell(str(row["images"]), row["images"]),
        "fid": Cell(f"{row['fid']:.2f}", row["fid"]),
        "distance": Cell(f"{row['distance']:.3f}", row["distance"]),
        "seconds": Cell(f"{row['seconds']:.0f}", row["seconds"]),
        "training": Cell(_training(row), row["training_seconds"]),
    }
    commands = [command for command in (row["training_command"], row["command"]) if command]
    return Row(row["method"], row["nfe"], cells, commands=commands)


def _pictures(rows):
    """The first seeds of every method, the converged solution first."""
    strips, count = [], min(PICTURED, *(row["images"] for row in rows))
    for row in sorted(rows, key=lambda row: row["method"] != "Reference"):
        images = load_array(ImageSource(row["folder"]))[:count].transpose(0, 2, 3, 1)
        if row["method"] == "Reference":
            strips.append(Strip("Converged solution", f"Heun, {row['nfe']} evaluations", images, None))
        else:
            note = f"FID* {row['fid']:.2f}, distance {row['distance']:.3f}"
            strips.append(Strip(row["method"], note, images, row["method"]))
    return page.strips(NFE, strips, range(count))


def prepare_folder(out):
    """Makes an empty folder, or removes the products of an earlier demo from it, and only these."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--outdir={out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--outdir={out} exists and is not an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by tools/demo.py, which may replace its products here\n", encoding="utf-8")
    for name in ("exps", "samples"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("table.json", "index.html", "first.png", *(f"{name}.png" for name in TITLES)):
        (out / name).unlink(missing_ok=True)


GROUPS = {"What to show": "full only images", "Output": "outdir", "Speed": "amp"}


@click.command(cls=Command, groups=GROUPS)
@click.option("--outdir", type=PATH, default="demo", show_default=True, help="Replaced if it is an earlier demo")
@click.option("--full", is_flag=True, help="Both networks, all learned methods trained here, 1,000 images per method")
@click.option("--only", type=click.Choice(list(TITLES)), help="Only this network")
@click.option("--images", type=click.IntRange(2), help="Per method (default: 500, with --full 1000)")
@click.option(
    "--amp", type=click.Choice(["none", "bf16"]), default="none", show_default=True, help="Autocast of the networks"
)
def main(outdir, full, only, images, amp):
    """A first picture; then trains, samples and scores all methods on the embedded networks."""
    out = Path(outdir).resolve()
    scale = FULL if full else SHORT
    networks = (only,) if only else scale.networks
    scale = Scale(networks, images or scale.images, min(scale.reference, images or scale.reference), scale.trained)
    prepare_folder(out)
    first, started = out / "first.png", time.perf_counter()
    print("== the first picture: predictors of the repository, 3 evaluations", flush=True)
    first_picture(first)
    print(f"the same seeds by five methods: {first} ({time.perf_counter() - started:.0f} s)", flush=True)
    extra = {"amp": amp}
    done, seconds = [], {}
    for dataset_name in scale.networks:
        started = time.perf_counter()
        learned = train_all(dataset_name, scale, out, extra)
        rows = score(sample_all(dataset_name, scale, out, learned, extra), dataset_name)
        figure = out / f"{dataset_name}.png"
        draw_figure(rows, figure)
        done.append((dataset_name, rows, figure))
        seconds[dataset_name] = round(time.perf_counter() - started)
    facts = {
        "seconds": json.dumps(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": cpu_name(),
        "amp": amp,
    }
    networks = {
        dataset_name: [row | {"folder": str(row["folder"].relative_to(out))} for row in rows]
        for dataset_name, rows, _ in done
    }
    (out / "table.json").write_text(json.dumps({"networks": networks, **facts}, indent=2), encoding="utf-8")
    write_page(done, facts, first, out / "index.html")
    for dataset_name, rows, figure in done:
        print(f"\n{TITLES[dataset_name]}, {NFE} evaluations ({figure})\n\n{table_text(rows)}")
    print(f"\n{sum(seconds.values())} s in all. FID*: in the features of the network's own small classifier.")
    print(f"All on one page: {out / 'index.html'}")


if __name__ == "__main__":
    main()
