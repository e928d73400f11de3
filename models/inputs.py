"""Inputs of a denoiser: noise and a condition that depend on the seeds of the samples alone."""

from collections.abc import Mapping, Sequence

import torch

from models.denoiser import member
from torch_utils.seeds import SeededGenerators


def draw_noise(net, generators: SeededGenerators, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Starting noise [B,C,H,W] of the network's samples, on the CPU; see ``Denoiser.draw_latents``."""
    return member(net, "draw_latents")(generators, dtype)


def initial_state(net, latents: torch.Tensor, sigma, cond: Mapping | None = None) -> torch.Tensor:
    """State [B,C,H,W] at the first noise level: latents * sigma around the network's prior mean.

    latents: starting noise [B,C,H,W].
    sigma: the first noise level.
    cond: keyword arguments of net. Default: none.
    """
    x, mean = latents * sigma, member(net, "prior_mean")(**(cond or {}))
    return x + mean.to(x) if torch.is_tensor(mean) else x


def draw_condition(
    net,
    generators: SeededGenerators,
    prompts: Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
) -> dict:
    """Condition of B samples, as keyword arguments of ``net``; an empty dict if it takes none.

    generators: of the B samples. Those of ``draw_noise``, if noise was drawn before.
    prompts: texts of which every sample draws one; text-to-image networks need them. Default: None.
    labels: class of all samples, or B classes. Default: None, every sample draws one.
    negative_prompt: text of the unconditional side. Default: None, that of the network.
    """
    if not hasattr(net, "make_cond"):
        return {}
    given: dict = {} if labels is None else {"labels": labels}
    if prompts is not None:
        given["prompts"] = [prompts[number] for number in generators.randint(len(prompts)).tolist()]
        if negative_prompt is not None:
            given["negative_prompt"] = negative_prompt
    return net.make_cond(generators, **given)


def draw_inputs(
    net, seeds: Sequence[int], prompts=None, dtype: torch.dtype = torch.float32, device="cpu", **condition
) -> tuple[torch.Tensor, dict]:
    """(unit-variance noise [B,C,H,W] on the device, condition) of B seeds.

    prompts, condition: of ``draw_condition``.
    dtype: in which the noise is drawn; float32 and float64 are different noise. Default: float32.
    """
    generators = SeededGenerators(seeds)
    latents = draw_noise(net, generators, dtype).to(device)
    return latents, draw_condition(net, generators, prompts, **condition)
