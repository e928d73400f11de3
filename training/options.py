"""The options of a training run, and the parsers of those written in a syntax of their own."""

import math
from dataclasses import asdict, dataclass, fields, make_dataclass, replace

import click
import torch

from models import zoo
from models.compile import AUTOCAST, COMPILE_MODES, DTYPES
from models.denoiser import member
from models.edm import EDMDenoiser
from models.inputs import draw_inputs
from solvers import SOLVERS
from solvers.former_names import current, with_current_names
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule
from solvers.search.problem import Problem
from solvers.solver import Option, check_teacher, teachers
from solvers.span_heads import SHIFTS
from solvers.span_table import BASES, GROUPS, PRESETS, SpanSolver
from torch_utils.cli import PATH, SEED, Number
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, load_array
from torch_utils.kinds import check_kinds, kinds_of
from torch_utils.memory import AUTO, BatchSize
from torch_utils.options import COUNT, POSITIVE, REQUIRED, AFSType, SigmaList, check_options, click_type, flag
from training.events import summary_writer
from training.loss import INTERVAL_LOSSES, make_solvers, make_teacher
from training.predictor import DEFAULTS, AMEDPredictor, solver_settings, trainable_options
from training.sample_loss import TERM_NAMES, DenoiserFeatures, parse_loss
from training.schedule_search import run_dmn
from training.sfd_loss import FIRST_STAGE, SCHEDULE, SECOND_STAGE, STUDENT
from training.teacher import TeacherSettings


class StepCount(click.IntRange):
    """A number of time steps, or a range of them as text, like "4-7"."""

    name = "N|A-B"

    def convert(self, value, param, ctx):
        first, dash, last = str(value).partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            return super().convert(value, param, ctx)
        self.convert(first, param, ctx)
        if not int(first) < self.convert(last, param, ctx):
            self.fail(f"'{value}': the second number must be larger", param, ctx)
        return value


STUDENTS = tuple(name for name, solver in SOLVERS.items() if solver.can_learn)


@dataclass
class RunOptions:
    """The options of every training run, with the names and defaults of the original code.

    ``changeable`` options may differ between the parts of a run: where and how long it runs and
    what it writes, not what it computes. Files may move, but not change.
    """

    dataset_name: str = flag(
        "Network: digits, cifar10, ffhq, ... ('python -m models.zoo list')", REQUIRED, zoo.NAMES, required=False
    )
    model_path: str | None = flag(
        "File of the network, https address or hf:owner/name (default: embedded or downloaded); diffusers: a folder or"
        " hub id; custom: also MODULE:FUNCTION of your own code, which is run",
        kind=PATH,
        changeable=True,
        metavar="FILE",
    )
    num_steps: int = flag("Time steps; the student evaluates 2 (N - 1) times, one less with AFS", 4, StepCount(min=2))
    sampler_stu: str = flag("Student solver", "amed", tuple(dict.fromkeys([*STUDENTS, "span"])))
    sampler_tea: str = flag("Teacher solver", "heun", tuple(teachers()))
    guidance_type: str | None = flag("Guidance of the network", kind=("cg", "cfg", "uncond", "none"))
    guidance_rate: float | None = flag(
        "Strength of the guidance (default: 7.5 for cfg, 1 for cg, else 0)", kind=Number()
    )
    schedule_type: str = flag("Time schedule", "polynomial", tuple(SCHEDULES))
    schedule_rho: float = flag("Exponent of the schedule", 7, POSITIVE)
    sigma_min: float | None = flag("Lowest noise level (default: the network's)", kind=POSITIVE)
    sigma_max: float | None = flag("Highest noise level (default: the network's)", kind=POSITIVE)
    sigmas: list[float] | None = flag(
        "Explicit noise levels, descending; they replace num_steps and schedule_*", kind=SigmaList()
    )
    afs: bool | str = flag(
        "Analytical first step; 'data' uses the mean and spread of the training data", True, AFSType()
    )
    prompt_path: str | None = flag(
        "Captions for text-to-image networks: a .csv or .txt file, or coco30k; one is drawn per sample",
        kind=PATH,
        changeable=True,
        metavar="FILE",
    )
    images: str | None = flag(
        "Restoration networks: folder or zip of degraded images; one is drawn per sample",
        kind=PATH,
        changeable=True,
        metavar="DIR|ZIP",
    )
    tokenizer_path: str | None = flag(
        "Tokenizer of Stable Diffusion (default: from the hub)", kind=PATH, changeable=True, metavar="DIR"
    )
    total_kimg: float = flag("Length of the training, in thousands of samples", 10, POSITIVE, changeable=True)
    batch: int = flag("Samples per iteration, over all processes", 512, COUNT)
    batch_gpu: int | str | None = flag(
        "Samples per network call (default: the whole share of a process; auto: as many as fit into memory)",
        kind=BatchSize(),
        aliases=("--batch-gpu",),
        changeable=True,
    )
    checkpointing: bool = flag(
        "Save memory by computing the network's activations again for the gradient", False, changeable=True
    )
    seed: int | None = flag("Random seed (default: a random one, recorded)", kind=SEED)
    amp: str = flag("Autocast of the network", "none", tuple(AUTOCAST))
    compile: str = flag(  # a CUDA graph would overwrite activations that gradients need
        "torch.compile of the network (--compile is --compile=default), which takes minutes",
        "none",
        COMPILE_MODES[:2],
        is_flag=False,
        flag_value="default",
    )
    channels_last: bool | None = flag("Memory format of the network (default: True on the CPU in float32)")
    bench: bool = flag("cuDNN benchmarking", True, changeable=True)
    tf32: bool = flag("TensorFloat-32 on NVIDIA GPUs: faster, rounded to 10 bits", False)
    dtype: str = flag("Precision of the weights of a diffusers pipeline; auto: bf16 or fp16 on a GPU", "fp32", DTYPES)
    outdir: str = flag("Folder of all runs", "./exps", PATH, metavar="DIR")
    desc: str | None = flag("Text to append to the name of the run's folder")
    nosubdir: bool = flag("Write into outdir itself", False, is_flag=True)
    tick: float = flag("Length of a tick in kimg; each tick logs a line of statistics", 1, POSITIVE, changeable=True)
    snap: int | None = flag(
        "Ticks between snapshots of the predictor (default: only at the end)", kind=COUNT, changeable=True
    )
    dump: int = flag("Ticks between training states", 1, COUNT, changeable=True)
    tensorboard: bool = flag(
        "Also write event files of TensorBoard: statistics, and images at every snapshot", False, changeable=True
    )

    def __post_init__(self):
        card = zoo.CARDS.get(self.dataset_name)
        kind = self.guidance_type or (card.guidance[0] if card is not None else None)
        if self.guidance_rate is None and kind in ("none", "uncond"):
            self.guidance_rate = 0.0
        if self.sigmas is not None:
            self.sigmas = check_sigmas(self.sigmas).tolist()
            self.num_steps = len(self.sigmas)

    @classmethod
    def from_dict(cls, values: dict):
        values = with_current_names(values)
        unknown = sorted(set(values) - set(kinds_of(cls)))
        if unknown:
            raise UserError(f"unknown training option '{unknown[0]}'")
        if "dataset_name" not in values:
            raise UserError("the training options name no dataset_name")
        check_kinds(values, kinds_of(cls))
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that are wrong for any network."""
        needed = zoo.takes_prompts(self.dataset_name, self.network_path)
        if needed is not None:
            self.check_prompts(needed)
        check_options(self)
        if self.tensorboard:
            summary_writer()
        if self.batch % world_size:
            raise UserError(f"batch={self.batch} must be divisible by the number of processes ({world_size})")
        share = self.batch // world_size
        if self.batch_gpu not in (None, AUTO) and share % min(self.batch_gpu, share):
            raise UserError(f"batch_gpu={self.batch_gpu} must divide the share of each process, {share} samples")
        self._check_desc()

    def _check_desc(self) -> None:
        """Checks desc, which becomes part of a folder name."""
        text = self.desc or ""
        if len(text) > 100 or not text.isprintable() or set(text) & set('/\\:*?"<>|'):
            raise UserError(
                f"desc={text[:40]!r}: use at most 100 printable characters that are allowed in folder names"
            )

    def check_prompts(self, needed: bool) -> None:
        """Raises UserError if the network needs prompts and has none, or the reverse."""
        if needed and self.prompt_path is None:
            raise UserError(f"{self.dataset_name} needs texts: give --prompt_path, a .txt or .csv file of captions")
        for name in ("prompt_path", "tokenizer_path"):
            if not needed and getattr(self, name) is not None:
                raise UserError(f"--{name}: {self.dataset_name} is not a text-to-image network; leave it out")

    def read_images(self, net) -> torch.Tensor | None:
        """The degraded images, uint8 [N,C,H,W], None for networks that do not restore images.

        Raises UserError if the network needs them and there are none, or the reverse, and for
        images of another size than the network's.
        """
        needed = member(net, "takes_images")
        if needed != (self.images is not None):
            if needed:
                raise UserError(f"{self.dataset_name} restores images: give --images, a folder of degraded images")
            raise UserError(f"--images: {self.dataset_name} does not restore images; leave it out")
        if not needed:
            return None
        source, size = ImageSource(self.images), net.img_resolution
        source.expect(net.img_channels, "as the network needs")
        if source.shape[1:] != (size, size):
            found = f"{source.shape[2]}x{source.shape[1]}"
            raise UserError(f"--images: images of {found} pixels, but this network is distilled at {size}x{size}")
        return torch.from_numpy(load_array(source))

    @property
    def network_path(self) -> str | None:
        """The file of the network; None: embedded or downloaded."""
        return self.model_path

    def check_network(self, net) -> None:
        """Raises UserError for a network that cannot be trained with these options."""
        if member(net, "few_step") is not None:
            raise UserError("this network was fine-tuned for few steps: train predictors with the original network")

    def guess_evals_per_call(self) -> int:
        """Evaluations that a call of the network costs, guessed from the guidance."""
        kind = self.guidance_type or ("cfg" if self.prompt_path is not None else None)
        return 2 if kind == "cfg" and self.guidance_rate != 1 else 1


def _solver_option(users: dict[str, Option]):
    """The dataclass field of a solver option. If defaults differ between solvers, it is None."""
    first = next(iter(users.values()))
    defaults = [user.default for user in users.values()]
    same = all(default == defaults[0] for default in defaults)
    own = "" if same else f" (default: {', '.join(f'{name} {user.default}' for name, user in users.items())})"
    text = f"{', '.join(users)}: {first.help}{own}"
    field = flag(text, first.default if same else None, click_type(first.kind), aliases=first.aliases)
    return first.type | None, field


TRAINABLE = trainable_options()
# One field per option of the solvers that can be student or teacher.
SolverOptions = make_dataclass(
    "SolverOptions",
    [(name, *_solver_option(users)) for name, users in TRAINABLE.items()],
    bases=(RunOptions,),
    namespace={"__doc__": "The options of a run with those of its solvers."},
)


@dataclass
class StepwiseOptions(SolverOptions):
    """The options of a run with one loss per interval (``training.stepwise_trainer``)."""

    max_order: int | None = flag(
        f"{', '.join(TRAINABLE['max_order'])}: order of the method",
        DEFAULTS["max_order"],
        click.IntRange(1, max(SOLVERS[name].highest_order for name in TRAINABLE["max_order"])),
    )
    M: int = flag("Intermediate points that the teacher adds to every interval", 1, click.IntRange(min=0))
    lr: float = flag("Learning rate of Adam", 5e-3, POSITIVE)
    teacher_cache: int | None = flag(
        "Teacher trajectories to store and reuse, a multiple of the batch (default: none, always new ones)",
        kind=COUNT,
    )
    interval_loss: str | None = flag(
        "Error of an interval, a difference to the teacher (default: squared for predictors, absolute for sfd)",
        kind=tuple(INTERVAL_LOSSES),
    )

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that are wrong for any network."""
        if self.sampler_tea in set(teachers()) - set(teachers(per_step=True)):
            raise UserError(f"--sampler_tea={self.sampler_tea} can only make the pairs of --objective=final")
        self._check_solvers()
        super().check(world_size)
        if self.teacher_cache is not None and (self.teacher_cache < self.batch or self.teacher_cache % self.batch):
            raise UserError(f"--teacher_cache={self.teacher_cache} must be a multiple of the batch, {self.batch}")

    def _check_solvers(self) -> None:
        """Raises UserError for solvers and options that do not go together."""
        raise NotImplementedError

    def _idle(self) -> list[str]:
        """Options of schedule and folder that have no effect with the others."""
        idle = ["schedule_rho"] if self.schedule_type == "logsnr" else []
        return [*idle, *(["desc"] if self.nosubdir else [])]


@dataclass
class AMEDOptions(StepwiseOptions):
    """Options of train.py for an AMED predictor."""

    scale_dir: float = flag("Directions are scaled by 1 +- at most this", 0.01, Number(0, 1, max_open=True))
    scale_time: float = flag(
        "Noise levels for the network are scaled by 1 +- at most this", 0.0, Number(0, 1, max_open=True)
    )

    def predictor_config(self, img_resolution: int | None = None) -> dict:
        """The configuration of the predictor, without values that keep their default."""
        names = (*DEFAULTS, *solver_settings(self.to_dict()))
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {**own, "img_resolution": img_resolution}

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that are wrong for any network.

        DistillationLoss checks the rest.
        """
        super().check(world_size)
        AMEDPredictor(**self.predictor_config())

    def _check_solvers(self) -> None:
        make_solvers(self.to_dict())

    @property
    def calls(self) -> int:
        """Calls of the network that the student makes."""
        return AMEDPredictor(**self.predictor_config()).evaluations()

    def folder_name(self, number: int, evals_per_call: int | None = None) -> str:
        """Number, dataset, num_steps, NFE, student, teacher, M, schedule [, afs] [, desc].

        number: of the run.
        evals_per_call: evaluations per network call. Default None: guessed from the guidance.
        """
        if evals_per_call is None:
            evals_per_call = self.guess_evals_per_call()
        schedule = "sigmas" if self.sigmas is not None else self.schedule_type
        parts = [f"{number:05d}", self.dataset_name, self.num_steps, self.calls * evals_per_call, self.sampler_stu]
        parts += [self.sampler_tea, self.M, schedule, *(["afs"] if self.afs else [])]
        return "-".join(str(part) for part in (*parts, *([self.desc] if self.desc else [])))

    def without_effect(self, names) -> list[str]:
        """The options among ``names`` that have no effect with the other settings."""
        used = solver_settings(self.to_dict())
        idle = [*(name for name in TRAINABLE if name not in used), *self._idle()]
        if "predict_x0" in used and not self.predict_x0:
            idle.append("thresholding")
        return [name for name in idle if name in names]


# Published settings of SFD that differ between its stages, and for a range of steps.
SFD_RUNS = {
    "first": {**FIRST_STAGE, **SCHEDULE, "lr": 5e-5, "total_kimg": 200},
    "variable": {**FIRST_STAGE, **SCHEDULE, "lr": 5e-5, "total_kimg": 800},
    "second": {**SECOND_STAGE, "lr": 5e-4, "total_kimg": 2000},
}


@dataclass
class SFDOptions(StepwiseOptions):
    """Options of train.py for a network that is fine-tuned for few steps (``--objective=sfd``).

    None stands for the published value, which depends on the stage (``SFD_RUNS``), and for the
    schedule of a second stage, which is that of its teacher.
    """

    objective: str = "sfd"
    sampler_stu: str = STUDENT
    num_steps: int | str | None = None
    sampler_tea: str | None = None
    max_order: int | None = None
    M: int | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    lr: float | None = None
    total_kimg: float | None = None
    batch: int = 128
    dump: int = 10
    teacher: str | None = flag(
        "second stage: the network of the first stage, whose steps are the targets",
        kind=PATH,
        changeable=True,
        metavar="FILE",
    )
    lr_final: float = flag("learning rate in the second half, as a share", 0.1, Number(0, 1))
    rank: int | None = flag(
        "train low-rank adapters of this rank, and merge them in the result (default: all weights)", kind=COUNT
    )
    dropout: float = flag("dropout of the student", 0.0, Number(0, 1, max_open=True))
    loss: str | None = flag(
        f"terms added in the last step, {TERM_NAMES}, or none (default: features in a second stage, none before)",
        metavar="W*TERM+...",
    )
    feature_sigma: float = flag("noise level of the denoiser when features are compared", 0.2, POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        kind = "second" if self.teacher is not None else "variable" if isinstance(self.num_steps, str) else "first"
        for name, value in SFD_RUNS[kind].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that are wrong for any network.

        ``SFDLoss`` checks the rest.
        """
        if self.objective != "sfd" or self.sampler_stu != STUDENT:
            raise UserError(f"objective={self.objective} with sampler_stu={self.sampler_stu}: the student is {STUDENT}")
        super().check(world_size)
        if self.compile != "none":
            raise UserError("--compile: a network whose weights are trained is not compiled; leave it out")
        if min(self.step_numbers()) < 2 + bool(self.afs):
            raise UserError(
                f"num_steps={self.num_steps} with afs={self.afs} makes no evaluation: use at least {2 + bool(self.afs)}"
            )
        if self.loss not in (None, "none"):
            parse_loss(self.loss)
        if self.teacher is None:
            return
        if self.model_path is not None:
            raise UserError("--teacher is the network that is trained: leave --model_path out")
        for name in ("schedule_type", "schedule_rho", "sigma_min", "sigma_max", "sigmas"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name}: the schedule of a second stage is that of its teacher; leave it out")
        if len(self.step_numbers()) > 1:
            raise UserError(f"num_steps={self.num_steps}: a second stage has one number of time steps")

    def _check_solvers(self) -> None:
        make_teacher(self.to_dict())

    @property
    def network_path(self) -> str | None:
        return self.model_path if self.teacher is None else self.teacher

    def check_network(self, net) -> None:
        if not isinstance(net, EDMDenoiser) or net.takes_images:
            raise UserError(
                f"--objective=sfd trains EDM networks, and saves them as such; this is {type(net).__name__}"
            )
        few = net.few_step is not None
        if few and self.teacher is None:
            raise UserError("this network was fine-tuned for few steps: for its second stage, give it as --teacher")
        if not few and self.teacher is not None:
            raise UserError(f"--teacher={self.teacher}: not a network of --objective=sfd; leave it out to train one")

    def step_numbers(self) -> list[int]:
        """The numbers of time steps that are trained."""
        if not isinstance(self.num_steps, str):
            return [self.num_steps]
        first, _, last = self.num_steps.partition("-")
        return list(range(int(first), int(last) + 1))

    def loss_config(self) -> dict:
        """The configuration of ``SFDLoss``."""
        names = ("M", "afs", "sampler_tea", "max_order", "schedule_type", "schedule_rho")
        names += ("sigma_min", "sigma_max", "sigmas", *TRAINABLE)
        config = {name: getattr(self, name) for name in names}
        return config if self.teacher is None else {name: config[name] for name in ("M", "afs", "sampler_tea")}

    @property
    def calls(self) -> int:
        """Calls of the network that the student makes, at most."""
        return max(self.step_numbers()) - 1 - bool(self.afs)

    def folder_name(self, number: int, evals_per_call: int | None = None) -> str:
        """``<number>-<dataset_name>-<num_steps>-<NFE>-sfd-<teacher>-<M>-<schedule>[-afs][-desc]``."""
        nfe = "-".join(
            str(n - 1 - bool(self.afs)) for n in sorted({min(self.step_numbers()), max(self.step_numbers())})
        )
        schedule = "sigmas" if self.sigmas is not None else self.schedule_type or "second"
        parts = [f"{number:05d}", self.dataset_name, self.num_steps, nfe, "sfd", self.sampler_tea, self.M, schedule]
        return "-".join(
            str(part) for part in (*parts, *(["afs"] if self.afs else []), *([self.desc] if self.desc else []))
        )

    def without_effect(self, names) -> list[str]:
        """The options among ``names`` that have no effect with the other settings."""
        options = SOLVERS[self.sampler_tea].options
        idle = [*(name for name in TRAINABLE if name not in options), *self._idle()]
        if "predict_x0" in options and not self.predict_x0:
            idle.append("thresholding")
        if self.teacher is None or self.loss == "none":
            idle.append("feature_sigma")
        return [name for name in idle if name in names]


RATES = {
    "knots": 2e-2,
    "substeps": 1e-2,
    "sigma_scale": 2e-2,
    "substep_sigma_scale": 1e-2,
    "coef_offset": 3e-2,
    "step_gain": 1e-2,
    "state_gain": 1e-3,
    "heads": 3e-3,
    "shifts": 1e-2,
}
# Rates of a preset that differ from ``RATES``: the best in validation on two networks
# (docs/span_solver.md, "Choices for the restrictions"). With this rate, step_gain of dyweight moves
# as fast within its bound as a coefficient offset.
PRESET_RATES = {
    "amed-table": {"substeps": 0.1, "substep_sigma_scale": 0.1, "step_gain": 0.1},
    "epd": {"substeps": 0.1, "substep_sigma_scale": 0.1, "step_gain": 0.1, "coef_offset": 0.1},
    "dyweight": {"step_gain": 6e-2},
}


LEARNED = (*GROUPS, "heads", "shifts")  # groups that can have their own learning rate or phase
DEFAULT_HEADS = ("spatial", "time")  # heads of the preset "full"
DEFAULT_LOSS = "features+0.2*huber"
GRID_GROUPS = ("knots", "substeps", "sigma_scale", "substep_sigma_scale")
INITIAL_BASES = ("ab", "dpmpp", "ipndm")
INITIAL_GRIDS = ("polynomial:7", "polynomial:4", "logsnr", "time_uniform:1")
# What --minutes chooses, unless it is given. The length of the training follows from the time.
CHOSEN = ("init", "afs", "lrs", "lr_factor", "heads", "loss", "batch", "pairs", "val_pairs", "val_every")


@dataclass(frozen=True)
class Start:
    """A start of the student, as in ``--init``: base:order@grid.

    base: the classical solver. None: that of the preset.
    order: its highest order. None: that of the preset.
    grid: "dmn", or a schedule with its exponent, as "polynomial:7". None: of the preset, or by
        schedule_type and sigmas.
    """

    base: str | None = None
    order: int | None = None
    grid: str | None = None

    def __str__(self) -> str:
        return f"{self.solver or 'preset'}@{self.grid or 'given'}"

    @property
    def solver(self) -> str:
        """The classical solver with its order; "" for that of the preset."""
        return f"{self.base or ''}{f':{self.order}' if self.order else ''}"

    @property
    def init(self) -> str:
        """The value of ``--init``."""
        return f"{self.solver}{f'@{self.grid}' if self.grid else ''}" or "preset"


@dataclass
class SpanOptions(RunOptions):
    """Options of train.py for a span solver (``--objective=final``).

    None stands for a value that suits the preset or the network: ``heads`` and ``loss`` (see
    ``resolved``), ``afs``, ``parallel``, ``sigma_scale_bound``, and the initial noise levels (the
    preset's, or found by trial, see ``starts``). Rates missing in ``lrs`` are those of
    ``PRESET_RATES``, else of ``RATES``.
    """

    objective: str = "final"
    sampler_stu: str = "span"
    num_steps: int = 5
    total_kimg: float = 16
    batch: int = 32
    afs: bool | str | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    sampler_tea: str = "deis"
    preset: str = flag("kind of span solver: what it learns", "full", tuple(PRESETS))
    heads: str | None = flag(
        "heads: sample, spatial (residual net), time (embedding offset), blocks (offsets in all blocks), or none (default: spatial,time for full)",
        metavar="NAME,...",
    )
    parallel: int | None = flag("network calls per interval that run as one batch (default: the preset's)", kind=COUNT)
    sigma_scale_bound: float | None = flag(
        "bound of |ln a| of the sigma scales (default: the preset's)", kind=POSITIVE, aliases=("--time_bound",)
    )
    minutes: float | None = flag(
        "wall time of the whole run: starts, rates, heads, loss and numbers of samples that are not given are chosen by"
        " validation",
        kind=POSITIVE,
    )
    open: list[str] | None = None  # what ``minutes`` chooses; None: all of ``CHOSEN`` that have their default value
    init: str | None = flag(
        "starts to try: base@grid or base:order@grid,... or preset (default: several for full)", metavar="LIST"
    )
    init_pairs: int = flag("teacher pairs for the trial of each start", 16, COUNT)
    init_trial: float = flag(
        "share of the run for which the three best starts are trained before one is chosen", 0.1, Number(0, 1)
    )
    loss: str | None = flag(
        f"weighted sum of {TERM_NAMES} (default: {DEFAULT_LOSS})",
        metavar="W*TERM+...",
    )
    feature_sigma: float = flag("noise level of the denoiser when features are compared", 0.2, POSITIVE)
    w_dist: float = flag("weight of the energy distance between the distributions of features", 0.0, Number(0))
    w_anchor: float = flag(
        "weight of the distance to the teacher's states, at the beginning of the run", 0.0, Number(0)
    )
    anchor: float = flag("share of the run over which w_anchor falls to 0", 0.2, Number(0, 1))
    w_delta: float = flag("weight of the squared offsets of the coefficients", 0.0, Number(0))
    num_steps_tea: int = flag("time steps of the teacher", 31, click.IntRange(min=3))
    schedule_tea: str = flag("schedule of the teacher", "polynomial", tuple(SCHEDULES))
    rho_tea: float = flag("exponent of the teacher's schedule", 7.0, POSITIVE)
    pairs: int = flag("teacher pairs to train on", 1024, COUNT)
    val_pairs: int = flag("teacher pairs for validation", 128, COUNT)
    teacher_set: str | None = flag(
        "file of the teacher pairs (default: one in outdir/teacher-sets)", kind=PATH, changeable=True, metavar="FILE"
    )
    lrs: str = flag("learning rates of groups, knots=0.01,coef_offset=0.02,...", "", metavar="GROUP=RATE,...")
    lr_factor: float = flag("factor of all learning rates", 1.0, POSITIVE)
    lr_final: float = flag("learning rates at the end, as a share", 0.02, Number(0, 1))
    warmup: int = flag("iterations of linear warm-up of the rates", 10, click.IntRange(min=0))
    clip: float = flag("largest norm of the gradient", 1.0, POSITIVE)
    ema: float = flag("decay of the moving average, which is validated and saved", 0.98, Number(0, 1, max_open=True))
    val_every: int = flag("iterations between validations", 25, COUNT)
    phases: str | None = flag(
        "groups trained in each phase, with its share of the run: knots+sigma_scale:0.2,all:0.8",
        metavar="GROUPS:SHARE,...",
    )
    phase_rounds: int = flag("number of repetitions of the phases", 1, COUNT)

    def check(self, world_size: int) -> None:
        """Raises UserError for settings that are wrong for any network."""
        if self.objective != "final" or self.sampler_stu != "span":
            raise UserError(f"objective={self.objective} with sampler_stu={self.sampler_stu}: it trains a span student")
        check_teacher(self.sampler_tea, per_step=False)
        fitting = max(1, self.batch // world_size) * world_size  # a batch that the run may choose
        checked = replace(self, batch=fitting) if "batch" in self.to_choose() else self
        super(SpanOptions, checked).check(world_size)
        if self.w_dist and self.val_pairs < 2:
            raise UserError("w_dist needs val_pairs of at least 2")
        if self.pairs < self.batch and not {"pairs", "batch"} & self.to_choose():
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

    def to_choose(self) -> set[str]:
        """The options that ``minutes`` chooses."""
        if self.minutes is None:
            return set()
        if self.open is not None:
            return set(self.open)
        return {
            entry.name for entry in fields(self) if entry.name in CHOSEN and getattr(self, entry.name) == entry.default
        }

    # The student

    def student_config(self, sigma_min: float, sigma_max: float, **more) -> dict:
        """The configuration of the untrained student; more: what a start changes."""
        own = {name: getattr(self, name) for name in ("dataset_name", "guidance_type", "guidance_rate", "num_steps")}
        own |= {"sigma_min": sigma_min, "sigma_max": sigma_max, "preset": self.preset}
        for name in ("parallel", "sigma_scale_bound", "schedule_type", "schedule_rho", "sigmas"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        if self.head_names():
            own |= {
                "heads": self.head_names(),
                "img_channels": 3,
                "embedding_width": 1,
            }  # ``more`` has the network's values
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
        """The options, with heads and loss that this network supports if none were given."""
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
                f"num_steps={self.num_steps}: this solver would not evaluate the network; use more time steps"
            )
        return student

    def starts(self) -> list[Start]:
        """The starts to try.

        ``init`` is "preset", or a comma-separated list of ``base``, ``base@grid`` or ``@grid``; a
        base may have an order, as "ipndm:4". Default: several bases and grids for the preset
        "full", else "preset".
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
            return [Start()]
        return [parse_start(part.strip(), text) for part in text.split(",")]

    @property
    def calls(self) -> int:
        """Calls of the network that the student makes."""
        return self.make_student(0.002, 80.0).evaluations()

    def folder_name(self, number: int, evals_per_call: int | None = None) -> str:
        """``<number>-<dataset_name>-<num_steps>-<NFE>-span-<preset>-<teacher>[-desc]``."""
        per_call = self.guess_evals_per_call() if evals_per_call is None else evals_per_call
        parts = [f"{number:05d}", self.dataset_name, self.num_steps, self.calls * per_call, "span", self.preset]
        return "-".join(str(part) for part in (*parts, self.sampler_tea, *([self.desc] if self.desc else [])))

    def without_effect(self, names) -> list[str]:
        """The options among ``names`` that have no effect with the other settings."""
        idle = []
        if "features" not in [name for _, name in parse_loss(self.loss or DEFAULT_LOSS)] and not self.w_dist:
            idle.append("feature_sigma")
        if not self.w_anchor:
            idle.append("anchor")
        if len(self.starts()) == 1 or self.minutes is not None:
            idle += ["init_pairs", "init_trial"]
        if self.schedule_tea == "logsnr":
            idle.append("rho_tea")
        if self.nosubdir:
            idle.append("desc")
        return [name for name in idle if name in names]

    # Optimisation

    def rates(self, student: SpanSolver) -> dict[str, float]:
        """Learning rate of each group that the solver learns."""
        given = {}
        for part in filter(None, (piece.strip() for piece in self.lrs.split(","))):
            name, _, value = part.partition("=")
            name = current(name)
            try:
                rate = float(value)
            except ValueError:
                rate = math.nan
            if name not in LEARNED or not (math.isfinite(rate) and rate >= 0):
                raise UserError(f"--lrs: '{part}' should be group=rate, with a group of {', '.join(LEARNED)}")
            if name not in learned(student):
                raise UserError(f"--lrs: the preset {self.preset} does not learn '{name}'; leave it out")
            given[name] = rate
        rates = {**RATES, **PRESET_RATES.get(self.preset, {}), **given}
        rates = {name: self.lr_factor * rates[name] for name in learned(student)}
        if not any(rates.values()):
            raise UserError("--lrs: all learning rates are 0")
        return rates

    def phase_list(self, student: SpanSolver) -> list[tuple[frozenset[str], float]]:
        """(groups to train, share of the run) of each phase; the shares sum to one.

        ``phases`` is a comma-separated list of ``group+group:share``, where "all" is every group.
        The list is repeated phase_rounds times. Default: everything at once; for S4S grid and
        coefficients in turn, as published.
        """
        names, text, rounds = set(learned(student)), self.phases, self.phase_rounds
        if text is None:
            text = "all:1"
            grid = sorted(names & set(GRID_GROUPS))
            if self.preset == "s4s" and "coef_offset" in names and grid:
                text, rounds = f"{'+'.join(grid)}:1,coef_offset+heads+shifts:1", 4 if rounds == 1 else rounds
        return parse_phases(text, rounds, names)

    def teacher(self, sigma_min: float, sigma_max: float) -> TeacherSettings:
        """The settings of the teacher pairs, for the noise range of the student."""
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
    """Whether ``DenoiserFeatures`` works with this network. UserError if sigma is out of range."""
    features = DenoiserFeatures(net, sigma)
    latents, cond = draw_inputs(net, [0], prompts, device=device)
    try:
        features(latents, cond)
    except UserError:
        return False
    return True


def learned(student: SpanSolver) -> dict[str, list[torch.nn.Parameter]]:
    """Learned parameters by group: the table's, "shifts" ("time", "blocks"), other "heads"."""
    groups = {name: [parameter] for name, parameter in student.groups().items()}
    for name, head in student.heads.items():
        groups.setdefault("shifts" if name in SHIFTS else "heads", []).extend(head.parameters())
    return groups


def parse_phases(text: str, rounds: int, names: set[str]) -> list[tuple[frozenset[str], float]]:
    """The phases of ``SpanOptions.phase_list``. UserError for unknown groups and wrong shares."""
    phases = []
    for part in text.split(","):
        kinds, colon, share = part.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not colon or not (math.isfinite(value) and value > 0):
            raise UserError(f"--phases={text}: '{part.strip()}' should be groups:share, like knots+sigma_scale:0.2")
        groups = {current(name) for name in kinds.split("+")}
        unknown = sorted(groups - set(LEARNED) - {"all"})
        if unknown:
            raise UserError(f"--phases={text}: unknown group '{unknown[0]}'; choose from all, {', '.join(LEARNED)}")
        groups = names if "all" in groups else groups & names
        if not groups:
            raise UserError(
                f"--phases={text}: nothing is learned in '{part.strip()}' (learned: {', '.join(sorted(names))})"
            )
        phases.append((frozenset(groups), value))
    phases = phases * rounds
    total = sum(share for _, share in phases)
    return [(groups, share / total) for groups, share in phases]


def parse_start(part: str, text: str | None = None) -> Start:
    """The start "base@grid", "base:order@grid" or "@grid". text: the value of ``--init``."""
    text = part if text is None else text
    solver, _, grid = part.partition("@")
    base, colon, order = solver.partition(":")
    if base and base not in BASES:
        raise UserError(f"--init={text}: unknown base '{base}'; choose from {', '.join(BASES)}")
    if colon:
        _check_order(text, base, order)
    if grid:
        _check_grid(text, grid)
    if not base and not grid:
        raise UserError(f"--init={text}: must be 'preset', or base@grid for each start")
    return Start(base or None, int(order) if colon else None, grid or None)


def _check_order(text: str, base: str, order: str) -> None:
    highest = {"ab": 4, "midpoint": 1}.get(base) or (SOLVERS[base].highest_order if base else 0)
    if not order.isdecimal() or not 1 <= int(order) <= highest:
        raise UserError(f"--init={text}: the order of '{base}' must be a whole number in 1..{highest}")


def _check_grid(text: str, grid: str) -> None:
    kind, _, rho = grid.partition(":")
    if kind == "dmn" and not rho:
        return
    if kind not in SCHEDULES:
        raise UserError(f"--init={text}: unknown grid '{grid}'; choose from {', '.join(SCHEDULES)}, dmn")
    if rho:
        try:
            POSITIVE.convert(rho, None, None)
        except click.BadParameter:
            raise UserError(f"--init={text}: '{rho}' is not an exponent above 0") from None


def grid_sigmas(grid: str, num_steps: int, sigma_min: float, sigma_max: float, net) -> list[float]:
    """The noise levels of a grid of ``--init``, float64 [num_steps]."""
    kind, _, rho = grid.partition(":")
    if kind == "dmn":
        problem = Problem(net, "dpmpp", num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
        return run_dmn(problem, kind="auto").sigmas.tolist()
    return get_schedule(num_steps, sigma_min, sigma_max, kind, float(rho or 7), net=net).tolist()
