"""A distillation run: iterations, output, folder, and how it is interrupted and resumed."""

import copy
import datetime
import math
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models import create_model, use_tokenizer, zoo
from models.compile import choose_backends, prepare_network
from models.denoiser import member
from models.inputs import draw_inputs
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.files import remove_leftovers, sha256_of, write_json
from torch_utils.images import ImageSource, image_grid, to_uint8
from torch_utils.locks import only_command
from torch_utils.memory import explained_oom, is_out_of_memory, release_memory
from torch_utils.progress import progress_bar
from torch_utils.prompts import read_prompts
from torch_utils.remote import is_remote
from torch_utils.version import code_version
from training.options import RunOptions
from training.run_folder import (
    OPTIONS_FILE,
    create_run_folder,
    newest_state,
    save_state,
    use_folder,
)
from training.trainer import BaseRun, BaseTrainer, NotFinite

GRID_COLUMNS = 4  # of the images of a snapshot


class Run(BaseRun):
    """A distillation in its folder.

    Subclasses name the ``columns`` of the trainer's statistics [rows, columns], and define what is
    saved and printed.

    trainer: its ``evaluations`` is the NFE of the student.
    provenance: origin of the result, for its file and the recorded options.
    """

    columns: tuple[str, ...]
    result_name = "predictor"

    def __init__(self, trainer: BaseTrainer, options: RunOptions, folder: Path, provenance: dict, elapsed: float = 0.0):
        super().__init__(trainer, options, folder, elapsed)
        self.provenance, self.total = provenance, iterations_of(options)
        self._tick_start = self._start
        self._collected: list[torch.Tensor] = []
        self._smoothed: torch.Tensor | None = None

    def save_result(self, progress: dict) -> None:
        """Writes the current result to ``result_path``. progress: kimg, iteration and date."""
        raise NotImplementedError

    def sample(self, latents: torch.Tensor, cond: dict) -> torch.Tensor:
        """Images [B,C,H,W] by the current result from unit-variance noise."""
        raise NotImplementedError

    @torch.no_grad()
    def sample_grid(self) -> np.ndarray:
        """Images of fixed seeds by the current result in a grid, uint8 [H,W,C]."""
        trainer, seeds = self.trainer, range(GRID_COLUMNS**2)
        images = []
        for first in range(0, len(seeds), trainer.chunk):
            part = seeds[first : first + trainer.chunk]
            latents, cond = draw_inputs(trainer.net, part, trainer.prompts, device=trainer.device)
            images.append(member(trainer.net, "decode")(self.sample(latents, cond)))
        return image_grid(to_uint8(torch.cat(images)), GRID_COLUMNS)

    def more_state(self) -> dict:
        """Further entries of the state for resuming."""
        return {}

    def statistics(self) -> dict:
        """Further statistics of a tick, for stats.jsonl."""
        return {}

    def progress_text(self, latest: torch.Tensor) -> str:
        """Text for the progress bar. latest: smoothed statistics."""
        raise NotImplementedError

    def describe(self, net) -> list[str]:
        """A few lines about the training."""
        raise NotImplementedError

    @property
    def result_path(self) -> Path:
        below = f".{self.nimg:03d}" if self.nimg < 1000 else ""  # short runs that are continued keep each result
        return self.folder / f"{self.result_name}-{self.nimg // 1000:06d}{below}.safetensors"

    def train(self, net, resume: bool, notes: Sequence[str] = ()) -> Path:
        """Records the options, describes the run and trains to the end. Returns the result's file.

        net: the network.
        resume: the run is resumed.
        notes: further lines for the log. Default ().

        Raises the exceptions of ``loop``, and UserError if the device is out of memory.
        """
        if resume:  # remove files of a killed run, and log lines beyond the newest state
            on_main(remove_leftovers, self.folder)
            on_main(self.log.rewind, "iteration", self.trainer.iteration)
        where = {"device": str(self.trainer.device), "processes": distributed.world_size(), "date": date()}
        record = {**self.options.to_dict(), "provenance": {**self.provenance, **where}}
        on_main(write_json, self.folder / OPTIONS_FILE, record)
        self.log.say(f"{'Continuing' if resume else 'Training'} in {self.folder}")
        for line in self.describe(net):
            self.log.say(line)
        if resume:
            self.log.say(f"from iteration {self.trainer.iteration} ({self.kimg:g} kimg)")
        for line in notes:
            self.log.say(line)
        with (
            self.log.event_file(self.options.tensorboard, self.kimg),
            explained_oom(self.trainer.device, f"lower --batch-gpu (now {self.trainer.chunk})"),
        ):
            self.loop()
        self.log.say(f"trained {self.result_path} NFE={self.trainer.evaluations} in {self.elapsed:.1f} s")
        return self.result_path

    def finished(self) -> bool:
        return self.trainer.iteration >= self.total

    def on_interruption(self) -> str:
        self.log.say(f"Interrupted after {self.kimg:g} kimg; continue with: {resume_command(self.folder)}")
        return ""

    def on_failure(self, error: NotFinite) -> None:
        self.save_state()
        self.log.note(f"Error: {self.failure_text(error)}")
        super().on_failure(error)

    def after_iteration(self, stopping: bool) -> None:
        done = stopping or self.finished()
        # Ticks depend on the number of samples only, so they are the same in a resumed run.
        before, now = ((self.nimg - back) // (self.options.tick * 1000) for back in (self.options.batch, 0))
        if not done and now == before:
            return

        def crosses(every: int | None) -> bool:
            return every is not None and now // every > before // every

        self._tick()
        if done or crosses(self.options.snap):
            progress = {"kimg": self.kimg, "iteration": self.trainer.iteration, "date": date()}
            self.save_result(progress)
            self.log.images(self.sample_grid, self.kimg)
        if done or crosses(self.options.dump):
            self.save_state()

    def _tick(self) -> None:
        now = time.monotonic()
        kimg = len(self._collected) * self.options.batch / 1000
        means = torch.stack(self._collected).double().mean(dim=0)
        per_row = {name: means[:, column].tolist() for column, name in enumerate(self.columns)}
        pace = (now - self._tick_start) / kimg
        record = {"kimg": self.kimg, "iteration": self.trainer.iteration, **per_row, **self.statistics()}
        self.log.stats({**record, "sec": round(self.elapsed, 3), "sec_per_kimg": round(pace, 4)})
        means[:, 0] *= self.trainer.loss_unit
        shown = "  ".join(f"{name} {numbers(means[:, column])}" for column, name in enumerate(self.columns))
        self.log.note(f"kimg {self.kimg:<8g} {shown}  sec {self.elapsed:.1f}  s/kimg {pace:.2f}")
        self._collected, self._tick_start = [], now

    def save_state(self) -> None:
        """Saves the state for resuming, unless the newest state is of this iteration."""
        if self._saved_at == self.trainer.iteration:
            return
        more = {
            "cur_nimg": self.nimg,
            "seed": self.options.seed,
            "elapsed": self.elapsed,
            "options": self.options.to_dict(),
            "network_hash": self.provenance["network_hash"],
            **{name: self.provenance.get(name) for name in ("prompts_sha256", "images_sha256")},
            **self.more_state(),
        }
        on_main(save_state, self.folder, self.nimg // 1000, {**self.trainer.state(), **more})
        self._saved_at = self.trainer.iteration

    def progress_bar(self) -> tqdm:
        return progress_bar(
            self.total,
            initial=self.trainer.iteration,
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}| [{elapsed}<{remaining}{postfix}]",
        )

    def show(self, bar: tqdm, statistics: torch.Tensor, seconds: float) -> None:
        self._collected.append(statistics)
        pace = torch.full_like(statistics[:, :1], seconds / self.options.batch * 1000)
        latest = torch.cat([statistics, pace], dim=1)
        self._smoothed = latest if self._smoothed is None else torch.lerp(self._smoothed, latest, 0.1)
        kimg = f"{self.kimg:.2f}/{self.total * self.options.batch / 1000:.2f} kimg"
        text = self.progress_text(self._smoothed[:, :-1])
        bar.set_postfix_str(f"{kimg} {text} {float(self._smoothed[0, -1]):.3g} s/kimg", refresh=False)
        bar.update()


def iterations_of(options: RunOptions) -> int:
    """Number of iterations of a whole run."""
    return max(1, math.ceil(options.total_kimg * 1000 / options.batch - 1e-9))


def resume_command(folder) -> str:
    """The command that continues the run in a folder with as many processes."""
    world = distributed.world_size()
    start = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    return f"{start} train.py --resume={shlex.quote(str(folder))}"


def numbers(values) -> str:
    return " ".join(f"{float(value):.3g}" for value in values)


def date() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def hash_of_pool(options: RunOptions) -> dict:
    """Hash of the texts or images that samples draw their condition from; {} if there are none."""
    if options.prompt_path is not None:
        return {"prompts_sha256": sha256_of(options.prompt_path)}
    return {} if options.images is None else {"images_sha256": ImageSource(options.images).digest()}


def provenance_of(net, options: RunOptions, names: tuple[str, ...]) -> dict:
    """Origin of a result: network, code, and the options ``names``."""
    return {
        "dataset_name": options.dataset_name,
        "network": net.source_path if is_remote(net.source_path) else Path(net.source_path).name,
        "network_hash": net.weights_hash,
        **hash_of_pool(options),
        "code_version": code_version(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in names},
    }


@contextmanager
def working_folder(options: RunOptions, net, run_dir, resume: bool = False) -> Iterator[Path]:
    """Context with the folder of a run, locked against other commands. resume: it exists."""
    if run_dir is None and not options.nosubdir:
        name = partial(options.folder_name, evals_per_call=member(net, "evals_per_call"))
        folder, fresh = on_main(create_run_folder, options.outdir, name), False
    else:
        folder, fresh = Path(options.outdir if run_dir is None else run_dir), not resume
        if fresh:
            on_main(use_folder, folder)
    refusal = f"another command is training in {folder}: wait until it ends, or choose another folder"
    with only_command(folder / ".lock", refusal):
        if fresh:
            on_main(use_folder, folder)  # again, since another command may have used the folder until now
        yield folder


def check_state(options: RunOptions, state: dict, net, folder) -> None:
    """Raises UserError if a training state does not fit this network and these options."""
    if state["network_hash"] != net.weights_hash:
        raise UserError(f"{net.source_path} is not the network that {folder} was trained on (another SHA-256)")
    pool = hash_of_pool(options)
    if state.get("prompts_sha256") != pool.get("prompts_sha256"):
        raise UserError(f"{options.prompt_path} does not hold the prompts that {folder} was trained on")
    if state.get("images_sha256") != pool.get("images_sha256"):
        raise UserError(f"{options.images} does not hold the images that {folder} was trained on")
    if state["iteration"] * options.batch >= options.total_kimg * 1000 - 1e-6:
        reached = f"{state['iteration'] * options.batch / 1000:g} kimg"
        raise UserError(f"{folder} has reached {reached}: to continue, pass a larger --total_kimg")


def restore(trainer, options: RunOptions, state: dict, net, folder) -> float:
    """Restores the state of an interrupted run. Returns the seconds it has trained."""
    check_state(options, state, net, folder)
    try:
        trainer.load_state(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the training state in {folder} does not fit its options ({str(error)[:120]})") from None
    return float(state["elapsed"])


def resume_run(trainer, options: RunOptions, net, folder) -> float:
    """Restores the newest state in the folder, if any. Returns the seconds it has trained.

    A run that was killed before its first state starts again, with its options and seed.
    """
    state = on_main(newest_state, folder)
    return 0.0 if state is None else restore(trainer, options, state, net, folder)


def load_network(options: RunOptions, device: torch.device, net=None):
    if net is None:
        net = create_model(
            options.dataset_name,
            options.network_path,
            options.guidance_type,
            options.guidance_rate,
            device=device,
            dtype=options.dtype,
        )
        prepare_network(net, options.amp, options.channels_last, options.compile)
    needs_prompts = member(net, "takes_prompts")
    options.check_prompts(needs_prompts)
    options.check_network(net)
    if options.tokenizer_path is not None:
        use_tokenizer(net, options.tokenizer_path)
    # Defaults of the network are recorded, so that the predictor does not depend on them.
    if needs_prompts:
        options.guidance_type = options.guidance_type or "cfg"
    elif options.guidance_type == "none":
        options.guidance_type = None
    if options.guidance_rate is None:
        options.guidance_rate = member(net, "guidance_rate") or 0.0
    for name in ("model_path", "teacher", "prompt_path", "tokenizer_path", "images"):
        value = vars(options).get(name)
        if value is not None and Path(value).exists():  # otherwise it is the id of a repository
            setattr(options, name, str(Path(value).resolve()))
    return net


def prepare(options: RunOptions, device: torch.device, net=None) -> tuple:
    """(options, network, prompts, images or None): a checked copy of the options, with a seed.

    net: the network. Default None: that of the options.

    Raises UserError for settings that cannot work, before anything is written.
    """
    options = copy.copy(options)
    options.check(distributed.world_size())
    if options.seed is None:
        options.seed = distributed.broadcast_object(secrets.randbelow(1 << 31))
    choose_backends(options.tf32, options.bench)
    options.prompt_path = zoo.resolve_prompts(options.prompt_path)
    prompts = None if options.prompt_path is None else list(read_prompts(options.prompt_path).values())
    net = load_network(options, device, net)
    images = options.read_images(net)
    return options, net, prompts if images is None else images


def fitting_batch_gpu(probe_memory: Callable[[int], None], share: int, device) -> int:
    """The largest divisor of the share that fits into the memory of every process.

    probe_memory: function of batch_gpu that needs as much memory as an iteration.
    share: samples of this process.

    Raises UserError if not even one sample fits.
    """
    for batch_gpu in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        fits = True
        try:
            probe_memory(batch_gpu)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        release_memory()
        if all(distributed.gather_objects(fits)):
            return batch_gpu
        distributed.print0(
            f"Note: --batch-gpu=auto: {batch_gpu} samples at once do not fit into the memory of {device}"
        )
    raise UserError(f"{device} is out of memory even with --batch-gpu=1: use another device or --amp")
