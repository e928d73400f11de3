"""optimize_schedule.py: usable files, costs, resuming, mistakes; how to add a method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from toy import ToyNet

import optimize_schedule as cli
from models import create_model
from solvers import get_schedule, sample
from solvers.schedule_file import load_schedule
from solvers.search.dmn import dmn_sigmas
from solvers.search.problem import Found, Problem
from solvers.solver import Option
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators
from training import schedule_search
from training.schedule_search import METHODS, Method, optimize

ROOT = Path(__file__).resolve().parents[1]
TEACHER_STEPS, SAMPLES = 9, 4
SMALL = (f"--num_steps_tea={TEACHER_STEPS}", f"--num_warmup={SAMPLES}", "--batch=2")
DIGITS = ("--dataset_name=digits", "--device=cpu")


def call(dest, *arguments, code=0):
    done = CliRunner().invoke(cli.main, [*DIGITS, f"--dest={dest}", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def line_of(done):
    """The one line of a mistake."""
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    return line


def toy_problem(**changes):
    return Problem(**({"net": ToyNet(), "solver": "euler", "num_steps": 5} | changes))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    dest = tmp_path_factory.mktemp("gits") / "schedule.json"
    done = call(dest, "--method=gits", "--num_steps=5", "--solver=ipndm", "--max_order=3", *SMALL)
    return dest, done


def test_gits_file(found):
    dest, done = found
    schedule = load_schedule(dest)
    grid = get_schedule(TEACHER_STEPS, 0.002, 80).tolist()
    assert len(schedule.sigmas) == 5 and set(schedule.sigmas) <= set(grid)
    assert schedule.sigmas[0] == grid[0] and schedule.sigmas[-1] == grid[-1]
    assert schedule.evaluations == SAMPLES * (TEACHER_STEPS - 1) and schedule.seconds > 0
    assert (schedule.method, schedule.solver, schedule.solver_options) == ("gits", "ipndm", {"max_order": 3})
    assert schedule.settings["num_warmup"] == SAMPLES and schedule.settings["coeff"] == 1.15
    net = create_model("digits")
    assert schedule.warnings(net, "ipndm", afs=False) == []
    assert {"code", "torch"} <= schedule.versions.keys()
    assert f"{schedule.evaluations} network evaluations" in done.output
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]  # no state is left behind
    assert sample(net, torch.zeros(1, 1, 32, 32), solver="ipndm", sigmas=schedule.sigmas).isfinite().all()


def test_dmn_file(tmp_path):
    call(tmp_path / "s.json", "--method=dmn", "--num_steps=5", "--solver=dpmpp", "--max_order=2")
    schedule = load_schedule(tmp_path / "s.json")
    assert schedule.sigmas == dmn_sigmas(5, 0.002, 80, "pixel", max_order=2).tolist()
    assert schedule.evaluations == 0 and schedule.settings["kind"] == "auto"


def test_existing_files_are_safe(found):
    dest, _ = found
    before = dest.read_bytes()
    assert "exists: choose another --dest" in line_of(call(dest, "--method=dmn", "--num_steps=3", code=2))
    assert dest.read_bytes() == before


def test_overwrite(tmp_path):
    (tmp_path / "s.json").write_text("old")
    call(tmp_path / "s.json", "--method=dmn", "--num_steps=3", "--overwrite=True", "--sigma_max=40")
    assert load_schedule(tmp_path / "s.json").sigmas[0] == 40


def test_resume(found, tmp_path, monkeypatch):
    """A run that dies in its second batch goes on there, with the same result and the same bill."""
    dest = tmp_path / "s.json"
    arguments = ("--num_steps=5", "--solver=ipndm", "--max_order=3", *SMALL)
    real, calls = schedule_search.gits_cost, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(schedule_search, "gits_cost", dying)
    call(dest, *arguments, code=130)
    assert not dest.exists() and len(list(tmp_path.iterdir())) == 1
    error = line_of(call(dest, *arguments, "--coeff=1.0", code=2))
    assert "interrupted run with another coeff (1.15 there, 1.0 now)" in error
    call(dest, *arguments)
    assert len(calls) == 3
    schedule, expected = load_schedule(dest), load_schedule(found[0])
    assert (schedule.sigmas, schedule.evaluations) == (expected.sigmas, expected.evaluations)
    assert list(tmp_path.iterdir()) == [dest]


def test_a_damaged_state(tmp_path):
    (tmp_path / ".s.json.state.0").write_bytes(b"torn")
    assert "delete it to start again" in line_of(call(tmp_path / "s.json", *SMALL, code=2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--method=dmn", "--coeff=1"), "--coeff has no effect with --method=dmn"),
        (("--solver=euler", "--max_order=2", *SMALL), "--max_order has no effect"),
        (("--solver=nope",), "unknown solver 'nope'"),
        (("--solver=amed",), "needs a trained predictor"),
        (("--num_steps=10", *SMALL), "num_steps=10: GITS chooses 2 to 9"),
        (("--num_steps=2", "--afs=True", *SMALL), "GITS with AFS needs num_steps and num_steps_tea of at least 3"),
        (("--num_steps=3", "--afs=True", "--num_steps_tea=2"), "num_steps_tea of at least 3"),
        (("--solver=dpm_v3", "--statistics=nowhere", "--afs=True", *SMALL), "there are no statistics nowhere"),
        (("--solver_tea=amed", *SMALL), "'amed' cannot be the teacher"),
        (("--num_warmup=0",), "num_warmup of at least 1"),
        (("--sigma_max=100", *SMALL), "sigma=100 is outside the network's range"),
        (("--sigma_max=0.001",), "0 < sigma_min < sigma_max"),
        (("--coeff=-1", *SMALL), "coeff=-1.0 must be a positive number"),
        (("--class=3",), "class"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    assert message in line_of(call(tmp_path / "s.json", *arguments, code=2))
    assert list(tmp_path.iterdir()) == []


def test_afs_counts_its_free_point():
    """Ours: num_steps sigmas, the free one among them.

    The published code adds the free one if there is room. Here there is none, since its teacher
    uses AFS as well (golden data, quirk 16).
    """
    options = {"num_steps_tea": 13, "num_warmup": 2, "schedule_type": "logsnr"}
    net = ToyNet()
    schedule = optimize(toy_problem(net=net, afs=True), "gits", options)
    grid = get_schedule(13, 0.002, 80, "logsnr").tolist()
    chain = [grid.index(sigma) for sigma in schedule.sigmas]
    assert len(chain) == 5 and chain[0] == 0 and chain[1] < chain[2] and chain[-1] == 12
    trials = chain[2] - 1  # every point before the third one, with 3 evaluations; and the teacher once more
    assert schedule.evaluations == 2 * (2 * 12 + 3 * trials)
    tried = 3  # evaluations of one image with the schedule found, which are not part of the search
    assert schedule.evaluations == 2 * (len(net.calls) - tried)
    published = optimize(toy_problem(afs=True), "gits", {**options, "original_code": True})
    assert len(published.sigmas) == 5 and grid.index(published.sigmas[1]) == 1


def test_a_teacher_of_lower_order_takes_its_highest():
    options = {"num_steps_tea": 9, "num_warmup": 2, "solver_tea": "dpmpp"}
    of_four = toy_problem(solver="ipndm", options={"max_order": 4})
    of_three = toy_problem(solver="ipndm", options={"max_order": 3})
    found = [optimize(problem, "gits", options) for problem in (of_four, of_three)]
    assert found[0].sigmas == found[1].sigmas and found[0].solver_options == {"max_order": 4}


def test_a_stochastic_student_draws_from_the_seed(monkeypatch):
    """Every trial the same, and nothing from the global generator."""
    drawn, randn = [], SeededGenerators.randn
    monkeypatch.setattr(SeededGenerators, "randn", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
    monkeypatch.delattr(torch, "randn_like")
    options = {"num_steps_tea": 9, "num_warmup": 4}
    found = optimize(toy_problem(solver="edm", options={"S_churn": 30.0}, afs=True, num_steps=3), "gits", options)
    # Latents for the costs and for the trials; then of all seven points in between two intervals of
    # noise each; at last one image with the schedule found.
    assert len(found.sigmas) == 3 and len(drawn) == 2 + 7 * 2 + 3
    assert all(torch.equal(noise, drawn[2 + index % 2]) for index, noise in enumerate(drawn[2:-3]))
    assert not torch.equal(drawn[2], drawn[1])


def test_seeds():
    options = {"num_steps_tea": 9, "num_warmup": 2}
    first, again, other = (optimize(toy_problem(seed=seed, num_steps=6), "gits", options) for seed in (0, 0, 1))
    assert first.sigmas == again.sigmas and other.settings["seed"] == 1
    noise = [toy_problem(seed=seed).noise(toy_problem(seed=seed).batches(2)[0])[0] for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert noise[0].dtype == torch.float64


def test_a_broken_network_stops_with_one_line():
    net = ToyNet()
    net.means.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        optimize(toy_problem(net=net), "gits", {"num_steps_tea": 9, "num_warmup": 2})


def test_a_method_is_one_entry_of_the_table(monkeypatch, tmp_path):
    def run(problem, *, power):
        net, (seeds,) = problem.net, problem.batches(3)
        latents, cond = problem.noise(seeds)
        net(latents, torch.tensor(1.0), **cond)
        sigmas = get_schedule(problem.num_steps, problem.sigma_min, problem.sigma_max, schedule_rho=power)
        return Found(sigmas, sigmas * 1.1)

    monkeypatch.setitem(METHODS, "mine", Method("a test", run, {"power": Option(float, 3.0, "a number")}))
    schedule = optimize(toy_problem(), "mine", {"power": 2})
    expected = get_schedule(5, 0.002, 80, schedule_rho=2)
    assert schedule.sigmas == expected.tolist() and schedule.sigmas_cond == (1.1 * expected).tolist()
    assert schedule.evaluations == 3 and schedule.settings["power"] == 2.0
    for method, options, message in (
        ("mine", {"x": 1}, "no option 'x'"),
        ("mine", {"power": "a"}, "a number"),
        ("?", {}, "unknown method"),
    ):
        with pytest.raises(UserError, match=message):
            optimize(toy_problem(), method, options)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(found, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "optimize_schedule.py"), *DIGITS, f"--dest={tmp_path / 's.json'}", *SMALL]
    command += ["--num_steps=5", "--solver=ipndm", "--max_order=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    schedule, expected = load_schedule(tmp_path / "s.json"), load_schedule(found[0])
    assert (schedule.sigmas, schedule.evaluations) == (expected.sigmas, expected.evaluations)
    assert len(list(tmp_path.iterdir())) == 1
