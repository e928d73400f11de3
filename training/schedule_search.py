"""Optimised schedules: the methods, and the frame that they share.

A method is an entry of ``METHODS``: a function from a ``Problem`` and its own options to ``Found``.
The command line (optimize_schedule.py), the counting of evaluations and seconds, resuming and the
schedule file are the same for all methods.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from models.denoiser import member
from solvers.sampler import resolve_sigmas, sample
from solvers.schedule_file import Schedule
from solvers.schedules import SCHEDULES
from solvers.search.dmn import HIGHEST_ORDER, NETWORK_KINDS, dmn_sigmas
from solvers.search.evolution import EVOLUTION_OPTIONS, evolution_sigmas
from solvers.search.gits import METRICS, gits_cost, gits_indices, insert_afs_point, teacher_trajectory
from solvers.search.ofs import OFS_OPTIONS, ofs_sigmas
from solvers.search.problem import Found, Problem
from solvers.solver import Option, check_teacher, make_solver
from torch_utils import distributed
from torch_utils.distributed import together
from torch_utils.errors import UserError, did_you_mean
from torch_utils.seeds import SeededGenerators, stream_seeds
from training.ld3 import OPTIONS as LD3_OPTIONS
from training.ld3 import SUMMARY as LD3_SUMMARY
from training.ld3 import ld3_schedule


@dataclass(frozen=True)
class Method:
    """A method that optimises a schedule.

    summary: one line for the documentation.
    run: function (problem, **options) -> Found.
    options: options of the method, which become flags.
    """

    summary: str
    run: Callable[..., Found]
    options: dict[str, Option]

    def settings(self, given: dict) -> dict:
        """All options with their values. UserError for unknown options and wrong values."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            raise UserError(f"the method has no option '{unknown[0]}' (its options: {', '.join(self.options)})")
        return {name: option.check(name, given.get(name)) for name, option in self.options.items()}


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
    """GITS. Under AFS, a point between the first two is added by trial; num_steps counts it.

    original_code: as published, the teacher uses AFS too, and the extra point comes on top of
        num_steps. It is omitted if the second point is the next one on the teacher's grid.

    The other arguments are described in ``METHODS``.
    """
    check_teacher(solver_tea)
    if num_warmup < 1 or num_steps_tea < 2:
        raise UserError("GITS needs a num_warmup of at least 1 and a num_steps_tea of at least 2")
    afs = problem.afs
    inserts = bool(afs) and not original_code
    if inserts and min(problem.num_steps, num_steps_tea) < 3:
        raise UserError("GITS with AFS needs num_steps and num_steps_tea of at least 3")
    count, second = (problem.num_steps - 1, 2) if inserts else (problem.num_steps, 1)
    gits_indices(torch.zeros(num_steps_tea, num_steps_tea), count, coeff, second)  # checks the numbers early
    if afs:  # the solver is used only at the end, but should fail early
        ends = (problem.sigma_min, problem.sigma_max)
        problem.make_solver().setup(problem.net, resolve_sigmas(problem.net, problem.num_steps, "logsnr", 1, *ends))
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

            def noise():  # the same noise in every trial
                generators = SeededGenerators(stream_seeds(problem.seed, -len(latents), len(latents)))
                return lambda: generators.randn(latents.shape[1:])

            student = {"solver": problem.solver, "afs": afs, "cond": cond, "noise": noise, **problem.options}
            chain = insert_afs_point(problem.net, latents, states[-1], grid, chain, **student)
    return Found(grid[distributed.broadcast_object(chain)])


def run_dmn(problem: Problem, *, kind) -> Found:
    """DM-NonUniform, for the order of the solver. kind: assumed error of the network."""
    if kind == "auto":
        kind = "latent" if member(problem.net, "latent") else "pixel"
    solver = problem.make_solver()
    exponential = hasattr(solver, "lower_order_final")
    return Found(
        dmn_sigmas(
            problem.num_steps,
            problem.sigma_min,
            problem.sigma_max,
            kind,
            max_order=solver.max_order if exponential else HIGHEST_ORDER,
            lower_order_final=solver.lower_order_final if exponential else True,
            net=problem.net,
        )
    )


def run_ofs(problem: Problem, **options) -> Found:
    """The schedule half of "Optimizing Few-Step Sampler"; the other is tools/train_denoiser.py."""
    return Found(ofs_sigmas(problem, **options))


def run_evolution(problem: Problem, **options) -> Found:
    """AutoDiffusion's search, for continuous noise levels instead of discrete steps."""
    return Found(evolution_sigmas(problem, **options))


METHODS: dict[str, Method] = {
    "gits": Method(
        "GITS: dynamic programming along the trajectories of a teacher; any network and solver",
        run_gits,
        {
            "solver_tea": Option(str, "ipndm", "solver of the teacher"),
            "num_steps_tea": Option(int, 61, "points of the teacher's grid, which the schedule is chosen from"),
            "schedule_type": Option(tuple(SCHEDULES), "polynomial", "the teacher's grid"),
            "schedule_rho": Option(float, 7.0, "its exponent"),
            "metric": Option(METRICS, "dev", "cost of a step: distance from the chord, or to the teacher"),
            "coeff": Option(float, 1.15, "above 1: errors late in sampling count more"),
            "num_warmup": Option(int, 256, "samples of the teacher"),
            "original_code": Option(bool, False, "reproduce the published code where it deviates"),
        },
    ),
    "dmn": Method(
        "DM-NonUniform: least error bound of a multistep exponential integrator; does not call the network",
        run_dmn,
        {"kind": Option(("auto", *NETWORK_KINDS), "auto", "assumed error of the network")},
    ),
    "ofs": Method(
        "OFS: least upper bound of Euler's error along the trajectories of a teacher; for solvers of first order",
        run_ofs,
        OFS_OPTIONS,
    ),
    "evolution": Method(
        "Evolutionary search by the distance to a teacher or by FID; any network and solver, expensive",
        run_evolution,
        EVOLUTION_OPTIONS,
    ),
    "ld3": Method(LD3_SUMMARY, lambda problem, **options: Found(*ld3_schedule(problem, **options)), LD3_OPTIONS),
}


@contextmanager
def counting(problem: Problem):
    """Context that adds the network's evaluations to ``problem.evaluations``, one per sample."""

    def count(module, inputs, output):
        problem.evaluations += len(output) * member(problem.net, "evals_per_call")

    handle = problem.net.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def try_schedule(problem: Problem, found: Found) -> None:
    """Samples one image with a schedule. UserError if it is not finite.

    Some methods never call the network, and would not notice that it fails.
    """
    seeds = problem.batches(1)[0]
    latents, cond = problem.noise(seeds)
    image = sample(
        problem.net,
        latents,
        solver=problem.solver,
        sigmas=found.sigmas,
        sigmas_cond=found.sigmas_cond,
        afs=problem.afs,
        cond=cond,
        noise=problem.fresh_noise(seeds),
        **problem.options,
    )
    if not image.isfinite().all():
        raise UserError(
            f"the network or the solver '{problem.solver}' fails on this schedule (the image is not finite): check the"
            " network, or choose another solver or --amp=none"
        )


def optimize(problem: Problem, method: str, options: dict | None = None, versions: dict | None = None) -> Schedule:
    """The schedule that a method finds, with its cost. Every process of a torchrun gets the same.

    problem: network, solver and number of steps.
    method: entry of ``METHODS``.
    options: options of the method. Default None.
    versions: versions to record in the file. Default None.

    Raises UserError on impossible settings.
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
        "network": member(problem.net, "weights_hash"),
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
        sigmas_cond=None if found.sigmas_cond is None else found.sigmas_cond.tolist(),
        solver=problem.solver,
        solver_options=dict(problem.options),
        afs=problem.afs,
        method=method,
        settings=settings,
        network=member(problem.net, "dataset_name"),
        network_hash=member(problem.net, "weights_hash"),
        sigma_min=float(least),
        sigma_max=float(problem.sigma_max if most is None else most),
        evaluations=evaluations,
        seconds=round(problem.elapsed(), 2),
        versions=versions or {},
    )


def optimize_schedule(net, *, solver: str, num_steps: int, method: str = "gits", device=None, **options) -> Schedule:
    """Optimised noise levels for a network and a solver, for ``solvers.sample(sigmas=...)``.

    net: a network of ``models.wrap`` or ``create_model``.
    solver: name of the solver that will use them.
    num_steps: number of noise levels.
    method: name in ``METHODS``. Default: gits.
    device: where to compute. Default: where net is.
    options: of the method or the solver, or fields of ``Problem`` (seed, batch, afs, ...).

    Raises UserError for unknown options and impossible settings.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'{did_you_mean(method, METHODS)}")
    if device is None:
        device = next(net.parameters(), torch.empty(0)).device
    kinds = {entry.name for entry in fields(Problem)} - {"net", "solver", "num_steps", "options", "device"}
    own = {name: options.pop(name) for name in tuple(options) if name in METHODS[method].options}
    more = {name: options.pop(name) for name in tuple(options) if name in kinds}
    make_solver(solver, options)  # refuses what is left and not an option of the solver
    return optimize(Problem(net, solver, num_steps, options, device=device, **more), method, own)
