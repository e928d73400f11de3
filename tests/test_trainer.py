"""training/trainer.py and models/inputs.py: the shared trainer; noise and condition by seed."""

from types import SimpleNamespace

import pytest
import torch

import tools.train_denoiser as train_denoiser
from models.inputs import draw_inputs
from solvers import SOLVERS
from solvers.search.problem import Problem
from solvers.solver import check_teacher, teachers
from torch_utils import distributed
from torch_utils.errors import UserError
from training import amed_trainer, ld3, span_trainer
from training.run import BaseRun
from training.run_folder import read_state
from training.trainer import BaseTrainer, NotFinite


class Small(BaseTrainer):
    kept = {"net": "net", "optimizer": "optimizer", "it": "iteration", "best": "best"}
    device = torch.device("cpu")

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.net, self.best = torch.nn.Linear(2, 1), {"value": torch.ones(1)}
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def iterate(self):
        self.optimizer.zero_grad()
        self.net(torch.ones(1, 2)).square().sum().backward()
        self.optimizer.step()
        self.iteration += 1


def test_a_state_is_a_copy_and_is_put_back_whole():
    trainer, other = Small(), Small(seed=1)
    trainer.iterate()
    state = trainer.state()
    weights = trainer.net.weight.detach().clone()
    for _ in range(2):
        trainer.iterate()
    expected = trainer.net.weight.detach().clone()
    trainer.best["value"] += 1
    assert torch.equal(state["net"]["weight"], weights) and state["it"] == 1 and state["best"]["value"] == 1
    other.load_state(state)
    other.best["value"] += 1
    assert state["best"]["value"] == 1
    for _ in range(2):
        other.iterate()
    assert torch.equal(other.net.weight, expected) and other.iteration == 3  # with Adam's moments
    live = trainer.state(copied=False)
    assert live["net"]["weight"].data_ptr() == trainer.net.weight.data_ptr()


def test_one_exception_for_losses_that_are_not_finite(monkeypatch):
    for module in (amed_trainer, span_trainer, ld3, train_denoiser):
        assert module.NotFinite is NotFinite
    for kind in (amed_trainer.Distiller, span_trainer.SpanTrainer, ld3.Trainer, train_denoiser.DenoiserTrainer):
        assert issubclass(kind, BaseTrainer)
    for finite, ranks in (([True, False, False], [1, 2]), ([True, True, True], [0, 1, 2])):
        monkeypatch.setattr(distributed, "gather_objects", lambda value, finite=finite: finite)
        assert NotFinite.found(True, 4).ranks == ranks and NotFinite.found(True, 4).interval == 4


def test_the_frame_ends_a_run_that_is_not_finite_in_one_line(tmp_path):
    class Run(BaseRun):
        shown = 0

        def finished(self):
            return self.trainer.iteration == 3

        def iterate(self):
            if self.trainer.iteration == 2:
                raise NotFinite([0])
            return super().iterate()

        def show(self, bar, statistics, seconds):
            self.shown += 1

        def after_iteration(self, stopping):
            assert not stopping

        def progress_bar(self):
            from torch_utils.progress import progress_bar

            return progress_bar(3)

        def failure_text(self, error):
            return f"rank {error.ranks}"

    run = Run(Small(), SimpleNamespace(batch=4), tmp_path)
    with pytest.raises(UserError, match=r"rank \[0\]"):
        run.loop()
    assert run.shown == 2 and run.nimg == 8 and run.kimg == 0.008


def test_states_are_read_in_one_place(tmp_path):
    torch.save({"net": {}}, tmp_path / "a.pt")
    assert read_state(tmp_path / "a.pt", {"net"}) == {"net": {}}
    with pytest.raises(UserError, match="cannot read .*it is not a training state"):
        read_state(tmp_path / "a.pt", {"net", "ema"})


def test_who_may_teach():
    compared = teachers(per_step=True)  # their directions, step by step
    assert set(teachers()) - set(compared) == {"dpm_v3", "evodiff", "pfdiff"}  # only their samples
    assert not {"amed", "span", "edm"} & set(teachers())
    for name in SOLVERS:
        if name in compared:
            check_teacher(name)
        else:
            with pytest.raises(UserError, match=f"'{name}' cannot be the teacher"):
                check_teacher(name)


class Classes(torch.nn.Module):
    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 2, 4, 10, 0.002, 80.0

    def make_cond(self, generator=None, labels=None, prompts=None, negative_prompt=None):
        if prompts is not None:
            return {"prompts": list(prompts), "negative_prompt": negative_prompt}
        drawn = generator.randint(self.label_dim).tolist() if labels is None else [labels] * len(generator.seeds)
        return {"class_labels": drawn}


def test_noise_and_condition_of_seeds():
    """Each sample has a generator: its noise first, then its class or the number of its prompt."""
    noise, classes, texts, prompts = [], [], [], ["a", "b", "c"]
    for seed in (3, 8, 5):
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(2, 4, 4, generator=generator))
        after = generator.get_state()
        classes.append(int(torch.randint(10, (), generator=generator)))
        generator.set_state(after)
        texts.append(prompts[int(torch.randint(3, (), generator=generator))])
    net = Classes()
    latents, cond = draw_inputs(net, (3, 8, 5))
    assert torch.equal(latents, torch.stack(noise)) and cond == {"class_labels": classes}
    assert draw_inputs(net, (3, 8, 5), labels=7)[1] == {"class_labels": [7, 7, 7]}
    assert draw_inputs(net, (3, 8, 5), prompts)[1] == {"prompts": texts, "negative_prompt": None}
    assert draw_inputs(SimpleNamespace(img_channels=2, img_resolution=4), (3,))[1] == {}
    problem = Problem(net, "euler", 4, prompts=prompts, negative_prompt="n")
    latents, cond = problem.noise([3, 8, 5])
    assert torch.equal(latents, torch.stack(noise).double()) and cond == {"prompts": texts, "negative_prompt": "n"}
