"""Images by search along the path of the reverse SDE, one seed after the other."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch

from models.inputs import draw_noise
from sampling.generate import Batch
from solvers import SampleInfo, Solver
from solvers.particle_search import PathSearch, search_path
from torch_utils.seeds import SeededGenerators, candidate_seed


@torch.no_grad()
def search_images(
    net,
    seeds: Sequence[int],
    reward: Callable[[torch.Tensor, int, dict], float],
    *,
    method: str,
    budget: int,
    first: int,
    sigmas: torch.Tensor,
    finish: Solver,
    device: torch.device,
    labels: int | None = None,
    text: Callable[[list[int]], dict] = lambda seeds: {},
) -> Iterator[Batch]:
    """The best image that a search finds for every seed.

    The noise of an image depends on its seed alone: starting noise k is that of candidate k, and
    the stochastic steps use the candidates that follow.

    net: the network.
    seeds: one per image.
    reward: function (image [1,C,H,W] in [-1, 1], seed, condition) -> number; larger is better.
    method: see ``solvers.particle_search.search_path``.
    budget: network evaluations per image.
    first: number of starting noises.
    sigmas: noise levels [N] of the steps.
    finish: solver that finishes the best path.
    device: where net is.
    labels: class of all images. Default None: drawn by the seed.
    text: function seeds -> keyword arguments of ``make_cond`` about prompts. Default: none.
    """
    for seed in seeds:
        numbers = count()

        def draw(seed=seed, numbers=numbers) -> SeededGenerators:
            return SeededGenerators([candidate_seed(seed, next(numbers))])

        own = SeededGenerators([seed])
        draw_noise(net, own)  # the class is drawn after the noise of the seed itself
        cond = net.make_cond(own, labels, **text([seed]))
        latents = [draw_noise(net, draw()).to(device) for _ in range(first)]
        uniform = torch.Generator().manual_seed(seed % (1 << 32))
        search = PathSearch(
            net,
            lambda image, seed=seed, cond=cond: reward(net.decode(image), seed, cond),
            lambda draw=draw: draw_noise(net, draw()),
            sigmas,
            cond,
            finish,
        )

        def number(generator=uniform) -> float:
            return float(torch.rand((), generator=generator))

        found = search_path(search, latents, budget, method, uniform=number)
        info = SampleInfo(sigmas=search.sigmas, nfe=found.nfe)
        yield Batch([seed], net.decode(found.x), None, info, cond)
