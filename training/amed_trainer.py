"""Distillation of a predictor: the iterations, what they write, and how a run is interrupted and continued.

Every sample of the training stream has a seed of its own (``stream_seeds``), and gradients are sums over samples,
divided by the total batch, so the number of processes and of micro-batches changes results by rounding only.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from solvers.sampler import afs_direction
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import AUTO
from torch_utils.seeds import stream_seeds
from training.checkpoint import save_predictor
from training.loss import DistillationLoss, TeacherTargets
from training.options import AMEDOptions
from training.predictor import AMEDPredictor
from training.run import (
    Run,
    fitting_batch_gpu,
    numbers,
    prepare,
    provenance_of,
    resume_run,
    working_folder,
)
from training.run_folder import on_main
from training.teacher import draw_inputs

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
    every sample draws one. teacher_cache: so many trajectories of the teacher are computed and then used again and again
    (None: every iteration has new ones). checkpointing: see ``solvers.Sampler``. Attributes:
    ``predictor``, ``optimizer``, ``iteration`` (how many are done), ``sigmas``.
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
        teacher_cache: int | None = None,
        checkpointing: bool = False,
        device="cpu",
        dtype=torch.float32,
    ):
        if teacher_cache is not None and (teacher_cache < batch or teacher_cache % batch):
            raise UserError(f"teacher_cache={teacher_cache} must be a multiple of the batch, {batch}")
        self.net, self.batch, self.seed, self.prompts = net, batch, seed, prompts
        self.teacher_cache, self._taught = teacher_cache, {}
        self.device, self.dtype = torch.device(device), dtype
        self.share = batch // distributed.world_size()
        self.chunk = min(batch_gpu or self.share, self.share)
        # A multistep student carries a history from interval to interval: one loss for each micro-batch.
        self.losses = [DistillationLoss(net, config, checkpointing) for _ in range(self.share // self.chunk)]
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
        return [self._draw(first) for first in self._firsts()]

    def _firsts(self) -> range:
        """The number in the training stream of the first sample of each micro-batch."""
        start = self.iteration * self.batch
        start = (start if self.teacher_cache is None else start % self.teacher_cache) + distributed.rank() * self.share
        return range(start, start + self.share, self.chunk)

    def _draw(self, first: int) -> tuple[torch.Tensor, dict]:
        return draw_inputs(self.net, stream_seeds(self.seed, first, self.chunk), self.prompts, self.dtype, self.device)

    def iterate(self) -> torch.Tensor:
        """The next iteration; see ``step``."""
        if self.teacher_cache is None:
            return self.step(self.draw())
        taught = []
        for loss, first in zip(self.losses, self._firsts(), strict=True):
            if first not in self._taught:
                latents, cond = self._draw(first)
                self._taught[first] = (latents, cond, loss.teach(latents * loss.sigma_max, cond))
            taught.append(self._taught[first])
        return self.step([(latents, cond) for latents, cond, _ in taught], [lesson for *_, lesson in taught])

    def step(
        self, micro_batches: list[tuple[torch.Tensor, dict]], lessons: list[TeacherTargets] | None = None
    ) -> torch.Tensor:
        """One iteration; returns the statistics [intervals, 4] (see STATISTICS), means over all processes.

        lessons: of the teacher on these micro-batches, if known. Raises NotFinite, on every process, where a loss is NaN
        or infinite; predictor and optimizer are then as before.
        """
        before = self.state()
        xs = [latents * self.losses[0].sigma_max for latents, _ in micro_batches]
        conds = [cond for _, cond in micro_batches]
        if lessons is None:
            lessons = [loss.teach(*start) for loss, *start in zip(self.losses, xs, conds, strict=True)]
        rows, own = [], []
        for k in range(self.intervals):
            self._buffer.zero_()
            for slot, loss in enumerate(self.losses):
                target, start = lessons[slot].targets[k], lessons[slot].starts.get(k)
                error, x_next = loss.student_step(self.predictor, xs[slot], k, target, conds[slot], start)
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

    def probe_memory(self) -> None:
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


class AMEDRun(Run):
    """The distillation of a predictor, with a loss for each interval."""

    columns = STATISTICS
    failures = (NotFinite,)

    def save_result(self, progress: dict) -> None:
        on_main(save_predictor, self.trainer.predictor, self.result_path, {**self.provenance, **progress})

    def on_failure(self, error: NotFinite) -> None:
        """Saves the state before the iteration that failed, and says what happened."""
        self.save_state()
        cur, nxt = self.trainer.sigmas[error.interval : error.interval + 2].tolist()
        message = (
            f"the loss is not finite in iteration {self.trainer.iteration + 1} ({self.nimg / 1000:g} kimg), interval "
            f"{error.interval} (sigma {cur:.4g} -> {nxt:.4g}), rank {', '.join(map(str, error.ranks))}; the state "
            f"before it is kept in {self.folder}: check the network, or start again with a smaller --lr or --amp=none"
        )
        self.log.note(f"Error: {message}")
        raise UserError(message) from None

    def shown(self, latest: torch.Tensor) -> str:
        return f"loss {numbers(latest[:, 0])} r {numbers(latest[:, 1])}"

    def announce(self, net, device: torch.device, resume: bool) -> None:
        """Records the options, and says in a few lines what is going to happen."""
        self.record_options(device)
        options, distiller, world = self.options, self.trainer, distributed.world_size()
        config = distiller.predictor.config
        self.log.say(f"{'Continuing' if resume else 'Training'} in {self.folder}")
        self.log.say(
            f"{config['sampler_stu']} taught by {config['sampler_tea']} (M={config['M']}) on {options.dataset_name} "
            f"({Path(net.source_path).name}), {config['num_steps']} time stamps, NFE {distiller.evaluations}"
        )
        self.log.say(f"noise levels {numbers(distiller.sigmas)}; seed {options.seed}")
        steps = f"{len(distiller.losses)} x {distiller.chunk}" if len(distiller.losses) > 1 else f"{distiller.chunk}"
        self.log.say(f"batch {options.batch} ({steps} on each of {world} processes), {self.total} iterations, {device}")
        if resume:
            self.log.say(f"from iteration {distiller.iteration} ({self.nimg / 1000:g} kimg)")


def train_predictor(
    options: AMEDOptions | dict, device="cpu", run_dir=None, resume: bool = False, schedule: Schedule | None = None
) -> Path:
    """Trains a predictor and returns its file, ``<folder>/predictor-<kimg>.safetensors``.

    options: TrainingOptions, or a dict of its fields. run_dir: the folder to use; None makes the next numbered one in
    ``options.outdir``. resume: continue the run in run_dir from its newest state (``options`` are then those of that
    state). schedule: the file that options.sigmas come from; what it was not made for is pointed out. Every process of
    a torchrun calls this. Raises UserError for settings that cannot work and for a loss that is not finite, Interrupted
    after Ctrl-C or SIGTERM, when everything is saved.
    """
    device = torch.device(device)
    options = AMEDOptions.from_dict(options) if isinstance(options, dict) else options
    options, net, prompts = prepare(options, device)
    if options.afs:  # before a folder is made: the network may not know what afs="data" needs
        afs_direction(net, torch.zeros(1, net.img_channels, 1, 1, device=device), torch.ones(()), options.afs)
    make = partial(
        Distiller,
        net,
        options.predictor_config(net.img_resolution),
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        prompts=prompts,
        teacher_cache=options.teacher_cache,
        checkpointing=options.checkpointing,
        device=device,
    )
    if options.batch_gpu == AUTO:
        options.batch_gpu = fitting_batch_gpu(
            lambda batch_gpu: make(batch_gpu=batch_gpu).probe_memory(),
            options.batch // distributed.world_size(),
            device,
        )
    distiller = make(batch_gpu=options.batch_gpu)
    provenance = provenance_of(net, options, ("seed", "batch", "lr", "amp", "compile", "teacher_cache"))
    with working_folder(options, net, run_dir, resume) as folder:
        elapsed = resume_run(distiller, options, net, folder) if resume else 0.0
        run = AMEDRun(distiller, options, folder, provenance, elapsed)
        if resume:
            run.clean_up()
        run.announce(net, device, resume)
        for line in [] if schedule is None else schedule.warnings(net, options.sampler_stu, options.afs):
            run.log.say(f"Warning: {line}")
        return run.run_to_end()
