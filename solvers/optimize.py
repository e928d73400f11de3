"""Optimised schedules: the table of methods, and what each of them is given to work with.

A method is one entry of ``METHODS``: a function from a ``Problem`` and its own options to ``Found``. The command line
(optimize_schedule.py), the counting of evaluations and seconds, resuming and the schedule file are the same for all.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from solvers.dmn import HIGHEST_ORDER, KINDS, dmn_sigmas
from solvers.evolution import EVOLUTION_OPTIONS, evolution_sigmas
from solvers.gits import METRICS, check_teacher, gits_cost, gits_indices, insert_afs_point, teacher_trajectory
from solvers.ld3 import OPTIONS as LD3_OPTIONS
from solvers.ld3 import SUMMARY as LD3_SUMMARY
from solvers.ld3 import ld3_schedule
from solvers.loop import afs_direction, resolve_sigmas, sample
from solvers.ofs import OFS_OPTIONS, ofs_sigmas
from solvers.rules import SOLVERS, Option, Rule, make_rule
from solvers.schedule_file import Schedule
from solvers.schedules import SCHEDULES
from torch_utils import distributed
from torch_utils.distributed import together
from torch_utils.errors import UserError
from torch_utils.progress import progress_bar
from torch_utils.safe_pickle import safe_load
from torch_utils.seeds import SeededGenerators, stream_seeds
from torch_utils.tensor_file import write_state

SHARED_OPTIONS = ("max_order", "predict_x0", "lower_order_final", "thresholding")  # a teacher takes the student's


# ----------------------------------------------------------------------------------------------------------------------
# What a method works with


@dataclass
class Found:
    """What a method returns: sigmas [N] descending; sigmas_net [N] where it learns what the network is told."""

    sigmas: torch.Tensor
    sigmas_net: torch.Tensor | None = None


@dataclass
class Problem:
    """A schedule is wanted for this network and solver.

    num_steps: time stamps of the schedule; options: those of the solver that were set; sigma_min, sigma_max: its ends
    (None: the network's); afs: the free first step the schedule is meant for; seed: of all randomness; batch: samples per
    network call; labels: class of all samples (None: drawn); prompts: of text-to-image networks, texts of which each
    sample draws one; negative_prompt: for the unconditional side (None: the network's default); state_path: where a method
    may keep its state; make_judge: (ref, detector) -> judge(batches), the FID of this process's batches of decoded images
    [B,C,H,W] and those of the others, the same on all of them; None where it cannot be had.
    """

    net: torch.nn.Module
    solver: str
    num_steps: int
    options: dict = field(default_factory=dict)
    sigma_min: float | None = None
    sigma_max: float | None = None
    afs: bool | str = False
    seed: int = 0
    batch: int = 64
    labels: int | None = None
    prompts: Sequence[str] | None = None
    negative_prompt: str | None = None
    device: torch.device | str = "cpu"
    state_path: Path | None = None
    make_judge: Callable | None = None
    evaluations: int = 0  # of the network by this process, counted per sample; with those before a resume
    seconds: float = 0.0  # spent before a resume
    identity: dict = field(default_factory=dict)  # what a state has to agree with, filled in by ``optimize``

    def __post_init__(self):
        rule = self.rule()
        if rule.needs_predictor:
            raise UserError(f"the solver '{self.solver}' needs a trained predictor: choose a plain one")
        if self.num_steps < 2:
            raise UserError(f"num_steps={self.num_steps}: a schedule needs at least 2 time stamps")
        if self.batch < 1:
            raise UserError(f"batch={self.batch} must be at least 1")
        if self.afs:  # a network that cannot do it says so before anything is computed
            afs_direction(
                self.net, torch.zeros(1, 1, 1, 1, device=self.device), torch.ones((), device=self.device), self.afs
            )
        self.sigma_min = self.net.sigma_min if self.sigma_min is None else self.sigma_min
        self.sigma_max = self.net.sigma_max if self.sigma_max is None else self.sigma_max
        sigmas = resolve_sigmas(
            self.net, 2, "logsnr", 1, self.sigma_min, self.sigma_max
        )  # says what is wrong with them
        if self.options:  # a file that an option names is looked at now
            rule.bind(self.net, sigmas)
        self._started = time.perf_counter()

    def rule(self) -> Rule:
        """The solver with its options; UserError where they do not go together."""
        return make_rule(self.solver, self.options)

    def shared_options(self, solver_tea: str) -> dict:
        """The options that a teacher takes from the solver."""
        teacher = SOLVERS[solver_tea]
        shared = {
            name: value for name, value in self.options.items() if name in SHARED_OPTIONS and name in teacher.options
        }
        if shared.get("max_order") is not None:  # a teacher that has no such high order takes its highest
            shared["max_order"] = min(shared["max_order"], teacher.highest_order)
        return shared

    def batches(self, samples: int) -> list[list[int]]:
        """The seeds of so many samples, batch by batch. They are not those of ``sample.py``, so that what is found is not
        fitted to the images that evaluate it."""
        seeds = stream_seeds(self.seed, 0, samples)
        return [seeds[start : start + self.batch] for start in range(0, samples, self.batch)]

    def noise(self, seeds: list[int]) -> tuple[torch.Tensor, dict]:
        """Unit-variance noise [B,C,H,W] and the condition that belong to these seeds. Float64 where the device has it."""
        generators = SeededGenerators(seeds)
        latents = generators.randn((self.net.img_channels, self.net.img_resolution, self.net.img_resolution))
        dtype = torch.float32 if torch.device(self.device).type == "mps" else torch.float64
        make_cond = getattr(self.net, "make_cond", lambda *_: {})
        text = {}
        if self.prompts is not None:
            numbers = generators.randint(len(self.prompts)).tolist()
            text = {"prompts": [self.prompts[number] for number in numbers]}
            text |= {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return latents.to(self.device, dtype), make_cond(generators, self.labels, **text)

    def texts(self) -> dict:
        """What the file and the state say about the prompts: a text, or the number of captions and their SHA-256."""
        if self.prompts is None:
            return {}
        digest = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        many = {"captions": len(self.prompts), "sha256": digest}
        return {"prompt": self.prompts[0] if len(self.prompts) == 1 else many, "negative_prompt": self.negative_prompt}

    def fresh_noise(self, seeds: list[int]) -> Callable[[], torch.Tensor]:
        """A source of noise [B,C,H,W] beside that of ``noise``; every source made for these seeds gives the same."""
        generators = SeededGenerators([stream_seeds(seed, 0, 1)[0] for seed in seeds])
        shape = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
        return lambda: generators.randn(shape)

    def teacher(self, solver_tea, num_steps_tea, schedule_type, schedule_rho, **more) -> dict:
        """Keywords of ``sample`` for a teacher over the range of the schedule; it takes the student's SHARED_OPTIONS."""
        return {
            "solver": solver_tea,
            "num_steps": num_steps_tea,
            "schedule_type": schedule_type,
            "schedule_rho": schedule_rho,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            **more,
            **self.shared_options(solver_tea),
        }

    def mean_cost(self, samples: int, size: int, cost_of: Callable) -> torch.Tensor:
        """The mean over so many samples of cost_of(seeds), the mean of a batch, float64 [size,size].

        The batches are shared by the processes of a torchrun, and a run that was interrupted goes on after the last one.
        """
        mine = self.batches(samples)[distributed.rank() :: distributed.world_size()]
        with together():
            state = self.load_state() or {"rounds": 0, "cost": torch.zeros(size, size, dtype=torch.float64)}
            total, done = state["cost"], state["rounds"]
            with self.progress(len(mine), "batch", done) as bar:
                for seeds in mine[done:]:
                    total, done = total + len(seeds) * cost_of(seeds), done + 1
                    self.save_state({"rounds": done, "cost": total})
                    bar.update()
        return torch.stack(distributed.gather_objects(total)).sum(0) / samples

    def progress(self, total: int, unit: str, done: int = 0) -> tqdm:
        return progress_bar(total, initial=done, unit=unit)

    # A method that takes long keeps a state and goes on from it. Every process of a torchrun has one of its own.

    def load_state(self) -> dict | None:
        """What ``save_state`` wrote last in a run that did not end; None where there is nothing."""
        path = self._state_file()
        if path is None or not path.exists():
            return None
        try:
            content = safe_load(path)
            identity, state = content["identity"], content["state"]
            evaluations, seconds = int(content["evaluations"]), float(content["seconds"])
        except (UserError, LookupError, TypeError, ValueError):
            raise UserError(f"cannot read {path}, the state of an interrupted run: delete it to start again") from None
        if identity != self.identity:
            name = next(n for n in (*self.identity, *identity) if identity.get(n) != self.identity.get(n))
            raise UserError(
                f"{path} is the state of an interrupted run with another {name} ({identity.get(name)} there,"
                f" {self.identity.get(name)} now): repeat that command, or delete the file to start again"
            )
        self.evaluations += evaluations
        self.seconds += seconds
        return state

    def save_state(self, state: dict) -> None:
        """Keeps a dict of tensors, numbers and texts for a later ``load_state``."""
        path = self._state_file()
        if path is None:
            return
        spent = {"evaluations": self.evaluations, "seconds": self.elapsed()}
        write_state(path, {"identity": self.identity, "state": state, **spent})

    def drop_state(self) -> None:
        path = self._state_file()
        if path is not None:
            path.unlink(missing_ok=True)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def _state_file(self) -> Path | None:
        path = self.state_path
        return None if path is None else Path(path).with_name(f"{Path(path).name}.{distributed.rank()}")


@dataclass(frozen=True)
class Method:
    """run(problem, **options) -> Found; options become flags; summary: one line for the documentation."""

    summary: str
    run: Callable[..., Found]
    options: dict[str, Option]

    def settings(self, given: dict) -> dict:
        """All options with their values; UserError for unknown ones and for values that do not fit."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            raise UserError(f"the method has no option '{unknown[0]}' (its options: {', '.join(self.options)})")
        return {name: option.check(name, given.get(name)) for name, option in self.options.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The methods


def run_gits(
    problem: Problem,
    *,
    solver_tea,
    num_steps_tea,
    schedule_type,
    schedule_rho,
    metric,
    coeff,
    num_warmup,
    original_code,
) -> Found:
    """GITS. With AFS the schedule gets a point more between its first two, chosen by trial; num_steps counts it.

    original_code: as published, AFS is used by the teacher too, the extra point comes on top of num_steps, and there is
    none where the second point is the next one of the teacher's grid.
    """
    check_teacher(solver_tea)
    if num_warmup < 1 or num_steps_tea < 2:
        raise UserError("GITS needs a num_warmup of at least 1 and a num_steps_tea of at least 2")
    afs = problem.afs
    inserts = bool(afs) and not original_code
    if inserts and min(problem.num_steps, num_steps_tea) < 3:
        raise UserError("GITS under AFS needs num_steps and num_steps_tea of at least 3: one point is the free one")
    count, second = (problem.num_steps - 1, 2) if inserts else (problem.num_steps, 1)
    gits_indices(torch.zeros(num_steps_tea, num_steps_tea), count, coeff, second)  # says at once what is impossible
    if afs:  # the student is tried in the end; what it is not prepared for is said before that
        ends = (problem.sigma_min, problem.sigma_max)
        problem.rule().bind(problem.net, resolve_sigmas(problem.net, problem.num_steps, "logsnr", 1, *ends))
    teacher = problem.teacher(solver_tea, num_steps_tea, schedule_type, schedule_rho, original_code=original_code)

    def cost_of(seeds):
        latents, cond = problem.noise(seeds)
        return gits_cost(problem.net, [latents], metric=metric, cond=cond, afs=afs, **teacher)

    cost = problem.mean_cost(num_warmup, num_steps_tea, cost_of)
    chain = gits_indices(cost, count, coeff, second)
    grid = resolve_sigmas(
        problem.net,
        num_steps_tea,
        schedule_type,
        schedule_rho,
        problem.sigma_min,
        problem.sigma_max,
        original_code=original_code,
    )
    with together():
        if afs and distributed.rank() == 0:
            latents, cond = problem.noise(problem.batches(num_warmup)[-1])
            of_teacher = afs if original_code else False
            states, _, _ = teacher_trajectory(problem.net, latents, cond=cond, afs=of_teacher, **teacher)

            def noise():  # the same in every trial
                generators = SeededGenerators(stream_seeds(problem.seed, -len(latents), len(latents)))
                return lambda: generators.randn(latents.shape[1:])

            student = {"solver": problem.solver, "afs": afs, "cond": cond, "noise": noise, **problem.options}
            chain = insert_afs_point(problem.net, latents, states[-1], grid, chain, **student)
    return Found(grid[distributed.broadcast_object(chain)])


def run_dmn(problem: Problem, *, kind) -> Found:
    """DM-NonUniform, for the order of the solver."""
    if kind == "auto":
        kind = "latent" if getattr(problem.net, "latent", False) else "pixel"
    rule = problem.rule()
    exponential = hasattr(rule, "lower_order_final")
    return Found(
        dmn_sigmas(
            problem.num_steps,
            problem.sigma_min,
            problem.sigma_max,
            kind,
            max_order=rule.max_order if exponential else HIGHEST_ORDER,
            lower_order_final=rule.lower_order_final if exponential else True,
            net=problem.net,
        )
    )


def run_ofs(problem: Problem, **options) -> Found:
    """The schedule half of "Optimizing Few-Step Sampler"; tools/train_denoiser.py does the other one."""
    return Found(ofs_sigmas(problem, **options))


def run_evolution(problem: Problem, **options) -> Found:
    """AutoDiffusion's search, with what it works with in the place of a discrete diffusion's steps."""
    return Found(evolution_sigmas(problem, **options))


METHODS: dict[str, Method] = {
    "gits": Method(
        "GITS: dynamic programming along the trajectories of a teacher; any network and solver",
        run_gits,
        {
            "solver_tea": Option(str, "ipndm", "solver of the teacher"),
            "num_steps_tea": Option(int, 61, "points of the teacher's grid, from which the schedule is chosen"),
            "schedule_type": Option(tuple(SCHEDULES), "polynomial", "the teacher's grid"),
            "schedule_rho": Option(float, 7.0, "its exponent"),
            "metric": Option(METRICS, "dev", "cost of a jump: distance from the chord, or to the teacher"),
            "coeff": Option(float, 1.15, "above 1: errors late in the sampling count more"),
            "num_warmup": Option(int, 256, "samples of the teacher"),
            "original_code": Option(bool, False, "reproduce the published code where it deviates"),
        },
    ),
    "dmn": Method(
        "DM-NonUniform: least error bound of a multistep exponential integrator; asks nothing of the network",
        run_dmn,
        {"kind": Option(("auto", *KINDS), "auto", "assumed error of the network")},
    ),
    "ofs": Method(
        "OFS: least upper bound of Euler's error along the trajectories of a teacher; for solvers of first order",
        run_ofs,
        OFS_OPTIONS,
    ),
    "evolution": Method(
        "Evolutionary search by the distance to a teacher or by FID; any network and solver, dear",
        run_evolution,
        EVOLUTION_OPTIONS,
    ),
    "ld3": Method(LD3_SUMMARY, lambda problem, **options: Found(*ld3_schedule(problem, **options)), LD3_OPTIONS),
}


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def counting(problem: Problem):
    """Context in which the network's evaluations are added to ``problem.evaluations``, one for each sample."""

    def count(module, inputs, output):
        problem.evaluations += len(output) * getattr(problem.net, "evals_per_call", 1)

    handle = problem.net.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def try_schedule(problem: Problem, found: Found) -> None:
    """Samples one image with a schedule; UserError where it is not finite. Some methods never call the network, and one
    that breaks down would not be noticed."""
    seeds = problem.batches(1)[0]
    latents, cond = problem.noise(seeds)
    image = sample(
        problem.net,
        latents,
        solver=problem.solver,
        sigmas=found.sigmas,
        sigmas_net=found.sigmas_net,
        afs=problem.afs,
        cond=cond,
        noise=problem.fresh_noise(seeds),
        **problem.options,
    )
    if not image.isfinite().all():
        raise UserError(
            f"the network or the solver '{problem.solver}' breaks down on this schedule (not a finite image): check the"
            " network, or choose another solver or --amp=none"
        )


def optimize(problem: Problem, method: str, options: dict | None = None, versions: dict | None = None) -> Schedule:
    """The schedule that a method finds, with its cost; every process of a torchrun calls it and gets the same.

    options: of the method; versions: what the file should name. Raises UserError on impossible settings.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'; choose from {', '.join(METHODS)}")
    settings = METHODS[method].settings(options or {})
    settings |= {"seed": problem.seed, "batch": problem.batch, "class": problem.labels} | problem.texts()
    problem.identity = {
        "method": method,
        **settings,
        "solver": problem.solver,
        "solver_options": problem.options,
        "num_steps": problem.num_steps,
        "afs": problem.afs,
        "sigma_min": problem.sigma_min,
        "sigma_max": problem.sigma_max,
        "network": getattr(problem.net, "weights_hash", None),
        "processes": distributed.world_size(),
    }
    with counting(problem):
        found = METHODS[method].run(problem, **{name: settings[name] for name in METHODS[method].options})
    with together():
        if distributed.rank() == 0:
            try_schedule(problem, found)
    evaluations = sum(distributed.gather_objects(problem.evaluations))
    least, most = getattr(problem.net, "sigma_min", problem.sigma_min), getattr(problem.net, "sigma_max", None)
    return Schedule(
        sigmas=found.sigmas.tolist(),
        sigmas_net=None if found.sigmas_net is None else found.sigmas_net.tolist(),
        solver=problem.solver,
        solver_options=dict(problem.options),
        afs=problem.afs,
        method=method,
        settings=settings,
        network=getattr(problem.net, "dataset_name", None),
        network_hash=getattr(problem.net, "weights_hash", None),
        sigma_min=float(least),
        sigma_max=float(problem.sigma_max if most is None else most),
        evaluations=evaluations,
        seconds=round(problem.elapsed(), 2),
        versions=versions or {},
    )
