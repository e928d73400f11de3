"""Training of an AMED predictor: what is trained, the output, and the run."""

from pathlib import Path

import torch

from models.denoiser import member
from torch_utils import distributed
from torch_utils.distributed import on_main
from training.checkpoint import save_predictor
from training.loss import DistillationLoss
from training.options import AMEDOptions
from training.predictor import AMEDPredictor
from training.run import numbers
from training.stepwise_trainer import StepwiseRun, StepwiseTrainer, train_stepwise
from training.trainer import NotFinite  # noqa: F401 (imported from here by other code)

STATISTICS = ("loss", "r", "scale_dir", "scale_time")  # per interval, mean over the batch


class Distiller(StepwiseTrainer):
    """A predictor that is trained with one Adam step per interval of the student.

    net: a Denoiser.
    config: the configuration of the predictor.
    lr: learning rate of Adam. Default 5e-3.
    checkpointing, error: see ``DistillationLoss``. Default False, None.
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
        error: str | None = None,
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
        self.losses = [DistillationLoss(net, config, checkpointing, error) for _ in range(self.share // self.chunk)]

    @property
    def evaluations(self) -> int:
        """NFE of the student, with the cost of each network call."""
        return self.predictor.evaluations() * member(self.net, "evals_per_call")

    def _more_statistics(self, loss: DistillationLoss) -> list[torch.Tensor]:
        return [value.sum() for value in loss.predicted]


class AMEDRun(StepwiseRun):
    """The training of an AMED predictor in a folder."""

    columns = STATISTICS
    options_type = AMEDOptions
    recorded = ("seed", "batch", "lr", "amp", "tf32", "dtype", "compile", "teacher_cache", "interval_loss")

    @staticmethod
    def make_trainer(net, options, **common):
        return Distiller(net, options.predictor_config(net.img_resolution), **common)

    def sample(self, latents, cond):
        return self.trainer.predictor.sample(self.trainer.net, latents, cond=cond)

    def save_result(self, progress: dict) -> None:
        on_main(save_predictor, self.trainer.predictor, self.result_path, {**self.provenance, **progress})

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
            f"loss: {options.interval_loss or 'squared'} difference to the teacher per {'latent' if member(net, 'latent') else 'pixel'} value, mean of a batch",
        ]


def train_predictor(
    options: AMEDOptions | dict, device="cpu", run_dir=None, resume=False, schedule=None, net=None
) -> Path:
    """Trains a predictor. Returns its file, ``<folder>/predictor-<kimg>.safetensors``.

    Arguments and errors are those of ``train_stepwise``.
    """
    return train_stepwise(AMEDRun, options, device, run_dir, resume, schedule, net)
