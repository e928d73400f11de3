"""Estimates the statistics of a network that the solver dpm_v3 steps with (Zheng et al. 2023, Section 3.1, Appendix C).

    python -m tools.model_statistics --dataset_name=digits
    python sample.py --dataset_name=digits --solver=dpm_v3 --schedule_type=logsnr --num_steps=6

No images are needed: the network is asked at states on its own trajectories from noise. Per node
and sample this costs five evaluations, on digits with the default numbers a minute or two of one
CPU core.
"""

import math
import sys
import time
from pathlib import Path

import click
import torch
from torch.func import jvp

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import create_model
from models.denoiser import member
from models.inputs import draw_condition, draw_noise
from solvers import get_schedule, sample
from solvers.dpm_solver_v3 import Statistics, guidance_rate, node_slopes, save_statistics, statistics_path
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Command, Number, offline_flag
from torch_utils.errors import UserError
from torch_utils.files import check_destination
from torch_utils.progress import progress_bar
from torch_utils.seeds import SeededGenerators, stream_seeds

DERIVATIVES = ("auto", "forward", "finite")
SHRINK_SAMPLES = 20  # the shrinkage is this number divided by the number of samples
NEGLIGIBLE = 1e-3  # deviations of f below this share of its natural size, the noise or the image, are rounding
MAX_S = 2.0  # f grows or decays like a power of sigma between -2 and 2 in the limits of high and low noise


class Derivative:
    """Directional derivatives of D(x; sigma), by forward-mode differentiation or central differences.

    kind: forward; finite; auto: forward on a GPU if the network supports it, else finite. (On a
    CPU, forward mode takes about four times as long as the two evaluations of a central
    difference.) ``used`` says which one it came to.
    """

    def __init__(self, net, kind: str, device_type: str):
        self.net, self.kind = net, kind
        self.used = "finite" if kind == "auto" and device_type != "cuda" else kind

    def __call__(self, x, sigma, x_tangent, sigma_tangent, cond):
        """d/dh D(x + h x_tangent; sigma + h sigma_tangent) at h = 0. The tangents are of the size
        of the noise, sigma.
        """

        def denoise(x, sigma):
            return self.net(x, sigma, **cond)

        if self.used != "finite":
            try:
                return jvp(denoise, (x, sigma), (x_tangent, sigma_tangent))[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotImplementedError, or an operation that is not fit for forward mode
                if self.kind == "forward":
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"--derivatives=forward: this network does not support it ({reason}); use finite"
                    ) from None
                self.used = "finite"
        # The step that balances rounding against curvature; float32 is what networks compute in.
        h = 4 * torch.finfo(x.dtype).eps ** (1 / 3)
        ahead = denoise(x + h * x_tangent, sigma + h * sigma_tangent)
        return (ahead - denoise(x - h * x_tangent, sigma - h * sigma_tangent)) / (2 * h)


class Moments:
    """Mean and scatter over the samples of several quantities per pixel, in float64, batch by
    batch.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        """values: [Q,B,C,H,W]."""
        values = values.cpu().double()
        count, mean = values.shape[1], values.mean(1)
        centred = values - mean.unsqueeze(1)
        shift = mean - self.mean
        share = self.count * count / (self.count + count)
        products = torch.einsum("pbchw,qbchw->pqchw", centred, centred)
        self.scatter = self.scatter + products + share * torch.einsum("pchw,qchw->pqchw", shift, shift)
        self.count += count
        self.mean = self.mean + shift * count / self.count


def regress(l, slope, mean, covariance, sigma: float, shrink: float):  # noqa: E741 (the paper's letter)
    """(s, b) of the best line df/dlambda = s f + b per pixel.

    l, slope: [C,H,W], l and dl/dlambda; mean [3,C,H,W], covariance [3,3,C,H,W]: of x, D and
    dD/dlambda. With N = x - D and dx/dlambda = -N, f = (1 - l) x - D and df/dlambda = -(1 - l) N -
    dD/dlambda - x dl/dlambda.

    s is drawn towards zero where f varies less than in most pixels (``shrink`` of the mean variance
    is added to its own), or hardly at all. There, few samples say nothing about s, and exp(int s)
    would make noise large. With shrink = SHRINK_SAMPLES / samples the estimate tends to plain least
    squares as the samples grow.
    """
    one = torch.ones_like(l)
    f = torch.stack([1 - l, -one, 0 * one])
    change = torch.stack([-(1 - l) - slope, 1 - l, -one])
    variance = torch.einsum("pchw,pqchw,qchw->chw", f, covariance, f)
    joint = torch.einsum("pchw,pqchw,qchw->chw", f, covariance, change)
    size = (mean[1] ** 2 + covariance[1, 1]).mean().sqrt()
    least = (NEGLIGIBLE * min(sigma, float(size))) ** 2
    s = (joint / (variance + shrink * variance.mean() + least)).clamp(-MAX_S, MAX_S)
    return s, (change * mean).sum(0) - s * (f * mean).sum(0)


@torch.no_grad()
def estimate_statistics(
    net,
    *,
    nodes: int = 32,
    samples: int = 64,
    batch: int = 32,
    seed: int = 0,
    derivatives: str = "auto",
    device="cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Statistics:
    """The statistics of a denoiser at ``nodes`` noise levels over its whole range, equidistant in ln sigma.

    samples: trajectories from noise, by DPM-Solver++ of order 2 over the nodes. Every one has a
    Rademacher probe v of its own, the same at all nodes, so that the error of l is smooth over
    them: l is the mean of 1 - v (dD/dx v).

    Raises UserError where ``derivatives`` is forward and the network does not support it.
    """
    sigmas = get_schedule(nodes, net.sigma_min, net.sigma_max, "logsnr")
    derivative = Derivative(net, derivatives, torch.device(device).type)
    moments, traces = [Moments() for _ in sigmas], [Moments() for _ in sigmas]
    seeds = stream_seeds(seed, 0, samples)
    bar = progress_bar(nodes * samples, unit="state", disable=not progress)
    for start in range(0, samples, batch):
        generators = SeededGenerators(seeds[start : start + batch])
        latents = draw_noise(net, generators, dtype).to(device)
        probe = (2 * generators.randint(2, latents.shape[1:]) - 1).to(device, dtype)
        cond = draw_condition(net, generators)

        def collect(i, sigma, x, denoised, probe=probe, cond=cond):
            sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
            noise = x - denoised
            change = derivative(x, sigma, -noise, -sigma, cond)  # of D along the trajectory, per lambda
            sensitivity = derivative(x, sigma, sigma * probe, 0 * sigma, cond) / sigma
            moments[i].add(torch.stack([x, denoised.to(x.dtype), change.to(x.dtype)]))
            traces[i].add((1 - probe * sensitivity).unsqueeze(0))
            bar.update(len(x))

        x = sample(
            net, latents, solver="dpmpp", max_order=2, thresholding=False, sigmas=sigmas, cond=cond, callback=collect
        )
        end = sigmas[-1].to(x)
        collect(nodes - 1, end, x, net(x, end, **cond))
    bar.close()
    l = torch.stack([of.mean[0] for of in traces])  # noqa: E741
    slopes = node_slopes(-sigmas.log(), l)
    shrink = SHRINK_SAMPLES / samples
    lines = [
        regress(l[i], slopes[i], of.mean, of.scatter / of.count, float(sigmas[i]), shrink)
        for i, of in enumerate(moments)
    ]
    metadata = {
        "network_hash": member(net, "weights_hash"),
        "dataset_name": member(net, "dataset_name"),
        "guidance_rate": guidance_rate(net),
        "nodes": nodes,
        "samples": samples,
        "seed": seed,
        "sigma_min": float(sigmas[-1]),
        "sigma_max": float(sigmas[0]),
        "derivatives": derivative.used,
        "mean_image_range": [float(getattr(moments[-1].mean[1], end)()) for end in ("min", "max")],
    }
    return Statistics(sigmas, l, *(torch.stack(values) for values in zip(*lines, strict=True)), metadata)


@click.command(cls=Command)
@click.option("--dataset_name", required=True, help="A network of models/zoo.py, or custom with --model_path")
@click.option("--model_path", type=PATH, metavar="FILE", help="Its weights, if not the embedded or downloaded ones")
@click.option("--guidance_type", help="Guidance of the network")
@click.option("--guidance_rate", type=Number(), help="Its strength")
@click.option(
    "--dest", type=PATH, metavar="FILE", help="The .safetensors file to write (default: where dpm_v3 looks for it)"
)
@click.option("--nodes", type=click.IntRange(min=3), default=32, show_default=True, help="Noise levels")
@click.option("--samples", type=click.IntRange(min=2), default=64, show_default=True, help="Trajectories")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Trajectories at a time")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--derivatives",
    type=click.Choice(DERIVATIVES),
    default="auto",
    show_default=True,
    help="Forward-mode differentiation, finite differences, or forward on a GPU that can and finite elsewhere",
)
@click.option("--device", default=None, help="cpu, cuda or mps (default: the best there is)")
@offline_flag
def main(
    dataset_name, model_path, guidance_type, guidance_rate, dest, nodes, samples, batch, seed, derivatives, device
):
    """Estimate the model statistics of the solver dpm_v3, from noise and the network alone.

    Costs about five evaluations of the network per node and sample: on digits with the defaults a
    minute or two on one CPU core. The paper has 120 or more nodes and 1024 or more samples, which a
    large network deserves on a GPU.
    """
    device = distributed.pick_device(device)
    if dest is not None and Path(dest).suffix != ".safetensors":
        raise UserError(f"--dest={dest}: must end in .safetensors")
    if dest is not None:
        check_destination(dest, "--dest")
    net = create_model(dataset_name, model_path, guidance_type, guidance_rate, device)
    dest = statistics_path(net) if dest is None else Path(dest)
    begin = time.perf_counter()
    found = estimate_statistics(
        net,
        nodes=nodes,
        samples=samples,
        batch=batch,
        seed=seed,
        derivatives=derivatives,
        device=device,
        progress=True,
    )
    small = Statistics(found.sigmas, found.l.float(), found.s.float(), found.b.float(), found.metadata)
    save_statistics(small, dest)
    seconds = math.ceil(time.perf_counter() - begin)
    click.echo(f"{dest}: {nodes} nodes, {samples} samples, {found.metadata['derivatives']} derivatives, {seconds} s")


if __name__ == "__main__":
    main()
