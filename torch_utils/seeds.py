"""Noise that depends on the seed alone.

One seed gives one image. Every sample draws from its own generator on the CPU, so batch size,
number of processes and device do not change what a seed means.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

import torch

from torch_utils.errors import UserError


class SeededGenerators:
    """One CPU generator per sample of a batch.

    ``randn`` and ``randint`` take the shape of a *single* sample and return a tensor
    [len(seeds), *shape]. Successive calls continue each sample's own stream.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = [int(seed) for seed in seeds]
        self._generators = [torch.Generator("cpu").manual_seed(seed % (1 << 32)) for seed in self.seeds]

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self._generators])

    def randint(self, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
        return torch.stack([torch.randint(high, tuple(shape), generator=g) for g in self._generators])

    def join(self, other: "SeededGenerators") -> None:
        """Samples with the same seed in ``other``, place by place, share its stream from now on."""
        pairs = zip(self.seeds, other.seeds, self._generators, other._generators, strict=True)
        self._generators = [theirs if seed == same else own for seed, same, own, theirs in pairs]


def candidate_seed(seed: int, number: int) -> int:
    """Seed of the noise of candidate ``number`` = 0, 1, ... of an image (32 bits).

    Candidate 0 has the image's own seed, the others a hash of (seed, number). So more candidates do
    not change the first ones.
    """
    return int(seed) if number == 0 else _hash32(f"candidate:{int(seed)}:{number}")


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def stream_seeds(seed: int, start: int, count: int) -> list[int]:
    """32-bit seeds of the samples ``start .. start + count - 1`` of the training stream ``seed``.

    They are hashes of (seed, index), so the division into processes and batches does not matter,
    and the stream differs from the seeds 0, 1, 2, ... of sampling. (A training sample collides with
    one of 50,000 evaluation seeds with probability 1e-5, which is harmless.)
    """
    return [_hash32(f"train:{seed}:{i}") for i in range(start, start + count)]


MOST_SEEDS = 10_000_000  # in one text, since they are kept in a list


def parse_seeds(text: str) -> list[int]:
    """The seeds of a text: ``"0-3,7,10-11"`` -> ``[0, 1, 2, 3, 7, 10, 11]``.

    Raises UserError on anything else, and on repeated seeds.
    """
    return [seed for part in parse_ranges(text) for seed in part]


def parse_ranges(text: str) -> list[range]:
    """``parse_seeds`` as ranges, in the order of the text. Fast for long ranges."""
    ranges: list[range] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part)
        if not match:
            raise UserError(f"seeds: '{part[:40]}' is not a number or a range; write seeds like 0-63 or 1,2,5-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"seeds: the range '{part.strip()}' is reversed; write the smaller number first")
        if last >= 1 << 32:
            raise UserError(f"seeds: '{part.strip()}' is out of range (seeds are below 2^32)")
        ranges.append(range(first, last + 1))
    if sum(len(part) for part in ranges) > MOST_SEEDS:
        raise UserError(f"seeds: '{text[:40]}' names more than {MOST_SEEDS} seeds; take fewer at a time")
    ordered = sorted(ranges, key=lambda part: part.start)
    if any(after.start < before.stop for before, after in itertools.pairwise(ordered)):
        raise UserError(f"seeds: '{text[:40]}' names a seed twice; list each once")
    return ranges


def among(seeds: Iterable[int], ranges: Sequence[range]) -> list[int]:
    """The seeds that are in one of the ranges (see ``parse_ranges``)."""
    ordered = sorted(ranges, key=lambda part: part.start)
    starts = [part.start for part in ordered]
    return [seed for seed in seeds if (at := bisect.bisect_right(starts, seed)) and seed in ordered[at - 1]]
