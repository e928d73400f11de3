"""Evolutionary search of a schedule, after the search of time steps in AutoDiffusion.

Li et al. 2023, arXiv 2309.10438. A genome is a set of points of a fine grid of noise levels, evenly
spaced in ln sigma. It always contains both ends of the range. The first generation consists of
common schedules, their mutants and random sets. Every later one consists of mutants and crossings
of the best genomes so far, and random sets. The solver may be stochastic or not differentiable.

Two differences from the published search:
* A crossing keeps the points that both parents share, and adds points of either parent. In the
  published one a point inherited from both silently cost an evaluation.
* The default objective is the distance to a teacher's solutions of the same noise. Some hundred
  samples are enough for it. FID needs thousands of images per candidate, is biased upwards and
  noisy for fewer, and is usually the measure that the result is evaluated by.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from solvers.sampler import resolve_sigmas, sample
from solvers.schedules import SCHEDULES, get_schedule
from solvers.solver import Option, check_teacher
from torch_utils import distributed
from torch_utils.distributed import together
from torch_utils.errors import UserError

OBJECTIVES = ("distance", "fid")
CUSTOMARY = (("polynomial", 7), ("time_uniform", 1), ("logsnr", 1))
MUTANTS, CROSSINGS = 0.5, 0.3  # shares of a generation; the rest is random
FIRST_RATE = 0.1  # mutation rate of the common schedules
ATTEMPTS = 100  # to find a new genome

EVOLUTION_OPTIONS = {
    "objective": Option(OBJECTIVES, "distance", "what to minimise: the distance to the teacher's samples, or FID"),
    "finalists": Option(
        int, 0, "after a search by distance, choose among this number of best schedules by FID; 0: off"
    ),
    "num_samples": Option(int, 256, "samples per candidate for the distance"),
    "fid_samples": Option(int, 5000, "images per candidate for FID"),
    "ref": Option(str, "auto", "reference of FID: name, npz or URL; auto: the network's"),
    "detector": Option(str, "auto", "feature network of FID; auto: the reference's"),
    "solver_tea": Option(str, "heun", "solver of the teacher"),
    "num_steps_tea": Option(int, 51, "time steps of the teacher"),
    "schedule_type": Option(tuple(SCHEDULES), "polynomial", "schedule of the teacher"),
    "schedule_rho": Option(float, 7.0, "exponent of the teacher's schedule"),
    "grid_points": Option(int, 256, "points of the grid from which the schedule is chosen"),
    "population": Option(int, 50, "candidates per generation"),
    "generations": Option(int, 10, "generations after the first"),
    "elites": Option(int, 10, "number of best candidates that become parents"),
    "mutation": Option(float, 0.25, "probability that a point of a mutant moves"),
    "reach": Option(int, 0, "how many grid points it may move; 0: anywhere, as published"),
}

Genome = tuple[int, ...]  # increasing indices into the grid, from 0 to the last


# --------------------------------------------------------------------------------------------------
# Genomes


def random_genome(length: int, size: int, rng: np.random.Generator) -> Genome:
    """``length`` points of the grid of ``size`` points, with the first and the last."""
    inner = rng.choice(np.arange(1, size - 1), length - 2, replace=False)
    return (0, *sorted(inner.tolist()), size - 1)


def mutate(genome: Genome, rate: float, size: int, rng: np.random.Generator, reach: int = 0) -> Genome:
    """Replace every inner point by a free one with probability ``rate``.

    genome: the points.
    rate: probability, 0 to 1.
    size: number of points of the grid.
    rng: source of random numbers.
    reach: largest distance in grid points between the two. Default: 0, no limit.
    """
    points = set(genome)
    for point in genome[1:-1]:
        if rng.random() < rate:
            low, high = (point - reach, point + reach) if reach else (1, size - 2)
            free = [k for k in range(max(low, 1), min(high, size - 2) + 1) if k not in points]
            if free:
                points.remove(point)
                points.add(int(rng.choice(free)))
    return tuple(sorted(points))


def cross(a: Genome, b: Genome, rng: np.random.Generator) -> Genome:
    """The child of two genomes of one length: the points they share, and random ones of either."""
    common = set(a) & set(b)
    others = sorted(set(a) ^ set(b))
    chosen: Iterable[int] = rng.choice(len(others), len(a) - len(common), replace=False) if others else []
    return tuple(sorted(common | {others[k] for k in chosen}))


def snap(sigmas: torch.Tensor, grid: torch.Tensor) -> Genome:
    """The genome nearest to sigmas [N] in ln sigma, with both ends and without double points."""
    distance = (sigmas.log()[:, None] - grid.log()[None]).abs()
    points = [0]
    for k, nearest in enumerate(distance.argmin(dim=1).tolist()[1:-1], start=1):
        points.append(min(max(nearest, points[-1] + 1), len(grid) - len(sigmas) + k))
    return (*points, len(grid) - 1)


# --------------------------------------------------------------------------------------------------
# The search


@dataclass
class Evolution:
    """The state of the search. Its random numbers depend on the seed and the generation only.

    length: number of points of a genome.
    size: number of points of the grid.
    customary: genomes to start from.
    population, generations, elites, mutation, reach: see EVOLUTION_OPTIONS.
    seed: of all random numbers. Default 0.
    seen: {genome: value} in the order of evaluation; values that are not finite are discarded.
    pending: genomes of the current generation that are not evaluated yet.
    generation: number of the current generation, from 0; -1: not started.
    """

    length: int
    size: int
    customary: list[Genome]
    population: int = 50
    generations: int = 10
    elites: int = 10
    mutation: float = 0.25
    reach: int = 0
    seed: int = 0
    seen: dict[Genome, float] = field(default_factory=dict)
    pending: list[Genome] = field(default_factory=list)
    generation: int = -1

    def __post_init__(self):
        if not 2 <= self.length <= self.size:
            raise UserError(
                f"num_steps={self.length}: the evolution chooses 2 to {self.size} of"
                f" grid_points={self.size}; give num_steps in this range, or more grid_points"
            )
        if self.population < 2 or self.elites < 1 or self.generations < 0 or self.reach < 0:
            raise UserError("the evolution needs population >= 2, elites >= 1, generations >= 0 and reach >= 0")
        if not 0 < self.mutation <= 1:
            raise UserError(f"mutation={self.mutation} must be a probability above 0")

    def run(self, fitness: Callable[[Genome], float], after=lambda: None) -> None:
        """Evaluate all generations that are left.

        fitness: function from a genome to its value; smaller is better.
        after: called after every evaluation. Default: nothing.
        """
        while True:
            while self.pending:
                value = fitness(self.pending[0])
                self.seen[self.pending.pop(0)] = value
                after()
            if self.seen and not self.ranked():
                raise UserError(
                    f"none of {len(self.seen)} schedules gave finite images: check the solver and the network"
                )
            if self.generation >= self.generations:
                return
            self.generation += 1
            self.pending = self.breed()

    def ranked(self) -> list[Genome]:
        """The genomes with finite values, the best first."""
        finite = [(value, genome) for genome, value in self.seen.items() if np.isfinite(value)]
        return [genome for _, genome in sorted(finite)]

    def breed(self) -> list[Genome]:
        """Make a generation: up to ``population`` different genomes that were not seen before."""
        rng = np.random.default_rng([self.seed, self.generation])
        parents = self.ranked()[: self.elites]
        new: dict[Genome, None] = {}

        def add(make: Callable[[], Genome], count: int) -> None:
            for _ in range(count * ATTEMPTS):
                if count == 0:
                    return
                genome = make()
                if genome not in new and genome not in self.seen:
                    new[genome] = None
                    count -= 1

        def pick() -> Genome:
            return parents[rng.integers(len(parents))]

        def anything() -> Genome:
            return random_genome(self.length, self.size, rng)

        if self.generation == 0:
            parents = list(dict.fromkeys(self.customary))
            new = dict.fromkeys(parents[: self.population])
            mutants = max(self.population // 2 - len(new), 0)
            add(lambda: mutate(pick(), FIRST_RATE, self.size, rng, self.reach), mutants)
        else:
            add(lambda: mutate(pick(), self.mutation, self.size, rng, self.reach), round(MUTANTS * self.population))
            if len(parents) > 1:
                add(lambda: cross(pick(), pick(), rng), round(CROSSINGS * self.population))
        add(anything, self.population - len(new))
        return list(new)

    def state(self) -> dict:
        """The state to resume from, as tensors and numbers."""
        pending = torch.tensor(self.pending, dtype=torch.int64).reshape(-1, self.length)
        return {"seen": pack(self.seen), "pending": pending, "generation": self.generation}

    def load_state(self, state: dict) -> None:
        self.seen, self.generation = unpack(state["seen"]), state["generation"]
        self.pending = [tuple(genome) for genome in state["pending"].tolist()]


def pack(values: dict[Genome, float]) -> dict[str, torch.Tensor]:
    """Convert {genome: value} to tensors; ``unpack`` is the inverse."""
    return {
        "genomes": torch.tensor(list(values), dtype=torch.int64),
        "values": torch.tensor(list(values.values()), dtype=torch.float64),
    }


def unpack(tensors: dict[str, torch.Tensor]) -> dict[Genome, float]:
    return dict(zip(map(tuple, tensors["genomes"].tolist()), tensors["values"].tolist(), strict=True))


# --------------------------------------------------------------------------------------------------
# Objectives


class Objectives:
    """Both objectives. The processes share the batches, and all get the same values.

    problem: the network and solver, a ``solvers.search.problem.Problem``.
    grid: noise levels that genomes index.
    teacher: keywords of ``sample`` for the teacher.
    num_samples, fid_samples: samples per candidate for the distance and for FID.
    """

    def __init__(self, problem, grid: torch.Tensor, teacher: dict, num_samples: int, fid_samples: int):
        self.problem, self.grid, self.teacher = problem, grid, teacher
        self.num_samples, self.fid_samples = num_samples, fid_samples
        self._targets: list[torch.Tensor] | None = None
        self.fid_fn: Callable | None = None

    def share(self, samples: int) -> list[list[int]]:
        return self.problem.batches(samples)[distributed.rank() :: distributed.world_size()]

    def samples_of(self, genome: Genome, seeds: list[int]) -> torch.Tensor:
        problem, (latents, cond) = self.problem, self.problem.noise(seeds)
        return sample(
            problem.net,
            latents,
            solver=problem.solver,
            sigmas=self.grid[list(genome)],
            afs=problem.afs,
            cond=cond,
            noise=problem.fresh_noise(seeds),
            **problem.options,
        )

    def targets(self) -> list[torch.Tensor]:
        """The teacher's samples [B,C,H,W] for the batches of this process."""
        if self._targets is None:
            with together():
                self._targets = []
                shares = self.share(self.num_samples)
                with self.problem.progress(len(shares), "batch of the teacher") as bar:
                    for seeds in shares:
                        latents, cond = self.problem.noise(seeds)
                        self._targets.append(sample(self.problem.net, latents, cond=cond, **self.teacher))
                        bar.update()
        return self._targets

    def distance(self, genome: Genome) -> float:
        """Root mean square difference per pixel to the teacher's sample, averaged over samples."""
        targets, rows = self.targets(), []
        with together():
            for seeds, target in zip(self.share(self.num_samples), targets, strict=True):
                gap = self.samples_of(genome, seeds) - target
                rows.append(gap.flatten(1).square().mean(dim=1).sqrt().tolist())
        # Sum in the order of the batches, so that the number of processes does not matter.
        parts = distributed.gather_objects(rows)
        ordered = [row for turn in range(len(parts[0])) for part in parts for row in part[turn : turn + 1]]
        return float(np.mean(np.concatenate(ordered)))

    def fid(self, genome: Genome) -> float:
        """FID of the decoded images; NaN if an image is not finite."""
        broken = []

        def images() -> Iterator[torch.Tensor]:
            for seeds in self.share(self.fid_samples):
                decoded = self.problem.net.decode(self.samples_of(genome, seeds))
                if not decoded.isfinite().all():
                    broken.append(seeds)
                    return
                yield decoded

        assert self.fid_fn is not None  # set for the objective fid
        value = self.fid_fn(images())
        return float("nan") if any(distributed.gather_objects(len(broken))) else value


def evolution_sigmas(
    problem,
    *,
    objective,
    finalists,
    num_samples,
    fid_samples,
    ref,
    detector,
    solver_tea,
    num_steps_tea,
    schedule_type,
    schedule_rho,
    grid_points,
    **settings,
) -> torch.Tensor:
    """The best noise levels that the search finds, float64 [num_steps]. Rank 0 prints their values.

    problem: a ``solvers.search.problem.Problem``.
    All others: see EVOLUTION_OPTIONS.

    An interrupted run resumes after the last candidate. Raises UserError for impossible settings,
    and if no candidate gives finite images.
    """
    uses_fid = objective == "fid" or finalists > 0
    check_teacher(solver_tea)
    if objective == "fid" and finalists:
        raise UserError("finalists are compared by FID after a search by distance: leave them out with objective=fid")
    if num_samples < 1 or fid_samples < 2 or finalists < 0:
        raise UserError("the evolution needs num_samples >= 1, fid_samples >= 2 and finalists >= 0")
    ends = (problem.sigma_min, problem.sigma_max)
    grid = get_schedule(max(grid_points, 2), *ends, "logsnr")
    customary = [get_schedule(problem.num_steps, *ends, *kind) for kind in CUSTOMARY]
    evolution = Evolution(
        problem.num_steps,
        len(grid),
        [snap(sigmas, grid) for sigmas in customary],
        seed=problem.seed,
        **settings,
    )
    # Setting up the solver now gives its errors before the search.
    problem.make_solver().setup(problem.net, grid[[*range(problem.num_steps - 1), -1]])
    teacher = problem.teacher(solver_tea, num_steps_tea, schedule_type, schedule_rho)
    resolve_sigmas(problem.net, num_steps_tea, schedule_type, schedule_rho, *ends)
    objectives = Objectives(problem, grid, teacher, num_samples, fid_samples)
    if uses_fid:
        if problem.make_fid_fn is None:
            raise UserError("FID is not available here: use objective=distance, or optimize_schedule.py")
        objectives.fid_fn = problem.make_fid_fn(ref, detector, fid_samples)
    finals = search(problem, evolution, objectives, objective, finalists)
    best = evolution.ranked()[0]
    if finals:
        best = min((value, genome) for genome, value in finals.items() if np.isfinite(value))[1]
    known = [
        (kind[0], evolution.seen.get(snap(sigmas, grid))) for kind, sigmas in zip(CUSTOMARY, customary, strict=True)
    ]
    others = ", ".join(f"{name} {value:.4g}" for name, value in known if value is not None)
    line = f"{objective} {evolution.seen[best]:.4g}, chosen from {len(evolution.seen)} schedules ({others})"
    distributed.print0(line + (f"; fid {finals[best]:.4g}, of {len(finals)} finalists" if finals else ""))
    return grid[list(best)]


def search(
    problem, evolution: Evolution, objectives: Objectives, objective: str, finalists: int
) -> dict[Genome, float]:
    """Run the evolution, or resume it, and return the FIDs of the finalists."""
    with together():
        state = problem.load_state()
    # The files of the processes may differ after a kill between two of them. That of rank 0 counts.
    state = distributed.broadcast_object(state)
    finals: dict[Genome, float] = {}
    if state is not None:
        evolution.load_state(state["search"])
        finals = unpack(state["finals"])
    fitness = objectives.fid if objective == "fid" else objectives.distance
    total = evolution.population * (evolution.generations + 1) + finalists
    with problem.progress(total, "schedule", len(evolution.seen) + len(finals)) as bar:

        def after(values: dict[Genome, float]) -> None:
            with together():
                problem.save_state({"search": evolution.state(), "finals": pack(finals)})
            finite = [value for value in values.values() if np.isfinite(value)]
            bar.set_postfix_str(f"best {min(finite, default=float('nan')):.4g}")
            bar.update()

        evolution.run(fitness, lambda: after(evolution.seen))
        for genome in evolution.ranked()[:finalists]:
            if genome not in finals:
                finals[genome] = objectives.fid(genome)
                after(finals)
    if finals and not np.isfinite(list(finals.values())).any():
        raise UserError("the FID of all finalists is not finite: check the solver and the network")
    return finals
