"""OFS: the schedule with the least upper bound of Euler's error, by the dynamic programme of GITS.

After the abstract of Huang 2024, "Optimizing Few-Step Sampler" (arXiv 2412.10786). The unrolled
Euler sampler is a convex combination of the denoised images at the chosen noise levels. An upper
bound of its discretisation error, estimated by Monte Carlo, is minimised over the schedule (here),
in turns with fine-tuning the network at these noise levels (tools/train_denoiser.py --schedule).
The bound and its minimisation below are a reconstruction, so results may differ from the paper's.

With u = 1/s the probability-flow ODE is d(x/s)/du = D(x, s). An Euler step from s_i to s_j keeps D
constant. From a point x_i of the exact trajectory it misses the exact x_j by at most

    e_ij = s_j int_{u_i}^{u_j} || D(x_s, s) - D(x_i, s_i) || du.

Later steps change this error. For Gaussian data of standard deviation v an Euler step from s to s'
multiplies it by (v^2 + s s') / (v^2 + s^2). That is at most the factor of the exact flow, the root
of (v^2 + s'^2) / (v^2 + s^2). Both grow with v. Hence ||error|| <= sum of c_ij over the intervals,

    c_ij = e_ij sqrt((v^2 + s_end^2) / (v^2 + s_j^2)),

for every Gaussian with a standard deviation of at most v in every direction. For v -> infinity
(c = e) it holds for every denoiser that does not expand distances. For v = 0 the sum ignores that
later evaluations see earlier errors, so it is not a bound. The bound is of first order: it says
little about multistep solvers.
"""

import torch

from solvers.sampler import afs_direction, resolve_sigmas, sample
from solvers.schedules import SCHEDULES
from solvers.search.gits import gits_indices, teacher_trajectory
from solvers.solver import Option, check_teacher
from torch_utils import distributed
from torch_utils.errors import UserError

TRAJECTORIES = ("teacher", "noised")
OFS_OPTIONS = {
    "solver_tea": Option(str, "ipndm", "solver of the teacher"),
    "num_steps_tea": Option(int, 121, "points of the teacher's grid, from which the schedule is chosen"),
    "schedule_type": Option(tuple(SCHEDULES), "logsnr", "schedule of the teacher"),
    "schedule_rho": Option(float, 7.0, "exponent of the teacher's schedule"),
    "trajectories": Option(
        TRAJECTORIES, "teacher", "evaluate on the teacher's trajectories, or at its images with fresh noise"
    ),
    "spread": Option(
        float, 10.0, "largest standard deviation of the data in any direction; 0: later steps ignore earlier errors"
    ),
    "num_warmup": Option(int, 128, "samples of the teacher"),
}


def bound_costs(denoised, sigmas, spread: float = 10.0, first=None) -> torch.Tensor:
    """The costs c_ij of the module, per pixel (RMS), float64 [T,T] on the CPU; 0 for j <= i.

    denoised: D at all points of a trajectory [T,B,...].
    sigmas: noise levels [T], decreasing.
    spread: v. Default 10.
    first: the denoised image [B,...] that AFS uses at the first point. Default: denoised[0].

    The integrals are trapezoidal in u.
    """
    denoised = denoised.flatten(2)
    sigmas = sigmas.detach().cpu().double()
    width = (1 / sigmas).diff()
    carried = sigmas * ((spread**2 + sigmas[-1] ** 2) / (spread**2 + sigmas**2)).sqrt()
    cost = torch.zeros(len(sigmas), len(sigmas), dtype=torch.float64)
    for i in range(len(sigmas) - 1):  # one row at a time, to save memory
        held = denoised[i] if i or first is None else first.flatten(1)
        gap = (denoised[i:] - held).square().mean(dim=-1).sqrt().mean(dim=1).cpu().double()
        cost[i, i + 1 :] = ((gap[1:] + gap[:-1]) / 2 * width[i:]).cumsum(0) * carried[i + 1 :]
    return cost


def ofs_cost(problem, seeds: list[int], trajectories: str, spread: float, teacher: dict) -> torch.Tensor:
    """``bound_costs`` of the samples of these seeds.

    problem: a ``solvers.search.problem.Problem``.
    seeds: one per sample.
    trajectories, spread: see OFS_OPTIONS.
    teacher: keywords of ``sample``.
    """
    net, (latents, cond) = problem.net, problem.noise(seeds)
    if trajectories == "teacher":
        states, offsets, sigmas = teacher_trajectory(net, latents, cond=cond, **teacher)
        with torch.no_grad():
            last = net(states[-1], sigmas[-1].to(latents), **cond).to(latents.dtype)
        denoised = torch.cat([states[:-1] - offsets, last[None]])
        start = states[0]
    else:
        images, info = sample(net, latents, cond=cond, return_info=True, **teacher)
        noise, sigmas = problem.fresh_noise(seeds)().to(latents), info.sigmas
        with torch.no_grad():
            levels = sigmas.to(latents.dtype)
            denoised = torch.stack([net(images + s * noise, s, **cond).to(latents.dtype) for s in levels])
        start = images + levels[0] * noise
    first = None
    if problem.afs:
        sigma = sigmas[0].to(latents.dtype)
        first = start - sigma * afs_direction(net, start, sigma, problem.afs)
    return bound_costs(denoised, sigmas, spread, first)


def ofs_sigmas(
    problem, *, solver_tea, num_steps_tea, schedule_type, schedule_rho, trajectories, spread, num_warmup
) -> torch.Tensor:
    """The noise levels with the least bound, float64 [num_steps]. Rank 0 prints the bound.

    problem: a ``solvers.search.problem.Problem``.
    All others: see OFS_OPTIONS.

    With AFS the first interval uses the denoised image of the analytical step. Raises UserError for
    impossible settings.
    """
    check_teacher(solver_tea)
    if num_warmup < 1 or num_steps_tea < 2:
        raise UserError("OFS needs num_warmup >= 1 and num_steps_tea >= 2")
    if not 0 <= spread < float("inf"):
        raise UserError(f"spread={spread} must be a standard deviation, 0 or more")
    # Raises UserError for an impossible number of steps before the teacher runs.
    gits_indices(torch.zeros(num_steps_tea, num_steps_tea), problem.num_steps, 1.0, method="OFS")
    teacher = problem.teacher(solver_tea, num_steps_tea, schedule_type, schedule_rho)

    def cost_of(seeds):
        return ofs_cost(problem, seeds, trajectories, spread, teacher)

    cost = problem.mean_cost(num_warmup, num_steps_tea, cost_of)
    chain = distributed.broadcast_object(gits_indices(cost, problem.num_steps, 1.0, method="OFS"))
    bound = float(cost[chain[:-1], chain[1:]].sum())
    distributed.print0(f"upper bound of Euler's error: {bound:.4g} per pixel (root mean square)")
    ends = (problem.sigma_min, problem.sigma_max)
    return resolve_sigmas(problem.net, num_steps_tea, schedule_type, schedule_rho, *ends)[chain]
