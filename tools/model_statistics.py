"""Estimates the model statistics of the solver dpm_v3 (Zheng et al. 2023, Section 3.1, Appendix C).

    python -m tools.model_statistics --dataset_name=digits
    python -m tools.model_statistics --dataset_name=cifar10 --nodes=120 --samples=1024
    python -m tools.model_statistics --dataset_name=custom --model_path=net.safetensors

``sample.py --solver=dpm_v3`` then finds them itself. Needs no images: the network is evaluated at
states of its own trajectories. Costs five evaluations per node and sample; for digits with the
defaults, one or two minutes on a CPU core.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.model_statistics")

import math
import time

import click
import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

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
SHRINK_SAMPLES = 20  # shrinkage = this number / number of samples
NEGLIGIBLE = 1e-3  # smaller deviations of f, relative to the noise or the image, count as rounding
MAX_S = 2.0  # for high and low noise, f is a power of sigma with an exponent between -2 and 2


class Derivative:
    """Directional derivatives of D(x; sigma).

    net: the denoiser.
    kind: forward: forward-mode differentiation. finite: central differences. auto: forward on a GPU
        if the network supports it, else finite. (On a CPU, forward mode takes about four times as
        long as the two evaluations of a central difference.)
    device_type: "cpu", "cuda", ...

    Attribute ``used``: the kind that is in use.
    """

    def __init__(self, net, kind: str, device_type: str):
        self.net, self.kind = net, kind
        self.used = "finite" if kind == "auto" and device_type != "cuda" else kind

    def __call__(self, x, sigma, x_tangent, sigma_tangent, cond):
        """d/dh D(x + h x_tangent; sigma + h sigma_tangent) at h = 0. Tangents: size of sigma."""

        def denoise(x, sigma):
            return self.net(x, sigma, **cond)

        if self.used != "finite":
            try:
                with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                    return jvp(denoise, (x, sigma), (x_tangent, sigma_tangent))[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotImplementedError, or an operation without forward mode
                if self.kind == "forward":
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"--derivatives=forward: this network does not support it ({reason}); use finite"
                    ) from None
                self.used = "finite"
        # This step balances rounding and curvature.
        h = 4 * torch.finfo(x.dtype).eps ** (1 / 3)
        ahead = denoise(x + h * x_tangent, sigma + h * sigma_tangent)
        return (ahead - denoise(x - h * x_tangent, sigma - h * sigma_tangent)) / (2 * h)


class Moments:
    """Mean and scatter over the samples of several quantities per pixel, in float64."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        """Adds a batch. values: [Q,B,C,H,W], Q quantities of B samples."""
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
    """(s, b) [C,H,W] of the best line df/dlambda = s f + b per pixel.

    l, slope: [C,H,W], l and dl/dlambda.
    mean, covariance: [3,C,H,W] and [3,3,C,H,W] of x, D and dD/dlambda.
    sigma: noise level.
    shrink: share of the mean variance that is added to the variance of each pixel.

    With N = x - D and dx/dlambda = -N: f = (1 - l) x - D, and df/dlambda = -(1 - l) N - dD/dlambda
    - x dl/dlambda. ``shrink`` draws s towards zero in pixels where f varies less than elsewhere.
    There, few samples do not determine s, and exp(int s) would amplify noise. With shrink =
    SHRINK_SAMPLES / samples, the estimate tends to plain least squares for many samples.
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
    """The statistics of a denoiser at noise levels equidistant in ln sigma over its whole range.

    net: the denoiser.
    nodes: number of noise levels. Default 32.
    samples: trajectories from noise, by DPM-Solver++ of order 2 over the nodes. Default 64.
    batch: trajectories per network call. Default 32.
    seed: of the trajectories. Default 0.
    derivatives: see ``Derivative``. Default "auto".
    device, dtype: of the computation. Default CPU, float32.
    progress: show a progress bar. Default False.

    l is the mean of 1 - v (dD/dx v). Each trajectory has its own Rademacher probe v, which is the
    same at all nodes, so that the error of l is smooth over the nodes. Raises UserError if
    ``derivatives`` is forward and the network does not support it.
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
            change = derivative(x, sigma, -noise, -sigma, cond)  # dD/dlambda along the trajectory
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


GROUPS = {
    "Network": "dataset_name model_path guidance_type guidance_rate",
    "Accuracy": "nodes samples seed derivatives",
    "Output": "dest",
    "Speed": "batch device offline",
}


@click.command(cls=Command, groups=GROUPS)
@click.option("--dataset_name", required=True, help="A network of models/zoo.py, or custom with --model_path")
@click.option("--model_path", type=PATH, metavar="FILE", help="File of the network (default: embedded or downloaded)")
@click.option("--guidance_type", help="Guidance of the network")
@click.option("--guidance_rate", type=Number(), help="Strength of the guidance")
@click.option(
    "--dest", type=PATH, metavar="FILE", help="File to write, .safetensors (default: where dpm_v3 looks for it)"
)
@click.option("--nodes", type=click.IntRange(min=3), default=32, show_default=True, help="Noise levels")
@click.option("--samples", type=click.IntRange(min=2), default=64, show_default=True, help="Trajectories")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Trajectories at a time")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed of the trajectories")
@click.option(
    "--derivatives",
    type=click.Choice(DERIVATIVES),
    default="auto",
    show_default=True,
    help="Forward-mode differentiation, finite differences, or auto: forward on a GPU if possible, else finite",
)
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
@offline_flag
def main(
    dataset_name, model_path, guidance_type, guidance_rate, dest, nodes, samples, batch, seed, derivatives, device
):
    """Estimates the model statistics of the solver dpm_v3, from the network alone.

    Costs about five evaluations of the network per node and sample: for digits with the defaults,
    one or two minutes on a CPU core. The paper uses 120 or more nodes and 1024 or more samples,
    recommended for large networks on a GPU.
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
