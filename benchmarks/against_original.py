"""CPU seconds of this project against the loop of the original AMED code, on the same weights.

    OMP_NUM_THREADS=1 python -m benchmarks.against_original --dataset_name=digits

Sampling: from the seeds to PNG files. The original loop keeps the noise levels in a tensor, runs
the network with its original structure (benchmarks/forward_pass.py), keeps the directions of iPNDM
in a list and saves the images of a batch one after the other. "agrees" is the share of values that
are within one grey level of its images. Distillation: an iteration of AMED-Solver. The original
loop computes the teacher in full and evaluates every starting point of the student again.

The variants run in turn, and ratios are those within a round, so other load matters little.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.distillation_speed import SETTINGS, Straightforward
from benchmarks.forward_pass import with_original_structure
from benchmarks.measuring import describe_machine, interleaved, spread
from models import create_model
from models.compile import prepare_network
from sampling.folder import Folder
from sampling.generate import generate_images
from sampling.quantized import quantized_network
from sampling.run import write_images
from solvers import get_schedule
from solvers.solver import IPNDM
from torch_utils.cli import Command
from torch_utils.markdown import table
from training.amed_trainer import Distiller

# Variant -> (options of prepare_network, images per network call, whether it is quantized).
SAMPLING = {
    "fp32, the defaults": ({}, 64, False),
    "fp32, batches of 32": ({}, 32, False),
    "fp32, batches of 16": ({}, 16, False),
    "--amp=bf16": ({"amp": "bf16"}, 64, False),
    "--amp=bf16 --channels_last=True": ({"amp": "bf16", "channels_last": True}, 64, False),
    "--quantize=int8": ({}, 64, True),
}
COMPILED = {
    "fp32, --compile": ({"compile_mode": "default"}, 64, False),
    "--amp=bf16 --compile": ({"amp": "bf16", "compile_mode": "default"}, 64, False),
}
DISTILLATION = {
    "fp32, the defaults": ({}, None),
    "fp32, --batch-gpu=16": ({}, 16),
    "--amp=bf16": ({"amp": "bf16"}, None),
}


@torch.no_grad()
def original_sampling(net, num_images: int, batch: int, num_steps: int, folder: Path) -> None:
    """iPNDM of order 4 from the seeds 0 .. num_images - 1 to PNG files."""
    shape, weights = (net.img_channels, net.img_resolution, net.img_resolution), IPNDM.WEIGHTS
    for first in range(0, num_images, batch):
        seeds = range(first, min(first + batch, num_images))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        levels = get_schedule(num_steps, net.sigma_min, net.sigma_max, "polynomial", 7).to(torch.float32)
        x, directions = noise * levels[0], []
        for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
            direction = (x - net(x, sigma)) / sigma
            directions = [*directions, direction][-4:]
            step = sum(w * d for w, d in zip(weights[len(directions) - 1], reversed(directions), strict=True))
            x = x + (sigma_next - sigma) * step
        pixels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for seed, image in zip(seeds, pixels, strict=True):
            place = folder / f"{seed - seed % 1000:06d}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze(-1) if shape[0] == 1 else image).save(place / f"{seed:06d}.png")


def own_sampling(net, num_images: int, batch: int, arguments: dict, folder: Path) -> None:
    batches = generate_images(net, range(num_images), batch=batch, device=torch.device("cpu"), **arguments)
    nfe = (arguments["num_steps"] - 1) * net.evals_per_call
    write_images(batches, Folder(folder, subdirs=True, inters=False), nfe, tqdm(disable=True), None)


def read_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.rglob("*.png"))])


def sampling_rows(name: str, num_images: int, num_steps: int, repeats: int, compiled: bool) -> list[list[str]]:
    original = create_model(name)
    if original.label_dim:
        raise click.UsageError(f"{name} has classes, which the original loop here does not draw")
    prepare_network(original, channels_last=False)
    arguments = {"solver": "ipndm", "num_steps": num_steps}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        runs = {"original": partial(original_sampling, original, num_images, 64, num_steps, root / "original")}
        runs["original"] = with_original_structure(original, runs["original"])
        for label, (options, batch, int8) in {**SAMPLING, **(COMPILED if compiled else {})}.items():
            net = prepare_network(create_model(name), **options)
            net = quantized_in(root, net, arguments) if int8 else net
            runs[label] = partial(own_sampling, net, num_images, batch, arguments, root / label)
        seconds = interleaved(runs, repeats)
        expected = read_folder(root / "original")
        agrees = {label: np.mean(abs(read_folder(root / label) - expected) <= 1) for label in runs}
    return [[*row, f"{100 * agrees[row[0]]:.2f} %"] for row in ratios(seconds)]


def quantized_in(folder: Path, net, arguments: dict):
    """The 8-bit network; its calibration is kept in ``folder``, not in ./src."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        return quantized_network(net, arguments)
    finally:
        os.chdir(before)


def distillation_rows(name: str, batch: int, repeats: int) -> list[list[str]]:
    config = {**SETTINGS["amed"], "num_steps": 4, "afs": True, "scale_dir": 0.01}
    original = prepare_network(create_model(name), channels_last=False)
    loop = Straightforward(original, config, batch=batch, seed=0)
    runs = {"original": with_original_structure(original, loop.iterate)}
    for label, (options, batch_gpu) in DISTILLATION.items():
        net = prepare_network(create_model(name), **options)
        runs[label] = Distiller(net, config, batch=batch, seed=0, batch_gpu=batch_gpu).iterate
    return ratios(interleaved(runs, repeats))


def ratios(seconds: dict) -> list[list[str]]:
    """Rows of label, CPU seconds, and their ratio to the original's."""
    cpu = {label: [both[1] for both in times] for label, times in seconds.items()}
    shares = {label: [a / b for a, b in zip(times, cpu["original"], strict=True)] for label, times in cpu.items()}
    return [[label, spread(times), spread(shares[label])] for label, times in cpu.items()]


@click.command(cls=Command)
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--num_images", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--num_steps", type=click.IntRange(min=2), default=6, show_default=True, help="Time steps of sampling")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Batch of the distillation")
@click.option("--repeats", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also compiled networks, which takes minutes")
@click.option("--only", type=click.Choice(["both", "sampling", "distillation"]), default="both", show_default=True)
def main(dataset_name, num_images, num_steps, batch, repeats, compiled, only):
    """Print CPU seconds and their ratios to the original loop as Markdown."""
    print(describe_machine())
    if only != "distillation":
        print(f"\n{dataset_name}, iPNDM, {num_steps - 1} evaluations, {num_images} images, {repeats} rounds\n")
        rows = sampling_rows(dataset_name, num_images, num_steps, repeats, compiled)
        print(table(["sampling", "CPU seconds", "of the original", "agrees"], rows), flush=True)
    if only != "sampling":
        print(f"\n{dataset_name}, AMED-Solver, batch {batch}, an iteration, {repeats} rounds\n")
        print(
            table(["distillation", "CPU seconds", "of the original"], distillation_rows(dataset_name, batch, repeats))
        )


if __name__ == "__main__":
    main()
