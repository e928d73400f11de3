"""Training of an AMED predictor: iterations, output, and how a run is interrupted and resumed.

Every sample of the training stream has its own seed (``stream_seeds``). Gradients are sums over
samples, divided by the total batch. So the number of processes and of micro-batches changes results
only by rounding.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from models.denoiser import member
from models.inputs import draw_inputs
from solvers.sampler import afs_direction
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.memory import AUTO
from torch_utils.seeds import stream_seeds
from torch_utils.transfer import to_device, to_pinned
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
from training.trainer import BaseTrainer, NotFinite

STATISTICS = ("loss", "r", "scale_dir", "scale_time")  # per interval, mean over the batch


class Distiller(BaseTrainer):
    """A predictor, its optimizer, and one iteration: an Adam step per interval of the student.

    net: a Denoiser.
    config: the configuration of the predictor.
    batch: samples per iteration over all processes. Each process takes a contiguous share.
    batch_gpu: samples per network call. Default None: the whole share.
    lr: learning rate of Adam. Default 5e-3.
    seed: of the training stream. Default 0.
    prompts: texts for text-to-image networks; every sample draws one. Default None.
    teacher_cache: number of teacher trajectories to store and reuse. Default None: always new ones.
    checkpointing: see ``solvers.Sampler``. Default False.
    device, dtype: of noise and predictor. Default CPU, float32.

    Attributes: ``predictor``, ``optimizer``, ``iteration`` (iterations done), ``sigmas``.
    """

    kept = {"predictor": "predictor", "optimizer": "optimizer", "iteration": "iteration"}

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
        self.net, self.seed, self.prompts = net, seed, prompts
        self.teacher_cache, self._cached = teacher_cache, {}
        self.device, self.dtype = torch.device(device), dtype
        self.split_batch(batch, batch_gpu)
        # A multistep student keeps a history between intervals, so each micro-batch has its own
        # loss.
        self.losses = [DistillationLoss(net, config, checkpointing) for _ in range(self.share // self.chunk)]
        self.sigmas = self.losses[0].sigmas
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = AMEDPredictor(**config)
        self.predictor.to(self.device, dtype).train()
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=lr, betas=(0.9, 0.999))
        # Gradients and statistics share a buffer, so that one reduction per interval is enough.
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
        """NFE of the student, with the cost of each network call."""
        return self.predictor.evaluations() * member(self.net, "evals_per_call")

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

    def iterate(self) -> torch.Tensor:
        """The next iteration; see ``step``."""
        if self.teacher_cache is None:
            return self.step(self.draw())
        cached = []
        for loss, first in zip(self.losses, self._firsts(), strict=True):
            if first not in self._cached:
                latents, cond = self._draw(first)
                targets = loss.run_teacher(latents * loss.sigma_max, cond)
                self._cached[first] = tree_map(to_pinned, (latents, cond, targets.targets, targets.cached_evals))
            latents, cond, states, evals = tree_map(self._to_device, self._cached[first])
            cached.append((latents, cond, TeacherTargets(states, evals)))
        return self.step([(latents, cond) for latents, cond, _ in cached], [targets for *_, targets in cached])

    def _to_device(self, value):
        return to_device(value, self.device) if isinstance(value, torch.Tensor) else value

    def step(
        self, micro_batches: list[tuple[torch.Tensor, dict]], teacher_targets: list[TeacherTargets] | None = None
    ) -> torch.Tensor:
        """One iteration. Returns the statistics [intervals, 4] (see STATISTICS) over all processes.

        micro_batches: (unit-variance noise [B,C,H,W], condition) of each.
        teacher_targets: the teacher's targets for each micro-batch. Default None: they are
            computed.

        Raises NotFinite on every process if a loss is NaN or infinite. Predictor and optimizer are
        then unchanged.
        """
        before = self.state()
        xs = [latents * self.losses[0].sigma_max for latents, _ in micro_batches]
        conds = [cond for _, cond in micro_batches]
        if teacher_targets is None:
            teacher_targets = [loss.run_teacher(*start) for loss, *start in zip(self.losses, xs, conds, strict=True)]
        rows, own = [], []
        for k in range(self.intervals):
            self._buffer.zero_()
            for slot, loss in enumerate(self.losses):
                target, start = teacher_targets[slot].targets[k], teacher_targets[slot].cached_evals.get(k)
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
            raise NotFinite.found(bool(own[interval].isfinite()), interval)
        self.iteration += 1
        return statistics

    def probe_memory(self) -> None:
        """Uses the memory of an iteration, without learning.

        One micro-batch is computed. The states of the others are copies of its own. Trajectories of
        ``teacher_cache`` are kept on the host. The history of the solvers is invalid afterwards.
        """
        latents, cond = self.draw()[0]
        x, loss = latents * self.losses[0].sigma_max, self.losses[0]
        teacher = loss.run_teacher(x, cond)
        held = [tree_map(torch.clone, (x, teacher.targets, teacher.cached_evals)) for _ in self.losses[1:]]
        for k, target in enumerate(teacher.targets):
            error, x = loss.student_step(self.predictor, x, k, target, cond, teacher.cached_evals.get(k))
            error.sum().backward()
        del held


class AMEDRun(Run):
    """The training of an AMED predictor, with one loss per interval."""

    columns = STATISTICS

    @property
    def result(self) -> AMEDPredictor:
        return self.trainer.predictor

    def save_result(self, progress: dict) -> None:
        on_main(save_predictor, self.result, self.result_path, {**self.provenance, **progress})

    def failure_text(self, error: NotFinite) -> str:
        cur, nxt = self.trainer.sigmas[error.interval : error.interval + 2].tolist()
        return (
            f"the loss is not finite in iteration {self.trainer.iteration + 1} ({self.kimg:g} kimg), interval "
            f"{error.interval} (sigma {cur:.4g} -> {nxt:.4g}), rank {', '.join(map(str, error.ranks))}; the state "
            f"before it is kept in {self.folder}: check the network, or start again with a smaller --lr or --amp=none"
        )

    def progress_text(self, latest: torch.Tensor) -> str:
        return f"loss {numbers(latest[:, 0] * self.loss_unit)} r {numbers(latest[:, 1])}"

    @property
    def loss_unit(self) -> float:
        """The loss is a sum over the values of an image; its mean is shown."""
        net = self.trainer.net
        return 1 / (net.img_channels * net.img_resolution**2)

    def describe(self, net) -> list[str]:
        options, distiller, world = self.options, self.trainer, distributed.world_size()
        config = distiller.predictor.config
        steps = f"{len(distiller.losses)} x {distiller.chunk}" if len(distiller.losses) > 1 else f"{distiller.chunk}"
        return [
            f"{config['sampler_stu']} taught by {config['sampler_tea']} (M={config['M']}) on {options.dataset_name} "
            f"({Path(net.source_path).name}), {config['num_steps']} time steps, NFE {distiller.evaluations}",
            f"noise levels {numbers(distiller.sigmas)}; seed {options.seed}",
            f"batch {options.batch} ({steps} on each of {world} processes), {self.total} iterations, {distiller.device}",
            f"loss: squared difference to the teacher per {'latent' if member(net, 'latent') else 'pixel'} value, mean of a batch",
        ]


def train_predictor(
    options: AMEDOptions | dict,
    device="cpu",
    run_dir=None,
    resume: bool = False,
    schedule: Schedule | None = None,
    net=None,
) -> Path:
    """Trains a predictor. Returns its file, ``<folder>/predictor-<kimg>.safetensors``.

    options: AMEDOptions, or a dict of its fields.
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
    options = AMEDOptions.from_dict(options) if isinstance(options, dict) else options
    options, net, prompts = prepare(options, device, net)
    if options.afs:  # checked before a folder is made: afs="data" needs statistics of the network
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
    provenance = provenance_of(
        net, options, ("seed", "batch", "lr", "amp", "tf32", "dtype", "compile", "teacher_cache")
    )
    with working_folder(options, net, run_dir, resume) as folder:
        elapsed = resume_run(distiller, options, net, folder) if resume else 0.0
        warnings = [] if schedule is None else schedule.warnings(net, options.sampler_stu, options.afs)
        run = AMEDRun(distiller, options, folder, provenance, elapsed)
        return run.train(net, resume, [f"Warning: {line}" for line in warnings])
