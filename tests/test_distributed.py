"""Waiting for each other: longer than an exchange may take, but not for a process that has died."""

import os
import time

import pytest
import torch
from two_processes import LONGEST, on_two

from torch_utils import distributed
from torch_utils.errors import UserError


def test_a_late_process_is_waited_for():
    """Longer than the timeout of an exchange; also where it comes with an error in the end."""

    timeout = 5

    def work(rank):
        if rank == 1:
            time.sleep(timeout + 3)
        distributed.agree(None)
        assert distributed.gather_objects(rank) == [0, 1]
        distributed.agree(UserError("too late") if rank == 1 else None)

    found, seconds = on_two(work, timeout)
    assert found == {0: "UserError: stopped because rank 1 failed: too late", 1: "UserError: too late"}
    assert seconds > timeout + 3


def test_a_dead_process_is_not_waited_for():
    def work(rank):
        if rank == 1:
            os._exit(3)
        distributed.agree(None)

    found, seconds = on_two(work, timeout=2 * LONGEST)
    assert list(found) == [0] and not found[0].startswith("fine") and seconds < LONGEST / 5


def test_without_other_processes():
    assert distributed.gather_objects(5) == [5]
    distributed.agree(None)
    with pytest.raises(UserError, match="mine"):
        distributed.agree(UserError("mine"))


def _wait_for(path) -> None:
    end = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)


def _slow_network(rank: int, marker):
    """A tiny network whose calls on rank 1 begin when the marker is there."""
    from test_execution import tiny_network

    net, _, _ = tiny_network("edm_song_uncond")
    if rank == 1:
        net.register_forward_pre_hook(lambda *_: _wait_for(marker))
    return net


def test_nothing_waits_for_a_slow_process_while_images_are_made(tmp_path):
    """Rank 1 makes its first image when rank 0 has made all of its own."""
    from sampling.generate import generate_images

    def work(rank):
        net = _slow_network(rank, tmp_path / "made")
        settings = {"solver": "euler", "num_steps": 3, "batch": 1}
        batches = list(generate_images(net, range(rank, 6, 2), device="cpu", **settings))
        assert [batch.seeds for batch in batches] == [[seed] for seed in range(rank, 6, 2)]
        if rank == 0:
            (tmp_path / "made").touch()
        distributed.wait_for_all()

    assert on_two(work)[0] == {0: "fine", 1: "fine"}


def test_a_training_waits_for_a_slow_process_only_where_gradients_are_summed(tmp_path, monkeypatch):
    """Rank 1 begins its iteration when rank 0 has finished its part of the first interval."""
    from training.amed_trainer import Distiller

    own = distributed.all_reduce_sum

    def work(rank):
        def reduce(tensor):
            if rank == 0:
                (tmp_path / "first interval").touch()
            return own(tensor)

        monkeypatch.setattr(distributed, "all_reduce_sum", reduce)
        net = _slow_network(rank, tmp_path / "first interval")
        config = {"sampler_stu": "amed", "sampler_tea": "heun", "num_steps": 3, "scale_dir": 0.01}
        statistics = Distiller(net, config, batch=2, seed=1).iterate()
        everyone = distributed.gather_objects(statistics.tolist())
        assert everyone[0] == everyone[1]

    assert on_two(work)[0] == {0: "fine", 1: "fine"}


def test_a_few_step_network_is_the_same_from_one_and_two_processes():
    """Gradients are summed, and both processes draw the same number of time steps."""
    from test_sfd import Toy, weights_of

    from training.sfd_trainer import SFDTrainer

    def weights():
        net, more = Toy(weights_of("toy", "v0.before.")), {"lr": 1e-3, "dtype": torch.float64}
        trainer = SFDTrainer(net, {"M": 1}, num_steps=(3, 4), total=8, batch=4, seed=2, **more)
        for _ in range(3):
            trainer.iterate()
        return torch.cat([value.detach().flatten() for value in trainer.student.parameters()])

    alone = weights()

    def work(rank):
        own = weights()
        assert torch.allclose(own, alone, atol=1e-9)
        assert len({value.sum().item() for value in distributed.gather_objects(own)}) == 1

    assert on_two(work)[0] == {0: "fine", 1: "fine"}
