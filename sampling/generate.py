"""Images from seeds, batch after batch. One seed is one image, whatever the batch size and the number of processes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from models.inputs import draw_noise
from solvers import SampleInfo, sample
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import first_batch, is_out_of_memory, release_memory
from torch_utils.seeds import SeededGenerators, candidate_seed
from torch_utils.session import Interrupted
from torch_utils.transfer import to_device


@dataclass
class Batch:
    """Result of one batch. images: [B,C,H,W] in about [-1, 1]; intermediates: [K,B,C,H,W] denoised images, or None; cond:
    what the network was called with."""

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
    device: torch.device | str | None = None,
    **arguments,
) -> Iterator[Batch]:
    """Samples batch after batch; the noise (and the class, if none is given) of an image depends on its seed alone.

    labels: None, one class for all, or one per seed. prompts: of text-to-image networks, one text for all, or texts by
    seed; negative_prompt: for the unconditional side (None: the network's default). candidates: so many images for each
    seed, one after the other, of one class or prompt, the first of them the usual one. first: how many of all these images
    to leave out. keep_intermediates: also the denoised images at the start of every interval. arguments: as of ``solvers.sample`` (solver, num_steps, afs, ...). device:
    where net is (found if None).
    """
    if device is None:
        device = next(net.parameters()).device
    rows = [(index, number) for index in range(len(seeds)) for number in range(candidates)][first:]

    def draw(start: int) -> tuple:
        part = rows[start : start + batch]
        chosen = [int(seeds[index]) for index, _ in part]
        noises = SeededGenerators([candidate_seed(seeds[index], number) for index, number in part])
        latents = to_device(draw_noise(net, noises), device)
        generators = noises
        if candidates > 1:  # the class is drawn after the noise of the seed itself
            generators = SeededGenerators(chosen)
            draw_noise(net, generators)
        of_batch = labels if labels is None or isinstance(labels, int) else [labels[index] for index, _ in part]
        cond = net.make_cond(generators, of_batch, **_text_of(chosen, prompts, negative_prompt))
        noises.join(generators)
        return chosen, noises, latents, cond

    drawn = draw(0) if rows else None
    for start in range(0, len(rows), batch):
        chosen, noises, latents, cond = drawn
        denoised: list[torch.Tensor] = []

        def keep(i, sigma, x, image, denoised=denoised):
            denoised.append(net.decode(image))

        x, info = sample(
            net,
            latents,
            predictor=predictor,
            cond=cond,
            return_info=True,
            callback=keep if keep_intermediates else None,
            noise=lambda noises=noises: draw_noise(net, noises),
            **arguments,
        )
        images = net.decode(x)
        if start + batch < len(rows):  # while a GPU still works on the images above: nothing has waited for them yet
            drawn = draw(start + batch)
        yield Batch(chosen, images, torch.stack(denoised) if keep_intermediates else None, info, cond)


def prompts_of(seeds: list[int], prompts: str | Mapping[int, str] | None) -> list[str] | None:
    """One text per seed, None without prompts."""
    if prompts is None:
        return None
    return [prompts if isinstance(prompts, str) else prompts[seed] for seed in seeds]


def generate_fitting(net, seeds: Sequence[int], *, device: torch.device, **arguments) -> Iterator[Batch]:
    """The same with the largest batch that memory allows: it is halved when an allocation fails, and that is said.

    The images are those of any other batch. Raises UserError where not even one image fits.
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
                raise UserError(f"{device} is out of memory even with --batch=1: use another device or --amp") from None
        release_memory()
        batch //= 2


def _tell_batch(batch: int, device: torch.device) -> int:
    rank = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
    print(f"Note: --batch=auto: {batch} images at once fit into the memory of {device}{rank}", file=sys.stderr)
    return batch


def until_stopped(batches: Iterator[Batch], received: list[int]) -> Iterator[Batch]:
    """The batches, up to a failure of another process (UserError) or to a signal (Interrupted)."""
    for result in batches:
        yield result
        distributed.check_peers()
        if received:
            raise Interrupted(received[0], ": the images that are done are kept; repeat the command to go on")


def _text_of(seeds: list[int], prompts: str | Mapping[int, str] | None, negative_prompt: str | None) -> dict:
    """Keyword arguments of ``make_cond``; none for networks that take no prompts."""
    own = prompts if isinstance(prompts, str) else prompts_of(seeds, prompts)
    text = {"prompts": own, "negative_prompt": negative_prompt}
    return {name: value for name, value in text.items() if value is not None}
