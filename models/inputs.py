"""Inputs of a denoiser: noise and condition, which depend only on the seeds of the samples."""

from collections.abc import Mapping, Sequence

import torch

from models.denoiser import member
from torch_utils.seeds import SeededGenerators
from torch_utils.transfer import to_device


def draw_noise(
    net, generators: SeededGenerators, dtype: torch.dtype = torch.float32, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Starting noise [B,C,H,W] of a batch, on the CPU; see ``Denoiser.draw_latents``."""
    draw = member(net, "draw_latents")
    return draw(generators, dtype) if size is None else draw(generators, dtype, size)


def initial_state(net, latents: torch.Tensor, sigma, cond: Mapping | None = None) -> torch.Tensor:
    """State [B,C,H,W] at the first noise level: the network's prior mean plus latents * sigma.

    latents: starting noise [B,C,H,W].
    sigma: the first noise level.
    cond: keyword arguments of net. Default: none.
    """
    x, mean = latents * sigma, member(net, "prior_mean")(**(cond or {}))
    return x + mean.to(x) if torch.is_tensor(mean) else x


def draw_condition(
    net,
    generators: SeededGenerators,
    prompts: Sequence[str] | torch.Tensor | None = None,
    labels: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
) -> dict:
    """Condition of B samples, as keyword arguments of net; empty for unconditional networks.

    net: the denoiser.
    generators: generators of the B samples; the same as for ``draw_noise``, which comes first.
    prompts: list of prompts, from which every sample draws one. Needed by text-to-image networks.
        For restoration networks: degraded images, uint8 [N,C,H,W]. Default None.
    labels: class of all samples, or one class per sample. Default: None, drawn at random.
    negative_prompt: prompt of the unconditional side. Default: that of the network.
    """
    if not hasattr(net, "make_cond"):
        return {}
    given: dict = {} if labels is None else {"labels": labels}
    if prompts is not None:
        drawn = generators.randint(len(prompts))
        if torch.is_tensor(prompts):
            from torch_utils.images import from_uint8  # here, since solvers do not need Pillow

            given["images"] = from_uint8(prompts[drawn])
        else:
            given["prompts"] = [prompts[number] for number in drawn.tolist()]
        if negative_prompt is not None:
            given["negative_prompt"] = negative_prompt
    return net.make_cond(generators, **given)


def draw_inputs(
    net, seeds: Sequence[int], prompts=None, dtype: torch.dtype = torch.float32, device="cpu", **condition
) -> tuple[torch.Tensor, dict]:
    """(starting noise [B,C,H,W] on the device, condition) of B seeds.

    net: the denoiser.
    seeds: one per sample.
    prompts, condition: see ``draw_condition``.
    dtype: dtype in which the noise is drawn; float32 and float64 give different noise. Default
        float32.
    device: where the noise is put. Default: the CPU.
    """
    generators = SeededGenerators(seeds)
    latents = to_device(draw_noise(net, generators, dtype), device)
    return latents, draw_condition(net, generators, prompts, **condition)
