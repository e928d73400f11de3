"""The evolutionary search: genomes, known optima, resuming, and its two objectives."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toy import ToyNet

import optimize_schedule as cli
from evaluation.fid import choose_detector, find_reference
from evaluation.frechet import FeatureStatistics, frechet_distance
from models import create_model
from sampling.schedule_search import fid_functions
from solvers import get_schedule, sample
from solvers.schedule_file import load_schedule
from solvers.search import evolution
from solvers.search.evolution import Evolution, cross, mutate, random_genome, snap
from solvers.search.problem import Problem
from torch_utils.errors import UserError
from torch_utils.images import to_uint8
from training.schedule_search import optimize

ROOT = Path(__file__).resolve().parents[1]
TINY = {"num_samples": 3, "num_steps_tea": 9, "grid_points": 9, "population": 8, "generations": 2, "elites": 3}
FLAGS = tuple(f"--{name}={value}" for name, value in TINY.items())


def rng(seed=0):
    return np.random.default_rng(seed)


def valid(genome, length, size):
    return (
        len(genome) == len(set(genome)) == length
        and list(genome) == sorted(genome)
        and (genome[0], genome[-1]) == (0, size - 1)
        and all(isinstance(point, int) for point in genome)
    )


@pytest.mark.parametrize(("length", "size"), [(2, 2), (2, 9), (5, 5), (5, 6), (6, 30)])
def test_genomes_keep_their_points_and_ends(length, size):
    random = rng()
    for _ in range(200):
        a, b = random_genome(length, size, random), random_genome(length, size, random)
        mutant, near, child = mutate(a, 0.5, size, random), mutate(a, 1.0, size, random, reach=1), cross(a, b, random)
        assert all(valid(genome, length, size) for genome in (a, b, mutant, near, child))
        assert set(a) & set(b) <= set(child) <= set(a) | set(b)
        assert child == a if a == b else True


def test_mutation_rate_and_reach():
    genome, random = tuple(range(0, 201, 10)), rng()
    changed = [len(set(genome) - set(mutate(genome, 0.25, 201, random))) for _ in range(400)]
    assert np.mean(changed) == pytest.approx(0.25 * 19, rel=0.05)
    near = [mutate(genome, 0.5, 201, random, reach=3) for _ in range(100)]
    assert all(max(abs(a - b) for a, b in zip(genome, other, strict=True)) <= 3 for other in near)
    assert len({other[1] for other in near}) == 7


def test_crossing_takes_from_both():
    a, b = (0, 1, 2, 3, 4, 20), (0, 3, 10, 11, 12, 20)
    children = [cross(a, b, rng(seed)) for seed in range(300)]
    assert all({0, 3, 20} <= set(child) for child in children)
    for point in (1, 2, 4, 10, 11, 12):
        assert 0.4 < np.mean([point in child for child in children]) < 0.6


def test_snapping():
    grid = get_schedule(256, 0.002, 80, "logsnr")
    for kind, rho in evolution.CUSTOMARY:
        sigmas = get_schedule(7, 0.002, 80, kind, rho)
        genome = snap(sigmas, grid)
        assert valid(genome, 7, 256)
        assert (grid[list(genome)] / sigmas).log().abs().max() <= 0.5 * math.log(80 / 0.002) / 255 + 1e-9
    coarse = get_schedule(8, 0.002, 80, "logsnr")
    for kind, rho in evolution.CUSTOMARY:  # they fall together on so few points
        for length in range(2, 9):
            assert valid(snap(get_schedule(length, 0.002, 80, kind, rho), coarse), length, 8)


SIZE, LENGTH = 16, 6
TARGET = torch.tensor([0.0, 0.6, 1.7, 3.1, 5.2, 15.0])


def toy_fitness(genome):
    """Rugged, with one optimum."""
    points = torch.tensor(genome, dtype=torch.float64)
    return float((points - TARGET).square().sum() + 0.3 * (7 * points).sin().abs().sum())


def toy_search(**changes):
    customary = [tuple(range(0, 16, 3)), (0, 1, 2, 4, 8, 15)]
    settings = {"population": 30, "generations": 8, "elites": 8} | changes
    return Evolution(LENGTH, SIZE, customary, **settings)


@pytest.mark.parametrize("reach", [0, 2])
def test_it_finds_the_optimum(reach):
    everything = [(0, *inner, SIZE - 1) for inner in itertools.combinations(range(1, SIZE - 1), LENGTH - 2)]
    best = min(everything, key=toy_fitness)
    found = 0
    for seed in range(3):
        search = toy_search(seed=seed, reach=reach)
        search.run(toy_fitness)
        assert len(search.seen) == 270 < len(everything) / 3 and all(valid(g, LENGTH, SIZE) for g in search.seen)
        found += search.ranked()[0] == best
    assert found >= 2


def test_generations():
    """Each genome is tried once. Parents are the best so far. Generation 0 has the usual ones."""
    search, tried, values = toy_search(), [], []

    def fitness(genome):
        tried.append(genome)
        return toy_fitness(genome)

    search.run(fitness, lambda: values.append(min(search.seen.values())))
    assert len(tried) == len(set(tried)) == 30 * 9 and tried == list(search.seen)
    assert tried[:2] == search.customary
    best = [min(map(toy_fitness, tried[: 30 * (k + 1)])) for k in range(9)]
    assert best == sorted(best, reverse=True) and values == sorted(values, reverse=True) and best[-1] < best[0]
    # The half of a later generation that mutates shares more with the elites than the random part
    # does.
    elites = sorted(tried[:240], key=toy_fitness)[:8]
    shared = [max(len(set(genome) & set(elite)) for elite in elites) for genome in tried[240:]]
    assert np.mean(shared[:24]) > np.mean(shared[24:]) + 0.5


def test_seeds():
    runs = []
    for seed in (0, 0, 1):
        search = toy_search(seed=seed)
        search.run(toy_fitness)
        runs.append(search.seen)
    assert list(runs[0].items()) == list(runs[1].items()) and list(runs[0]) != list(runs[2])


@pytest.mark.parametrize("killed_at", [1, 30, 95])
def test_a_killed_search_goes_on_as_if_it_had_not_been(killed_at, tmp_path):
    whole, first, second = toy_search(), toy_search(), toy_search()
    whole.run(toy_fitness)

    def after():
        torch.save(first.state(), tmp_path / "state.pt")
        if len(first.seen) == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(toy_fitness, after)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(second.seen) == killed_at
    tried = []
    second.run(lambda genome: tried.append(genome) or toy_fitness(genome))
    assert list(second.seen.items()) == list(whole.seen.items()) and len(tried) == 270 - killed_at


def test_broken_candidates_are_discarded():
    def fitness(genome):
        return [float("nan"), float("inf"), toy_fitness(genome)][genome[1] % 3]

    search = toy_search()
    search.run(fitness)
    assert all(genome[1] % 3 == 2 for genome in search.ranked()) and search.ranked()
    for value in (float("nan"), float("inf")):
        search = toy_search()
        with pytest.raises(UserError, match="none of 30 schedules gave finite images"):
            search.run(lambda genome, value=value: value)


@pytest.mark.parametrize(("length", "size", "count"), [(2, 2, 1), (2, 16, 1), (6, 6, 1), (4, 6, 6)])
def test_fewer_genomes_than_the_population(length, size, count):
    grid = get_schedule(size, 0.002, 80, "logsnr")
    search = Evolution(length, size, [snap(get_schedule(length, 0.002, 80), grid)], generations=2)
    search.run(lambda genome: float(sum(genome)))
    assert len(search.seen) == count and search.ranked()[0] == (*range(length - 1), size - 1)


# Objectives


def toy_problem(**changes):
    return Problem(**({"net": ToyNet(), "solver": "euler", "num_steps": 4, "batch": 2} | changes))


@pytest.mark.parametrize(("solver", "afs"), [("euler", False), ("ipndm", True), ("heun", False), ("pfdiff", False)])
def test_distance_finds_the_best_of_all_schedules(solver, afs):
    task = toy_problem(solver=solver, afs=afs)
    grid = get_schedule(9, 0.002, 80, "logsnr")
    generous = {**TINY, "population": 21}  # as many as there are schedules
    found = optimize(task, "evolution", generous)
    latents = torch.cat([task.noise(seeds)[0] for seeds in task.batches(3)])
    target = sample(task.net, latents, solver="heun", num_steps=9)

    def distance(chain):
        x = sample(task.net, latents, solver=solver, sigmas=grid[list(chain)], afs=afs)
        return float((x - target).flatten(1).square().mean(dim=1).sqrt().mean())

    best = min(((0, *inner, 8) for inner in itertools.combinations(range(1, 8), 2)), key=distance)
    assert found.sigmas == grid[list(best)].tolist()


def test_a_stochastic_solver_gets_the_same_noise(monkeypatch):
    monkeypatch.delattr(torch, "randn_like")  # nothing from the global generator
    task = {"solver": "edm", "options": {"S_churn": 20.0}}
    first, again = (optimize(toy_problem(**task), "evolution", TINY).sigmas for _ in range(2))
    objectives = evolution.Objectives(
        toy_problem(**task),
        get_schedule(9, 0.002, 80, "logsnr"),
        toy_problem().teacher("heun", 9, "polynomial", 7.0),
        3,
        2,
    )
    assert first == again and objectives.distance((0, 2, 5, 8)) == objectives.distance((0, 2, 5, 8))


def test_fid_objective_takes_the_least():
    """FID is of decoded images; one that is not finite counts as NaN."""

    class Decoding(ToyNet):
        def decode(self, x):
            return x * (float("nan") if float(self.calls[-2][0]) > 20 else 2)

    task, seen = toy_problem(net=Decoding()), []

    def make_fid_fn(ref, detector, count):
        assert (ref, detector, count) == ("mine", "auto", 3)

        def fid_fn(batches):
            images = list(batches)
            seen.append(len(images))
            return float(torch.cat(images).std()) if images else 0.0

        return fid_fn

    task.make_fid_fn = make_fid_fn
    options = {**TINY, "population": 21, "objective": "fid", "fid_samples": 3, "ref": "mine"}
    found = optimize(task, "evolution", options)
    grid = get_schedule(9, 0.002, 80, "logsnr")
    latents = torch.cat([task.noise(seeds)[0] for seeds in task.batches(3)])

    def spread(chain):
        x = sample(task.net, latents, solver="euler", sigmas=grid[list(chain)])
        return float((2 * x).std())

    chains = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), 2)]
    usable = [chain for chain in chains if grid[chain[1]] <= 20]
    assert found.sigmas == grid[list(min(usable, key=spread))].tolist() and found.sigmas[1] <= 20
    assert seen.count(0) == len(chains) - len(usable)


def test_finalists_are_compared_by_fid():
    task, scored = toy_problem(), []
    task.net.decode = lambda x: x

    def make_fid_fn(ref, detector, count):
        def fid_fn(batches):
            scored.append(torch.cat(list(batches)))
            return [7.0, 3.0, 5.0][len(scored) - 1]

        return fid_fn

    task.make_fid_fn = make_fid_fn
    options = {**TINY, "finalists": 3, "fid_samples": 4}
    found = optimize(task, "evolution", options)
    assert len(scored) == 3 and all(len(images) == 4 for images in scored)
    assert found.sigmas != optimize(toy_problem(), "evolution", TINY).sigmas  # but the second best by distance


def test_a_network_that_breaks_down():
    net = ToyNet()
    net.means.fill_(float("nan"))
    with pytest.raises(UserError, match="none of 8 schedules gave finite images"):
        optimize(toy_problem(net=net), "evolution", TINY)


# The command line


def call(dest, *arguments, code=0):
    base = ("--method=evolution", "--dataset_name=digits", "--device=cpu", f"--dest={dest}", "--batch=3")
    done = CliRunner().invoke(cli.main, [*base, *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    dest = tmp_path_factory.mktemp("evolution") / "s.json"
    flags = (*FLAGS, "--population=3", "--generations=1", "--num_steps_tea=4", "--finalists=2", "--fid_samples=3")
    done = call(dest, "--num_steps=3", "--solver=ipndm", *flags)
    return load_schedule(dest), done, dest


def test_file(found):
    schedule, done, dest = found
    grid = get_schedule(9, 0.002, 80, "logsnr").tolist()
    assert set(schedule.sigmas) <= set(grid) and (schedule.sigmas[0], schedule.sigmas[-1]) == (grid[0], grid[-1])
    assert schedule.method == "evolution" and schedule.settings["population"] == 3
    # Two generations of 3 candidates, 2 evaluations of 3 samples each; the teacher; the finalists.
    assert schedule.evaluations == 6 * 2 * 3 + 6 * 3 + 2 * 2 * 3
    assert "chosen from 6 schedules (polynomial " in done.output and "of 2 finalists" in done.output
    assert "3 images for 64 features" in done.output
    assert list(dest.parent.iterdir()) == [dest]


OF_KILLED = {**TINY, "finalists": 3, "fid_samples": 4, "grid_points": 12}  # 24 candidates
KILLED = """
import os, signal, sys
from test_evolution import OF_KILLED, fid_problem
from training.schedule_search import Problem, optimize

save, saved = Problem.save_state, []

def dying(self, state):
    save(self, state)
    saved.append(1)
    if len(saved) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

Problem.save_state = dying
optimize(fid_problem(state_path=sys.argv[1]), "evolution", OF_KILLED)
"""


def fid_problem(**changes):
    task = toy_problem(**changes)
    task.net.decode = lambda x: x
    task.make_fid_fn = lambda *_: lambda batches: sum(float(images.std()) for images in batches)
    return task


@pytest.mark.parametrize("at", [13, 26])
def test_killed_runs_continue(tmp_path, at):
    """kill -9 after a candidate, or after a finalist; what follows is what would have followed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), str(at)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9 and [path.name for path in tmp_path.iterdir()] == ["s.0"], killed.stderr
    whole = optimize(fid_problem(), "evolution", OF_KILLED)
    again = optimize(fid_problem(state_path=tmp_path / "s"), "evolution", OF_KILLED)
    assert again.sigmas == whole.sigmas
    teacher = 3 * 16 if at < 24 else 0  # its samples are made anew
    assert again.evaluations == whole.evaluations + teacher


SHARED = """
import json, sys
from pathlib import Path
from test_evolution import TINY, toy_problem
from training.schedule_search import optimize
from torch_utils import distributed

distributed.init("cpu")
found = optimize(toy_problem(), "evolution", TINY)
Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps([found.sigmas, found.evaluations]))
distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "shared.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    one = optimize(toy_problem(), "evolution", TINY)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [one.sigmas, one.evaluations]


def test_fid_of_the_command_line_is_that_of_fid_py():
    """FID of images in memory: their features, the reference of the network."""
    images = create_model("digits").data_mean[None] + 0.3 * torch.randn(90, 1, 32, 32)
    value = fid_functions("digits", torch.device("cpu"))("auto", "auto", 90)(iter(images.split(32)))
    reference = find_reference("digits")
    detector = choose_detector("digits", reference, torch.device("cpu"))
    statistics = FeatureStatistics(64)
    statistics.append(detector(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)))
    assert value == pytest.approx(frechet_distance(*statistics.moments(), reference.mu, reference.sigma), rel=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--num_steps=10",), "num_steps=10: the evolution chooses 2 to 9 of grid_points=9"),
        (("--objective=fid", "--ref=nowhere.npz"), "--ref=nowhere.npz: no such file"),
        (("--objective=fid", "--detector=nowhere.pt"), "--detector=nowhere.pt"),
        (("--objective=fid", "--finalists=2"), "leave them out with objective=fid"),
        (("--objective=fid", "--fid_samples=1"), "fid_samples >= 2"),
        (("--objective=lpips",), "'lpips' is not one of"),
        (("--num_samples=0",), "num_samples >= 1"),
        (("--elites=0",), "elites >= 1"),
        (("--population=1",), "population >= 2"),
        (("--generations=-1",), "generations"),
        (("--mutation=0",), "mutation=0.0 must be a probability"),
        (("--mutation=nan",), "'--mutation': nan is not a number"),
        (("--solver_tea=amed",), "'amed' cannot be the teacher"),
        (("--num_steps_tea=1",), "num_steps=1"),
        (("--spread=1",), "--spread has no effect"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    done = call(tmp_path / "s.json", *FLAGS, *arguments, code=2)
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_no_fid_in_the_library():
    with pytest.raises(UserError, match="FID is not available here"):
        optimize(toy_problem(), "evolution", {**TINY, "objective": "fid"})


def test_own_networks_need_a_reference():
    with pytest.raises(UserError, match="has no reference statistics: give --ref"):
        fid_functions("custom", torch.device("cpu"))("auto", "auto", 10)
