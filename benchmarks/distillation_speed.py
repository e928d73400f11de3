"""Seconds per kimg of distillation and its final loss, compared with a simple training loop.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation_speed --dataset_name=digits --num_seeds=3

The simple loop computes every teacher trajectory in full, and calls the network again at every
starting point of the student. Variant "shared" reuses the teacher's evaluations; "cache" also
stores its trajectories. The variants train in turn, so that other load slows all of them alike. The
validation loss is the student's squared error per sample and interval on unseen noise.
"""

import click
import numpy as np
import torch

from benchmarks.measuring import describe_machine, interleaved, spread
from models import create_model
from models.inputs import draw_inputs
from torch_utils.cli import Command
from torch_utils.markdown import table
from torch_utils.seeds import stream_seeds
from training.amed_trainer import Distiller
from training.loss import DistillationLoss

AMED = {"sampler_stu": "amed", "sampler_tea": "heun", "M": 1, "schedule_type": "time_uniform", "schedule_rho": 1}
IPNDM = {"sampler_stu": "ipndm", "sampler_tea": "ipndm", "M": 2, "schedule_type": "polynomial", "schedule_rho": 7}
SETTINGS = {
    "amed": AMED | {"scale_time": 0.0},
    "ipndm": IPNDM | {"scale_time": 0.2, "max_order": 4},
}  # Zhou et al. 2024


class Straightforward(Distiller):
    """The loop without anything shared."""

    def step(self, micro_batches, teacher_targets=None):
        teacher_targets = []
        for loss, (latents, cond) in zip(self.losses, micro_batches, strict=True):
            targets = loss.run_teacher(latents * loss.sigma_max, cond)
            targets.cached_evals.clear()
            teacher_targets.append(targets)
        return super().step(micro_batches, teacher_targets)


@torch.no_grad()
def validation_loss(distiller: Distiller, samples: int, batch: int) -> float:
    """Mean over samples of the sum over intervals of the student's squared error; the seeds are of
    another stream.
    """
    loss = DistillationLoss(distiller.net, distiller.predictor.config)
    total = 0.0
    for first in range(0, samples, batch):
        seeds = stream_seeds(987654321, first, min(batch, samples - first))
        latents, cond = draw_inputs(distiller.net, seeds, dtype=distiller.dtype, device=distiller.device)
        x = latents * loss.sigma_max
        targets = loss.teacher_trajectory(x, cond)
        for k, target in enumerate(targets):
            error, x = loss.student_step(distiller.predictor, x, k, target, cond)
            total += error.sum().item()
    return total / samples


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--setting", type=click.Choice(list(SETTINGS)), default="amed", show_default=True)
@click.option("--num_steps", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--cache", type=click.IntRange(min=1), default=256, show_default=True, help="Trajectories that are kept")
@click.option("--num_seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--validation", type=click.IntRange(min=1), default=128, show_default=True, help="Samples of it")
@click.option("--device", default="cpu", show_default=True)
def main(dataset_name, setting, num_steps, batch, iterations, cache, num_seeds, validation, device):
    net = create_model(dataset_name, device=device)
    config = {**SETTINGS[setting], "num_steps": num_steps, "afs": True, "scale_dir": 0.01}
    variants = {"straightforward": (Straightforward, None), "shared": (Distiller, None), "cache": (Distiller, cache)}
    seconds, losses = ({name: [] for name in variants} for _ in range(2))
    for seed in range(num_seeds):
        runs = {
            name: kind(net, config, batch=batch, seed=seed, teacher_cache=kept, device=device)
            for name, (kind, kept) in variants.items()
        }
        steps = {name: distiller.iterate for name, distiller in runs.items()}
        for name, spent in interleaved(steps, iterations, device, warmup=0).items():
            seconds[name].append(sum(wall for wall, _ in spent) / (iterations * batch / 1000))
            losses[name].append(validation_loss(runs[name], validation, batch))
    print(describe_machine(device))
    print(
        f"{dataset_name}, {setting}, {num_steps} time steps, batch {batch}, {iterations} iterations, {num_seeds} seeds, "
        f"{cache} trajectories kept\n"
    )
    plain = np.median(seconds["straightforward"])
    rows = [
        [name, spread(seconds[name]), f"{plain / np.median(seconds[name]):.2f}"]
        + [f"{np.mean(losses[name]):.3f} ± {np.std(losses[name], ddof=min(num_seeds, 2) - 1):.3f}"]
        for name in variants
    ]
    print(table(["loop", "s/kimg", "ratio", "validation loss, mean ± sd of the seeds"], rows))


if __name__ == "__main__":
    main()
