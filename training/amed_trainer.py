"""Training of an AMED predictor: what is trained, the output, and the run."""

from functools import partial
from pathlib import Path

import torch

from models.denoiser import member
from solvers.sampler import afs_direction
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.memory import AUTO
from training.checkpoint import save_predictor
from training.loss import DistillationLoss
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
from training.stepwise_trainer import StepwiseTrainer
from training.trainer import NotFinite

STATISTICS = ("loss", "r", "scale_dir", "scale_time")  # per interval, mean over the batch


class Distiller(StepwiseTrainer):
    """A predictor that is trained with one Adam step per interval of the student.

    net: a Denoiser.
    config: the configuration of the predictor.
    lr: learning rate of Adam. Default 5e-3.
    checkpointing: see ``solvers.Sampler``. Default False.
    others: see ``StepwiseTrainer``.

    Attributes: ``predictor``, ``optimizer``, ``iteration`` (iterations done), ``sigmas``.
    """

    kept = {"predictor": "predictor", "optimizer": "optimizer", "iteration": "iteration"}

    def __init__(
        self,
        net,
        config: dict,
        *,
        lr=5e-3,
        checkpointing: bool = False,
        seed=0,
        device="cpu",
        dtype=torch.float32,
        **others,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = AMEDPredictor(**config)
        self.predictor.to(device, dtype).train()
        super().__init__(net, self.predictor, len(STATISTICS), lr=lr, seed=seed, device=device, dtype=dtype, **others)
        # A multistep student keeps a history between intervals, so each micro-batch has its own
        # loss.
        self.losses = [DistillationLoss(net, config, checkpointing) for _ in range(self.share // self.chunk)]

    @property
    def evaluations(self) -> int:
        """NFE of the student, with the cost of each network call."""
        return self.predictor.evaluations() * member(self.net, "evals_per_call")

    def _more_statistics(self, loss: DistillationLoss) -> list[torch.Tensor]:
        return [value.sum() for value in loss.predicted]


class AMEDRun(Run):
    """The training of an AMED predictor, with one loss per interval."""

    columns = STATISTICS

    def sample(self, latents, cond):
        return self.trainer.predictor.sample(self.trainer.net, latents, cond=cond)

    def save_result(self, progress: dict) -> None:
        on_main(save_predictor, self.trainer.predictor, self.result_path, {**self.provenance, **progress})

    def failure_text(self, error: NotFinite) -> str:
        cur, nxt = self.trainer.sigmas[error.interval : error.interval + 2].tolist()
        return (
            f"the loss is not finite in iteration {self.trainer.iteration + 1} ({self.kimg:g} kimg), interval "
            f"{error.interval} (sigma {cur:.4g} -> {nxt:.4g}), rank {', '.join(map(str, error.ranks))}; the state "
            f"before it is kept in {self.folder}: check the network, or start again with a smaller --lr or --amp=none"
        )

    def progress_text(self, latest: torch.Tensor) -> str:
        return f"loss {numbers(latest[:, 0] * self.trainer.loss_unit)} r {numbers(latest[:, 1])}"

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
