"""Inverse problems with the network ``cifar10-small``: PSNR and FID* against simple baselines.

    python -m benchmarks.inverse_problems --test=cifar10-test.zip --num=64
    python -m benchmarks.inverse_problems --num=64    # renews docs/inverse_problems.md only

Test images, which trained nothing, are observed with noise of ``NOISE``. The noise of observation k
has the seed ``FIRST_SEED`` + k, the sample of image k the seed k. FID* is that of the embedded
classifier. It is biased upwards for few images, so the originals have a row of their own. The form
with Jacobian is measured on the first ``JACOBIAN_IMAGES`` images. Rows are appended to
``benchmarks/inverse_problems.jsonl``; what is there is not measured again.
"""

from functools import partial

import click
import torch
import torch.nn.functional as F

from benchmarks.demo_settings import ROOT, Bench
from benchmarks.measuring import mean_and_error, measured, read_rows
from evaluation.image_pairs import psnr
from models.inputs import draw_noise
from models.posterior import Posterior, make_operator
from solvers import sample
from tools.make_docs import renew
from torch_utils.cli import PATH, Command
from torch_utils.images import ImageSource, evenly_spaced, from_uint8, image_grid, save_image, to_pixels, to_uint8
from torch_utils.markdown import table
from torch_utils.seeds import SeededGenerators

ROWS, PAGE = ROOT / "benchmarks" / "inverse_problems.jsonl", ROOT / "docs" / "inverse_problems.md"
NETWORK, NOISE, FIRST_SEED, JACOBIAN_IMAGES, SEEDS = "cifar10-small", 0.05, 1 << 20, 16, 4
BASELINES = {"inpaint:0.5": "zero filling", "sr:4": "bicubic"}
SOLVERS = {
    5: {"solver": "ipndm", "num_steps": 6},
    10: {"solver": "ipndm", "num_steps": 11},
    36: {"solver": "heun", "num_steps": 19},
}


class Problems:
    """The originals, their observations, and what is measured on them.

    test: folder or zip of test images.
    num: number of images, evenly spaced.
    """

    def __init__(self, test, num: int):
        self.bench = Bench(NETWORK, 1)  # its network, detector and reference statistics
        source = ImageSource(test)
        self.originals = torch.stack(
            [from_uint8(torch.tensor(source.read(index))) for index in evenly_spaced(len(source), num)]
        )

    def observe(self, operator) -> torch.Tensor:
        y = operator.forward(self.originals)
        noise = NOISE * SeededGenerators(range(FIRST_SEED, FIRST_SEED + len(y))).randn(y.shape[1:], torch.float32)
        return y + (operator.forward(noise) if y.shape == self.originals.shape else noise)  # none where pixels miss

    def restore(self, task: str, nfe: int, *, seed: int = 0, jacobian: bool = False, count: int | None = None):
        """Samples [B,C,H,W] of the posterior of the first images. seed: which of their samples."""
        operator, net = make_operator(task), self.bench.net
        y = self.observe(operator)[:count]
        latents = draw_noise(net, SeededGenerators([k + seed * len(self.originals) for k in range(len(y))]))
        x, info = sample(Posterior(net, operator, y, NOISE, jacobian), latents, return_info=True, **SOLVERS[nfe])
        assert info.nfe == nfe
        return x

    def baseline(self, task: str) -> torch.Tensor:
        """Zero filling of missing pixels, or bicubic enlargement of means."""
        y = self.observe(make_operator(task))
        if y.shape == self.originals.shape:
            return y
        return F.interpolate(y, self.originals.shape[-2:], mode="bicubic", align_corners=False)

    def score(self, images: torch.Tensor, fid: bool = True) -> dict:
        pixels, originals = (to_pixels(x).double() for x in (images, self.originals[: len(images)]))
        row = {"images": len(images)}
        if images is not self.originals:
            row["psnr"] = mean_and_error(psnr(pixels, originals))
        if fid:
            row["fid"] = self.bench.frechet(self.bench.features(images, self.bench.detector), self.bench.target)
        return row

    def rows(self):
        """(key, function that measures it) of every row."""
        yield {"task": "", "method": "originals"}, lambda: self.score(self.originals)
        for task in BASELINES:
            yield {"task": task, "method": "baseline"}, partial(lambda task: self.score(self.baseline(task)), task)
            for nfe in SOLVERS:
                one = partial(lambda task, nfe: self.score(self.restore(task, nfe)), task, nfe)
                yield {"task": task, "method": "sample", "nfe": nfe}, one
            yield {"task": task, "method": "mean", "nfe": 5}, partial(self.mean_of_seeds, task)
            for nfe in SOLVERS:
                for jacobian in (False, True):
                    key = {"task": task, "method": "jacobian" if jacobian else "without", "nfe": nfe}
                    yield key, partial(self.few, task, nfe, jacobian)

    def mean_of_seeds(self, task: str) -> dict:
        return self.score(sum(self.restore(task, 5, seed=seed) for seed in range(SEEDS)) / SEEDS)

    def few(self, task: str, nfe: int, jacobian: bool) -> dict:
        """The form with or without Jacobian, on few images; what is not finite counts as grey."""
        images = self.restore(task, nfe, jacobian=jacobian, count=JACOBIAN_IMAGES)
        return self.score(images.nan_to_num(0.0), fid=False)


def report(num: int) -> str:
    rows = [row for row in read_rows(ROWS) if row["num"] == num]

    def cells(task: str, method: str, nfe=None) -> list[str]:
        found = [r for r in rows if r["task"] == task and r["method"] == method and r.get("nfe") == nfe]
        if not found:
            return ["", ""]
        shown = "{:.1f} ± {:.1f}".format(*found[-1]["psnr"]) if "psnr" in found[-1] else ""
        return [shown, f"{found[-1]['fid']:.1f}" if "fid" in found[-1] else ""]

    header, lines = ["evaluations"], []
    for task in BASELINES:
        header += [f"`{task}`: PSNR", "FID\\*"]
    lines.append(["originals", *(cell for _ in BASELINES for cell in cells("", "originals"))])
    lines.append([" / ".join(BASELINES.values()), *(cell for task in BASELINES for cell in cells(task, "baseline"))])
    for nfe in SOLVERS:
        lines.append([str(nfe), *(cell for task in BASELINES for cell in cells(task, "sample", nfe))])
    lines.append([f"5, mean of {SEEDS} seeds", *(cell for task in BASELINES for cell in cells(task, "mean", 5))])
    few = [["evaluations", *(f"`{task}`: {form} Jacobian" for task in BASELINES for form in ("without", "with"))]]
    for nfe in SOLVERS:
        forms = [cells(task, form, nfe)[0] for task in BASELINES for form in ("without", "jacobian")]
        few.append([str(nfe), *forms])
    text = f"PSNR in dB of the two forms on the first {JACOBIAN_IMAGES} images:"
    return f"{table(header, lines)}\n\n{text}\n\n{table(few[0], few[1:])}"


def draw(problems: Problems) -> None:
    """Rows of eight images: originals; then of each task the baseline, and 5 and 36 evaluations."""
    rows = [problems.originals[:8]]
    for task in BASELINES:
        rows += [problems.baseline(task)[:8], *(problems.restore(task, nfe, count=8) for nfe in (5, 36))]
    save_image(image_grid(to_uint8(torch.cat(rows)), 8), PAGE.with_suffix(".png"))


@click.command(cls=Command)
@click.option("--test", type=PATH, help="Test images of the data set: measures what is missing, draws the picture")
@click.option("--num", type=click.IntRange(JACOBIAN_IMAGES), default=64, show_default=True, help="Number of images")
@torch.no_grad()
def main(test, num):
    """Measures what is missing, and renews the tables of docs/inverse_problems.md."""
    if test is not None:
        problems = Problems(test, num)
        for key, measure in problems.rows():
            measured(ROWS, {**key, "num": num}, measure)
        draw(problems)
    renew(PAGE, {"inverse problems": lambda: report(num)}, check=False)


if __name__ == "__main__":
    main()
