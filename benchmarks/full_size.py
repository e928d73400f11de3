"""Builds and times the largest networks of the paper, with random weights in the official layout.

    python -m benchmarks.full_size sd      # Stable Diffusion 1.5: 1.07 billion parameters, 4.3 GB
    python -m benchmarks.full_size adm     # ADM 256x256 and classifier: 0.61 billion, 2.4 GB

The files are written to --folder (and kept with --keep), then read by ``create_model`` like the
published ones. Prints the peak memory of reading, and times one training iteration of a predictor
and one sample. The weights are noise, so this says nothing about quality.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from models import create_model
from models.adm import RELEASED_CONFIGS, ADMDenoiser
from models.building import build_empty
from models.inputs import draw_noise
from models.sd import STABLE_DIFFUSION_1_5, StableDiffusionDenoiser
from solvers import sample
from torch_utils.cli import Command
from torch_utils.memory import peak_memory
from torch_utils.seeds import SeededGenerators
from training.amed_trainer import Distiller

GIGA = 1e9
NETWORKS = {"sd": ("ms_coco", "cfg", None), "adm": ("imagenet256", "cg", 1.0)}


def random_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Small random tensors for every parameter and buffer of a network on the meta device."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            scale = value[0].numel() ** -0.5 if value.ndim != 2 or value.shape[0] < 10000 else 0.02
            weights[name] = torch.empty(value.shape).normal_(0, scale, generator=generator)
        else:
            weights[name] = torch.ones(value.shape) if name.endswith("weight") else torch.zeros(value.shape)
    return weights


def write_files(family: str, folder: Path) -> list[Path]:
    if family == "sd":
        net = build_empty(StableDiffusionDenoiser, STABLE_DIFFUSION_1_5, "a Stable Diffusion model")
        places = [folder / "v1-5-pruned-emaonly.safetensors"]
        save_file(random_weights(net), places[0])
        return places
    config = {**RELEASED_CONFIGS["imagenet256"], "guidance_rate": 1.0}
    weights = random_weights(build_empty(ADMDenoiser, config, "an ADM network"))
    places = [folder / "256x256_diffusion.pt", folder / "256x256_classifier.pt"]
    for path, prefix in zip(places, ("model.", "classifier."), strict=True):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        torch.save(part, path)
    return places


def condition(net, generators: SeededGenerators) -> dict:
    """Classes, or the contexts of random tokens where prompts would need a tokenizer."""
    if not hasattr(net, "cond_stage_model"):
        return net.make_cond(generators)
    text = net.cond_stage_model
    tokens = torch.randint(text.config["vocab_size"], (2, text.config["max_position_embeddings"]))
    contexts = text.encode(tokens)
    return {"condition": contexts[:1], "unconditional_condition": contexts[1:]}


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.argument("family", type=click.Choice(list(NETWORKS)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where the file is written [default: a temporary one]")
@click.option("--keep", is_flag=True, help="Leave the file there")
@click.option("--device", default="cpu", show_default=True)
@click.option("--num_steps", type=click.IntRange(min=2), default=3, show_default=True, help="Time steps")
@click.option("--loaded", is_flag=True, hidden=True, help="The second half, in a process of its own")
def main(family, folder, keep, device, num_steps, loaded):
    dataset_name, guidance, rate = NETWORKS[family]
    if not loaded:  # in a process of its own: writing the file must not count as memory of reading it
        place = Path(folder or tempfile.mkdtemp(prefix="full-size-"))
        place.mkdir(parents=True, exist_ok=True)
        try:
            written = write_files(family, place)
            size = sum(path.stat().st_size for path in written) / GIGA
            print(f"{', '.join(path.name for path in written)}: {size:.2f} GB", flush=True)
            command = [
                sys.executable,
                "-m",
                "benchmarks.full_size",
                family,
                f"--folder={place}",
                f"--device={device}",
                "--loaded",
            ]
            sys.exit(subprocess.run([*command, f"--num_steps={num_steps}"]).returncode)
        finally:
            if not keep:
                shutil.rmtree(place)

    before = peak_memory()
    start = time.perf_counter()
    path = next(path for path in sorted(folder.iterdir()) if "classifier" not in path.name)
    net = create_model(dataset_name, path, guidance, rate, device)
    parameters = sum(value.numel() for value in net.parameters())
    print(
        f"{dataset_name}: {parameters / 1e9:.2f} billion parameters ({parameters * 4 / GIGA:.2f} GB in float32), read in "
        f"{time.perf_counter() - start:.0f} s, memory at its peak {(peak_memory() - before) / 1e3:.2f} GB",
        flush=True,
    )
    generators = SeededGenerators([0])
    cond = condition(net, generators)
    latents = draw_noise(net, generators).to(device)
    config = {
        "num_steps": num_steps,
        "sampler_stu": "dpmpp",
        "sampler_tea": "dpmpp",
        "M": 1,
        "schedule_type": "discrete" if family == "sd" else "logsnr",
        "schedule_rho": 1,
        "afs": True,
        "max_order": 2,
        "predict_x0": family != "sd",
        "scale_dir": 0.01,
        "scale_time": 0.2,
        "sigma_min": net.sigma_min,
        "sigma_max": net.sigma_max,
    }
    distiller = Distiller(net, config, batch=1, device=device)
    start = time.perf_counter()
    losses = distiller.step([(latents, cond)])[:, 0]
    seconds = time.perf_counter() - start
    print(
        f"one training iteration (batch 1, {num_steps} time steps, {distiller.evaluations} evaluations of the student): "
        f"{seconds:.0f} s, losses {', '.join(f'{loss:.3g}' for loss in losses.tolist())}, memory at its peak "
        f"{peak_memory() / 1e3:.2f} GB",
        flush=True,
    )
    start = time.perf_counter()
    options = {name: config[name] for name in ("num_steps", "schedule_type", "schedule_rho", "afs", "max_order")}
    x, info = sample(
        net, latents, solver="dpmpp", predictor=distiller.predictor, cond=cond, return_info=True, **options
    )
    with torch.inference_mode():
        image = net.decode(x)
    print(
        f"one sample ({info.nfe} evaluations and decoding to {list(image.shape)}): {time.perf_counter() - start:.0f} s, "
        f"{'finite' if image.isfinite().all() else 'NOT finite'}"
    )


if __name__ == "__main__":
    main()
