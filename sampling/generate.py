"""Images from seeds. One seed is one image, for any batch size and number of processes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.denoiser import member
from models.inputs import draw_noise
from sampling.inputs import ImageInputs
from solvers import SampleInfo, sample
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import first_batch, is_out_of_memory, release_memory
from torch_utils.seeds import SeededGenerators, candidate_seed
from torch_utils.session import Interrupted
from torch_utils.transfer import to_device


@dataclass
class Batch:
    """Result of one batch.

    seeds: one per image.
    images: [B,C,H,W] in about [-1, 1].
    intermediates: denoised images [K,B,C,H,W] of all intervals, or None.
    info: evaluations and noise levels of the run.
    cond: the condition that the network was called with.
    """

    seeds: list[int]
    images: torch.Tensor
    intermediates: torch.Tensor | None
    info: SampleInfo
    cond: Mapping


@torch.no_grad()
def generate_images(
    net,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    predictor=None,
    labels: int | Sequence[int] | None = None,
    prompts: str | Mapping[int, str] | None = None,
    negative_prompt: str | None = None,
    candidates: int = 1,
    first: int = 0,
    keep_intermediates: bool = False,
    inputs: ImageInputs | None = None,
    device: torch.device | str | None = None,
    **arguments,
) -> Iterator[Batch]:
    """Samples in batches. The noise (and a drawn class) of an image depends on its seed alone.

    net: the network.
    seeds: one per image.
    batch: images per network call. Default 64.
    predictor: AMEDPredictor or SpanSolver. Default None.
    labels: class of all images, or one per seed. Default None: drawn by the seed.
    prompts: text for all images, or texts by seed, for text-to-image networks. Default None.
    negative_prompt: text of the unconditional side. Default None: the network's default.
    candidates: images per seed. They share the class or prompt; candidate 0 uses the seed's own
        noise. Default 1.
    first: skip this many images (to resume). Default 0.
    keep_intermediates: also return the denoised images at the start of every interval.
    inputs: images that sampling starts from, by seed. A batch holds images of one size, so seeds
        should come in the order of ``inputs.order``. Default None.
    device: where net is. Default None: that of its parameters.
    arguments: keyword arguments of ``solvers.sample`` (solver, num_steps, afs, ...).
    """
    if device is None:
        device = next(net.parameters()).device
    rows = [(index, number) for index in range(len(seeds)) for number in range(candidates)][first:]

    def draw(start: int) -> tuple:
        part = rows[start : start + batch]
        chosen = [int(seeds[index]) for index, _ in part]
        denoiser, size, given = net, None, text_of(chosen, prompts, negative_prompt)
        if inputs is not None:
            part, chosen = part[: (same := inputs.same_size(chosen))], chosen[:same]
            denoiser, size, images = inputs.prepare(net, chosen, device)
            given |= images
        noises = SeededGenerators([candidate_seed(seeds[index], number) for index, number in part])
        latents = to_device(draw_noise(net, noises, size=size), device)
        generators = noises
        if candidates > 1:  # the class is drawn after the noise of the seed itself
            generators = SeededGenerators(chosen)
            draw_noise(net, generators, size=size)
        of_batch = labels if labels is None or isinstance(labels, int) else [labels[index] for index, _ in part]
        cond = net.make_cond(generators, of_batch, **given)
        noises.join(generators)
        return denoiser, chosen, noises, latents, cond

    drawn: Any = draw(0) if rows else None
    start = 0
    while start < len(rows):
        denoiser, chosen, noises, latents, cond = drawn
        start += len(chosen)
        denoised: list[torch.Tensor] = []

        def keep(i, sigma, x, image, denoised=denoised):
            denoised.append(net.decode(image))

        x, info = sample(
            denoiser,
            latents,
            predictor=predictor,
            cond=cond,
            return_info=True,
            callback=keep if keep_intermediates else None,
            noise=lambda noises=noises, like=latents: noises.randn(like.shape[1:]),
            **arguments,
        )
        images = net.decode(x)
        if start < len(rows):  # drawn while a GPU still computes the images above
            drawn = draw(start)
        yield Batch(chosen, images, torch.stack(denoised) if keep_intermediates else None, info, cond)


def prompts_of(seeds: list[int], prompts: str | Mapping[int, str] | None) -> list[str] | None:
    """One text per seed, None without prompts."""
    if prompts is None:
        return None
    return [prompts if isinstance(prompts, str) else prompts[seed] for seed in seeds]


def generate_fitting(net, seeds: Sequence[int], *, device: torch.device, **arguments) -> Iterator[Batch]:
    """``generate_images`` with the largest batch that fits into memory.

    The batch is halved whenever an allocation fails, and its size is printed. The images are those
    of any other batch size. Raises UserError if not even one image fits.
    """
    rows = len(seeds) * arguments.get("candidates", 1)
    batch, start, announced = min(first_batch(device), max(rows, 1)), 0, None
    while start < rows:
        try:
            for result in generate_images(net, seeds, batch=batch, device=device, first=start, **arguments):
                start += len(result.seeds)
                if announced != batch:
                    announced = _tell_batch(batch, device)
                yield result
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise UserError(
                    f"{device} is out of memory even with --batch=1: use another --device, or --amp"
                ) from None
        if (compiled := member(net, "compiled")) is not None:
            compiled.forget()  # else it would fill smaller batches up to the size that did not fit
        release_memory()
        batch //= 2


def _tell_batch(batch: int, device: torch.device) -> int:
    rank = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
    print(f"Note: --batch=auto: {batch} images at once fit into the memory of {device}{rank}", file=sys.stderr)
    return batch


def until_stopped(batches: Iterator[Batch], received: list[int]) -> Iterator[Batch]:
    """The batches, until another process fails (UserError) or a signal arrives (Interrupted)."""
    for result in batches:
        yield result
        distributed.check_peers()
        if received:
            raise Interrupted(received[0], ": finished images are kept; repeat the command to continue")


def text_of(seeds: list[int], prompts: str | Mapping[int, str] | None, negative_prompt: str | None) -> dict:
    """Keyword arguments of ``make_cond`` for the texts; empty without texts."""
    own = prompts if isinstance(prompts, str) else prompts_of(seeds, prompts)
    text = {"prompts": own, "negative_prompt": negative_prompt}
    return {name: value for name, value in text.items() if value is not None}
