"""Draws the figures of docs/watching.md, docs/measuring.md and docs/diffusers.md.

    python -m tools.draw_pages
    python -m tools.draw_pages --only=measuring

They are measured and sampled anew with the digits network, which takes some minutes on a CPU. Needs
matplotlib, tensorboard and diffusers (extras "plot", "tensorboard", "diffusers").
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import click
import numpy as np
import torch
from PIL import Image

from evaluation.fid import METRICS, StreamedFID
from models import create_model
from models.diffusers import import_diffusers, noise_process
from models.inputs import draw_inputs
from solvers import sample
from torch_utils.cli import Command
from torch_utils.images import image_grid, save_image, to_pixels, to_uint8
from torch_utils.plots import new_figure
from training.amed_trainer import train_predictor
from training.checkpoint import find_predictor, load_predictor

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORK, LEVELS = "digits", (3, 4, 5, 6)
IMAGES, REFERENCE_STEPS = 300, 10  # of docs/measuring.png
COLOURS = ("#b36b00", "#0b6e99")


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path, flush=True)


def finished(axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_watching(path: Path) -> None:
    """A short training with --tensorboard, as its event file has it."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES as PICTURES
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"dataset_name": NETWORK, "num_steps": 4, "batch": 8, "total_kimg": 0.192, "tick": 0.008, "seed": 0}
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train_predictor({**options, "snap": 8, "tensorboard": True, "outdir": folder}, run_dir=run)
        events = EventAccumulator(str(run), size_guidance={PICTURES: 0}).Reload()
        figure = new_figure("a figure", figsize=(10, 3.2))
        axes = figure.subplots(1, 4, width_ratios=(1.3, 1.3, 1, 1))
        for place, name in zip(axes, ("loss", "r"), strict=False):
            for k in range(options["num_steps"] - 1):
                curve = events.Scalars(f"{name}/{k}")
                place.plot([e.step for e in curve], [e.value for e in curve], label=f"{name}/{k}", lw=1.6)
            place.legend(fontsize=8, frameon=False)
            finished(place, name, "samples")
        axes[0].set_yscale("log")
        shown = events.Images("samples")
        for place, event in zip(axes[2:], (shown[0], shown[-1]), strict=True):
            place.imshow(np.array(Image.open(io.BytesIO(event.encoded_image_string))), cmap="gray")
            place.set_title(f"samples, step {event.step}", fontsize=10)
            place.axis("off")
        figure.tight_layout()
        save(figure, path)


def generate(net, solver: str, nfe: int):
    """(seeds, pixels) of batches of images by a solver, or by the included span solver."""
    predictor = load_predictor(find_predictor(f"{NETWORK}-span-{nfe}")) if solver == "span" else None
    for first in range(0, IMAGES, 100):
        seeds = range(first, first + 100)
        latents, cond = draw_inputs(net, seeds)
        own = {"predictor": predictor, "solver": "span"} if predictor else {"solver": solver, "num_steps": nfe + 1}
        yield seeds, to_pixels(sample(net, latents, cond=cond, **own))


def draw_measuring(path: Path) -> None:
    """All measures of two solvers against images by Heun's method from other seeds."""
    net, found = create_model(NETWORK), {}
    with TemporaryDirectory() as folder:
        for first in range(0, IMAGES, 100):
            seeds = range(IMAGES + first, IMAGES + first + 100)
            latents, cond = draw_inputs(net, seeds)
            images = to_uint8(sample(net, latents, solver="heun", num_steps=REFERENCE_STEPS, cond=cond))
            for seed, image in zip(seeds, images, strict=True):
                save_image(image, Path(folder) / f"{seed:06d}.png")
        for solver in ("ipndm", "span"):
            for nfe in LEVELS:
                stream = StreamedFID(folder, IMAGES, NETWORK, metrics=METRICS)
                for seeds, pixels in generate(net, solver, nfe):
                    stream.append(pixels, seeds)
                result = stream.result(f"{solver} {nfe}")
                found[solver, nfe] = {"fid": {"value": result.fid, "spread": None}, **result.measures}
    figure = new_figure("a figure", figsize=(10, 5))
    for axes, name in zip(figure.subplots(2, 3).flat, METRICS, strict=True):
        for solver, colour in zip(("ipndm", "span"), COLOURS, strict=True):
            rows = [found[solver, nfe][name] for nfe in LEVELS]
            bars = [row["spread"] or 0.0 for row in rows]
            axes.errorbar(LEVELS, [row["value"] for row in rows], bars, label=solver, color=colour, capsize=3, lw=1.6)
        axes.set_xticks(LEVELS)
        better = "lower" if name in ("fid", "kid") else "higher"
        finished(axes, f"{name} ({better} is better)", "evaluations")
        if name in ("fid", "kid"):
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize=9, frameon=False)
    figure.tight_layout()
    save(figure, path)


class NoiseNetwork(torch.nn.Module):
    """A denoiser as a network that predicts the noise, with the interface of diffusers' U-Nets.

    net: the denoiser.
    process: ``models.noise.VariancePreserving``.
    """

    def __init__(self, net, process):
        super().__init__()
        self.net, self.process = net, process
        self.config = SimpleNamespace(sample_size=net.img_resolution, in_channels=net.img_channels)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.time_embedding = SimpleNamespace(linear_2=net.noise_embedding)  # for the solver's head "time"

    def forward(self, sample, timestep):
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1)
        sigma = self.process.sigma_of_timestep(times).to(sample.dtype)
        x = sample / self.process.scale(sigma)
        return SimpleNamespace(sample=(x - self.net(x, sigma)) / sigma)


def draw_diffusers(path: Path) -> None:
    """The same noise in DDPMPipeline with schedulers of diffusers and with AMEDScheduler."""
    diffusers = import_diffusers("a figure")
    from sampling.diffusers_scheduler import AMEDScheduler

    diffusers.utils.logging.disable_progress_bar()
    config, net, nfe, count = diffusers.DDPMScheduler().config, create_model(NETWORK), 5, 12
    network = NoiseNetwork(net, noise_process(config))
    learned = AMEDScheduler.from_predictor(f"{NETWORK}-span-{nfe}", config, network)
    schedulers = {
        "DDIMScheduler, 50 evaluations": (diffusers.DDIMScheduler.from_config(config), 50),
        f"DDIMScheduler, {nfe}": (diffusers.DDIMScheduler.from_config(config), nfe),
        f"DPMSolverMultistepScheduler, {nfe}": (diffusers.DPMSolverMultistepScheduler.from_config(config), nfe),
        f"AMEDScheduler (span solver), {nfe}": (learned, nfe),
    }
    figure = new_figure("a figure", figsize=(8, 3.9))
    for axes, (title, (scheduler, steps)) in zip(figure.subplots(4, 1), schedulers.items(), strict=True):
        pipe = diffusers.DDPMPipeline(network, scheduler)
        pipe.scheduler = scheduler  # the constructor of the pipeline makes a DDPMScheduler of it
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"batch_size": count, "num_inference_steps": steps, "output_type": "np"}
        images = pipe(generator=generator, **arguments).images
        axes.imshow(image_grid((images * 255).round().astype(np.uint8), count), cmap="gray")
        axes.set_title(title, fontsize=9, loc="left", pad=3)
        axes.axis("off")
    figure.tight_layout(h_pad=0.3)
    save(figure, path)


DRAWN = {"watching": draw_watching, "measuring": draw_measuring, "diffusers": draw_diffusers}


@click.command(cls=Command)
@click.option("--only", type=click.Choice(list(DRAWN)), help="Draw this figure only")
def main(only):
    """Draws figures of the documentation anew."""
    for name, draw in DRAWN.items():
        if only in (None, name):
            draw(DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
