"""GITS: a schedule by dynamic programming over the points of a teacher's trajectory.

Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling". The cost of an
Euler jump between any two points of a fine grid is measured on trajectories of a teacher. Then the
cheapest chain with a given number of jumps is found exactly. The result is an ordinary schedule for
any solver.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from solvers.sampler import sample
from solvers.solver import check_teacher
from torch_utils.errors import UserError
from torch_utils.transfer import to_device

METRICS = ("dev", "l1", "l2")


def chord_distance(points, start, end):
    """Distances [...,B] of points [...,B,D] from the straight line through start and end [B,D]."""
    chord = end - start
    unit = chord / chord.norm(dim=-1, keepdim=True)
    offset = points - end
    return (offset - (offset * unit).sum(-1, keepdim=True) * unit).norm(dim=-1)


def jump_costs(states, offsets, sigmas, metric: str = "dev") -> torch.Tensor:
    """The mean costs of Euler jumps from point i to j > i, float64 [T,T] on the CPU; 0 for j <= i.

    states: the teacher's trajectory [T,B,...].
    offsets: x - D at its points [T-1,B,...], the direction times sigma.
    sigmas: noise levels [T].
    metric: l1 or l2: norm of the difference to the teacher's x_j. dev: distance of the jump's end
        from the chord of the trajectory, minus that of x_j; may be negative. Default dev.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric '{metric}'; choose from {', '.join(METRICS)}")
    states, offsets = states.flatten(2), offsets.flatten(2)
    sigmas = to_device(sigmas.to(states.dtype), states.device)
    rows = []
    if metric == "dev":
        of_states = chord_distance(states, states[0], states[-1])
    for i in range(len(states) - 1):  # one row at a time, to save memory
        shrink = (sigmas[i + 1 :] / sigmas[i] - 1).reshape(-1, 1, 1)
        jumps = states[i] + shrink * offsets[i]
        if metric == "dev":
            row = chord_distance(jumps, states[0], states[-1]) - of_states[i + 1 :]
        else:
            row = (jumps - states[i + 1 :]).norm(p=1 if metric == "l1" else 2, dim=-1)
        rows.append(row.mean(dim=1))
    cost = torch.zeros(len(states), len(states), dtype=torch.float64)
    cost[tuple(torch.triu_indices(len(states), len(states), 1))] = torch.cat(rows).cpu().double()
    return cost


def teacher_trajectory(net, latents, solver: str, **settings):
    """The trajectory of a plain solver: (states, x - D, sigmas).

    net: the denoiser.
    latents: unit-variance noise [B,C,H,W].
    solver: name of the solver.
    settings: keywords of ``sample``.

    Returns states [T,B,C,H,W], x - D at all but the last [T-1,B,C,H,W] and sigmas [T]. Raises
    UserError if the solver does not visit all points of its schedule.
    """
    offsets = []
    states, info = sample(
        net,
        latents,
        solver=solver,
        callback=lambda i, sigma, x, denoised: offsets.append(x - denoised),
        return_trajectory=True,
        return_info=True,
        **settings,
    )
    if not len(states) == len(info.sigmas) == len(offsets) + 1:
        raise UserError(f"the solver '{solver}' skips points of its schedule: choose another teacher")
    return states, torch.stack(offsets), info.sigmas


def gits_cost(
    net,
    latents: Iterable[torch.Tensor],
    solver: str = "ipndm",
    num_steps: int = 61,
    metric: str = "dev",
    *,
    cond: Mapping | None = None,
    afs: bool | str = False,
    original_code: bool = False,
    **settings,
) -> torch.Tensor:
    """The cost matrix of GITS, averaged over all samples, float64 [T,T].

    net: the denoiser.
    latents: unit-variance noise [rounds,B,C,H,W], or any iterable of batches; one batch is in
        memory at a time.
    solver: name of the teacher's solver. Default ipndm.
    num_steps: T, number of time steps of the teacher. Default 61.
    metric: dev, l1 or l2, see ``jump_costs``. Default dev.
    cond: keyword arguments of net, the same for every batch. Default: none.
    afs: kind of AFS that the schedule is for. Only with original_code the teacher uses it too.
        Default False.
    original_code: reproduce the published code. Default False.
    settings: further keywords of ``sample`` for the teacher.

    Raises UserError for unknown names and solvers that cannot be the teacher.
    """
    check_teacher(solver)
    settings = {**settings, "afs": afs if original_code else False, "original_code": original_code}
    total: Any = 0.0
    count = 0
    for batch in latents:
        if batch.ndim != 4:
            raise UserError(f"gits_cost: latents must be [rounds,batch,C,H,W], not [rounds,{_shape(batch)}]")
        states, offsets, sigmas = teacher_trajectory(net, batch, solver, num_steps=num_steps, cond=cond, **settings)
        total = total + len(batch) * jump_costs(states, offsets, sigmas, metric)
        count += len(batch)
    if not count:
        raise UserError("gits_cost: latents must have at least one batch")
    return total / count


def gits_indices(cost, num_steps: int, coeff: float = 1.15, second: int = 1, method: str = "GITS") -> list[int]:
    """The cheapest chain of points from the first to the last of the teacher's grid, as indices.

    cost: costs [T,T] of the jumps from i to j > i.
    num_steps: number of points of the chain.
    coeff: jump m (from 0) is weighted by coeff^m, coeff > 0. Values above 1 give late errors more
        weight. Default 1.15.
    second: smallest index of the second point, unless that is the last point. Default 1.
    method: name of the method for error messages. Default GITS.

    Of equally cheap chains the one with the smallest indices is returned. Raises UserError if there
    is no such chain or a cost is not finite.
    """
    cost = torch.as_tensor(cost).detach().to("cpu", torch.float64).numpy()
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) < 2:
        raise UserError(f"gits_indices: the cost matrix must be [T,T] with T >= 2, not [{_shape(cost)}]")
    if not np.isfinite(cost).all():
        raise UserError(f"the cost matrix of {method} is not finite: check the teacher and the network")
    if not coeff > 0 or not np.isfinite(coeff):
        raise UserError(f"coeff={coeff} must be a positive number")
    if int(num_steps) != num_steps or not 2 <= num_steps <= len(cost):
        raise UserError(
            f"num_steps={num_steps}: {method} chooses 2 to {len(cost)} of the {len(cost)} points of the teacher's grid;"
            " choose another num_steps or a finer grid"
        )
    jumps = np.where(np.triu(np.ones(cost.shape, bool), 1), cost, np.inf)
    jumps[0, 1 : min(second, len(cost) - 1)] = np.inf
    value = jumps[:, -1]  # cost of the rest of the chain from each point, first with one jump
    choices = []
    for _ in range(num_steps - 2):
        total = jumps + coeff * value
        choices.append(total.argmin(axis=1))
        value = total.min(axis=1)
    if not np.isfinite(value[0]):
        raise UserError(
            f"num_steps={num_steps}: the teacher's grid of {len(cost)} points is too small for a second point at"
            f" index {second} or later"
        )
    chain = [0]
    for choice in reversed(choices):
        chain.append(int(choice[chain[-1]]))
    return [*chain, len(cost) - 1]


def insert_afs_point(
    net, latents, targets, sigmas, indices: list[int], *, solver: str, noise=None, **settings
) -> list[int]:
    """Insert the best point between the first two indices. It costs no evaluation with AFS.

    All points of the teacher's grid between the two are tried. The best one has samples with the
    least mean L2 distance to targets. Without a point between the two, the list is returned
    unchanged.

    net: the denoiser.
    latents: unit-variance noise [B,C,H,W].
    targets: the teacher's samples [B,C,H,W].
    sigmas: noise levels [T] of the teacher's grid.
    indices: the chain of points.
    solver: name of the solver that the schedule is for.
    noise: called before every trial, returns the ``noise`` of a stochastic solver. Default None.
    settings: further keywords of ``sample``.
    """
    best, least = list(indices), float("inf")
    for k in range(indices[0] + 1, indices[1]):
        chain = [indices[0], k, *indices[1:]]
        drawn = None if noise is None else noise()
        x = sample(net, latents, solver=solver, sigmas=sigmas[chain], noise=drawn, **{"afs": True, **settings})
        distance = float((x - targets).flatten(1).norm(dim=1).mean())
        if distance < least:
            best, least = chain, distance
    return best


def _shape(array) -> str:
    return ",".join(map(str, array.shape))
