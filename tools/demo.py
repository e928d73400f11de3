"""A first picture in a minute; then the whole pipeline: train, sample, FID, page.

    python -m tools.demo            # or ./launch.sh demo: about 5 minutes on 2 CPU cores
    python -m tools.demo --full     # both networks, every learned method trained here, 1,000 images
    python -m tools.demo --only=digits --images=100 --outdir=demo-digits

The first picture needs no training: the same seeds by plain solvers and by shipped predictors, with
three evaluations each. Then all methods are compared on natural images (and, with --full, on
digits) with five evaluations, as compare.py does it: Fréchet distance, and distance to the
converged solution from the same noise. Solvers have their recommended settings
(solvers/recommended.py). Predictors are trained by train.py or, without --full, partly taken from
the repository.

Writes first.png, index.html and, for each network, a folder with the results of the comparison to
--outdir.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.demo")

import html
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
from models import create_model
from models.inputs import draw_noise
from sampling.settings import ComputeOptions, NetworkSettings, Settings, settings_of
from sampling.text import TextOptions
from solvers import recommended, sample
from tools import page, report
from tools.compare_options import CompareOptions
from tools.compare_run import compute, prepare
from torch_utils.cli import PATH, Command
from torch_utils.distributed import pick_device
from torch_utils.errors import UserError
from torch_utils.files import write_text
from torch_utils.images import save_image, to_uint8
from torch_utils.seeds import SeededGenerators
from torch_utils.version import code_version, cpu_name
from training.checkpoint import find_predictor, load_predictor

ROOT = Path(__file__).resolve().parent.parent
NFE = 5  # of the table; settings were chosen on seeds 100000-100255, which it never uses
PLAIN = ("euler", "dpm", "dpmpp", "unipc", "ipndm")
LEARNED = {"AMED-Solver": "amed", "AMED-Plugin (iPNDM)": "ipndm", "Span solver": "span"}  # --sampler_stu
SHIPPED = {"amed": "amed", "ipndm": "plugin", "span": "span"}  # the same in the names of predictors
TITLES = {"cifar10-small": "Natural images", "digits": "Handwritten digits"}
REFERENCE_STEPS, REFERENCE_SEEDS = 50, 256  # of the converged solution, by Heun's method
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
    jobs["Converged"] = {"solver": "heun", "num_steps": REFERENCE_STEPS + 1}
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


def compare(dataset_name, scale, out, learned, amp, device):
    """Compares the plain solvers and the predictors; as compare.py, (comparison, jobs)."""
    options = CompareOptions(
        network=NetworkSettings(dataset_name=dataset_name),
        solvers=",".join(PLAIN),
        nfe=str(NFE),
        predictor_path=",".join(str(place) for place, _, _ in learned.values()),
        num=scale.images,
        num_reference=scale.reference,
        reference_steps=REFERENCE_STEPS,
        text=TextOptions(),
        compute=ComputeOptions(amp=amp),
        outdir=str(out / dataset_name),
    )
    comparison, jobs = prepare(options, device)
    compute(comparison, jobs)
    return comparison, jobs


FIRST = """<p>Each column starts from the same noise, and each image took THREE evaluations of the network; those of the
last row took a hundred. The last row is what the network would draw with unlimited time, so a good method looks like it.
Euler and iPNDM are solvers without training. The AMED-Plugin and the span solver were trained for one to two minutes;
the predictors of this picture came with the repository.</p>
"""
EXPLANATION = """<p>What to look for: blur and washed-out colours (too few evaluations for the solver), wrong shapes
(the method left the path of the exact solution). The FID is in the features of a small classifier of the network's own,
so it cannot be compared with FIDs from the Inception network.</p>
"""


def part_of_page(comparison, jobs, learned, explanation):
    """The part of the page about one network, as HTML."""
    rows = [comparison.row(job) for job in jobs]
    name, count = comparison.options.network.dataset_name, comparison.protocol.num
    trained = "".join(
        f"<p>Trained here in {seconds:.0f} s: {html.escape(method)}</p>{page.command(command)}"
        for method, (_, seconds, command) in learned.items()
        if command is not None
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.make_notes(comparison, rows))
    return (
        f"<h2>{html.escape(TITLES[name])}, {NFE} evaluations</h2>\n"
        f"<p>The network <code>{name}</code>; the same {count} seeds for every method.</p>{explanation}"
        f"{page.results(report.table_html(rows), report.pictures_html(comparison, jobs, rows))}"
        f"{trained}<h3>What the numbers mean</h3><ul>{notes}</ul>"
    )


def prepare_folder(out):
    """Makes an empty folder, or removes the products of an earlier demo from it, and only these."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--outdir={out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--outdir={out} exists and is not an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by tools/demo.py, which may replace its products here\n", encoding="utf-8")
    for name in ("exps", *TITLES):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("index.html", "first.png"):
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
    introduction = FIRST.replace("THREE", {3: "three"}.get(FIRST_NFE, str(FIRST_NFE)))
    parts, device = [introduction, page.picture(first.read_bytes(), "the same seeds by five methods")], pick_device()
    for dataset_name in scale.networks:
        learned = train_all(dataset_name, scale, out, {"amp": amp})
        print(f"\n== {dataset_name}: comparing {len(PLAIN)} solvers and {len(learned)} predictors", flush=True)
        comparison, jobs = compare(dataset_name, scale, out, learned, amp, device)
        text = report.write_report(comparison, jobs, "tools.demo")
        print("\n" + text.partition("\n\n* ")[0], flush=True)
        parts.append(part_of_page(comparison, jobs, learned, EXPLANATION if len(parts) == 2 else ""))
    facts = {
        "seconds": f"{time.perf_counter() - started:.0f}",
        "date": time.strftime("%Y-%m-%d"),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": cpu_name(),
        "amp": amp,
    }
    about = f"<h2>About</h2>{page.facts(facts)}"
    write_text(out / "index.html", page.page("Sampling in a few network evaluations", *parts, about))
    print(f"{facts['seconds']} s in all. All on one page: {out / 'index.html'}")


if __name__ == "__main__":
    main()
