"""The predictors that come with the repository: trains, measures and writes them all.

    python -m benchmarks.make_predictors                                  # 40 minutes, one CPU core
    python -m benchmarks.make_predictors --only=digits-span-3 --work=DIR  # some of them

Trains the recipes of ``models/recommended`` with train.py, at 3, 4, 5 and 6 evaluations, scores
each result on 1,000 images (seeds 0-999), and writes it to ``models/predictors``. Its provenance
holds the command, the seed, the date, the machine and the scores. A predictor that is there already
is not made again; delete its file to replace it.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks import ROOT
from benchmarks.demo_settings import Bench
from benchmarks.measuring import describe_machine
from evaluation.detectors import EMBEDDED
from models.zoo import PREDICTORS
from sampling.settings import Settings, settings_of
from torch_utils.cli import PATH, Command
from torch_utils.errors import UserError
from training.checkpoint import find_predictor, load_predictor, save_predictor
from training.flags import with_recipe
from training.options import AMEDOptions, SpanOptions

STUDENTS = {"amed": "amed", "plugin": "ipndm", "span": "span"}
EVALUATIONS = (3, 4, 5, 6)
IMAGES, NEAR = 1000, 256  # images scored; those compared with the converged solution


def train(command: list[str], more: list[str], work: Path) -> Path:
    """Runs train.py unless ``work`` holds its result already; the predictor's file."""
    mark = work / "finished"  # an interrupted training leaves a predictor as well
    if not mark.exists():
        shutil.rmtree(work, ignore_errors=True)
        done = subprocess.run([sys.executable, *command, *more, f"--outdir={work}", "--nosubdir"], cwd=ROOT)
        if done.returncode:
            raise UserError(f"this training failed: python {' '.join(command)}")
        mark.touch()
    return find_predictor(work)


@click.command(cls=Command)
@click.option("--work", type=PATH, default="exps/shipped", show_default=True, help="Folder of the training runs")
@click.option("--only", help="Names, separated by commas (default: all)")
def main(work, only):
    """Train, score and write the predictors that come with the repository."""
    names = {f"{d}-{kind}-{nfe}": (d, kind, nfe) for nfe in EVALUATIONS for d in EMBEDDED for kind in STUDENTS}
    chosen = only.split(",") if only else list(names)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"--only={unknown[0]}: choose from {', '.join(names)}")
    benches = {}
    for name in chosen:
        dataset_name, kind, nfe = names[name]
        path = PREDICTORS / f"{name}.safetensors"
        if path.exists():
            continue
        asked = {"dataset_name": dataset_name, "sampler_stu": STUDENTS[kind], "seed": 0}
        recipe = with_recipe(SpanOptions if kind == "span" else AMEDOptions, asked, nfe)
        command = ["train.py", *(f"--{key}={value}" for key, value in recipe.items())]
        print(f"== {name}: python {' '.join(command)}", flush=True)
        folder = Path(work).resolve()
        # The teacher's samples depend on the seed alone: all span solvers of a network share them.
        shared = [f"--teacher_set={folder / f'{dataset_name}-pairs.safetensors'}"] if kind == "span" else []
        predictor = load_predictor(train(command, shared, folder / name))
        if dataset_name not in benches:
            benches[dataset_name] = Bench(dataset_name, IMAGES, first=0, num_reference=NEAR)
        bench = benches[dataset_name]
        started = time.perf_counter()
        settings = settings_of(predictor, Settings(dataset_name=dataset_name))
        x, spent = bench.solve(predictor=predictor, **settings.arguments())
        if spent != nfe:
            raise RuntimeError(f"{name} spent {spent} evaluations instead of {nfe}")
        figures = {
            **{"name": name, "nfe": nfe, "command": f"python {' '.join(command)}", **bench.score(x)},
            **{"seeds": f"0-{IMAGES - 1}", "distance_seeds": f"0-{NEAR - 1}", "date": time.strftime("%Y-%m-%d")},
            "machine": describe_machine(),
            "sampling_seconds": round(time.perf_counter() - started, 1),
        }
        path.parent.mkdir(exist_ok=True)
        save_predictor(predictor, path, {**predictor.provenance, "shipped": figures})
        print(f"wrote {path}: {figures}", flush=True)


if __name__ == "__main__":
    main()
