"""The options of a training run, and the small languages that some are written in."""

import math
from dataclasses import asdict, dataclass, fields, replace

import torch

from models import zoo
from models.compile import AUTOCAST, COMPILE_MODES
from models.denoiser import member
from solvers import SOLVERS
from solvers.sampler import AFS_KINDS
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule
from solvers.search.problem import Problem
from solvers.span_table import BASES, GROUPS, PRESETS, SpanSolver
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds
from torch_utils.memory import AUTO
from training.loss import make_solvers
from training.predictor import DEFAULTS, AMEDPredictor
from training.sample_loss import DenoiserFeatures, parse_loss
from training.schedule_search import run_dmn
from training.teacher import TeacherSettings, draw_inputs

STUDENTS = tuple(name for name, solver in SOLVERS.items() if solver.can_learn)
TEACHERS = tuple(name for name, solver in SOLVERS.items() if solver.can_teach)


# What may differ between the parts of one run: where and how long it runs and what it writes, not what it computes.
# (Files may move; the network and the prompts in them may not change.)
CHANGEABLE = (
    *("total_kimg", "batch_gpu", "tick", "snap", "dump", "bench", "checkpointing"),
    *("model_path", "prompt_path", "tokenizer_path"),
)


@dataclass
class RunOptions:
    """What every training run has: the network, the length, the machine, and what is written where.

    guidance_rate: None is the network's own under guidance, and 0 without. prompt_path: captions for text-to-image
    networks, one drawn per sample; tokenizer_path: a local folder in place of the network's tokenizer from the hub.
    batch: samples per iteration over all processes; batch_gpu: samples per network call of one process (None: all of its
    share; "auto": what fits). tick: kimg between lines of statistics; snap, dump: ticks between snapshots of the student
    and between training states (None: only at the end). compile: "default" compiles the network. channels_last: memory
    format of the network (None: on the CPU only). checkpointing: activations of the network are not kept for the gradient
    but computed again.
    """

    dataset_name: str
    model_path: str | None = None
    outdir: str = "./exps"
    desc: str | None = None
    nosubdir: bool = False
    total_kimg: float = 10
    num_steps: int = 4
    guidance_type: str | None = None
    guidance_rate: float | None = None
    prompt_path: str | None = None
    tokenizer_path: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    afs: bool | str = True
    batch: int = 512
    batch_gpu: int | str | None = None
    seed: int | None = None
    amp: str = "none"
    compile: str = "none"
    channels_last: bool | None = None
    checkpointing: bool = False
    bench: bool = True
    tick: float = 1
    snap: int | None = None
    dump: int = 1

    afs_kinds = AFS_KINDS

    def __post_init__(self):
        card = zoo.CARDS.get(self.dataset_name)
        kind = self.guidance_type or (card.guidance[0] if card is not None else None)
        if self.guidance_rate is None and kind in ("none", "uncond"):
            self.guidance_rate = 0.0

    @classmethod
    def from_dict(cls, values: dict):
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"unknown training option '{unknown[0]}'")
        if "dataset_name" not in values:
            raise UserError("the training options name no dataset_name")
        check_kinds(values, {field.name: field.type for field in fields(cls)})
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that no network could make work."""
        card = zoo.find_card(self.dataset_name)
        if card is not None:
            self.check_prompts(card.takes_prompts)
        positive("batch", self.batch, whole=True)
        positive("total_kimg", self.total_kimg)
        positive("tick", self.tick)
        for name in ("batch_gpu", "snap", "dump"):
            if getattr(self, name) not in (None, AUTO):
                positive(name, getattr(self, name), whole=True)
        if self.batch % world_size:
            raise UserError(f"batch={self.batch} must be divisible by the number of processes ({world_size})")
        share = self.batch // world_size
        if self.batch_gpu not in (None, AUTO) and share % min(self.batch_gpu, share):
            raise UserError(
                f"batch_gpu={self.batch_gpu} must divide each process's share of the batch, {share} samples"
            )
        if self.amp not in AUTOCAST:
            raise UserError(f"amp={self.amp}: choose from {', '.join(AUTOCAST)}")
        if self.compile not in COMPILE_MODES[:2]:  # a CUDA graph would overwrite activations that gradients need
            raise UserError(f"compile={self.compile}: choose from {', '.join(COMPILE_MODES[:2])}")
        if self.afs not in self.afs_kinds:
            raise UserError(f"afs={self.afs!r}: choose from {', '.join(map(str, AFS_KINDS))}")
        self._check_desc()

    def _check_desc(self) -> None:
        """It becomes part of the name of a folder."""
        text = self.desc or ""
        if len(text) > 100 or not text.isprintable() or set(text) & set('/\\:*?"<>|'):
            raise UserError(f"desc={text[:40]!r}: choose at most 100 printable characters that a folder name may have")

    def check_prompts(self, needed: bool) -> None:
        """Raises UserError where the network needs prompts and there are none, or the other way round."""
        if needed and self.prompt_path is None:
            raise UserError(f"{self.dataset_name} needs texts: give --prompt_path, a .txt or .csv file of captions")
        for name in ("prompt_path", "tokenizer_path"):
            if not needed and getattr(self, name) is not None:
                raise UserError(f"--{name}: {self.dataset_name} is no text-to-image network; leave it out")

    def guess_evals_per_call(self) -> int:
        """What a call of the network costs, as far as the guidance tells."""
        kind = self.guidance_type or ("cfg" if self.prompt_path is not None else None)
        return 2 if kind == "cfg" and self.guidance_rate != 1 else 1


@dataclass
class AMEDOptions(RunOptions):
    """Every option of train.py that a predictor's run depends on; names and defaults are the original code's.

    sigmas: an explicit schedule that replaces num_steps, schedule_type and schedule_rho. teacher_cache: how many
    trajectories of the teacher are computed and then used again and again (None: as many as samples).
    """

    sampler_stu: str = "amed"
    sampler_tea: str = "heun"
    M: int = 1
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    sigmas: list[float] | None = None
    scale_dir: float = 0.01
    scale_time: float = 0.0
    max_order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = True
    lr: float = 5e-3
    teacher_cache: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.sigmas is not None:
            self.sigmas = check_sigmas(self.sigmas).tolist()
            self.num_steps = len(self.sigmas)

    def predictor_config(self, img_resolution: int | None = None) -> dict:
        """The configuration that the predictor carries, without what keeps its default."""
        own = {key: getattr(self, key) for key in DEFAULTS if hasattr(self, key)}
        return {**own, "img_resolution": img_resolution}

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that no network could make work; DistillationLoss checks the rest."""
        super().check(world_size)
        positive("lr", self.lr)
        if self.teacher_cache is not None and (self.teacher_cache < self.batch or self.teacher_cache % self.batch):
            raise UserError(f"--teacher_cache={self.teacher_cache} must be a multiple of the batch, {self.batch}")
        make_solvers(self.to_dict())
        AMEDPredictor(**self.predictor_config())

    @property
    def calls(self) -> int:
        """Calls of the network that the student makes."""
        return AMEDPredictor(**self.predictor_config()).evaluations()

    def folder_name(self, number: int, evals_per_call: int | None = None) -> str:
        """``<number>-<dataset_name>-<num_steps>-<NFE>-<student>-<teacher>-<M>-<schedule>[-afs][-desc]``.

        evals_per_call: of the network; None guesses it from the guidance.
        """
        if evals_per_call is None:
            evals_per_call = self.guess_evals_per_call()
        schedule = "sigmas" if self.sigmas is not None else self.schedule_type
        parts = [f"{number:05d}", self.dataset_name, self.num_steps, self.calls * evals_per_call, self.sampler_stu]
        parts += [self.sampler_tea, self.M, schedule, *(["afs"] if self.afs else [])]
        return "-".join(str(part) for part in (*parts, *([self.desc] if self.desc else [])))

    def without_effect(self, names) -> list[str]:
        """Those of the options ``names`` that nothing looks at under the other settings."""
        used = {*SOLVERS[self.sampler_stu].options, *SOLVERS[self.sampler_tea].options}
        idle = [n for n in ("max_order", "predict_x0", "lower_order_final", "thresholding") if n not in used]
        if "predict_x0" in used and not self.predict_x0:
            idle.append("thresholding")
        if self.schedule_type == "logsnr":
            idle.append("schedule_rho")
        if self.nosubdir:
            idle.append("desc")
        return [name for name in idle if name in names]


def positive(name: str, value, whole: bool = False) -> None:
    if not math.isfinite(value) or value <= 0 or (whole and int(value) != value):
        raise UserError(f"{name}={value} must be a {'whole ' if whole else ''}number above 0")


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
class SpanOptions(RunOptions):
    """Every option of train.py under ``--objective=final``; see RunOptions for those of all runs.

    preset: of ``solvers.span_table.PRESETS``; heads: comma-separated ``solvers.span_heads.HEADS``, or "none" (None: spatial and
    time for the preset "full", no other); parallel: calls per batch of the network; time_bound: how far the logarithm of a
    time scale may go (None: as far as the preset says); afs: None is the preset's first step,
    else False, True (data of mean zero) or "data" (measured mean and variance). schedule_type, schedule_rho, sigmas: the
    labels that the student starts from (None: the preset's, or found by trial); init: which starts are tried (see
    ``starts``), on init_pairs pairs; init_trial: share of the iterations for which the three best of them are trained first.

    loss: see ``training.sample_loss`` (None: features and a little huber, or huber where the network has no encoder whose
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

    def resolved(self, net, prompts=None, device="cpu") -> "SpanOptions":
        """The options with the heads and the loss that this network can have, where none were given."""
        heads, loss = self.heads, self.loss
        if heads is None:
            names = [name for name in self.head_names() if name != "time" or member(net, "noise_embedding")]
            heads = ",".join(names) or "none"
        if loss is None:
            loss = DEFAULT_LOSS if has_features(net, self.feature_sigma, prompts, device) else "huber"
        return replace(self, heads=heads, loss=loss)

    def make_student(self, sigma_min: float, sigma_max: float, **more) -> SpanSolver:
        student = SpanSolver(**self.student_config(sigma_min, sigma_max, **more))
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

    def rates(self, student: SpanSolver) -> dict[str, float]:
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

    def phase_list(self, student: SpanSolver) -> list[tuple[frozenset[str], float]]:
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


def learned(student: SpanSolver) -> dict[str, list[torch.nn.Parameter]]:
    """What a student learns by kind: the groups of its table, "shifts" of the head "time", and "heads", all others."""
    groups = {name: [parameter] for name, parameter in student.groups().items()}
    for name, head in student.heads.items():
        groups.setdefault("shifts" if name == "time" else "heads", []).extend(head.parameters())
    return groups


def parse_phases(text: str, rounds: int, names: set[str]) -> list[tuple[frozenset[str], float]]:
    """The phases of ``SpanOptions.phase_list``. Raises UserError for unknown groups and shares that are no numbers."""
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
