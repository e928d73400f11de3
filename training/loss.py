"""The loss of an AMED predictor: each interval against a teacher with more steps.

Zhou et al. 2024, Section 3.3. The student's interval runs the code of sampling,
``Sampler.advance``.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from models.denoiser import read_bottleneck
from solvers import SOLVERS, Sampler, Solver, State, get_schedule, make_solver, refine, resolve_sigmas
from solvers.solver import check_teacher
from torch_utils.errors import UserError
from training.predictor import DEFAULTS

# Errors of an interval by name: function (student's state, teacher's state) -> [B,C,H,W].
INTERVAL_LOSSES: dict[str, Callable] = {
    "squared": lambda x, target: (x - target) ** 2,
    "absolute": lambda x, target: (x - target).abs(),
}


def make_solvers(config: dict) -> tuple[Solver, Solver]:
    """The solvers of student and teacher.

    Both have the options of the configuration, as in the original code. The teacher's order is
    limited to its highest.
    """
    student, teacher = make_solver(config["sampler_stu"], common=config), make_teacher(config)
    if not student.can_learn:
        raise UserError(f"sampler_stu={config['sampler_stu']} cannot learn: choose another student")
    return student, teacher


def make_teacher(config: dict) -> Solver:
    """The teacher's solver, with the options of the configuration."""
    highest = getattr(SOLVERS.get(config["sampler_tea"]), "highest_order", 1)
    order = None if config["max_order"] is None else min(config["max_order"], highest)
    teacher = make_solver(config["sampler_tea"], common={**config, "max_order": order})
    check_teacher(teacher.name)
    return teacher


@dataclass
class TeacherTargets:
    """What the teacher computed for one batch of starting points.

    targets: its states at the student's noise levels 1 .. num_steps - 1, [num_steps-1,B,C,H,W].
    cached_evals: {k: (direction, bottleneck)} for intervals k of the student that start at a state
        where the teacher has evaluated the network; reused instead of a call.
    """

    targets: torch.Tensor
    cached_evals: dict[int, tuple[torch.Tensor, torch.Tensor]]


class IntervalLoss:
    """Base class: the schedules of student and teacher, and the teacher's states.

    net: the teacher's network, a Denoiser.
    config: settings of schedule and teacher by name (``PredictorConfig`` and options of solvers).
    checkpointing: see ``Sampler``. Default False.
    error: name in ``INTERVAL_LOSSES``. Default None: ``published_error``.

    Attributes: ``sigmas``, the student's schedule, float64 [num_steps]; ``teacher_sigmas``, the
    teacher's, with M more points in every interval; ``teacher_afs``, whether the teacher makes an
    analytical first step.
    """

    teacher_afs: bool | str = False
    published_error = "squared"

    def __init__(self, net, config: dict, checkpointing: bool = False, error: str | None = None):
        self.net, self.config, self.checkpointing = net, config, checkpointing
        self.error = INTERVAL_LOSSES[error or self.published_error]
        if int(config["M"]) != config["M"] or config["M"] < 0:
            raise UserError(f"M={config['M']} must be a whole number >= 0")
        self.extra = int(config["M"])
        self.teacher_solver = make_teacher(config)
        self.sigmas = resolve_sigmas(
            net,
            config["num_steps"],
            config["schedule_type"],
            config["schedule_rho"],
            config["sigma_min"],
            config["sigma_max"],
            config["sigmas"],
            original_code=bool(config.get("original_code")),
        )
        self.teacher_sigmas = self._teacher_schedule()

    def _teacher_schedule(self):
        if self.config["sigmas"] is not None:
            return refine(self.sigmas, self.extra)
        return get_schedule(
            (self.extra + 1) * (len(self.sigmas) - 1) + 1,
            float(self.sigmas[-1]),
            float(self.sigmas[0]),
            self.config["schedule_type"],
            self.config["schedule_rho"],
            net=self.net,
            original_code=bool(self.config.get("original_code")),
        )

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[0])

    def teacher_trajectory(self, latents: torch.Tensor, cond=None) -> torch.Tensor:
        """The teacher's states at the student's noise levels but the first, [num_steps-1,B,C,H,W].

        latents: starting points, already scaled by sigma_max. The teacher has no predictor.
        cond: keyword arguments of the network.
        """
        return self.run_teacher(latents, cond).targets

    @torch.no_grad()
    def run_teacher(self, latents: torch.Tensor, cond=None) -> TeacherTargets:
        """``teacher_trajectory`` with the evaluations that the student's intervals can reuse."""
        wanted = {k * (self.extra + 1): k for k in range(len(self.sigmas) - 1) if self._begins_as_teacher(k)}
        cached_evals = {}
        with read_bottleneck(self.net) if wanted else nullcontext() as reader:

            def keep(i, sigma, x, denoised):
                if i in wanted and x is state.x:  # a corrector evaluates elsewhere
                    cached_evals[wanted[i]] = ((x - denoised) / sigma, reader.read(len(x)).to(x.dtype))

            run = Sampler(
                self.net,
                self.teacher_solver,
                self.teacher_sigmas,
                afs=self.teacher_afs,
                cond=cond,
                observer=keep if wanted else None,
            )
            state, targets = State(latents), []
            for i in range(run.intervals):
                state = run.advance(state, i)
                if (i + 1) % (self.extra + 1) == 0:
                    targets.append(state.x)
        return TeacherTargets(torch.stack(targets), cached_evals)

    def _begins_as_teacher(self, k: int) -> bool:
        """Whether interval k of the student starts with an evaluation that the teacher has made."""
        return False

    def trains(self, k: int) -> bool:
        """Whether something is learned in interval k."""
        return True


class DistillationLoss(IntervalLoss):
    """The error per interval between a student with a predictor and its teacher.

    net: a Denoiser.
    config: the predictor's configuration (``PredictorConfig`` and options of solvers). Missing keys
        take the defaults.
    checkpointing, error: see ``IntervalLoss``. Default False, squared.

    One-step students start every interval from the teacher's state. Multistep students continue
    from their own state; this object keeps their history from step_idx to step_idx + 1.
    """

    def __init__(self, net, config: dict, checkpointing: bool = False, error: str | None = None):
        config = {**DEFAULTS, **config}
        self.student_solver, _ = make_solvers(config)
        super().__init__(net, config, checkpointing, error)
        self.predicted: tuple | None = None  # (r, scale_dir, scale_time) of the latest student step, detached
        self._state: State | None = None

    def _begins_as_teacher(self, k: int) -> bool:
        if k == 0 and self.config["afs"]:
            return False
        own, sigma_tea = self.sigmas[k].item(), self.teacher_sigmas[k * (self.extra + 1)].item()
        return (k == 0 or self.student_solver.one_step) and math.isclose(own, sigma_tea, rel_tol=1e-12)

    def student_step(self, predictor, x, step_idx, target, cond=None, start=None):
        """One interval of the student, with gradients.

        predictor: the AMEDPredictor.
        x: state [B,C,H,W] at sigmas[step_idx].
        step_idx: the interval.
        target: the teacher's state [B,C,H,W] at its end.
        cond: keyword arguments of the network.
        start: cached (direction, bottleneck) at x, from ``TeacherTargets``; x is then the teacher's
            state. Default None.

        Returns the error per element [B,C,H,W], and the state (detached) where the next
        interval
        starts: the target for one-step students, their own result for multistep students.
        """
        run = Sampler(
            self.net,
            self.student_solver,
            self.sigmas,
            afs=self.config["afs"],
            predictor=predictor,
            cond=cond,
            checkpointing=self.checkpointing,
            cached_evals=None if start is None else {step_idx: start},
        )
        history, updates = (
            ((), 0) if step_idx == 0 or self._state is None else (self._state.history, self._state.updates)
        )
        with run.reading():
            after = run.advance(State(x.detach(), history, updates), step_idx)
        self.predicted = tuple(value.detach() for value in run.predicted)
        self._state = after.detach()
        return self.error(after.x, target), (target.detach() if self.student_solver.one_step else self._state.x)
