"""What a trajectory starts from: noise and a condition that depend on the sample's seed alone."""

from collections.abc import Sequence

import torch

from torch_utils.seeds import SeededGenerators


def draw_inputs(net, seeds: Sequence[int], prompts: Sequence[str] | None = None, dtype=torch.float32, device="cpu"):
    """(unit-variance noise [B,C,H,W], keyword arguments of net) of these seeds.

    prompts: for text-to-image networks, of which every sample draws one.
    """
    generators = SeededGenerators(seeds)
    latents = generators.randn([net.img_channels, net.img_resolution, net.img_resolution], dtype).to(device)
    return latents, draw_condition(net, generators, prompts)


def draw_condition(net, generators: SeededGenerators, prompts: Sequence[str] | None = None) -> dict:
    """Keyword arguments of net: a class, or one of the prompts, for every generator."""
    if prompts is not None:
        numbers = generators.randint(len(prompts)).tolist()
        return net.make_cond(generators, prompts=[prompts[number] for number in numbers])
    return net.make_cond(generators) if net.label_dim else {}
