"""The loss of SFD: the network's own few steps against a teacher with more steps.

Zhou et al. 2024, "Simple and Fast Distillation of Diffusion Models" (arXiv 2409.19681), Section 3,
and the published code. A step of the student runs the code of sampling, ``Sampler.advance``.
"""

from collections.abc import Callable

from models.denoiser import member
from models.few_step import FewStep
from solvers import Sampler, State, check_sigmas, make_solver
from torch_utils.errors import UserError
from training.loss import IntervalLoss

SCHEDULE = {"schedule_type": "polynomial", "schedule_rho": 7}
# The published settings. The schedule of a second stage is that of its teacher.
FIRST_STAGE = {"num_steps": 4, "M": 3, "afs": True, "sampler_tea": "dpmpp", "max_order": 3}
SECOND_STAGE = {"num_steps": 3, "M": 2, "afs": True, "sampler_tea": "euler", "max_order": None}
SIGMA_MIN = 0.006  # or the network's, if that is higher
STUDENT = "euler"


class SFDLoss(IntervalLoss):
    """The error per step between a network that makes Euler steps and its teacher.

    net: the teacher's network, a Denoiser, which is not changed. With ``few_step`` (the network of
        a first stage) this is a second stage: the teacher makes its own steps.
    config: settings by name. Missing ones are those of ``FIRST_STAGE`` or ``SECOND_STAGE``; options
        of the teacher's solver have their defaults.
    checkpointing, error: see ``IntervalLoss``. Default False, absolute.
    distance: function (x, target, cond) -> [B], whose mean over the batch is added to every element
        of the last step's error (the second stage's perceptual term). Default None.

    The student goes on from its own states, so that later steps learn to repair earlier ones.
    Raises UserError if the settings do not fit the network.
    """

    published_error = "absolute"

    def __init__(
        self,
        net,
        config: dict,
        checkpointing: bool = False,
        error: str | None = None,
        distance: Callable | None = None,
    ):
        few = member(net, "few_step")
        schedule = {**SCHEDULE, "sigma_min": None, "sigma_max": None, "sigmas": None}
        config = {**schedule, **(FIRST_STAGE if few is None else SECOND_STAGE), **config}
        if few is not None:
            config |= _schedule_of_teacher(few, config, (config["M"] + 1) * (config["num_steps"] - 1) + 1)
            self.teacher_afs = few.afs
        if config["sigma_min"] is None:
            config["sigma_min"] = max(SIGMA_MIN, net.sigma_min)
        super().__init__(net, config, checkpointing, error)
        if few is not None and few.sigmas is not None:
            self.teacher_sigmas = check_sigmas(few.sigmas)
        self.student_solver = make_solver(STUDENT)
        self.distance = distance

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest noise level of the schedule, without rounding."""
        if self.config["sigmas"] is not None:
            return float(self.sigmas[-1]), float(self.sigmas[0])
        high = self.config["sigma_max"]
        return self.config["sigma_min"], self.net.sigma_max if high is None else high

    def trains(self, k: int) -> bool:
        return not (k == 0 and self.config["afs"])

    def few_step(self, step_condition: bool, num_steps: list[int] | None = None) -> FewStep:
        """How a student of this loss is sampled.

        step_condition: whether it gets the number of time steps.
        num_steps: the numbers that it is trained for. Default: that of this loss.
        """
        names = ("afs", *SCHEDULE, "sigmas")
        return FewStep(
            num_steps or [len(self.sigmas)],
            STUDENT,
            step_condition=step_condition,
            **{name: self.config[name] for name in names},
        )

    def student_step(self, student, x, step_idx, target, cond=None, start=None):
        """One step of the student, with gradients to its parameters.

        student: the network. If its ``few_step`` says so, it gets the number of time steps.
        x: its state [B,C,H,W] at sigmas[step_idx].
        step_idx: the interval.
        target: the teacher's state [B,C,H,W] at its end.
        cond: keyword arguments of the network.
        start: not used, since the student is not the teacher's network.

        Returns the error per element [B,C,H,W], and the student's state (detached).
        """
        run = Sampler(
            student,
            self.student_solver,
            self.sigmas,
            afs=self.config["afs"],
            cond=cond,
            checkpointing=self.checkpointing,
            train_network=True,
        )
        after = run.advance(State(x.detach()), step_idx).x
        error = self.error(after, target)
        if self.distance is not None and step_idx == run.intervals - 1:
            error = error + self.distance(after, target, cond).mean()
        return error, after.detach()


def _schedule_of_teacher(few: FewStep, config: dict, num_steps: int) -> dict:
    """The schedule of a second stage. UserError if the first stage does not have these steps."""
    if num_steps not in few.num_steps:
        there = ", ".join(map(str, few.num_steps))
        raise UserError(
            f"the second stage with num_steps={config['num_steps']} and M={config['M']} needs a first stage with "
            f"{num_steps} time steps; this network was trained for {there}: choose another num_steps or M, or teacher"
        )
    if config["sampler_tea"] != few.solver:
        raise UserError(f"the teacher of a second stage makes its own steps, sampler_tea={few.solver}")
    sigmas = None if few.sigmas is None else few.sigmas[:: config["M"] + 1]
    # The ends are those of the network.
    return {**{name: getattr(few, name) for name in SCHEDULE}, "sigma_min": None, "sigma_max": None, "sigmas": sigmas}
