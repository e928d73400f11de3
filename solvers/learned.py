"""Runs of learned solvers in the loops of other programs."""

import torch

from models.denoiser import BOTTLENECK_SIZE
from models.noise import TimeOfProcess
from solvers.sampler import Sampler, resolve_sigmas
from solvers.schedules import SCHEDULE_NAMES, check_sigmas
from solvers.solver import SOLVERS, Solver, make_solver
from torch_utils.errors import UserError
from torch_utils.transfer import module_on


class NoBottleneck:
    """The reader of the time-only mode: zeros, for all samples together."""

    def read(self, batch: int) -> torch.Tensor:
        return torch.zeros(1, BOTTLENECK_SIZE, BOTTLENECK_SIZE)


class NetworkOfProcess(TimeOfProcess):
    """What a schedule needs of a network: its range of noise levels, and those of its time steps.

    process: ``models.noise.NoiseProcess``.
    """

    def __init__(self, process):
        self.process, self.sigma_min, self.sigma_max = process, process.sigma_min, process.sigma_max


def solver_of(predictor) -> Solver:
    """The solver of an AMEDPredictor or SpanSolver. UserError if no other program can run it."""
    settings, solver = predictor.config, getattr(predictor, "solver", None)
    if solver is not None:  # a SpanSolver
        return make_solver(solver)
    if settings["sampler_stu"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{settings['sampler_stu']}'")
    if settings["afs"] == "data":
        raise UserError("a predictor with afs='data' needs the statistics of the data, which are not known here")
    options = {name: settings[name] for name in SOLVERS[settings["sampler_stu"]].options if name in settings}
    return make_solver(settings["sampler_stu"], {k: v for k, v in options.items() if v is not None})


def learned_run(net, predictor, device=None, dtype=torch.float32, reader=None) -> Sampler:
    """The ``Sampler`` of a predictor, with noise levels on the CPU.

    net: called as net(x, sigma) where the caller does not evaluate the network itself. Its
        sigma_min, sigma_max, sigma and sigma_inv give the schedule, as far as the predictor's
        settings leave it open.
    predictor: an AMEDPredictor or SpanSolver.
    device: of the states; the run has a copy of the predictor there. Default: the CPU.
    dtype: of the sampling. Default: float32.
    reader: of the bottleneck. Default: zeros, the time-only mode.
    """
    solver, predictor = solver_of(predictor), module_on(predictor, device or "cpu")
    if solver.own_schedule:
        own = predictor.brings()
        sigmas = check_sigmas(own.pop("sigmas").detach())
        return Sampler(net, solver, sigmas, predictor=predictor, **own)
    settings = predictor.config
    own = {name: settings[name] for name in (*SCHEDULE_NAMES, "sigmas")} | {
        "original_code": bool(settings.get("original_code"))
    }
    sigmas = resolve_sigmas(net, **own, device="cpu", dtype=dtype)
    run = Sampler(net, solver, sigmas, afs=settings["afs"], predictor=predictor)
    run.reader = reader or NoBottleneck()
    return run
