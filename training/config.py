"""The settings of a training run: one dataclass that the command line fills in and that a run folder records."""

import importlib.metadata
import math
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from models import zoo
from models.execution import AUTOCAST, COMPILE_MODES
from solvers import SOLVERS, check_sigmas
from solvers.loop import AFS_KINDS
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds
from torch_utils.memory import AUTO
from training.loss import make_rules
from training.predictor import DEFAULTS, AMEDPredictor

STUDENTS = tuple(name for name, rule in SOLVERS.items() if rule.can_learn)
TEACHERS = tuple(name for name, rule in SOLVERS.items() if rule.can_teach)
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
class TrainingOptions(RunOptions):
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
        make_rules(self.to_dict())
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


def code_version() -> str:
    """Version of this code: the commit where it is a git checkout, else the version of the installed package."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):  # no git on this machine: the package version will do
            done = None
        if done is not None and done.returncode == 0:
            return f"git-{done.stdout.strip()}"
    try:
        return importlib.metadata.version("amed-solver")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
