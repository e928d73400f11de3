"""Distillation of a predictor: the iterations, what they write, and how a run is interrupted and continued.

Every sample of the training stream has a seed of its own (``stream_seeds``), and gradients are sums over samples,
divided by the total batch, so the number of processes and of micro-batches changes results by rounding only.
"""

import copy
import datetime
import math
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from models import create_model, use_tokenizer
from solvers.loop import afs_direction
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.download import sha256_of
from torch_utils.errors import UserError
from torch_utils.image_data import remove_leftovers
from torch_utils.memory import AUTO, explained_oom, is_out_of_memory, release_memory
from torch_utils.progress import progress_bar
from torch_utils.prompts import read_prompts
from torch_utils.seeds import SeededGenerators, stream_seeds
from torch_utils.signals import Interrupted, any_signal, deferred_signals
from training.checkpoint import save_predictor
from training.config import AUTOCAST, TrainingOptions, code_version
from training.loss import DistillationLoss
from training.predictor import AMEDPredictor
from training.run_folder import (
    OPTIONS_FILE,
    RunLog,
    create_run_folder,
    newest_state,
    on_main,
    save_state,
    use_folder,
    write_json,
)

STATISTICS = ("loss", "r", "scale_dir", "scale_time")  # per interval, means over the batch


class NotFinite(Exception):
    """The loss of an iteration is not a number; ``interval`` is the first one where, on any process."""

    def __init__(self, interval: int, ranks: list[int]):
        super().__init__(f"loss not finite in interval {interval}")
        self.interval, self.ranks = interval, ranks


class Distiller:
    """A predictor, its optimizer, and one iteration: an Adam step per interval of the student.

    net: a Denoiser; config: the predictor's configuration; batch: samples per iteration over all processes, of which
    this process takes a contiguous share, ``batch_gpu`` per network call. prompts: for text-to-image networks, of which
    every sample draws one. Attributes: ``predictor``, ``optimizer``, ``iteration`` (how many are done), ``sigmas``.
    """

    def __init__(
        self,
        net,
        config: dict,
        *,
        batch,
        batch_gpu=None,
        lr=5e-3,
        seed=0,
        prompts: Sequence[str] | None = None,
        device="cpu",
        dtype=torch.float32,
    ):
        self.net, self.batch, self.seed, self.prompts = net, batch, seed, prompts
        self.device, self.dtype = torch.device(device), dtype
        self.share = batch // distributed.world_size()
        self.chunk = min(batch_gpu or self.share, self.share)
        # A multistep student carries a history from interval to interval: one loss for each micro-batch.
        self.losses = [DistillationLoss(net, config) for _ in range(self.share // self.chunk)]
        self.sigmas = self.losses[0].sigmas
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = AMEDPredictor(**config)
        self.predictor.to(self.device, dtype).train()
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=lr, betas=(0.9, 0.999))
        self.iteration = 0
        # Gradients and statistics side by side in one buffer, so that one reduction per interval serves both.
        sizes = [p.numel() for p in self.predictor.parameters()]
        self._buffer = torch.zeros(sum(sizes) + len(STATISTICS), device=self.device, dtype=dtype)
        self._gradients, self._statistics = self._buffer.split([sum(sizes), len(STATISTICS)])
        for parameter, part in zip(self.predictor.parameters(), self._gradients.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def evaluations(self) -> int:
        """NFE of the student, by the cost of the network's calls."""
        return self.predictor.evaluations() * getattr(self.net, "evals_per_call", 1)

    def draw(self) -> list[tuple[torch.Tensor, dict]]:
        """(unit-variance noise, condition) of each micro-batch of the current iteration."""
        start = self.iteration * self.batch + distributed.rank() * self.share
        shape = [self.net.img_channels, self.net.img_resolution, self.net.img_resolution]
        drawn = []
        for first in range(start, start + self.share, self.chunk):
            generators = SeededGenerators(stream_seeds(self.seed, first, self.chunk))
            latents = generators.randn(shape, self.dtype).to(self.device)
            drawn.append((latents, self._condition(generators)))
        return drawn

    def _condition(self, generators: SeededGenerators) -> dict:
        if self.prompts is not None:
            numbers = generators.randint(len(self.prompts)).tolist()
            return self.net.make_cond(generators, prompts=[self.prompts[number] for number in numbers])
        return self.net.make_cond(generators) if self.net.label_dim else {}

    def step(self, micro_batches: list[tuple[torch.Tensor, dict]]) -> torch.Tensor:
        """One iteration; returns the statistics [intervals, 4] (see STATISTICS), means over all processes.

        Raises NotFinite, on every process, where a loss is NaN or infinite; predictor and optimizer are then as before.
        """
        before = self.state()
        xs = [latents * self.losses[0].sigma_max for latents, _ in micro_batches]
        conds = [cond for _, cond in micro_batches]
        targets = [loss.teacher_trajectory(*start) for loss, *start in zip(self.losses, xs, conds, strict=True)]
        rows, own = [], []
        for k in range(self.intervals):
            self._buffer.zero_()
            for slot, loss in enumerate(self.losses):
                error, x_next = loss.student_step(self.predictor, xs[slot], k, targets[slot][k], conds[slot])
                total = error.sum()
                total.backward()
                values = [total.detach(), *(value.sum() for value in loss.predicted)]
                self._statistics += torch.stack(values).to(self._statistics.dtype)
                xs[slot] = x_next
            own.append(self._statistics[0].clone())
            self._buffer /= self.batch
            distributed.all_reduce_sum(self._buffer)
            self._gradients.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
            self.optimizer.step()
            rows.append(self._statistics.clone())
        statistics = torch.stack(rows).cpu()
        bad = (~statistics[:, 0].isfinite()).nonzero()
        if len(bad):
            self.load_state(before)
            interval = int(bad[0])
            fine = distributed.gather_objects(bool(own[interval].isfinite()))
            raise NotFinite(interval, [rank for rank, ok in enumerate(fine) if not ok] or list(range(len(fine))))
        self.iteration += 1
        return statistics

    def rehearse(self) -> None:
        """What needs the memory of an iteration, for one micro-batch and without learning; spoils the solvers' history."""
        latents, cond = self.draw()[0]
        x, loss = latents * self.losses[0].sigma_max, self.losses[0]
        for k, target in enumerate(loss.teacher_trajectory(x, cond)):
            error, x = loss.student_step(self.predictor, x, k, target, cond)
            error.sum().backward()

    def state(self) -> dict:
        """A copy of everything that the next iteration depends on."""
        predictor = {name: value.detach().clone() for name, value in self.predictor.state_dict().items()}
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return {"predictor": predictor, "optimizer": optimizer, "iteration": self.iteration}

    def load_state(self, state: dict) -> None:
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


def fitting_batch_gpu(make: Callable[..., Distiller], share: int, device) -> int:
    """The largest divisor of the share with which a Distiller works in the memory of every process.

    make: makes one from ``batch_gpu``. Raises UserError where not even one sample fits.
    """
    for batch_gpu in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        fits = True
        try:
            make(batch_gpu=batch_gpu).rehearse()
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


class Run:
    """A distiller with its folder: decides when to log and to save, and does it."""

    def __init__(self, distiller: Distiller, options: TrainingOptions, folder: Path, provenance: dict, elapsed=0.0):
        self.distiller, self.options, self.folder = distiller, options, Path(folder)
        self.provenance = provenance
        self.log = RunLog(folder)
        self.total = max(1, math.ceil(options.total_kimg * 1000 / options.batch - 1e-9))  # iterations
        self._elapsed_before, self._start = elapsed, time.monotonic()
        self._tick_start = self._start
        self._collected: list[torch.Tensor] = []
        self._shown: torch.Tensor | None = None
        self._saved_at = -1  # iteration of the newest state on disk

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of earlier parts of the run included."""
        return self._elapsed_before + time.monotonic() - self._start

    @property
    def nimg(self) -> int:
        return self.distiller.iteration * self.options.batch

    @property
    def predictor_path(self) -> Path:
        return self.folder / f"predictor-{self.nimg // 1000:06d}.safetensors"

    def loop(self) -> None:
        """Trains to the end. Raises Interrupted after a signal and UserError for a loss that is not finite."""
        with deferred_signals() as received, self._progress_bar() as bar:
            while self.distiller.iteration < self.total:
                begin = time.monotonic()
                try:
                    statistics = self.distiller.step(self.distiller.draw())
                except NotFinite as error:
                    self._give_up(error)
                self._collected.append(statistics)
                self._show(bar, statistics, time.monotonic() - begin)
                stop = any_signal(received, self.distiller.device)
                self._after_iteration(stop is not None)
                if stop is not None and self.distiller.iteration < self.total:
                    bar.close()
                    world = distributed.world_size()
                    start = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
                    command = f"{start} train.py --resume={shlex.quote(str(self.folder))}"
                    self.log.say(f"Interrupted after {self.nimg / 1000:g} kimg; continue with: {command}")
                    raise Interrupted(stop)

    def _after_iteration(self, stopping: bool) -> None:
        done = stopping or self.distiller.iteration == self.total
        # Ticks are places in the stream of samples, so a continued run has them where an unbroken one would.
        before, now = ((self.nimg - back) // (self.options.tick * 1000) for back in (self.options.batch, 0))
        if not done and now == before:
            return

        def crosses(every: int | None) -> bool:
            return every is not None and now // every > before // every

        self._tick()
        if done or crosses(self.options.snap):
            self._save_predictor()
        if done or crosses(self.options.dump):
            self._save_state(self.distiller.state())

    def _tick(self) -> None:
        now = time.monotonic()
        kimg = len(self._collected) * self.options.batch / 1000
        means = torch.stack(self._collected).double().mean(dim=0)
        per_interval = {name: means[:, column].tolist() for column, name in enumerate(STATISTICS)}
        pace = (now - self._tick_start) / kimg
        record = {"kimg": self.nimg / 1000, "iteration": self.distiller.iteration, **per_interval}
        self.log.stats({**record, "sec": round(self.elapsed, 3), "sec_per_kimg": round(pace, 4)})
        shown = "  ".join(f"{name} {_numbers(means[:, column])}" for column, name in enumerate(STATISTICS))
        self.log.note(f"kimg {self.nimg / 1000:<8g} {shown}  sec {self.elapsed:.1f}  s/kimg {pace:.2f}")
        self._collected, self._tick_start = [], now

    def _save_predictor(self) -> None:
        progress = {"kimg": self.nimg / 1000, "iteration": self.distiller.iteration, "date": _now()}
        on_main(save_predictor, self.distiller.predictor, self.predictor_path, {**self.provenance, **progress})

    def _save_state(self, state: dict) -> None:
        more = {
            "cur_nimg": self.nimg,
            "seed": self.options.seed,
            "elapsed": self.elapsed,
            "options": self.options.to_dict(),
            "network_hash": self.provenance["network_hash"],
            "prompts_sha256": self.provenance.get("prompts_sha256"),
        }
        on_main(save_state, self.folder, self.nimg // 1000, {**state, **more})
        self._saved_at = self.distiller.iteration

    def _give_up(self, error: NotFinite) -> None:
        """Saves the state before the iteration that failed, and says what happened."""
        if self._saved_at != self.distiller.iteration:
            self._save_state(self.distiller.state())
        cur, nxt = self.distiller.sigmas[error.interval : error.interval + 2].tolist()
        message = (
            f"the loss is not finite in iteration {self.distiller.iteration + 1} ({self.nimg / 1000:g} kimg), interval "
            f"{error.interval} (sigma {cur:.4g} -> {nxt:.4g}), rank {', '.join(map(str, error.ranks))}; the state "
            f"before it is kept in {self.folder}: check the network, or start again with a smaller --lr or --amp=none"
        )
        self.log.note(f"Error: {message}")
        raise UserError(message) from None

    def _progress_bar(self) -> tqdm:
        return progress_bar(
            self.total,
            initial=self.distiller.iteration,
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}| [{elapsed}<{remaining}{postfix}]",
        )

    def _show(self, bar: tqdm, statistics: torch.Tensor, seconds: float) -> None:
        pace = torch.full_like(statistics[:, :1], seconds / self.options.batch * 1000)
        latest = torch.cat([statistics, pace], dim=1)
        self._shown = latest if self._shown is None else torch.lerp(self._shown, latest, 0.1)
        loss, r, pace = self._shown[:, 0], self._shown[:, 1], float(self._shown[0, -1])
        kimg = f"{self.nimg / 1000:.2f}/{self.total * self.options.batch / 1000:.2f} kimg"
        bar.set_postfix_str(f"{kimg} loss {_numbers(loss)} r {_numbers(r)} {pace:.3g} s/kimg", refresh=False)
        bar.update()


def _numbers(values) -> str:
    return " ".join(f"{float(value):.3g}" for value in values)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _load_network(options: TrainingOptions, device: torch.device):
    net = create_model(
        options.dataset_name, options.model_path, options.guidance_type, options.guidance_rate, device=device
    )
    net.autocast = AUTOCAST[options.amp]
    if options.channels_last if options.channels_last is not None else device.type == "cpu":
        net = net.to(memory_format=torch.channels_last)
    if options.afs:  # before a folder is made: the network may not know what afs="data" needs
        afs_direction(net, torch.zeros(1, net.img_channels, 1, 1, device=device), torch.ones(()), options.afs)
    needs_prompts = getattr(net, "takes_prompts", False)
    options.check_prompts(needs_prompts)
    if options.tokenizer_path is not None:
        use_tokenizer(net, options.tokenizer_path)
    # What the network did by itself is written down, so that the predictor does not depend on defaults.
    if needs_prompts:
        options.guidance_type = options.guidance_type or "cfg"
    elif options.guidance_type == "none":
        options.guidance_type = None
    if options.guidance_rate is None:
        options.guidance_rate = getattr(net, "guidance_rate", 0.0)
    for name in ("model_path", "prompt_path", "tokenizer_path"):
        value = getattr(options, name)
        if value is not None and Path(value).exists():  # otherwise the id of a repository
            setattr(options, name, str(Path(value).resolve()))
    return net


def _provenance(net, options: TrainingOptions) -> dict:
    return {
        "dataset_name": options.dataset_name,
        "network": Path(net.source_path).name,
        "network_hash": net.weights_hash,
        **({"prompts_sha256": sha256_of(options.prompt_path)} if options.prompt_path is not None else {}),
        "code_version": code_version(),
        "torch": torch.__version__,
        "seed": options.seed,
        "batch": options.batch,
        "lr": options.lr,
        "amp": options.amp,
    }


def _choose_folder(options: TrainingOptions, net, run_dir) -> Path:
    if run_dir is None and not options.nosubdir:
        name = partial(options.folder_name, evals_per_call=getattr(net, "evals_per_call", 1))
        return on_main(create_run_folder, options.outdir, name)
    return on_main(use_folder, options.outdir if run_dir is None else run_dir)


def _restore(distiller: Distiller, options: TrainingOptions, state: dict, net, folder) -> float:
    """Puts the state of an interrupted run back; returns the seconds it has trained."""
    if state["network_hash"] != net.weights_hash:
        raise UserError(f"{net.source_path} is not the network that {folder} was trained on (another SHA-256)")
    prompts = sha256_of(options.prompt_path) if options.prompt_path is not None else None
    if state.get("prompts_sha256") != prompts:
        raise UserError(f"{options.prompt_path} does not hold the prompts that {folder} was trained on")
    if state["iteration"] * options.batch >= options.total_kimg * 1000 - 1e-6:
        reached = f"{state['iteration'] * options.batch / 1000:g} kimg"
        raise UserError(f"{folder} has reached {reached}: pass a larger --total_kimg to train on")
    try:
        distiller.load_state(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the training state in {folder} does not fit its options ({str(error)[:120]})") from None
    return float(state["elapsed"])


def train_predictor(
    options: TrainingOptions | dict, device="cpu", run_dir=None, resume: bool = False, schedule: Schedule | None = None
) -> Path:
    """Trains a predictor and returns its file, ``<folder>/predictor-<kimg>.safetensors``.

    options: TrainingOptions, or a dict of its fields. run_dir: the folder to use; None makes the next numbered one in
    ``options.outdir``. resume: continue the run in run_dir from its newest state (``options`` are then those of that
    state). schedule: the file that options.sigmas come from; what it was not made for is pointed out. Every process of a torchrun calls this. Raises UserError for settings that cannot work and for a loss that
    is not finite, Interrupted after Ctrl-C or SIGTERM, when everything is saved.
    """
    options = TrainingOptions.from_dict(options) if isinstance(options, dict) else copy.copy(options)
    device = torch.device(device)
    options.check(distributed.world_size())
    if options.seed is None:
        options.seed = distributed.broadcast_object(secrets.randbelow(1 << 31))
    torch.backends.cudnn.benchmark = options.bench
    prompts = None if options.prompt_path is None else list(read_prompts(options.prompt_path).values())
    net = _load_network(options, device)
    make = partial(
        Distiller,
        net,
        options.predictor_config(net.img_resolution),
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        prompts=prompts,
        device=device,
    )
    if options.batch_gpu == AUTO:
        options.batch_gpu = fitting_batch_gpu(make, options.batch // distributed.world_size(), device)
    distiller = make(batch_gpu=options.batch_gpu)
    provenance = _provenance(net, options)
    elapsed = 0.0
    if resume:
        folder, state = Path(run_dir), on_main(newest_state, run_dir)
        if state is not None:  # else it was killed before the first one: from the start, with its options and its seed
            elapsed = _restore(distiller, options, state, net, run_dir)
    else:
        folder = _choose_folder(options, net, run_dir)
    run = Run(distiller, options, folder, provenance, elapsed)
    if resume:
        on_main(remove_leftovers, folder)
        on_main(run.log.rewind, "iteration", distiller.iteration)
    _announce(run, net, device, resume)
    for line in [] if schedule is None else schedule.warnings(net, options.sampler_stu, options.afs):
        run.log.say(f"Warning: {line}")
    with explained_oom(device, f"lower --batch-gpu (now {distiller.chunk})"):
        run.loop()
    run.log.say(f"trained {run.predictor_path} NFE={distiller.evaluations} in {run.elapsed:.1f} s")
    return run.predictor_path


def _announce(run: Run, net, device: torch.device, resume: bool) -> None:
    """Records the options, and says in a few lines what is going to happen."""
    options, distiller = run.options, run.distiller
    world = distributed.world_size()
    where = {"device": str(device), "processes": world, "date": _now()}
    record = {**options.to_dict(), "provenance": {**run.provenance, **where}}
    on_main(write_json, run.folder / OPTIONS_FILE, record)
    config = distiller.predictor.config
    run.log.say(f"{'Continuing' if resume else 'Training'} in {run.folder}")
    run.log.say(
        f"{config['sampler_stu']} taught by {config['sampler_tea']} (M={config['M']}) on {options.dataset_name} "
        f"({Path(net.source_path).name}), {config['num_steps']} time stamps, NFE {distiller.evaluations}"
    )
    run.log.say(f"noise levels {_numbers(distiller.sigmas)}; seed {options.seed}")
    steps = f"{len(distiller.losses)} x {distiller.chunk}" if len(distiller.losses) > 1 else f"{distiller.chunk}"
    run.log.say(f"batch {options.batch} ({steps} on each of {world} processes), {run.total} iterations, {device}")
    if resume:
        run.log.say(f"from iteration {distiller.iteration} ({run.nimg / 1000:g} kimg)")
