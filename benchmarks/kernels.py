"""Kernels and waits per network evaluation outside of the network, counted on a pretended GPU.

    python -m benchmarks.kernels

Counts this project's solvers and, where they are installed, the samplers of k-diffusion and the
schedulers of diffusers, all with the same counter (tests/pretend_device.py) and the same network, a
multiplication that is not counted. Every run makes six steps from noise on two images. A kernel is
an operation that computes or copies something on the device; a wait is a place where the host stops
until the device has finished.
"""

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from unittest import mock

import click
import torch

from benchmarks import ROOT
from solvers import sample
from solvers.span_table import SpanSolver
from torch_utils.cli import Command
from torch_utils.markdown import table
from training.predictor import AMEDPredictor

sys.path.insert(0, str(ROOT / "tests"))
from pretend_device import PretendedDevice

STEPS = 6
SHAPE = (2, 3, 16, 16)


class Network(torch.nn.Module):
    """D(x; sigma) = x / 2, whose kernels are not counted, with the interface of a denoiser."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim, evals_per_call = 0.002, 80.0, *SHAPE[1:3], 0, 1

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self.bottleneck, self.noise_embedding = torch.nn.Identity(), torch.nn.Linear(4, 8)
        self.device, self.calls = device, 0

    def forward(self, x, sigma, **cond):
        self.calls += 1
        with self.device.silent():
            self.bottleneck(x[:, :, :8, :8])
            self.noise_embedding(x.new_zeros(1, 4))
            return 0.5 * x


def count(run: Callable) -> tuple[float, int]:
    """(kernels per network call, waits) of ``run(net, x)``. x: unit-variance noise."""
    torch.manual_seed(0)
    with PretendedDevice("cuda", ROOT) as device, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, x = Network(device).to("cuda"), torch.randn(SHAPE).to("cuda")
        run(net, x, device)
    return device.kernels / net.calls, sum(device.waits.values())


def own(solver: str, **options) -> Callable:
    """A run of a solver of this project."""

    def run(net, x, device):
        if "predictor" in options:
            options["predictor"].to("cuda")
        device.clear()
        sample(net, x, solver=solver, num_steps=STEPS + 1, **options)

    return run


@functools.cache
def k_diffusion_samplers():
    """The module k_diffusion.sampling; None without the package.

    The package imports libraries for its own trainings and SDEs. The samplers here do not use them,
    so that those that are not installed are replaced by empty ones while it is imported.
    """
    if (spec := importlib.util.find_spec("k_diffusion")) is None:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    unused = ("torchvision", "torchvision.transforms", "torchsde", "torchdiffeq")
    missing = {name: mock.MagicMock() for name in unused if importlib.util.find_spec(name.partition(".")[0]) is None}
    sys.modules.update({"k_diffusion": package, **missing})
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in missing:
            del sys.modules[name]


def k_diffusion(name: str) -> Callable | None:
    """A run of a sampler of k-diffusion; None without the package."""
    sampling = k_diffusion_samplers()
    if sampling is None:
        return None

    def run(net, x, device):
        sigmas = sampling.get_sigmas_karras(STEPS, 0.002, 80.0, device="cuda")
        device.clear()
        getattr(sampling, name)(net, x * 80, sigmas, disable=True)

    return run


def diffusers(name: str, **options) -> Callable | None:
    """A run of a scheduler of diffusers, as a pipeline calls it; None without the package."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers as library

    def run(net, x, device):
        scheduler = getattr(library, name)(**options)
        scheduler.set_timesteps(STEPS, device="cuda")
        x = x * float(scheduler.init_noise_sigma)
        times = list(scheduler.timesteps)
        device.clear()
        for time in times:
            output = net(scheduler.scale_model_input(x, time), time)
            x = scheduler.step(output, time, x).prev_sample

    return run


def span(heads=()) -> SpanSolver:
    """A span solver with all groups of the preset "full", none exactly zero, as after training."""
    student = SpanSolver.preset(
        "full", num_steps=STEPS + 1, heads=list(heads), img_channels=SHAPE[1], embedding_width=8
    )
    student._set_gaussian(torch.zeros(SHAPE[1:]), torch.tensor(0.3))
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return student


PLUGINS = {"iPNDM": "ipndm", "iPNDM, weights of the grid": "ipndm_v", "DPM-Solver++ 3M": "dpmpp", "DEIS": "deis"}


def predictor(solver: str = "amed") -> AMEDPredictor:
    return AMEDPredictor(sampler_stu=solver, num_steps=STEPS + 1, scale_dir=0.01, scale_time=0.1)


def rows() -> list[tuple[str, Callable | None, Callable | None, Callable | None]]:
    """(method, run of this project, of k-diffusion, of diffusers); None: it does not have it."""
    return [
        ("Euler / DDIM", own("euler"), k_diffusion("sample_euler"), diffusers("EulerDiscreteScheduler")),
        ("Heun", own("heun"), k_diffusion("sample_heun"), diffusers("HeunDiscreteScheduler")),
        ("DPM-Solver-2", own("dpm"), k_diffusion("sample_dpm_2"), diffusers("KDPM2DiscreteScheduler")),
        ("linear multistep, order 4", own("ipndm"), k_diffusion("sample_lms"), diffusers("LMSDiscreteScheduler")),
        ("the same, weights of the grid", own("ipndm_v"), None, None),
        (
            "DPM-Solver++ 2M",
            own("dpmpp", max_order=2, thresholding=False),
            k_diffusion("sample_dpmpp_2m"),
            diffusers("DPMSolverMultistepScheduler"),
        ),
        (
            "DPM-Solver++ 3M",
            own("dpmpp", thresholding=False),
            None,
            diffusers("DPMSolverMultistepScheduler", solver_order=3),
        ),
        (
            "the same with thresholding",
            own("dpmpp"),
            None,
            diffusers("DPMSolverMultistepScheduler", solver_order=3, thresholding=True),
        ),
        ("DEIS", own("deis"), None, diffusers("DEISMultistepScheduler", solver_order=3)),
        ("UniPC", own("unipc", thresholding=False), None, diffusers("UniPCMultistepScheduler", solver_order=3)),
        ("UniPC with thresholding", own("unipc"), None, None),
        ("DPM-Solver-v3 (plain statistics)", own("dpm_v3", statistics="data"), None, None),
        ("AMED-Solver", own("amed", predictor=predictor()), None, None),
        *[
            (f"AMED-Plugin on {name}", own(solver, predictor=predictor(solver)), None, None)
            for name, solver in PLUGINS.items()
        ],
        ("span", own("span", predictor=span()), None, None),
        ("span with all heads", own("span", predictor=span(("sample", "spatial", "time"))), None, None),
    ]


@click.command(cls=Command)
def main():
    """Print the table of kernels and waits as Markdown."""
    lines = []
    for method, *runs in rows():
        cells = []
        for run in runs:
            try:
                kernels, waits = (None, None) if run is None else count(run)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                cells.append(f"not counted ({type(error).__name__})")
                continue
            cells.append("" if kernels is None else f"{kernels:.1f}, {waits}")
        lines.append([method, *cells])
    header = ["kernels per evaluation, waits per run", "this project", "k-diffusion", "diffusers"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
