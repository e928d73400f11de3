"""The settings of a run that trains a span student on its final samples, and the small languages that some are written in."""

import math
from dataclasses import dataclass, replace

import torch

from solvers.feature_loss import DenoiserFeatures
from solvers.loop import AFS_KINDS
from solvers.optimize import Problem, run_dmn
from solvers.pair_loss import parse_loss
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule
from solvers.span import BASES, GROUPS, PRESETS, SpanStudent
from torch_utils.errors import UserError
from training.config import RunOptions, positive
from training.inputs import draw_inputs
from training.teacher_set import TeacherSettings

RATES = {
    "labels": 2e-2,
    "inner": 1e-2,
    "time": 2e-2,
    "inner_time": 1e-2,
    "corrections": 3e-2,
    "scale": 1e-2,
    "contrast": 1e-3,
    "heads": 3e-3,
    "shifts": 1e-2,
}
# Rates of a preset that differ from ``RATES``: the best in validation on two networks (docs/span_solver.md, "Choices
# for the restrictions"). scale of dyweight: within its bound it moves as fast as a correction.
PRESET_RATES = {
    "amed-table": {"inner": 0.1, "inner_time": 0.1, "scale": 0.1},
    "epd": {"inner": 0.1, "inner_time": 0.1, "scale": 0.1, "corrections": 0.1},
    "dyweight": {"scale": 6e-2},
}
KINDS = (*GROUPS, "heads", "shifts")
DEFAULT_HEADS = ("spatial", "time")  # of the preset "full", if nothing else is said
DEFAULT_LOSS = "features+0.2*huber"
GRID_GROUPS = ("labels", "inner", "time", "inner_time")
CHANGEABLE_FINAL = ("teacher_set",)  # besides those of every run
INITIAL_BASES = ("ab", "dpmpp", "ipndm")
INITIAL_GRIDS = ("polynomial:7", "polynomial:4", "logsnr", "time_uniform:1")


@dataclass
class FinalOptions(RunOptions):
    """Every option of train.py under ``--objective=final``; see RunOptions for those of all runs.

    preset: of ``solvers.span.PRESETS``; heads: comma-separated ``solvers.span_heads.HEADS``, or "none" (None: spatial and
    time for the preset "full", no other); parallel: calls per batch of the network; time_bound: how far the logarithm of a
    time scale may go (None: as far as the preset says); afs: None is the preset's first step,
    else False, True (data of mean zero) or "data" (measured mean and variance). schedule_type, schedule_rho, sigmas: the
    labels that the student starts from (None: the preset's, or found by trial); init: which starts are tried (see
    ``starts``), on init_pairs pairs; init_trial: share of the iterations for which the three best of them are trained first.

    loss: see ``solvers.pair_loss`` (None: features and a little huber, or huber where the network has no encoder whose
    features could be compared); feature_sigma: noise level at which the denoiser's features are compared. w_dist:
    weight of the energy distance; w_anchor: of the distance to the teacher's states, which decays to 0 over the first
    ``anchor`` share of the run; w_delta: of the squared corrections.

    sampler_tea, num_steps_tea, schedule_tea, rho_tea: the teacher; pairs, val_pairs: how many it makes; teacher_set: file
    they are kept in (None: one in outdir/teacher-sets, named after the settings).

    lrs: learning rates per group, those left out keep ``PRESET_RATES`` of the preset, else ``RATES``; lr_final: share of the rates at the end of the cosine;
    warmup: iterations; clip: largest norm of the gradient; ema: decay of the average that is validated every val_every
    iterations and of which the best is kept; phases, phase_rounds: see ``parse_phases``. checkpointing: activations are
    computed again in the backward pass.
    """

    objective: str = "final"
    sampler_stu: str = "span"
    num_steps: int = 5
    total_kimg: float = 16
    batch: int = 32
    afs: bool | str | None = None
    preset: str = "full"
    heads: str | None = None
    parallel: int | None = None
    time_bound: float | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    sigmas: list[float] | None = None
    init: str | None = None
    init_pairs: int = 16
    init_trial: float = 0.1
    loss: str | None = None
    feature_sigma: float = 0.2
    w_dist: float = 0.0
    w_anchor: float = 0.0
    anchor: float = 0.2
    w_delta: float = 0.0
    sampler_tea: str = "deis"
    num_steps_tea: int = 31
    schedule_tea: str = "polynomial"
    rho_tea: float = 7.0
    pairs: int = 1024
    val_pairs: int = 128
    teacher_set: str | None = None
    lrs: str = ""
    lr_final: float = 0.02
    warmup: int = 10
    clip: float = 1.0
    ema: float = 0.98
    val_every: int = 25
    phases: str | None = None
    phase_rounds: int = 1

    afs_kinds = (None, *AFS_KINDS)

    def __post_init__(self):
        super().__post_init__()
        if self.sigmas is not None:
            self.sigmas = check_sigmas(self.sigmas).tolist()
            self.num_steps = len(self.sigmas)

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that no network could make work."""
        if self.objective != "final" or self.sampler_stu != "span":
            raise UserError(f"objective={self.objective} with sampler_stu={self.sampler_stu}: it trains a span student")
        super().check(world_size)
        for name in ("init_pairs", "pairs", "val_pairs", "val_every", "phase_rounds"):
            positive(name, getattr(self, name), whole=True)
        for name in ("feature_sigma", "clip", "rho_tea"):
            positive(name, getattr(self, name))
        for name in ("w_dist", "w_anchor", "w_delta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"{name}={getattr(self, name)} must be a number of at least 0")
        for name, least, most in (("lr_final", 0, 1), ("ema", 0, 1), ("anchor", 0, 1), ("init_trial", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{name}={getattr(self, name)} must lie in {least}..{most}")
        if self.ema == 1:
            raise UserError("ema=1: the average would never move; it must be below 1")
        if self.warmup < 0:
            raise UserError(f"warmup={self.warmup} must be at least 0")
        if self.w_dist and self.val_pairs < 2:
            raise UserError("w_dist needs val_pairs of at least 2")
        if self.pairs < self.batch:
            raise UserError(f"pairs={self.pairs} must be at least the batch, {self.batch}")
        if self.init is not None and (self.schedule_type is not None or self.sigmas is not None):
            raise UserError("--init: the student starts from --sigmas or --schedule_type; give only one of them")
        if self.schedule_rho is not None and self.schedule_type is None:
            raise UserError("--schedule_rho needs --schedule_type")
        parse_loss(self.loss or DEFAULT_LOSS)
        student = self.make_student(0.002, 80.0)
        self.starts()
        self.phase_list(student)
        self.rates(student)
        self.teacher(0.002, 80.0)

    # The student

    def student_config(self, sigma_min: float, sigma_max: float, **more) -> dict:
        """The configuration of the untrained student; more: what a start changes."""
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset}: choose from {', '.join(PRESETS)}")
        own = {name: getattr(self, name) for name in ("dataset_name", "guidance_type", "guidance_rate", "num_steps")}
        own |= {"sigma_min": sigma_min, "sigma_max": sigma_max, "preset": self.preset}
        for name in ("parallel", "time_bound", "schedule_type", "schedule_rho", "sigmas"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        if self.head_names():
            own |= {
                "heads": self.head_names(),
                "img_channels": 3,
                "embedding_width": 1,
            }  # the network's are in ``more``
        if self.afs is not None:
            own["first_step"] = {False: "none", True: "zero", "data": "gaussian"}[self.afs]
        return {**PRESETS[self.preset], **own, **more}

    def head_names(self) -> list[str]:
        if self.heads is None:
            return list(DEFAULT_HEADS) if self.preset == "full" else []
        names = [] if self.heads == "none" else [name.strip() for name in self.heads.split(",")]
        if len(set(names)) < len(names):
            raise UserError(f"--heads={self.heads}: name each head only once")
        return names

    def resolved(self, net, prompts=None, device="cpu") -> "FinalOptions":
        """The options with the heads and the loss that this network can have, where none were given."""
        heads, loss = self.heads, self.loss
        if heads is None:
            names = [name for name in self.head_names() if name != "time" or getattr(net, "noise_embedding", None)]
            heads = ",".join(names) or "none"
        if loss is None:
            loss = DEFAULT_LOSS if has_features(net, self.feature_sigma, prompts, device) else "huber"
        return replace(self, heads=heads, loss=loss)

    def make_student(self, sigma_min: float, sigma_max: float, **more) -> SpanStudent:
        student = SpanStudent(**self.student_config(sigma_min, sigma_max, **more))
        if not learned(student):
            raise UserError(f"preset={self.preset} with num_steps={self.num_steps} has nothing to learn")
        if student.evaluations() < 1:
            raise UserError(
                f"num_steps={self.num_steps}: the student would not call the network: give more time stamps"
            )
        return student

    def starts(self) -> list[tuple[str | None, str | None]]:
        """(base, grid) of the starts to try; None is the preset's own, or what schedule_type and sigmas say.

        init: "preset"; or a comma-separated list of ``base``, ``base@grid`` or ``@grid``, where a grid is a schedule with
        its exponent, as "polynomial:7", or "dmn". Default: a few bases and grids for the preset "full", else "preset".
        """
        text = self.init
        if text is None:
            fixed = self.sigmas is not None or self.schedule_type is not None
            if self.preset != "full":
                text = "preset"
            elif fixed:
                text = ",".join(INITIAL_BASES if self.parallel in (None, 1) else ("ab",))
            else:
                bases = INITIAL_BASES if self.parallel in (None, 1) else ("ab",)
                text = ",".join(f"{base}@{grid}" for base in bases for grid in INITIAL_GRIDS)
        if text == "preset":
            return [(None, None)]
        starts = []
        for part in text.split(","):
            base, _, grid = part.strip().partition("@")
            if base and base not in BASES:
                raise UserError(f"--init={text}: unknown base '{base}'; choose from {', '.join(BASES)}")
            if grid:
                _check_grid(text, grid)
            if not base and not grid:
                raise UserError(f"--init={text}: write 'preset', or base@grid for each start")
            starts.append((base or None, grid or None))
        return starts

    def folder_name(self, number: int, evals_per_call: int | None = None) -> str:
        """``<number>-<dataset_name>-<num_steps>-<NFE>-span-<preset>-<teacher>[-desc]``."""
        per_call = self.guess_evals_per_call() if evals_per_call is None else evals_per_call
        calls = self.make_student(0.002, 80.0).evaluations()
        parts = [f"{number:05d}", self.dataset_name, self.num_steps, calls * per_call, "span", self.preset]
        return "-".join(str(part) for part in (*parts, self.sampler_tea, *([self.desc] if self.desc else [])))

    def without_effect(self, names) -> list[str]:
        """Those of the options ``names`` that nothing looks at under the other settings."""
        idle = []
        if "features" not in [name for _, name in parse_loss(self.loss or DEFAULT_LOSS)] and not self.w_dist:
            idle.append("feature_sigma")
        if not self.w_anchor:
            idle.append("anchor")
        if len(self.starts()) == 1:
            idle += ["init_pairs", "init_trial"]
        if self.schedule_tea == "logsnr":
            idle.append("rho_tea")
        if self.nosubdir:
            idle.append("desc")
        return [name for name in idle if name in names]

    # The optimisation

    def rates(self, student: SpanStudent) -> dict[str, float]:
        """Learning rate of each group that the student learns."""
        given = {}
        for part in filter(None, (piece.strip() for piece in self.lrs.split(","))):
            name, _, value = part.partition("=")
            try:
                rate = float(value)
            except ValueError:
                rate = math.nan
            if name not in KINDS or not (math.isfinite(rate) and rate >= 0):
                raise UserError(f"--lrs: '{part}' should be group=rate, with a group of {', '.join(KINDS)}")
            if name not in learned(student):
                raise UserError(f"--lrs: the preset {self.preset} does not learn '{name}'; leave it out")
            given[name] = rate
        rates = {**RATES, **PRESET_RATES.get(self.preset, {}), **given}
        rates = {name: rates[name] for name in learned(student)}
        if not any(rates.values()):
            raise UserError("--lrs: all learning rates are 0")
        return rates

    def phase_list(self, student: SpanStudent) -> list[tuple[frozenset[str], float]]:
        """(groups that are trained, share of the run), one after the other; the shares sum to one.

        phases: comma-separated ``group+group:share``, where "all" is every group; all of them phase_rounds times over.
        Default: everything at once, but grid and corrections in turn for S4S, as published.
        """
        names, text, rounds = set(learned(student)), self.phases, self.phase_rounds
        if text is None:
            text = "all:1"
            grid = sorted(names & set(GRID_GROUPS))
            if self.preset == "s4s" and "corrections" in names and grid:
                text, rounds = f"{'+'.join(grid)}:1,corrections+heads+shifts:1", 4 if rounds == 1 else rounds
        return parse_phases(text, rounds, names)

    def teacher(self, sigma_min: float, sigma_max: float) -> TeacherSettings:
        """The settings of the teacher's pairs, over the student's range."""
        if self.schedule_tea not in SCHEDULES:
            raise UserError(f"schedule_tea={self.schedule_tea}: choose from {', '.join(SCHEDULES)}")
        return TeacherSettings(
            solver=self.sampler_tea,
            num_steps=self.num_steps_tea,
            schedule_type=self.schedule_tea,
            schedule_rho=float(self.rho_tea),
            sigma_min=float(sigma_min),
            sigma_max=float(sigma_max),
            pairs=self.pairs,
            validation=self.val_pairs,
            seed=self.seed or 0,
            states=self.w_anchor > 0,
        )


def has_features(net, sigma: float, prompts=None, device="cpu") -> bool:
    """Whether there is an encoder for ``DenoiserFeatures``; UserError where the network does not support sigma."""
    features = DenoiserFeatures(net, sigma)
    latents, cond = draw_inputs(net, [0], prompts, device=device)
    try:
        features(latents, cond)
    except UserError:
        return False
    return True


def learned(student: SpanStudent) -> dict[str, list[torch.nn.Parameter]]:
    """What a student learns by kind: the groups of its table, "shifts" of the head "time", and "heads", all others."""
    groups = {name: [parameter] for name, parameter in student.groups().items()}
    for name, head in student.heads.items():
        groups.setdefault("shifts" if name == "time" else "heads", []).extend(head.parameters())
    return groups


def parse_phases(text: str, rounds: int, names: set[str]) -> list[tuple[frozenset[str], float]]:
    """The phases of ``FinalOptions.phase_list``. Raises UserError for unknown groups and shares that are no numbers."""
    phases = []
    for part in text.split(","):
        kinds, colon, share = part.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not colon or not (math.isfinite(value) and value > 0):
            raise UserError(f"--phases={text}: '{part.strip()}' should be groups:share, for example labels+time:0.2")
        groups = set(kinds.split("+"))
        unknown = sorted(groups - set(KINDS) - {"all"})
        if unknown:
            raise UserError(f"--phases={text}: unknown group '{unknown[0]}'; choose from all, {', '.join(KINDS)}")
        groups = names if "all" in groups else groups & names
        if not groups:
            raise UserError(
                f"--phases={text}: nothing is learned in '{part.strip()}' (learned: {', '.join(sorted(names))})"
            )
        phases.append((frozenset(groups), value))
    phases = phases * rounds
    total = sum(share for _, share in phases)
    return [(groups, share / total) for groups, share in phases]


def _check_grid(text: str, grid: str) -> None:
    kind, _, rho = grid.partition(":")
    if kind == "dmn" and not rho:
        return
    if kind not in SCHEDULES:
        raise UserError(f"--init={text}: unknown grid '{grid}'; choose from {', '.join(SCHEDULES)}, dmn")
    if rho:
        try:
            positive("rho", float(rho))
        except ValueError:
            raise UserError(f"--init={text}: '{rho}' is not an exponent above 0") from None


def grid_sigmas(grid: str, num_steps: int, sigma_min: float, sigma_max: float, net) -> list[float]:
    """The noise levels of a grid of ``--init``, float64 [num_steps]."""
    kind, _, rho = grid.partition(":")
    if kind == "dmn":
        problem = Problem(net, "dpmpp", num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
        return run_dmn(problem, kind="auto").sigmas.tolist()
    return get_schedule(num_steps, sigma_min, sigma_max, kind, float(rho or 7), net=net).tolist()
