"""Noise belongs to the seed: not to the batch, the order or the generator's neighbours."""

import pytest
import torch

from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators, candidate_seed, parse_seeds, stream_seeds


def test_noise_of_a_seed_is_that_of_a_plain_torch_generator():
    noise = SeededGenerators([5, 123]).randn([2, 4, 4])
    for row, seed in enumerate((5, 123)):
        expected = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise[row], expected)


def test_noise_does_not_depend_on_the_batch_and_later_draws_continue_the_stream():
    together, alone = SeededGenerators([7, 8, 9]), SeededGenerators([9])
    assert torch.equal(together.randn([3])[2], alone.randn([3])[0])
    assert torch.equal(together.randint(1000)[2], alone.randint(1000)[0])
    again = together.randn([3])
    assert torch.equal(again[2], alone.randn([3])[0])
    assert not torch.equal(again[2], SeededGenerators([9]).randn([3])[0])


def test_noise_has_unit_variance_and_seeds_are_uncorrelated():
    noise = SeededGenerators(range(200)).randn([1000], dtype=torch.float64)
    assert abs(noise.mean().item()) < 0.01 and abs(noise.var().item() - 1) < 0.02
    correlation = noise @ noise.T / 1000 - torch.eye(200, dtype=torch.float64)
    assert correlation.abs().max() < 0.25  # 5 standard deviations of 1/sqrt(1000) are 0.16


def test_classes_cover_the_range():
    drawn = SeededGenerators(range(300)).randint(10)
    assert drawn.shape == (300,) and set(drawn.tolist()) == set(range(10))


def test_training_stream_can_be_dealt_out_in_any_way():
    whole = stream_seeds(3, 0, 100)
    assert stream_seeds(3, 0, 37) + stream_seeds(3, 37, 63) == whole
    assert len(set(whole)) == 100 and set(whole).isdisjoint(stream_seeds(4, 0, 100))
    assert all(0 <= seed < 1 << 32 for seed in whole) and min(whole) > 50_000  # apart from the seeds of sampling


def test_parse_seeds():
    assert parse_seeds("0-3,7, 10-11") == [0, 1, 2, 3, 7, 10, 11]
    assert parse_seeds("5") == [5] and parse_seeds(6) == [6] and parse_seeds("4294967295") == [4294967295]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-", "0-2,2", "4294967296", "0-200000000", "1.5"])
def test_parse_seeds_refuses(text):
    with pytest.raises(UserError, match="seeds"):
        parse_seeds(text)


def test_candidates_of_every_seed_have_noise_of_their_own():
    """The first candidate is the seed's own image; no other noise occurs twice."""
    assert [candidate_seed(seed, 0) for seed in (0, 7, 4_000_000_000)] == [0, 7, 4_000_000_000]
    drawn = [candidate_seed(seed, number) for seed in range(100) for number in range(1, 5)]
    assert len(set(drawn)) == 400 and all(0 <= seed < 1 << 32 for seed in drawn)
    assert set(drawn).isdisjoint(stream_seeds(0, 0, 1000)) and set(drawn).isdisjoint(range(50_000))
