"""Search along the path against best-of-N with equal evaluations, for a wanted digit.

    python -m benchmarks.path_search --num=64    # measures, and renews docs/path_search.md

The network ``digits`` knows no classes. The verifier is log p(digit) of the embedded classifier;
image of seed k shall be the digit k mod 10. The judge, which chooses nothing, is a classifier of
another architecture and seed (benchmarks/judges). Rows are appended to
``benchmarks/path_search.jsonl``; what is there is not measured again.
"""

from itertools import count
from pathlib import Path

import click
import torch

from benchmarks.demo_settings import ROOT
from benchmarks.measuring import mean_and_error, measured, read_rows
from evaluation.detectors import EMBEDDED, PRETRAINED, load_classifier
from models import create_model
from models.inputs import draw_noise
from solvers import get_schedule, make_solver, sample
from solvers.particle_search import PathSearch, search_path
from solvers.recommended import recommend
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.images import image_grid, save_image, to_pixels, to_uint8
from torch_utils.markdown import table
from torch_utils.seeds import SeededGenerators, candidate_seed

ROWS, PAGE = ROOT / "benchmarks" / "path_search.jsonl", ROOT / "docs" / "path_search.md"
BUDGET, STEPS, FIRST = 60, 10, 8
PLAIN_NFE = 6  # evaluations of one image of best-of-N
METHODS = {
    "one image": "one image, 6 evaluations",
    "best of N": "best of 10, 6 evaluations each",
    "quota": "quota, 8 starting noises",
    "rollover": "rollover, 8 starting noises",
    "resample": "resample, 4 particles",
}


def log_probability(classifier, images: torch.Tensor, digit: int) -> torch.Tensor:
    """log p(digit) [B] of images [B,C,H,W] in [-1, 1], as their 8-bit pixels."""
    return classifier(to_pixels(images).float() / 255).double().log_softmax(1)[:, digit]


@torch.no_grad()
def make_image(net, verifier, method: str, seed: int) -> tuple[torch.Tensor, int]:
    """(image [1,C,H,W], evaluations) of a seed."""
    digit = seed % 10
    if method in ("one image", "best of N"):
        candidates = BUDGET // PLAIN_NFE if method == "best of N" else 1
        noise = draw_noise(net, SeededGenerators([candidate_seed(seed, k) for k in range(candidates)]))
        images, info = sample(net, noise, return_info=True, **recommend(net, PLAIN_NFE).settings)
        best = int(log_probability(verifier, images, digit).argmax())
        return images[best : best + 1], candidates * info.nfe
    numbers = count()

    def draw() -> torch.Tensor:
        return draw_noise(net, SeededGenerators([candidate_seed(seed, next(numbers))]))

    latents = [draw() for _ in range(4 if method == "resample" else FIRST)]
    sigmas = get_schedule(STEPS + 1, net.sigma_min, net.sigma_max, "polynomial", 7)
    uniform = torch.Generator().manual_seed(seed)

    def reward(image: torch.Tensor) -> float:
        return float(log_probability(verifier, image, digit))

    search = PathSearch(net, reward, draw, sigmas, finish=make_solver("euler"))
    found = search_path(search, latents, BUDGET, method, uniform=lambda: float(torch.rand((), generator=uniform)))
    return found.x, found.nfe


def measure(net, verifier, judge, method: str, num: int) -> dict:
    made = [make_image(net, verifier, method, seed) for seed in range(num)]
    verified, judged, right = [], [], []
    for seed, (image, _) in enumerate(made):
        verified.append(float(log_probability(verifier, image, seed % 10)))
        logits = judge(to_pixels(image).float() / 255).double().log_softmax(1)[0]
        judged.append(float(logits[seed % 10]))
        right.append(float(logits.argmax() == seed % 10))
    scores = {"verifier": verified, "judge": judged, "right": right}
    nfe = [spent for _, spent in made]
    return {name: mean_and_error(values) for name, values in scores.items()} | {"nfe": [min(nfe), max(nfe)]}


def report(num: int) -> str:
    rows = {row["method"]: row for row in read_rows(ROWS) if row["num"] == num}
    lines = []
    for method, name in METHODS.items():
        if (row := rows.get(method)) is not None:
            low, high = row["nfe"]
            (ours, width), (judged, error), (right, half) = (row[kind] for kind in ("verifier", "judge", "right"))
            evaluations = str(low) if low == high else f"{low}-{high}"
            scores = [f"{ours:.2f} ± {width:.2f}", f"{judged:.2f} ± {error:.2f}", f"{right:.0%} ± {half:.0%}"]
            lines.append([name, evaluations, *scores])
    header = ["method", "evaluations", "verifier: log p", "judge: log p", "judge: the wanted digit"]
    return table(header, lines)


@click.command(cls=Command)
@click.option("--num", type=click.IntRange(2), default=64, show_default=True, help="Seeds 0 to num - 1")
@click.option("--picture", is_flag=True, help="Also draw docs/path_search.png, ten seeds of each method")
@torch.no_grad()
def main(num, picture):
    """Measures what is missing, and renews the table of docs/path_search.md."""
    net = create_model("digits")
    folders = (PRETRAINED / EMBEDDED["digits"], Path(__file__).parent / "judges" / "digits.safetensors")
    verifier, judge = (load_classifier(path)[0] for path in folders)
    for method in METHODS:
        measured(ROWS, {"method": method, "num": num}, lambda method=method: measure(net, verifier, judge, method, num))
    renew(PAGE, {"path search": lambda: report(num)}, check=False)
    if picture:
        rows = [torch.cat([make_image(net, verifier, method, seed)[0] for seed in range(10)]) for method in METHODS]
        save_image(image_grid(to_uint8(torch.cat(rows)), 10), PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
