"""Training of the span solver on final samples: what improves, continuing, and failures."""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from toy import ToyNet

from solvers import sample
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators
from torch_utils.session import Interrupted
from training import run as run_module
from training import span_trainer as final_loop
from training.checkpoint import load_predictor
from training.options import SpanOptions, grid_sigmas, learned, parse_phases
from training.run_folder import load_newest_state
from training.span_run import train_span
from training.span_trainer import PATIENCE, NotFinite, SpanTrainer
from training.teacher import teacher_set

USUAL = {"dataset_name": "custom", "seed": 3, "num_steps": 5, "pairs": 24, "val_pairs": 6, "batch": 4, "val_every": 5}
USUAL |= {"num_steps_tea": 21, "total_kimg": 0.08, "init": "preset", "heads": "none", "loss": "huber"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(ToyNet):
    """The mixture of Gaussians as ``create_model`` would return it."""

    weights_hash, source_path, evals_per_call = "toy", "toy.safetensors", 1

    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x, sigma):
        self.calls.clear()
        return super().forward(x, sigma)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("final")


@pytest.fixture
def toy_model(monkeypatch):
    monkeypatch.setattr(run_module, "create_model", lambda *_, **__: Toy())


def make_trainer(folder, net=None, **more) -> SpanTrainer:
    options = SpanOptions(**{**USUAL, **more})
    options.check(1)
    net = net or Toy()
    settings = options.teacher(0.002, 80.0)
    pairs = teacher_set(net, settings, folder / f"{settings.states}-{settings.pairs}.safetensors", batch=30)
    student = options.make_student(0.002, 80.0)
    if student.config["first_step"] == "gaussian":
        student.measure_gaussian(net)
    total = math.ceil(options.total_kimg * 1000 / options.batch)
    return SpanTrainer(net, student, pairs, options, total)


def train(trainer: SpanTrainer, iterations: int | None = None) -> torch.Tensor:
    count = trainer.total - trainer.iteration if iterations is None else iterations
    return torch.cat([trainer.iterate() for _ in range(count)])


def same_state(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_state(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same_state, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def stats(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (path.parent / "stats.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("sec")} for row in rows]


# What is learned


def test_trained_student_is_closer_to_the_truth_on_other_noise(folder):
    """The error against a solver with 200 steps, on seeds that training has not seen."""
    trainer = make_trainer(folder, num_steps=5, total_kimg=0.4)
    start = SpanSolver(**trainer.student.config)
    start.load_state_dict(trainer.student.state_dict())
    train(trainer)
    latents = SeededGenerators(range(40)).randn([3, 16, 16])
    truth = sample(trainer.net, latents, solver="ipndm", num_steps=201)

    def error(student):
        with torch.no_grad():
            return float((student.run(trainer.net, latents) - truth).square().flatten(1).mean(1).sqrt().mean())

    assert error(trainer.best_student()) < 0.6 * error(start)
    value, rms = trainer.first
    assert trainer.best["value"] < 0.6 * value and trainer.validation[1] < rms


@pytest.mark.parametrize("loss", ["l2", "huber+features"])
def test_other_losses_fall(folder, loss):
    trainer = make_trainer(folder, loss=loss, w_anchor=0.1, anchor=1.0, w_dist=0.05)
    before = trainer.validate()[0]
    rows = train(trainer)
    assert trainer.best["value"] < 0.95 * before
    assert rows[-5:, 0].mean() < rows[:5, 0].mean()


@pytest.mark.parametrize("preset", ["ld3", "s4s", "dyweight", "gs", "amed-table", "epd"])
def test_restrictions_keep_what_they_do_not_learn(folder, preset):
    trainer = make_trainer(folder, preset=preset, num_steps=4, phases="all:1")
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    train(trainer, 2)
    learned = set(trainer.student.groups())
    assert learned == {name for name in trainer.student.config["learn"] if before[name].numel()}
    moved = {name for name, value in trainer.student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == learned
    assert {
        name for name, value in trainer.averaged.state_dict().items() if not torch.equal(value, before[name])
    } == moved


def test_phases(folder):
    """Only the groups of a phase move in it, in either order."""
    trainer = make_trainer(folder, phases="knots+sigma_scale:1,coef_offset:3", total_kimg=0.032)  # 8 iterations
    assert [tuple(trainer._phase()) for trainer.iteration in range(8)] == [("knots", "sigma_scale")] * 2 + [
        ("coef_offset",)
    ] * 6
    trainer.iteration = 0
    start = trainer.student.state_dict()["coef_offset"].clone()
    train(trainer, 2)
    first = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    assert torch.equal(first["coef_offset"], start)
    train(trainer, 1)
    after = trainer.student.state_dict()
    assert not torch.equal(after["coef_offset"], start)
    assert all(torch.equal(after[name], first[name]) for name in ("knots", "sigma_scale", "state_gain"))


def test_heads_may_join_at_the_end(folder):
    """They change nothing before, and then lower the loss further."""
    phases = "knots+sigma_scale+coef_offset+state_gain:2,all:1"
    trainer = make_trainer(folder, heads="sample,spatial", total_kimg=0.12, phases=phases)  # 30 iterations
    assert ["heads" in trainer._phase() for trainer.iteration in range(30)] == [False] * 20 + [True] * 10
    trainer.iteration = 0
    start = [weight.clone() for weight in trainer.student.head_parameters()]
    train(trainer, 20)
    assert same_state(start, trainer.student.head_parameters())
    train(trainer)
    assert not any(map(torch.equal, start[-2:], trainer.student.head_parameters()[-2:]))
    assert not any(map(torch.equal, start[-2:], learned(trainer.averaged)["heads"][-2:]))
    alone = make_trainer(folder, heads="sample,spatial", phases="heads:1", lrs="heads=0.01")
    assert "shifts" not in alone.groups
    before = {name: value.clone() for name, value in alone.student.groups().items()}
    train(alone)
    assert same_state(before, alone.student.groups()) and alone.best["value"] < 0.99 * alone.first[0]


def test_phases_in_turn():
    learned = {"knots", "sigma_scale", "coef_offset"}
    once = parse_phases("labels:1,all:3", 1, learned)
    assert once == [(frozenset({"knots"}), 0.25), (frozenset(learned), 0.75)]
    assert parse_phases("labels:1,all:3", 2, learned) == [(groups, share / 2) for groups, share in once * 2]
    student = SpanOptions("custom", preset="s4s").make_student(0.002, 80.0)
    alternating = SpanOptions("custom", preset="s4s").phase_list(student)
    assert [sorted(groups) for groups, _ in alternating] == [["knots", "sigma_scale"], ["coef_offset"]] * 4
    for text in ("knots", "knots:0", "knots:x", "colour:1", "state_gain:1", ""):
        with pytest.raises(UserError, match="--phases="):
            parse_phases(text, 1, learned)


# The arithmetic of an iteration


def test_gradient_is_that_of_the_mean_loss(folder):
    """Whole batch and micro-batches, clipped, against autograd on a loss written out here."""
    found = []
    for batch_gpu in (None, 2, 1):
        trainer = make_trainer(folder, batch_gpu=batch_gpu, loss="l2", w_delta=0.3, phases="all:1")
        with torch.no_grad():
            trainer.student.coef_offset.add_(0.05)
        names = list(trainer.groups)
        trainer._accumulate(names)
        found.append({name: trainer.student.groups()[name].grad.clone() for name in names})
    student = trainer.student
    latents, _, images = trainer.pairs.batch(trainer._indices())
    loss = (student.run(trainer.net, latents) - images).square().mean() + 0.3 * student.coef_offset.square().sum()
    expected = torch.autograd.grad(loss, [student.groups()[name] for name in names])
    for gradients in found:
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_clipping_and_rates(folder):
    trainer = make_trainer(folder, clip=1e-3, lrs="knots=0.5,sigma_scale=0", warmup=4, lr_final=0.1, phases="all:1")
    time = trainer.student.sigma_scale.detach().clone()
    row = trainer.iterate()
    assert row[0, 3] > 1e-3  # what is reported is the norm before
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.student.groups().values()]
    assert float(torch.stack([m.norm() for m in moments]).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-6)
    assert torch.equal(trainer.student.sigma_scale, time)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.25)
    rates = [trainer._rate() for trainer.iteration in range(21)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * it / 20)) for it in range(21)]
    assert rates == pytest.approx([c * min(1, (it + 1) / 4) for it, c in enumerate(cosine)])


def test_the_average_soon_forgets_the_untrained_student(folder):
    """A long average starts short: it is nine tenths new after one iteration."""
    trainer = make_trainer(folder, ema=0.9999, phases="all:1")
    start = trainer.student.knots.detach().clone()
    train(trainer, 1)
    moved = trainer.student.knots.detach() - start
    assert float(moved.norm()) > 1e-4
    torch.testing.assert_close(trainer.averaged.knots.detach() - start, 0.9 * moved, rtol=1e-6, atol=0)
    trainer = make_trainer(folder, ema=0.05, phases="all:1")
    train(trainer, 1)
    moved = trainer.student.knots.detach() - start
    torch.testing.assert_close(trainer.averaged.knots.detach() - start, 0.95 * moved, rtol=1e-6, atol=0)


def test_a_student_without_finite_images_is_infinitely_bad(folder):
    net = Toy()
    trainer = make_trainer(folder, net)
    net.means = net.means * float("nan")
    assert trainer.validate() == (math.inf, math.inf) and trainer.best["value"] == math.inf


def test_small_gradients_are_not_scaled_up(folder):
    trainer = make_trainer(folder, clip=1e6, phases="all:1")
    norm = float(trainer.iterate()[0, 3])
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.student.groups().values()]
    assert float(torch.stack([m.norm() for m in moments]).norm()) == pytest.approx(0.1 * norm, rel=1e-6)


def test_of_equal_validations_the_first_is_the_best(folder):
    trainer = make_trainer(folder, phases="all:1")
    trainer.rates = dict.fromkeys(trainer.rates, 0.0)
    train(trainer)
    assert trainer.best["iteration"] == 0 and trainer.validation == trainer.first


@pytest.mark.parametrize("preset", ["amed-table", "epd"])
def test_a_place_can_cross_its_interval_in_a_short_run(folder, preset):
    """Adam moves a logit by its rate at most: 120 iterations have to reach 0.5 to 0.99."""
    trainer = make_trainer(folder, preset=preset, total_kimg=0.48)
    assert trainer.total == 120
    reach = sum(trainer._rate() for trainer.iteration in range(120))
    for name in ("substeps", "substep_sigma_scale", "step_gain", *(["coef_offset"] if preset == "epd" else [])):
        assert trainer.rates[name] * reach > math.log(0.99 / 0.01), name
    given = make_trainer(folder, preset=preset, lrs="inner=0.03").rates
    assert given["substeps"] == 0.03 and given["step_gain"] == trainer.rates["step_gain"]


def test_anchor(folder):
    """By hand at the levels where states are kept; gone after its share of the run."""
    trainer = make_trainer(folder, w_anchor=2.0, anchor=0.5)
    assert [trainer._anchor_weight() for trainer.iteration in (0, 5, 10, 15)] == [2.0, 1.0, 0.0, 0.0]
    sigmas = trainer.student.sigmas().detach()
    indices = [7, 9]
    wanted = trainer.pairs.states_at(indices, sigmas[1:-1])
    shift = torch.tensor([0.0, 0.3, 0.0])[:, None, None, None, None] * torch.ones_like(wanted)
    states = torch.cat([wanted[:1], wanted + shift, wanted[:1]])
    value = trainer._anchor(states, indices)
    torch.testing.assert_close(value, torch.full([2], 0.09 / float(sigmas[2]) ** 2), rtol=1e-3, atol=1e-6)


def test_every_pair_once_per_epoch(folder, monkeypatch):
    trainer = make_trainer(folder)

    def drawn(iteration, world=1, rank=0):
        monkeypatch.setattr(final_loop.distributed, "world_size", lambda: world)
        monkeypatch.setattr(final_loop.distributed, "rank", lambda: rank)
        trainer.iteration, trainer.share = iteration, 4 // world
        return trainer._indices()

    epochs = [[index for it in range(e * 6, e * 6 + 6) for index in drawn(it)] for e in range(2)]
    assert all(sorted(epoch) == list(trainer.pairs.train) for epoch in epochs) and epochs[0] != epochs[1]
    assert drawn(2, 2, 0) + drawn(2, 2, 1) == drawn(2)


# Failures


class Spoilt(Toy):
    """Answers NaN in the backward pass or the forward pass while ``bad``."""

    bad = None

    def forward(self, x, sigma):
        result = super().forward(x, sigma)
        if self.bad == "forward" and torch.is_grad_enabled():
            return result * float("nan")
        if self.bad == "backward" and result.requires_grad:
            result.register_hook(lambda gradient: gradient * float("nan"))
        return result


@pytest.mark.parametrize("bad", ["forward", "backward"])
def test_a_gradient_that_is_not_finite_is_skipped(folder, bad):
    net = Spoilt()
    trainer = make_trainer(folder, net, w_dist=0.1)
    said = []
    trainer.report = said.append
    train(trainer, 2)
    before = trainer.state()
    net.bad = bad
    row = trainer.iterate()
    after = trainer.state()
    assert row[0, -1] == 1 and said == ["Warning: no finite gradient in iteration 3: skipped"] and row.isfinite().all()
    for name in ("predictor", "optimizer", "averaged", "best"):
        assert same_state(before[name], after[name])
    assert after["queue"].isfinite().all()
    net.bad = None
    assert train(trainer, 1)[0, -1] == 0 and trainer.failures == 0
    net.bad = bad
    with pytest.raises(NotFinite):
        train(trainer, PATIENCE)
    assert all(value.isfinite().all() for value in trainer.student.state_dict().values())


def test_a_run_of_failures_ends_with_the_last_good_state(toy_model, tmp_path, monkeypatch):
    net = Spoilt()
    monkeypatch.setattr(run_module, "create_model", lambda *_, **__: net)
    accumulate = SpanTrainer._accumulate

    def spoiling(self, trained):
        net.bad = "forward" if self.iteration >= 3 else None
        return accumulate(self, trained)

    monkeypatch.setattr(SpanTrainer, "_accumulate", spoiling)
    with pytest.raises(UserError, match="no finite gradient in 5 iterations in a row, up to iteration 8"):
        train_span({**USUAL, "outdir": str(tmp_path)})
    (run,) = tmp_path.glob("0*")
    state = load_newest_state(run)
    assert state["failures"] == 0 and all(value.isfinite().all() for value in state["predictor"].values())
    assert (run / "log.txt").read_text().count("skipped") == 5


# Runs


def test_what_a_run_leaves(toy_model, tmp_path):
    path = train_span({**USUAL, "outdir": str(tmp_path), "init": "ab@polynomial:7,dpmpp@logsnr", "desc": "x"})
    assert path.parent.name == "00000-custom-5-3-span-full-deis-x"
    names = sorted(entry.name for entry in path.parent.iterdir())
    assert names == ["log.txt", "predictor-000000.080.safetensors", "stats.jsonl", "training-state-000000.pt"] + [
        "training_options.json"
    ]
    assert [entry.suffix for entry in (tmp_path / "teacher-sets").iterdir()] == [".safetensors"]
    student = load_predictor(path)
    assert isinstance(student, SpanSolver) and student.config["preset"] == "full" and student.evaluations() == 3
    facts = student.provenance
    assert facts["network_hash"] == "toy" and facts["kimg"] == 0.08 and facts["seed"] == 3 and facts["loss"] == "huber"
    assert facts["validation"]["best"] < facts["validation"]["first"]
    recorded = json.loads((path.parent / "training_options.json").read_text())
    recorded.pop("provenance")
    assert SpanOptions.from_dict(recorded).init == "ab@polynomial:7,dpmpp@logsnr"
    log = (path.parent / "log.txt").read_text()
    assert "starts: " in log and f"trained {path} NFE=3" in log
    latents = SeededGenerators(range(4)).randn([3, 16, 16])
    images = sample(Toy(), latents, solver="span", predictor=student)
    best = load_newest_state(path.parent)["best"]
    assert same_state({**student.state_dict()}, best["state"]) and images.isfinite().all()
    assert best["value"] == pytest.approx(facts["validation"]["best"])


def test_the_best_start_is_taken(toy_model, tmp_path):
    names = ["ab@polynomial:7", "euler@logsnr", "dpmpp@dmn"]
    kept = {
        **USUAL,
        "outdir": str(tmp_path),
        "teacher_set": str(tmp_path / "set"),
        "total_kimg": 0.004,
        "init_pairs": 24,
        "init_trial": 0.0,
    }
    first = {}
    for init in (*names, ",".join(names)):
        path = train_span({**kept, "init": init})
        state = load_newest_state(path.parent)
        first[init] = (state["first"][0], state["student_config"]["base"], state["student_config"]["sigmas"])
    chosen = first.pop(",".join(names))
    assert chosen == min(first.values())
    assert len({value[0] for value in first.values()}) == 3
    expected = grid_sigmas("polynomial:7", 5, 0.002, 80.0, Toy())
    assert first[names[0]][1:] == ("ab", pytest.approx(expected))


@pytest.mark.parametrize("more", [{}, {"w_dist": 0.1}], ids=str)
def test_the_start_that_learns_best_is_taken(toy_model, tmp_path, more):
    """The best untrained starts are tried from the same state; the run then begins untrained."""
    names = ["ab@polynomial:7", "euler@logsnr", "dpmpp@polynomial:4", "ab@polynomial:4", "ipndm@polynomial:7"]
    kept = {
        **USUAL,
        "teacher_set": str(tmp_path / "set"),
        "total_kimg": 0.08,
        "init_pairs": 24,
        "val_every": 1000,
        **more,
    }
    short = {**kept, "total_kimg": 0.016, "warmup": 1}  # what a trial of a fifth comes to, warm-up and all
    untrained, trained, starts = {}, {}, {}
    for number, init in enumerate(names):
        path = train_span({**short, "init": init, "outdir": str(tmp_path / str(number))})
        state = load_newest_state(path.parent)
        untrained[init], trained[init] = state["first"][0], state["validation"][0]
        starts[init] = (state["student_config"]["base"], state["student_config"]["sigmas"])
    said = train_span({**kept, "init": ",".join(names), "init_trial": 0.2, "outdir": str(tmp_path / "all")}).parent
    state = load_newest_state(said)
    finalists = re.search(r"after 4 iterations: (.*)", (said / "log.txt").read_text())[1]
    assert len(finalists.split(", ")) == 3
    for part in finalists.split(", "):
        name, value = part.split()
        assert float(value) == pytest.approx(trained[name], rel=1e-3)
    winner = finalists.split()[0]
    assert (state["student_config"]["base"], state["student_config"]["sigmas"]) == starts[winner]
    assert state["first"][0] == untrained[winner]


@pytest.mark.parametrize("more", [{}, {"w_dist": 0.1, "w_anchor": 0.1, "preset": "s4s"}])
def test_continuing_after_an_interruption_is_bit_for_bit(toy_model, tmp_path, monkeypatch, more):
    settings = {**USUAL, **more, "tick": 0.02, "outdir": str(tmp_path)}
    straight = train_span(settings)
    iterate = SpanTrainer.iterate

    def interrupted(self):
        if self.iteration == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self)

    with monkeypatch.context() as patch:
        patch.setattr(SpanTrainer, "iterate", interrupted)
        with pytest.raises(Interrupted):
            train_span(settings)
    folder = sorted(tmp_path.glob("0*"))[1]
    state = load_newest_state(folder)
    assert state["iteration"] == 8
    path = train_span(state["options"], run_dir=folder, resume=True)
    one, two = load_newest_state(straight.parent), load_newest_state(folder)
    for name in ("predictor", "optimizer", "iteration", "averaged", "best", "validation", "first", "queue"):
        assert same_state(one[name], two[name]), name
    assert same_state({**load_predictor(straight).state_dict()}, {**load_predictor(path).state_dict()})
    assert stats(straight)[-1] == stats(path)[-1]
    with pytest.raises(UserError, match="has reached 0.08 kimg"):
        train_span(state["options"], run_dir=folder, resume=True)


def test_a_damaged_state_is_explained(toy_model, tmp_path):
    path = train_span({**USUAL, "outdir": str(tmp_path)})
    state_path = next(path.parent.glob("*.pt"))
    state = load_newest_state(path.parent)
    state["options"]["total_kimg"] = 1
    for change in ({"student_config": {"num_steps": 9}}, {"student_config": {"colour": 1}}, {"student_config": None}):
        torch.save({**state, **change}, state_path)
        with pytest.raises(UserError, match="is not that of a span solver"):
            train_span(state["options"], run_dir=path.parent, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "best"}, "preset=best: choose from"),
        ({"num_steps": 1}, "at least 2"),
        ({"num_steps": 2}, "would not evaluate the network|nothing to learn"),
        ({"init": "ab@cosine"}, "unknown grid 'cosine'"),
        ({"init": "rk4@logsnr"}, "unknown base 'rk4'"),
        ({"init": "ab@polynomial:x"}, "'x' is not an exponent"),
        ({"init": "ab", "schedule_type": "logsnr"}, "give only one of them"),
        ({"schedule_rho": 3.0, "init": None}, "--schedule_rho needs --schedule_type"),
        ({"loss": "l3"}, "unknown term 'l3'"),
        ({"heads": "temporal"}, "heads: unknown 'temporal'"),
        ({"lrs": "knots"}, "'knots' should be group=rate"),
        ({"lrs": "scale=1"}, "does not learn 'step_gain'"),
        ({"lrs": "knots=0,sigma_scale=0,coef_offset=0,state_gain=0"}, "all learning rates are 0"),
        ({"phases": "scale:1"}, "nothing is learned"),
        ({"w_dist": -1.0}, "w_dist=-1.0"),
        ({"w_dist": float("nan")}, "w_dist=nan"),
        ({"ema": 1.0}, "ema=1"),
        ({"clip": 0.0}, "clip=0"),
        ({"pairs": 2}, "pairs=2 must be at least the batch, 4"),
        ({"val_pairs": 0}, "val_pairs=0"),
        ({"sampler_tea": "edm"}, "'edm' cannot be the teacher"),
        ({"schedule_tea": "cosine"}, "schedule_tea=cosine"),
        ({"sampler_stu": "amed"}, "it trains a span student"),
        ({"afs": "perhaps"}, "afs='perhaps'"),
        ({"feature_sigma": 100.0, "loss": "features"}, "range, 0.002..80"),
        ({"sigma_max": 0.001}, "sigma_min < sigma_max"),
        ({"sigmas": [1.0, 2.0], "init": None}, "strictly decreasing"),
        ({"batch": 4, "batch_gpu": 3}, "batch_gpu=3 must divide"),
        ({"lr": 0.1}, "unknown training option 'lr'"),
    ],
)
def test_impossible_settings_leave_no_run(toy_model, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_span({**USUAL, **change, "outdir": str(tmp_path / "exps")})
    assert not list((tmp_path / "exps").glob("0*"))
