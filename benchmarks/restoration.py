r"""Restoration networks of one's own: PSNR, SSIM and distance with a few evaluations.

One network per data set restores three degradations of 32x32 images (``DEGRADATIONS``). For digits:

    python -m benchmarks.restoration --part=prepare --data=digits \
        --train=mnist-train.zip --test=mnist-test.zip
    python -m tools.train_denoiser --data=runs/restoration/digits/train/clean.zip \
        --condition=runs/restoration/digits/train/degraded.zip \
        --outdir=runs/restoration/digits/net --total_kimg=100 --amp=bf16 --compile=True --snap=0 \
        --ema_kimg=5 --warmup_kimg=2
    python -m benchmarks.restoration --part=measure --data=digits
    python -m benchmarks.restoration    # the tables of docs/restoration.md only

The same with --data=natural and CIFAR-10. The part ``measure`` trains AMED-Solver and the span
solver on the network (``LEARNED``), unless they are in --work. Rows are appended to
``benchmarks/restoration.jsonl``; what is there is not measured again.
"""

import io
import time
import zipfile
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from PIL import Image

import train
from benchmarks.demo_settings import REFERENCE, ROOT
from benchmarks.measuring import mean_and_error, measured, network_of, read_rows
from evaluation.image_pairs import psnr, ssim
from models import create_model
from models.inputs import draw_noise
from sampling.settings import Settings, open_predictor
from solvers import sample
from tools.make_docs import renew
from torch_utils.cli import PATH, Command
from torch_utils.files import atomic_path
from torch_utils.images import (
    ImageSource,
    evenly_spaced,
    from_uint8,
    image_grid,
    load_array,
    save_image,
    to_pixels,
    to_uint8,
)
from torch_utils.markdown import table
from torch_utils.seeds import SeededGenerators
from training.checkpoint import find_predictor

ROWS, PAGE = ROOT / "benchmarks" / "restoration.jsonl", ROOT / "docs" / "restoration.md"
NOISE, HOLE, FACTOR = 0.5, 14, 4
TRAINING_IMAGES, TEST_IMAGES = 5_000, 128
CHANNELS = {"digits": 1, "natural": 3}
EVALUATIONS = (3, 5, 10)
LEARNED_AT = (3,)  # evaluations
LEARNED = {  # short trainings, as in benchmarks/learned_solvers.py
    "AMED-Solver": ["--sampler_stu=amed", "--total_kimg=1", "--batch=16"],
    "span solver with heads": ["--sampler_stu=span", "--total_kimg=0.72", "--batch=8", "--pairs=384", "--val_pairs=64"],
}
BATCH = 128
MR = {"solver": "dpm_v3", "statistics": "data", "corrector": "off", "max_order": 2, "lower_order_final": False}
SOLVERS = {
    "Euler = MR sampler, ODE, order 1": {"solver": "euler"},
    "MR sampler, ODE, order 2": {**MR, "schedule_type": "logsnr"},
    "MR sampler, SDE, order 1": {"solver": "sde", "max_order": 1, "lower_order_final": False},
    "MR sampler, SDE, order 2": {"solver": "sde", "max_order": 2, "lower_order_final": False},
}
ONE = "one evaluation, D at the highest noise"


def denoise(image, generator):
    """Gaussian noise."""
    return image + NOISE * torch.randn(image.shape, generator=generator)


def inpaint(image, generator):
    """A grey square at a random place."""
    top, left = (int(torch.randint(size - HOLE + 1, (), generator=generator)) for size in image.shape[1:])
    image = image.clone()
    image[:, top : top + HOLE, left : left + HOLE] = 0
    return image


def enlarge(image, generator):
    """Means over blocks of pixels, enlarged again by bicubic interpolation."""
    size = image.shape[1:]
    return F.interpolate(F.avg_pool2d(image[None], FACTOR), size, mode="bicubic", align_corners=False)[0]


DEGRADATIONS = {"denoise": denoise, "inpaint": inpaint, "enlarge": enlarge}


def write_pairs(source: ImageSource, channels: int, count: int, folder: Path, seed: int) -> None:
    """Writes ``clean.zip`` and ``degraded.zip``: every image once per degradation, in its folder.

    source: 32x32 images.
    channels: of the images.
    count: how many of them, evenly spaced.
    seed: of the degradations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source.expect(channels)
    with (
        atomic_path(folder / "clean.zip") as clean_path,
        atomic_path(folder / "degraded.zip") as degraded_path,
        zipfile.ZipFile(clean_path, "w") as clean,
        zipfile.ZipFile(degraded_path, "w") as degraded,
    ):
        for number, index in enumerate(evenly_spaced(len(source), count)):
            image = from_uint8(torch.tensor(source.read(index)))
            generator = torch.Generator().manual_seed(seed + number)
            for name, degrade in DEGRADATIONS.items():
                for archive, made in ((clean, image), (degraded, degrade(image, generator))):
                    buffer = io.BytesIO()
                    pixels = to_uint8(made[None])[0].squeeze(-1) if channels == 1 else to_uint8(made[None])[0]
                    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
                    archive.writestr(f"{name}/{number:05d}.png", buffer.getvalue())


class Restoration:
    """The test images of each degradation, restored by the network in ``work``."""

    def __init__(self, work: Path):
        self.work, self.path = work, network_of(work / "net")
        self.net = create_model("custom", self.path).to(memory_format=torch.channels_last)
        sources = [ImageSource(work / "test" / name) for name in ("clean.zip", "degraded.zip")]
        self.tasks = [name.split("/")[0] for name in sources[0].names]
        self.clean, self.mu = (from_uint8(load_array(source)) for source in sources)
        self.noise = draw_noise(self.net, SeededGenerators(range(len(self.mu))))
        self.converged = None

    def restore(self, rows=None, **settings) -> tuple[torch.Tensor, int]:
        """(images, evaluations). rows: of the images. Default all."""
        parts, info = [], None
        for part in torch.tensor(range(len(self.mu)) if rows is None else rows).split(BATCH):
            cond = self.net.make_cond(images=self.mu[part])
            x, info = sample(self.net, self.noise[part], cond=cond, return_info=True, **settings)
            parts.append(x)
        return torch.cat(parts), info.nfe

    def score(self, images: torch.Tensor) -> dict:
        """{degradation: {measure: (mean, half width of the 95 % interval)}}.

        The measure "distance" is the root mean square distance to the converged restoration.
        """
        if self.converged is None:
            self.converged, _ = self.restore(**REFERENCE)
        pixels, clean = (to_pixels(x).double() for x in (images, self.clean))
        apart = (images - self.converged).square().mean(dim=(1, 2, 3)).sqrt()
        values = {"psnr": psnr(pixels, clean), "ssim": ssim(pixels, clean), "distance": apart}
        rows = {name: [k for k, task in enumerate(self.tasks) if task == name] for name in DEGRADATIONS}
        return {name: {kind: mean_and_error(v[rows[name]]) for kind, v in values.items()} for name in rows}

    def learned(self, name: str, nfe: int) -> tuple[torch.Tensor, int, dict]:
        """(images, evaluations, facts of the training) of a trained solver."""
        folder = self.work / f"{name}-{nfe}".replace(" ", "_")
        given = [*LEARNED[name], f"--nfe={nfe}", "--dataset_name=custom", f"--model_path={self.path}"]
        given += [f"--images={self.work / 'train' / 'degraded.zip'}", "--seed=0", "--device=cpu"]
        seconds = time.process_time()
        if not folder.exists():
            with torch.enable_grad():
                train.main([*given, f"--outdir={folder}", "--nosubdir"], standalone_mode=False)
        seconds = time.process_time() - seconds
        settings, predictor, _ = open_predictor(find_predictor(folder), Settings(), frozenset())
        x, spent = self.restore(predictor=predictor, **settings.arguments())
        return x, spent, {"command": "python train.py " + " ".join(given), "training_seconds": round(seconds, 1)}

    def jobs(self):
        """(method, evaluations, function that returns images, evaluations and further entries)."""
        yield "degraded", 0, lambda: (self.mu, 0)
        yield ONE, 1, partial(self.restore, solver="euler", num_steps=2)
        for method, settings in SOLVERS.items():
            for nfe in EVALUATIONS:
                yield method, nfe, partial(self.restore, **settings, num_steps=nfe + 1)
        for name in LEARNED:
            for nfe in LEARNED_AT:
                yield name, nfe, partial(self.learned, name, nfe)


def report(data: str) -> str:
    rows = {(row["method"], row["nfe"]): row for row in read_rows(ROWS) if row["data"] == data}
    lines = []
    for (method, nfe), row in rows.items():
        cells = []
        for name in DEGRADATIONS:
            (value, error), (similarity, _), (apart, _) = (
                row["scores"][name][kind] for kind in ("psnr", "ssim", "distance")
            )
            own = "-" if "SDE" in method else f"{apart:.3f}"  # its noise leads to other images
            cells.append(f"{value:.1f} ± {error:.1f} / {similarity:.3f} / {own}")
        lines.append([method, str(nfe or ""), *cells])
    return table(["method", "evaluations", *DEGRADATIONS], lines)


def document_parts():
    measured = sorted({row["data"] for row in read_rows(ROWS)})
    return {f"restoration of {data}": partial(report, data) for data in measured}


def draw(bench: Restoration, path: Path) -> None:
    """Rows: originals, degraded images, Euler's method with 1, 3, 10 evaluations, span with 3."""
    columns = range(2, TEST_IMAGES, TEST_IMAGES // 5)[:5]
    rows = [bench.tasks.index(name) + k for name in DEGRADATIONS for k in columns]
    restored = [bench.restore(rows, solver="euler", num_steps=nfe + 1)[0] for nfe in (1, 3, 10)]
    span = bench.learned("span solver with heads", 3)[0][rows]
    grid = image_grid(to_uint8(torch.cat([bench.clean[rows], bench.mu[rows], *restored, span])), len(rows))
    save_image(grid.repeat(2, 0).repeat(2, 1), path)


@click.command(cls=Command)
@click.option("--part", type=click.Choice(["prepare", "measure", "report"]), default="report", show_default=True)
@click.option("--data", type=click.Choice(list(CHANNELS)), default="digits", show_default=True)
@click.option("--work", type=PATH, default="runs/restoration", show_default=True, help="Folder of pairs and networks")
@click.option("--train", "train_path", type=PATH, help="prepare: training images, 32x32")
@click.option("--test", "test_path", type=PATH, help="prepare: test images")
@torch.no_grad()
def main(part, data, work, train_path, test_path):
    """Prepares pairs of images, measures a network, renews the tables of docs/restoration.md."""
    work = Path(work) / data
    if part == "prepare":
        write_pairs(ImageSource(train_path), CHANNELS[data], TRAINING_IMAGES, work / "train", 0)
        write_pairs(ImageSource(test_path), CHANNELS[data], TEST_IMAGES, work / "test", 1 << 20)
        return
    if part == "measure":
        bench = Restoration(work)
        network = bench.net.weights_hash[:16]
        for method, nfe, restore in bench.jobs():

            def measure(nfe=nfe, restore=restore):
                images, spent, *facts = restore()
                assert spent == nfe, (spent, nfe)
                return {"images": TEST_IMAGES, **dict(*facts), "scores": bench.score(images)}

            measured(ROWS, {"data": data, "method": method, "nfe": nfe, "network": network}, measure)
        draw(bench, PAGE.with_name(f"restoration_{data}.png"))
    renew(PAGE, document_parts(), check=False)


if __name__ == "__main__":
    main()
