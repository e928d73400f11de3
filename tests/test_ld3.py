"""LD3: grids, gradients against differences, errors on a known problem, resuming."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from latent_nets import tiny_case
from test_solvers_properties import TwoGaussians
from toy import ToyNet

import optimize_schedule
import sample as sample_cli
from models import build_denoiser, create_model
from solvers import SOLVERS, get_schedule, integrate, sample
from solvers.schedule_file import load_schedule, save_schedule
from solvers.search.problem import Problem
from solvers.solver import Euler, register
from torch_utils.errors import UserError
from torch_utils.session import Interrupted
from training import ld3, schedule_search
from training.ld3 import Grid, LD3Run, NotFinite, Pairs, Trainer, check_gradients
from training.sample_loss import huber
from training.schedule_search import METHODS, optimize

ROOT = Path(__file__).resolve().parents[1]
DIFFERENTIABLE = [
    name
    for name, solver in SOLVERS.items()
    if solver.differentiable and not solver.stochastic and not solver.needs_predictor
]
SMALL = {"num_train": 16, "num_valid": 16, "update_batch": 8, "rounds": 6, "rounds_grid": 2, "loss": "l2"}
QUICK = {**SMALL, "num_train": 4, "num_valid": 2, "update_batch": 2, "num_steps_tea": 5, "rounds": 2, "rounds_grid": 1}


class Mixture(TwoGaussians):
    """Two Gaussians in every pixel, over the whole range of noise levels."""

    sigma_min, sigma_max, std = 0.002, 80.0, 0.3


def problem(**changes):
    return Problem(**({"net": Mixture(), "solver": "ipndm", "num_steps": 6} | changes))


def options(**changes):
    return METHODS["ld3"].settings({**SMALL, **changes})


def trained(problem, **changes):
    """A trainer in front of its first update."""
    trainer = Trainer(problem, options(**changes))
    trainer.deal()
    trainer.run_teacher()
    trainer.start()
    return trainer


# ---- the schedule and its parameters -------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lambda", "time"])
@pytest.mark.parametrize("kind", ["polynomial", "logsnr", "time_uniform"])
def test_the_start_is_the_initial_schedule(kind, mode):
    initial = get_schedule(7, 0.002, 80, kind, 7 if kind == "polynomial" else 1)
    sigmas, sigma_cond = Grid(initial, mode).levels()
    torch.testing.assert_close(sigmas, initial, rtol=1e-9, atol=0)
    assert torch.equal(sigma_cond, sigmas) and torch.equal(sigmas[[0, -1]], initial[[0, -1]])


@pytest.mark.parametrize("mode", ["lambda", "time"])
def test_any_parameters_give_a_schedule(mode):
    """Descending with fixed ends; sigma_cond stays within half of the gap beside its sigma."""
    generator = torch.Generator().manual_seed(0)
    initial = get_schedule(6, 0.002, 80)
    for spread in (0.1, 1.0, 10.0, 1000.0):
        for _ in range(50):
            grid = Grid(initial, mode)
            grid.u.data = spread * torch.randn(5, generator=generator, dtype=torch.float64)
            grid.v.data = spread * torch.randn(4, generator=generator, dtype=torch.float64)
            grid.project()
            sigmas, sigma_cond = (value.detach() for value in grid.levels())
            assert (sigmas.diff() < 0).all() and (sigma_cond.diff() <= 1e-12).all()
            for levels in (sigmas, sigma_cond):
                assert levels[0] == initial[0] and levels[-1] == initial[-1]
            where, asked = (grid._coordinate(value) for value in (sigmas, sigma_cond))
            gaps = where.diff()
            share = ((asked - where)[1:-1].abs() / torch.minimum(gaps[:-1], gaps[1:])).max()
            assert share <= 0.5 * (1 + 1e-6)
    assert share > 0.4  # large v does reach the bound


def test_learned_levels_of_a_file_are_continued():
    initial = get_schedule(5, 0.002, 80)
    grid = Grid(initial)
    grid.v.data = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
    sigmas, sigma_cond = (value.detach() for value in grid.levels())
    again = Grid(sigmas, initial_net=sigma_cond).levels()
    torch.testing.assert_close(again[1].detach(), sigma_cond, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", ["ipndm", "dpmpp", "unipc"])
def test_nothing_learned_is_the_solver_itself(solver):
    frozen = {"lr": 0, "lr_net": 0, "radius": 0, "init": "polynomial"}
    net = ToyNet()
    found = optimize(problem(net=net, solver=solver), "ld3", {**QUICK, **frozen})
    expected = get_schedule(6, 0.002, 80).clone()
    expected[0], expected[-1] = 80, 0.002
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert found.sigmas == expected.tolist() and found.sigmas_cond is None
    grid = Grid(expected)
    sigmas, sigma_cond = (value.detach() for value in grid.levels())
    x = sample(net, latents, solver=solver, sigmas=sigmas, sigmas_cond=sigma_cond)
    torch.testing.assert_close(x, sample(net, latents, solver=solver, num_steps=6), rtol=0, atol=1e-9)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", DIFFERENTIABLE)
def test_gradients_equal_differences(solver, afs):
    """With respect to both kinds of parameters and the noise, through a checkpointed network."""
    net = ToyNet()
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = latents.flip(0) / 10
    plain = {"thresholding": False} if "thresholding" in SOLVERS[solver].options else {}  # it has kinks everywhere

    def loss(point):
        grid = Grid(get_schedule(5, 0.002, 80))
        grid.u, grid.v = point[:4], point[4:7]
        sigmas, sigma_cond = grid.levels()
        settings = {
            "sigmas": sigmas,
            "sigmas_cond": sigma_cond,
            "solver": solver,
            "afs": afs,
            "checkpointing": True,
            **plain,
        }
        return huber(integrate(net, latents + point[7] * target, **settings), target).sum()

    # Where v is 0, the bounds of the levels, which follow u without a gradient, do not matter.
    point = torch.tensor([0.2, -0.4, 0.1, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    leaf = point.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    expected, step = torch.zeros_like(point), 1e-5
    with torch.no_grad():
        for i, shift in enumerate(step * torch.eye(len(point), dtype=torch.float64)):
            expected[i] = (loss(point + shift) - loss(point - shift)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    assert (expected.abs() > 1e-4 / 768**0.5).sum() >= 7  # pfdiff does not evaluate at every point


@pytest.mark.parametrize("solver", DIFFERENTIABLE)
@pytest.mark.parametrize("afs", [False, "data"])
def test_the_check_lets_differentiable_solvers_pass(solver, afs):
    net = Mixture()
    net.data_mean, net.data_std = torch.zeros(1, 2, 2), 1.0
    check_gradients(problem(net=net, solver=solver, afs=afs), get_schedule(6, 0.002, 80))


@pytest.mark.parametrize(
    "step",
    [lambda d, by: by.detach() * d, lambda d, by: by * d.detach(), lambda d, by: float(by.detach()) * d.detach()],
)
def test_wrong_gradients_are_refused(step):
    @register("wrong")
    class Wrong(Euler):
        def update(self, x, history, sigma_next, index, total, scale=1.0):
            d, sigma = history[-1]
            return x + step(d, sigma_next - sigma)

    with pytest.raises(UserError, match="the solver 'wrong' gives wrong ones"):
        optimize(problem(solver="wrong"), "ld3", SMALL)


@pytest.mark.parametrize("solver, reason", [("edm", "draws noise"), ("dpm_v3", "does not have them")])
def test_solvers_without_gradients_are_refused(solver, reason):
    with pytest.raises(UserError, match=reason):
        optimize(problem(solver=solver), "ld3", SMALL)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_does_not_grow_with_evaluations(checkpointing):
    """Bytes that autograd keeps per evaluation, without those that checkpointing recomputes."""
    net, kept = create_model("digits"), []
    for num_steps in (3, 6):
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        sigmas = get_schedule(num_steps, 0.002, 80).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = integrate(net, torch.zeros(1, 1, 32, 32), solver="euler", sigmas=sigmas, checkpointing=checkpointing)
        kept.append((sum(seen.values()), x))
    growth = (kept[1][0] - kept[0][0]) / 3 / (4 * 32 * 32)  # of images
    assert growth < 10 if checkpointing else growth > 100


# ---- what it finds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver, changes",
    [("ipndm", {}), ("dpmpp", {"mode": "time"}), ("unipc", {"loss": "huber"}), ("heun", {"radius": 0})],
)
def test_errors_fall(solver, changes):
    """Distance to the true solution, on noise not optimised for, from a start that is not good."""
    this = problem(solver=solver)
    start = {"init": "time_uniform", "rounds": 12}
    found = optimize(this, "ld3", {**SMALL, **start, "solver_tea": "heun", "num_steps_tea": 40, **changes})
    latents = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    net = Mixture()
    exact = net.solution(latents * 80, get_schedule(100, 0.002, 80, "logsnr"))[-1]
    errors = [
        float((sample(net, latents, solver=solver, **settings) - exact).square().mean().sqrt())
        for settings in (
            {"sigmas": found.sigmas, "sigmas_cond": found.sigmas_cond},
            {"num_steps": 6, "schedule_type": "time_uniform", "schedule_rho": 1},
        )
    ]
    assert errors[0] < 0.85 * errors[1], errors
    assert found.sigmas[0] == 80 and found.sigmas[-1] == 0.002 and found.evaluations > 0


def test_directions_by_the_level_of_the_network():
    """The search uses the option, and the file has it: it is better with it than without."""
    losses = {}
    for level in ("point", "network"):
        option = {"direction_sigma": level}
        this = problem(options=option)
        trainer = trained(this, rounds=10, rounds_grid=0, lr_net=20.0)
        levels = LD3Run(trainer).run()
        assert optimize(this, "ld3", QUICK).solver_options == option
        for used in ("point", "network"):
            this.options = {"direction_sigma": used}
            losses[level, used] = trainer.validate(*levels)
    assert losses["point", "point"] < losses["point", "network"]
    assert losses["network", "network"] < losses["network", "point"]


def test_validation_decides():
    """Much too long steps do no harm: the result is the start or better, and rates fall."""
    trainer = Trainer(problem(), options(lr=5.0, lr_net=50.0, patience=1, valid_every=1, radius=0))
    sigmas, sigma_cond = LD3Run(trainer).run()
    trainer.valid, loss = trainer.valid, trainer.validate(sigmas, sigma_cond)
    assert loss == trainer.best["loss"] <= trainer.first
    assert trainer.optimizers[0].param_groups[0]["lr"] < 5.0


def test_auto_starts_with_the_best():
    this = problem(solver="dpmpp")
    losses = {kind: trained(this, init=kind).first for kind in ("polynomial", "time_uniform", "logsnr")}
    assert trained(this).first == min(losses.values()) < max(losses.values())


def test_starting_points_stay_in_the_ball_and_losses_fall():
    trainer = trained(problem(), radius=0.5)
    assert trainer.radius == pytest.approx(0.5 * 4 / 25)
    sigmas, sigma_cond = trainer.levels()
    (pairs,) = trainer.train[0]
    losses = []
    for _ in range(6):
        losses.append(trainer.gradients(pairs, sigmas, sigma_cond)[0])
        lengths = (pairs.relaxed - pairs.latents).flatten(1).norm(dim=1)
        assert (lengths <= trainer.radius * (1 + 1e-12)).all()
    assert (losses[-1] <= losses[0]).all() and losses[-1].mean() < 0.9 * losses[0].mean()
    assert (lengths > 0.9 * trainer.radius).any()  # the ball is what stops them
    strict = trained(problem(), radius=0)
    (pairs,) = strict.train[0]
    strict.gradients(pairs, sigmas, sigma_cond)
    assert torch.equal(pairs.relaxed, pairs.latents)


def test_what_the_network_is_told_is_frozen_at_first():
    for rounds_grid, sigma_cond in ((6, False), (5, True)):
        trainer = Trainer(problem(), options(rounds_grid=rounds_grid))
        LD3Run(trainer).run()
        assert bool(trainer.grid.v.any()) == sigma_cond
    trainer = Trainer(problem(), options(win_rate=0.0))
    assert LD3Run(trainer).run()[1] is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_evaluations(checkpointing):
    """Teacher, three starts, three parts of an update, and validations; repetitions count."""
    net = Mixture()
    small = {"num_train": 4, "num_valid": 2, "update_batch": 4, "rounds": 1, "num_steps_tea": 9, "loss": "l2"}
    found = optimize(problem(net=net), "ld3", {**small, "checkpointing": checkpointing})
    teacher, starts = (4 + 2) * 8, 3 * 2 * 5
    round_start = 2 * 5 * (3 if not checkpointing else 4)  # gradient, trial, the best once more
    update = 4 * 5 * (2 if not checkpointing else 3) + 2 * 5
    assert found.evaluations == teacher + starts + round_start + update


def test_seeds_and_network_calls():
    short = {**SMALL, "rounds": 2, "init": "time_uniform", "lr": 1e-3}
    found = [optimize(problem(seed=seed), "ld3", short).sigmas for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    other = optimize(problem(batch=3), "ld3", short).sigmas
    assert other == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("case", ["edm_song_cond", "ldm_uncond_vq"])
def test_classes_and_latents(case):
    facts, weights, _ = tiny_case(case)
    net = build_denoiser("edm" if case.startswith("edm") else "ldm", facts["init_kwargs"], weights)
    quick = {**QUICK, "num_train": 2, "rounds": 1, "rounds_grid": 0, "loss": "features"}
    found = optimize(problem(net=net, num_steps=4, afs=True), "ld3", quick)
    assert len(found.sigmas) == 4 and found.evaluations > 0


# ---- interruptions and breakdowns ----------------------------------------------------------------


class Killed(BaseException):
    pass


def test_resume_is_identical(tmp_path, monkeypatch):
    expected = optimize(problem(), "ld3", SMALL)
    this = {"state_path": tmp_path / "state"}
    real, calls = Trainer.update, []

    def dying(self, index):
        calls.append(index)
        if len(calls) in (4, 10):
            raise Killed
        real(self, index)

    monkeypatch.setattr(Trainer, "update", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            optimize(problem(**this), "ld3", SMALL)
    with pytest.raises(UserError, match="another lr "):
        optimize(problem(**this), "ld3", {**SMALL, "lr": 0.1})
    found = optimize(problem(**this), "ld3", SMALL)
    assert (found.sigmas, found.sigmas_cond) == (expected.sigmas, expected.sigmas_cond)
    assert found.evaluations == expected.evaluations
    assert len(calls) == 12 + 2 + 2  # those of the rounds that were not complete are made again


def test_a_signal_ends_the_run_after_an_update_and_nothing_is_lost(tmp_path, monkeypatch):
    expected = optimize(problem(), "ld3", SMALL)
    real, calls = Trainer.update, []

    def interrupted(self, index):
        calls.append(index)
        if len(calls) in (3, 8):  # in the middle of a round, and at the end of one
            os.kill(os.getpid(), signal.SIGINT)
        real(self, index)

    monkeypatch.setattr(Trainer, "update", interrupted)
    for _ in range(2):
        with pytest.raises(Interrupted, match="interrupted by SIGINT; repeat the command to continue"):
            optimize(problem(state_path=tmp_path / "state"), "ld3", SMALL)
    found = optimize(problem(state_path=tmp_path / "state"), "ld3", SMALL)
    assert (found.sigmas, found.sigmas_cond) == (expected.sigmas, expected.sigmas_cond)
    assert found.evaluations == expected.evaluations and len(calls) == 12


def breaking(after):
    """A network that gives nothing but nan from a certain call on."""
    net = Mixture()
    real = net.denoised
    net.denoised = lambda x, sigma: real(x, sigma) * (float("nan") if len(net.calls) > after else 1)
    return net


def test_nan_keeps_the_best(capsys, monkeypatch):
    monkeypatch.setattr(schedule_search, "try_schedule", lambda *_: None)  # the network is broken for ever
    net = Mixture()
    optimize(problem(net=net), "ld3", SMALL)
    found = optimize(problem(net=breaking(len(net.calls) * 9 // 10)), "ld3", SMALL)
    assert "Warning: stopped after" in capsys.readouterr().err
    assert found.sigmas != get_schedule(6, 0.002, 80).tolist()
    for after in (0, 20 + 3 * 5 + 7):  # at once, and in the first updates
        with pytest.raises(UserError, match="the loss at the start is|nothing better than the start"):
            optimize(problem(net=breaking(after)), "ld3", SMALL)


@pytest.mark.parametrize("rounds", [[3, 2], [2, 3], [2, 2]])
def test_processes_go_on_from_a_round_that_all_have(rounds, monkeypatch):
    """Two processes that were killed while they saved."""
    trainer = trained(problem())
    snapshots = []
    for trainer.iteration in range(4):
        snapshots.append(trainer.state())
    state = {
        "targets": [pairs.targets for pairs in trainer.calls],
        "snapshots": snapshots[rounds[0] - 1 : rounds[0] + 1],
    }
    monkeypatch.setattr(ld3.distributed, "gather_objects", lambda value: rounds if isinstance(value, int) else [value])
    assert LD3Run(trainer).restore(state) and trainer.iteration == 2


def test_not_finite_sums_stop_everybody():
    with pytest.raises(NotFinite):
        trained(problem())._summed(torch.tensor([1.0, float("inf")]))


# ---- command line --------------------------------------------------------------------------------

DIGITS = ("--method=ld3", "--dataset_name=digits", "--device=cpu")


def call(dest, *arguments, code=0):
    done = CliRunner().invoke(optimize_schedule.main, [*DIGITS, f"--dest={dest}", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def test_command_line_and_sampling(tmp_path):
    dest = tmp_path / "s.json"
    small = ("--num_train=2", "--num_valid=2", "--rounds=1", "--rounds_grid=0", "--num_steps_tea=5")
    output = call(dest, "--num_steps=4", "--solver=dpmpp", "--max_order=2", "--afs=True", *small)
    schedule = load_schedule(dest)
    assert "ld3 found 4 noise levels for dpmpp" in output and schedule.settings["loss"] == "features"
    assert schedule.sigmas[0] == 80 and schedule.sigmas[-1] == 0.002 and schedule.evaluations > 2 * 4
    flags = ["--dataset_name=digits", "--device=cpu", "--solver=dpmpp", "--max_order=2", "--afs=True", "--seeds=0-1"]
    done = CliRunner().invoke(sample_cli.main, [*flags, f"--schedule={dest}", f"--outdir={tmp_path / 'out'}"])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--loss=lpip",), "unknown term 'lpip'; choose from l2, huber, features, lpips, or module:function"),
        (("--loss=l2", "--feature_sigma=0.1"), "feature_sigma has no effect with loss=l2"),
        (("--feature_sigma=100",), "features at sigma=100: must be in the network's range"),
        (("--num_steps=2",), "num_steps of at least 3"),
        (("--solver=edm",), "draws noise: choose a deterministic one"),
        (("--solver_tea=amed",), "'amed' cannot be the teacher"),
        (("--win_rate=0.6",), "win_rate=0.6 must be within 0..0.5"),
        (("--num_valid=0",), "num_valid=0 must be at least 1"),
        (("--radius=-1",), "radius=-1.0 must be a finite number >= 0"),
        (("--num_steps_tea=1",), "num_steps=1"),
        (("--init=nowhere.json",), "cannot read the schedule nowhere.json"),
        (("--init=discrete",), "discrete noise table"),
        (("--coeff=1",), "--coeff has no effect with --method=ld3"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    (line,) = [line for line in call(tmp_path / "s.json", *arguments, code=2).splitlines() if line.startswith("Error")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_start_from_a_file(tmp_path):
    first = optimize(problem(), "ld3", SMALL)
    path = tmp_path / "first.json"
    save_schedule(path, first)
    again = trained(problem(), init=str(path))
    assert again.best["sigmas"].tolist() == first.sigmas and again.first < trained(problem()).first
    with pytest.raises(UserError, match="has 6 noise levels instead of num_steps=5"):
        optimize(problem(num_steps=5), "ld3", {**SMALL, "init": str(path)})


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    small = ("--num_train=4", "--num_valid=3", "--update_batch=3", "--rounds=2", "--rounds_grid=1", "--num_steps_tea=5")
    call(tmp_path / "one.json", "--num_steps=4", *small)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "optimize_schedule.py"), *DIGITS, f"--dest={tmp_path / 'two.json'}", "--num_steps=4", *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = (load_schedule(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two.sigmas == pytest.approx(one.sigmas, rel=1e-3)
    assert two.evaluations == one.evaluations + 1  # each process looks once where the features of the network are
    assert len(list(tmp_path.iterdir())) == 2


def test_pairs_belong_to_one_process(monkeypatch):
    """Whatever the number of processes and the size of a call, all pairs together are the same."""
    whole = trained(problem(), num_train=10, update_batch=4)
    expected = torch.cat([pairs.latents for pairs in whole.calls]).sum()
    parts, sizes = [], []
    for rank in range(3):
        monkeypatch.setattr(ld3.distributed, "world_size", lambda: 3)
        monkeypatch.setattr(ld3.distributed, "rank", lambda rank=rank: rank)
        trainer = Trainer(problem(batch=2), options(num_train=10, update_batch=4))
        trainer.deal()
        parts += [pairs.latents for pairs in trainer.calls]
        sizes.append([sum(len(pairs.latents) for pairs in batch) for batch in trainer.train])
        assert all(isinstance(pairs, Pairs) and len(pairs.latents) <= 2 for pairs in trainer.calls)
    assert torch.allclose(torch.cat(parts).sum(), expected)
    assert [sum(column) for column in zip(*sizes, strict=True)] == whole.sizes == [4, 4, 2]
