"""Images per second of a network evaluation with each option, against the original structure.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.forward_pass
    python -m benchmarks.forward_pass --dataset_name=cifar10 --batch=64 --compile=True   # minutes

The baseline is float32, NCHW, eager, with attention as two products and a softmax, and resampling
by depthwise convolutions. PSNR compares images of the same seeds (four steps of DPM-Solver++) with
that baseline, peak 2.
"""

import copy
import math

import click
import torch
import torch.nn.functional as F

from benchmarks.measuring import describe_machine, interleaved, spread
from models import create_model, openai_unet
from models import edm_unet as networks
from models.compile import prepare_network
from models.inputs import draw_inputs
from solvers import sample
from torch_utils.cli import Command
from torch_utils.distributed import pick_device
from torch_utils.markdown import table


def explicit_attention(query, key, value):
    """softmax(q k^T / sqrt(d)) v, with the matrix of weights in memory."""
    weights = torch.einsum("...qc,...kc->...qk", query, key / math.sqrt(key.shape[-1])).softmax(dim=-1)
    return torch.einsum("...qk,...kc->...qc", weights, value)


class _Explicit:
    """``torch.nn.functional`` with explicit attention."""

    scaled_dot_product_attention = staticmethod(explicit_attention)

    def __getattr__(self, name):
        return getattr(F, name)


def with_original_structure(net, function):
    """``function``, run with the original structure of the networks."""

    def run():
        modules = (networks, openai_unet)
        for module in modules:
            module.F = _Explicit()
        try:
            return function()
        finally:
            for module in modules:
                module.F = F

    for part in net.modules():
        if isinstance(part, networks.Conv2d):
            part._box = False
    return run


def variants_of(net, device, compiled: bool) -> dict:
    """Label -> (network, whether the original structure is put back)."""
    choices = {
        "float32, NCHW, eager, explicit attention": ({"channels_last": False}, True),
        "float32, NCHW": ({"channels_last": False}, False),
        "float32, channels last": ({"channels_last": True}, False),
        "bf16, NCHW": ({"channels_last": False, "amp": "bf16"}, False),
        "bf16, channels last": ({"channels_last": True, "amp": "bf16"}, False),
    }
    if device.type == "cuda":
        choices["fp16, channels last"] = ({"channels_last": True, "amp": "fp16"}, False)
    if compiled:
        choices["float32, channels last, compiled"] = ({"channels_last": True, "compile_mode": "default"}, False)
        choices["bf16, channels last, compiled"] = (
            {"channels_last": True, "amp": "bf16", "compile_mode": "default"},
            False,
        )
        if device.type == "cuda":
            graphs = {"channels_last": True, "amp": "bf16", "compile_mode": "reduce-overhead"}
            choices["bf16, channels last, CUDA graphs"] = (graphs, False)
    return {
        label: (prepare_network(copy.deepcopy(net), **options), original)
        for label, (options, original) in choices.items()
    }


@click.command(cls=Command)
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--model_path", default=None)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--compile", "compiled", type=bool, default=False, show_default=True)
@click.option("--device", default=None)
def main(dataset_name, model_path, batch, repeats, compiled, device):
    device = pick_device(device)
    net = create_model(dataset_name, model_path, device=device)
    noise, cond = draw_inputs(net, range(batch), device=device)
    sigma = torch.tensor(1.0, device=device)
    calls, images = {}, {}
    for label, (network, original) in variants_of(net, device, compiled).items():

        def call(network=network):
            with torch.no_grad():
                return network(noise, sigma, **cond)

        def draw(network=network):
            return sample(network, noise, solver="dpmpp", num_steps=5, cond=cond)

        calls[label] = with_original_structure(network, call) if original else call
        images[label] = (with_original_structure(network, draw) if original else draw)()
    print(describe_machine(device))
    print(f"{dataset_name}, batch {batch}, {repeats} interleaved repeats\n")
    print(table(*rows_of(interleaved(calls, repeats, device, warmup=2), images, batch, device)))


def rows_of(seconds: dict, images: dict, batch: int, device: torch.device) -> tuple[list[str], list[list[str]]]:
    clock = 1 if device.type == "cpu" else 0  # CPU seconds, on a busy machine the steadier ones
    first = next(iter(seconds))
    baseline = [times[clock] for times in seconds[first]]
    shown = {label: x.clamp(-1, 1).double() for label, x in images.items()}
    rows = []
    for label, times in seconds.items():
        own = [pair[clock] for pair in times]
        ratios = [one / other for one, other in zip(baseline, own, strict=True)]
        quality = 10 * torch.log10(4 / (shown[label] - shown[first]).square().mean())
        rows.append([label, spread([batch / s for s in own]), spread(ratios), f"{quality:.1f}"])
    return ["variant", f"images per {'CPU ' if clock else ''}second", "speed, baseline = 1", "PSNR, dB"], rows


if __name__ == "__main__":
    main()
