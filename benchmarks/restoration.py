r"""A restoration network of one's own on digits: PSNR and SSIM with a few evaluations.

One network restores three degradations of 32x32 images (``DEGRADATIONS``).

    python -m benchmarks.restoration --part=prepare --train=mnist-train.zip --test=mnist-test.zip
    python -m tools.train_denoiser --data=runs/restoration/train/clean.zip \
        --condition=runs/restoration/train/degraded.zip --outdir=runs/restoration/net --minutes=20 \
        --batch=64 --amp=bf16 --snap=0 --ema_kimg=5 --warmup_kimg=2
    python train.py --dataset_name=custom --images=runs/restoration/train/degraded.zip \
        --model_path=runs/restoration/net/NETWORK.safetensors --sampler_stu=amed --nfe=5
    python -m benchmarks.restoration --part=measure \
        --model=runs/restoration/net/NETWORK.safetensors --predictors=AMED-Solver=FILE.safetensors
    python -m benchmarks.restoration    # the table of docs/restoration.md only

--predictors adds trained predictors to the part ``measure``. Rows are appended to
``benchmarks/restoration.jsonl``; what is there is not measured again.
"""

import io
import zipfile
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.demo_settings import ROOT
from benchmarks.measuring import mean_and_error, measured, read_rows, table
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
from torch_utils.seeds import SeededGenerators

ROWS, PAGE = ROOT / "benchmarks" / "restoration.jsonl", ROOT / "docs" / "restoration.md"
NOISE, HOLE, FACTOR = 0.5, 14, 4
TRAINING_IMAGES, TEST_IMAGES, MEASURED = 5_000, 128, 32
EVALUATIONS = (3, 5, 10)
MR = {"solver": "dpm_v3", "statistics": "data", "corrector": "off", "max_order": 2, "lower_order_final": False}
SOLVERS = {
    "Euler = MR sampler, ODE, order 1": {"solver": "euler"},
    "MR sampler, ODE, order 2": {**MR, "schedule_type": "logsnr"},
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


def write_pairs(source: ImageSource, count: int, folder: Path, seed: int) -> None:
    """Writes ``clean.zip`` and ``degraded.zip``: every image once per degradation, in its folder.

    source: 32x32 grey images.
    count: how many of them, evenly spaced.
    seed: of the degradations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source.expect(1)
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
                    Image.fromarray(to_uint8(made[None])[0, :, :, 0]).save(buffer, format="PNG", compress_level=1)
                    archive.writestr(f"{name}/{number:05d}.png", buffer.getvalue())


class Restoration:
    """``MEASURED`` test images of each degradation, evenly spaced, restored by a network."""

    def __init__(self, work: Path, model: str):
        self.net = create_model("custom", model)
        sources = [ImageSource(work / "test" / name) for name in ("clean.zip", "degraded.zip")]
        names = sources[0].names
        step = TEST_IMAGES // MEASURED
        rows = [k for k, name in enumerate(names) if int(Path(name).stem) % step == 0]
        self.tasks = [names[k].split("/")[0] for k in rows]
        self.clean, self.mu = (from_uint8(load_array(source)[rows]) for source in sources)
        self.noise = draw_noise(self.net, SeededGenerators(range(len(rows))))

    def restore(self, rows=slice(None), **settings) -> tuple[torch.Tensor, int]:
        """(images, evaluations). rows: of the images. Default all."""
        cond = self.net.make_cond(images=self.mu[rows])
        x, info = sample(self.net, self.noise[rows], cond=cond, return_info=True, **settings)
        return x, info.nfe

    def score(self, images: torch.Tensor) -> dict:
        """{degradation: {measure: (mean, half width of the 95 % interval)}}."""
        pixels, clean = (to_pixels(x).double() for x in (images, self.clean))
        values = {"psnr": psnr(pixels, clean), "ssim": ssim(pixels, clean)}
        rows = {name: [k for k, task in enumerate(self.tasks) if task == name] for name in DEGRADATIONS}
        return {name: {kind: mean_and_error(v[rows[name]]) for kind, v in values.items()} for name in rows}

    def jobs(self, predictors: dict[str, str]):
        """(method, evaluations, function that returns images and evaluations)."""
        yield "degraded", 0, lambda: (self.mu, 0)
        yield ONE, 1, lambda: self.restore(solver="euler", num_steps=2)
        for method, settings in SOLVERS.items():
            for nfe in EVALUATIONS:
                yield method, nfe, lambda settings=settings, nfe=nfe: self.restore(**settings, num_steps=nfe + 1)
        for name, path in predictors.items():
            settings, predictor, _ = open_predictor(path, Settings(), frozenset())
            arguments = {"predictor": predictor, **settings.arguments()}
            yield name, settings.evaluations(self.net, predictor), lambda given=arguments: self.restore(**given)


def report() -> str:
    rows = {(row["method"], row["nfe"]): row for row in read_rows(ROWS)}
    lines = []
    for (method, nfe), row in rows.items():
        cells = []
        for name in DEGRADATIONS:
            (value, error), (similarity, _) = (row["scores"][name][kind] for kind in ("psnr", "ssim"))
            cells.append(f"{value:.1f} ± {error:.1f} / {similarity:.3f}")
        lines.append([method, str(nfe or ""), *cells])
    return table(["method", "evaluations", *DEGRADATIONS], lines)


def draw(bench: Restoration) -> None:
    """Rows: originals, degraded images, and Euler's method with 1, 3 and 10 evaluations."""
    columns = range(2, MEASURED, MEASURED // 5)
    rows = [bench.tasks.index(name) + k for name in DEGRADATIONS for k in columns]
    restored = [bench.restore(rows, solver="euler", num_steps=nfe + 1)[0] for nfe in (1, 3, 10)]
    grid = image_grid(to_uint8(torch.cat([bench.clean[rows], bench.mu[rows], *restored])), len(rows))
    save_image(grid.repeat(2, 0).repeat(2, 1), PAGE.with_suffix(".png"))


@click.command(cls=Command)
@click.option("--part", type=click.Choice(["prepare", "measure", "report"]), default="report", show_default=True)
@click.option("--work", type=PATH, default="runs/restoration", show_default=True, help="Folder of the image pairs")
@click.option("--train", "train_path", type=PATH, help="prepare: training images, 32x32")
@click.option("--test", "test_path", type=PATH, help="prepare: test images")
@click.option("--model", type=PATH, help="measure: the network")
@click.option("--predictors", default="", help="measure: NAME=FILE,... of trained predictors")
@torch.no_grad()
def main(part, work, train_path, test_path, model, predictors):
    """Prepares pairs of images, measures a network, and renews the table of docs/restoration.md."""
    work = Path(work)
    if part == "prepare":
        write_pairs(ImageSource(train_path), TRAINING_IMAGES, work / "train", 0)
        write_pairs(ImageSource(test_path), TEST_IMAGES, work / "test", 1 << 20)
        return
    if part == "measure":
        bench = Restoration(work, model)
        network = bench.net.weights_hash[:16]
        named = dict(item.split("=", 1) for item in predictors.split(",") if item)
        for method, nfe, restore in bench.jobs(named):

            def measure(nfe=nfe, restore=restore):
                images, spent = restore()
                assert spent == nfe, (spent, nfe)
                return {"images": MEASURED, "scores": bench.score(images)}

            measured(ROWS, {"method": method, "nfe": nfe, "network": network}, measure)
        draw(bench)
    renew(PAGE, {"restoration": report}, check=False)


if __name__ == "__main__":
    main()
