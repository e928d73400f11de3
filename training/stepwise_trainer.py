"""Training interval by interval: an Adam step in each interval of the student, against a teacher.

``StepwiseTrainer`` is one iteration, ``StepwiseRun`` and ``train_stepwise`` are a run in a folder.

Every sample of the training stream has its own seed (``stream_seeds``). Gradients are sums over
samples, divided by the total batch. So the number of processes and of micro-batches changes results
only by rounding.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from models.inputs import draw_inputs, initial_state
from solvers.sampler import afs_direction
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import AUTO
from torch_utils.seeds import stream_seeds
from torch_utils.transfer import to_device, to_pinned
from training.loss import IntervalLoss, TeacherTargets
from training.options import StepwiseOptions
from training.run import Run, fitting_batch_gpu, prepare, provenance_of, resume_run, working_folder
from training.trainer import BaseTrainer, NotFinite


class StepwiseTrainer(BaseTrainer):
    """What learns, its optimizer, and one iteration: an Adam step per interval of the student.

    net: the teacher's network, a Denoiser.
    learner: the module that is trained; only parameters that require gradients.
    columns: number of statistics per interval; the first is the loss.
    batch: samples per iteration over all processes. Each process takes a contiguous share.
    batch_gpu: samples per network call. Default None: the whole share.
    lr: learning rate of Adam.
    seed: of the training stream. Default 0.
    prompts: texts for text-to-image networks; every sample draws one. Default None.
    teacher_cache: number of teacher trajectories to store and reuse. Default None: always new ones.
    device, dtype: of noise and arithmetic. Default CPU, float32.

    Subclasses define ``losses``, an ``IntervalLoss`` for each micro-batch, whose ``student_step``
    gets the learner.

    Attributes: ``optimizer``, ``iteration`` (iterations done).
    """

    # Undo an iteration that fails. This copies learner and optimizer in every iteration; without
    # it, an iteration ends before the step that fails, and the host waits for every interval.
    undoes = True
    losses: list[IntervalLoss]

    def __init__(
        self,
        net,
        learner: torch.nn.Module,
        columns: int,
        *,
        batch,
        batch_gpu=None,
        lr,
        seed=0,
        prompts: Sequence[str] | None = None,
        teacher_cache: int | None = None,
        device="cpu",
        dtype=torch.float32,
    ):
        if teacher_cache is not None and (teacher_cache < batch or teacher_cache % batch):
            raise UserError(f"teacher_cache={teacher_cache} must be a multiple of the batch, {batch}")
        self.net, self.learner, self.seed, self.prompts = net, learner, seed, prompts
        self.teacher_cache, self._cached = teacher_cache, {}
        self.device, self.dtype = torch.device(device), dtype
        self.split_batch(batch, batch_gpu)
        parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))
        # Gradients and statistics share a buffer, so that one reduction per interval is enough.
        sizes = [p.numel() for p in parameters]
        self._buffer = torch.zeros(sum(sizes) + columns, device=self.device, dtype=dtype)
        self._gradients, self._statistics = self._buffer.split([sum(sizes), columns])
        for parameter, part in zip(parameters, self._gradients.split(sizes), strict=True):
            layout = (parameter.size(), parameter.stride(), part.storage_offset())
            parameter.grad = part.as_strided(*layout)  # autograd and Adam want the parameter's memory format

    @property
    def sigmas(self) -> torch.Tensor:
        """The student's noise levels [N]."""
        return self.losses[0].sigmas

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    def draw(self) -> list[tuple[torch.Tensor, dict]]:
        """(unit-variance noise, condition) of each micro-batch of the current iteration."""
        return [self._draw(first) for first in self._firsts()]

    def _firsts(self) -> range:
        """Index in the training stream of the first sample of each micro-batch."""
        start = self.iteration * self.batch
        start = (start if self.teacher_cache is None else start % self.teacher_cache) + distributed.rank() * self.share
        return range(start, start + self.share, self.chunk)

    def _draw(self, first: int) -> tuple[torch.Tensor, dict]:
        return draw_inputs(self.net, stream_seeds(self.seed, first, self.chunk), self.prompts, self.dtype, self.device)

    @property
    def loss_unit(self) -> float:
        """The loss is a sum over the values of an image; its mean is shown."""
        return 1 / (self.net.img_channels * self.net.img_resolution**2)

    def iterate(self) -> torch.Tensor:
        """The next iteration; see ``step``."""
        if self.teacher_cache is None:
            return self.step(self.draw())
        cached = []
        for loss, first in zip(self.losses, self._firsts(), strict=True):
            key = (first, len(loss.sigmas))
            if key not in self._cached:
                latents, cond = self._draw(first)
                targets = loss.run_teacher(initial_state(self.net, latents, loss.sigma_max, cond), cond)
                self._cached[key] = tree_map(to_pinned, (latents, cond, targets.targets, targets.cached_evals))
            latents, cond, states, evals = tree_map(self._to_device, self._cached[key])
            cached.append((latents, cond, TeacherTargets(states, evals)))
        return self.step([(latents, cond) for latents, cond, _ in cached], [targets for *_, targets in cached])

    def _to_device(self, value):
        return to_device(value, self.device) if isinstance(value, torch.Tensor) else value

    def step(
        self, micro_batches: list[tuple[torch.Tensor, dict]], teacher_targets: list[TeacherTargets] | None = None
    ) -> torch.Tensor:
        """One iteration. Returns the statistics [intervals, columns] over all processes.

        micro_batches: (unit-variance noise [B,C,H,W], condition) of each.
        teacher_targets: the teacher's targets for each micro-batch. Default None: they are
            computed.

        Raises NotFinite on every process if a loss is NaN or infinite. With ``undoes`` learner and
        optimizer are then as before, else as after the last good interval.
        """
        before = self.state() if self.undoes else None
        xs = [initial_state(self.net, latents, self.losses[0].sigma_max, cond) for latents, cond in micro_batches]
        conds = [cond for _, cond in micro_batches]
        if teacher_targets is None:
            teacher_targets = [loss.run_teacher(*start) for loss, *start in zip(self.losses, xs, conds, strict=True)]
        rows, own = [], []
        for k in range(self.intervals):
            self._buffer.zero_()
            trains = self.losses[0].trains(k)
            for slot, loss in enumerate(self.losses):
                target, start = teacher_targets[slot].targets[k], teacher_targets[slot].cached_evals.get(k)
                with torch.set_grad_enabled(trains):
                    error, xs[slot] = loss.student_step(self.learner, xs[slot], k, target, conds[slot], start)
                total = error.sum()
                if trains:
                    total.backward()
                values = [total.detach(), *self._more_statistics(loss)]
                self._statistics += torch.stack(values).to(self._statistics.dtype)
            own.append(self._statistics[0].clone())
            self._buffer /= self.batch
            distributed.all_reduce_sum(self._buffer if trains else self._statistics)
            rows.append(self._statistics.clone())
            if trains:
                if not self.undoes:
                    self._check(rows[k], own[k], k)
                self._gradients.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
                self.optimizer.step()
        statistics = torch.stack(rows).cpu()
        try:
            for k, row in enumerate(statistics):
                self._check(row, own[k], k)
        except NotFinite:
            if before is not None:
                self.load_state(before)
            raise
        self.iteration += 1
        return statistics

    @staticmethod
    def _check(row, own, interval: int) -> None:
        """Raises NotFinite on every process if the loss of an interval is not finite.

        row: statistics of the interval over all processes.
        own: the loss of this process.
        """
        if not row[0].isfinite():
            raise NotFinite.found(bool(own.isfinite()), interval)

    def _more_statistics(self, loss: IntervalLoss) -> list[torch.Tensor]:
        """Further statistics of the latest student step, each a sum over the micro-batch."""
        return []

    def probe_memory(self) -> None:
        """Uses the memory of an iteration, without learning.

        One micro-batch is computed. The states of the others are copies of its own. Trajectories of
        ``teacher_cache`` are kept on the host. The history of the solvers is invalid afterwards.
        """
        latents, cond = self.draw()[0]
        loss = self.losses[0]
        x = initial_state(self.net, latents, loss.sigma_max, cond)
        teacher = loss.run_teacher(x, cond)
        held = [tree_map(torch.clone, (x, teacher.targets, teacher.cached_evals)) for _ in self.losses[1:]]
        for k, target in enumerate(teacher.targets):
            with torch.set_grad_enabled(loss.trains(k)):
                error, x = loss.student_step(self.learner, x, k, target, cond, teacher.cached_evals.get(k))
            if loss.trains(k):
                error.sum().backward()
        del held


class StepwiseRun(Run):
    """A run with one loss per interval."""

    options_type: type[StepwiseOptions]
    recorded: tuple[str, ...]  # options that the result's file names

    @staticmethod
    def make_trainer(net, options, **common) -> StepwiseTrainer:
        """The trainer of these options. common: arguments of ``StepwiseTrainer``, and others."""
        raise NotImplementedError

    def failure_text(self, error: NotFinite) -> str:
        cur, nxt = self.trainer.sigmas[error.interval : error.interval + 2].tolist()
        return (
            f"the loss is not finite in iteration {self.trainer.iteration + 1} ({self.kimg:g} kimg), interval "
            f"{error.interval} (sigma {cur:.4g} -> {nxt:.4g}), rank {', '.join(map(str, error.ranks))}; the state "
            f"before it is kept in {self.folder}: check the network, or start again with a smaller --lr or --amp=none"
        )


def train_stepwise(
    kind: type[StepwiseRun],
    options: StepwiseOptions | dict,
    device="cpu",
    run_dir=None,
    resume: bool = False,
    schedule: Schedule | None = None,
    net=None,
) -> Path:
    """Trains to the end. Returns the file of the result.

    kind: class of the run.
    options: of its ``options_type``, or a dict of its fields.
    device: where to train. Default CPU.
    run_dir: folder to use. Default None: the next numbered folder in ``options.outdir``.
    resume: continue the run in run_dir from its newest state, which ``options`` must match. Default
        False.
    schedule: the file that options.sigmas come from; warns if it was made for other settings.
        Default None.
    net: the network. Default None: that of the options.

    Every process of a torchrun calls this. Raises UserError for settings that cannot work and for a
    loss that is not finite; Interrupted after Ctrl-C or SIGTERM, with everything saved.
    """
    device = torch.device(device)
    options = kind.options_type.from_dict(options) if isinstance(options, dict) else options
    options, net, pool = prepare(options, device, net)
    if options.afs:  # checked before a folder is made: afs="data" needs statistics of the network
        afs_direction(net, torch.zeros(1, net.img_channels, 1, 1, device=device), torch.ones(()), options.afs)
    common = {name: getattr(options, name) for name in ("batch", "lr", "seed", "teacher_cache", "checkpointing")}
    more = {"error": options.interval_loss, "prompts": pool, "device": device}
    make = partial(kind.make_trainer, net, options, **common, **more)
    if options.batch_gpu == AUTO:
        share = options.batch // distributed.world_size()
        options.batch_gpu = fitting_batch_gpu(lambda batch_gpu: make(batch_gpu=batch_gpu).probe_memory(), share, device)
    trainer = make(batch_gpu=options.batch_gpu)
    provenance = provenance_of(net, options, kind.recorded)
    with working_folder(options, net, run_dir, resume) as folder:
        elapsed = resume_run(trainer, options, net, folder) if resume else 0.0
        warnings = [] if schedule is None else schedule.warnings(net, options.sampler_stu, options.afs)
        run = kind(trainer, options, folder, provenance, elapsed)
        return run.train(net, resume, [f"Warning: {line}" for line in warnings])
