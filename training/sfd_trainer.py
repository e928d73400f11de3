"""SFD: a network is fine-tuned so that a few Euler steps end where a solver with more steps ends.

Zhou et al. 2024, "Simple and Fast Distillation of Diffusion Models" (arXiv 2409.19681). The result
is a network. Its file says how it is sampled (``models.few_step.FewStep``).
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from models.compile import convert_weights
from models.denoiser import member
from models.edm import EDMDenoiser, save_edm_safetensors, with_step_condition
from solvers.sampler import sample
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.seeds import stream_seeds
from training.low_rank import add_adapters, merged
from training.options import SFDOptions, has_features
from training.run import numbers
from training.sample_loss import PairLoss
from training.sfd_loss import SFDLoss
from training.stepwise_trainer import StepwiseRun, StepwiseTrainer, train_stepwise

STATISTICS = ("loss", "last")  # L1 sums per sample: mean over the trained steps, and of the last step
STEP_LAYERS = ("map_step_layer", "affine_step")


def make_student(net, step_condition: bool, rank: int | None = None, dropout: float = 0.0, seed: int = 0):
    """A trainable copy of a network.

    net: a Denoiser, not compiled.
    step_condition: whether it gets the number of time steps; an EDM network gets layers for it.
    rank: of low-rank adapters. Default None: all weights are trained.
    dropout: of the U-Net's blocks. Default 0.
    seed: of new layers. Default 0.
    """
    student = copy.deepcopy(net)
    convert_weights(student, None)  # autocast computes with float32 weights, which the optimizer changes
    if step_condition and isinstance(student, EDMDenoiser):
        student = with_step_condition(student, seed)
    student.eval().requires_grad_(True)
    if rank is not None:
        add_adapters(student, rank, seed, whole=STEP_LAYERS)
    if dropout:
        for block in student.modules():
            if hasattr(block, "dropout"):
                block.dropout, block.training = dropout, True
    return student


class SFDTrainer(StepwiseTrainer):
    """A network that is trained with one Adam step per step of its own trajectory.

    net: the teacher's network, a Denoiser, which is not changed. That of a first stage
        (``few_step``) trains a second stage.
    config: the configuration of ``SFDLoss``, without num_steps.
    num_steps: numbers of time steps; with several each iteration draws one, and the student is
        conditioned on it (SFD-v).
    total: samples of the whole run.
    lr: learning rate of Adam. Default 5e-5.
    lr_final: factor of the rate in the second half of the run. Default 0.1.
    rank, dropout: see ``make_student``. Default None, 0.
    distance, checkpointing, error: see ``SFDLoss``. Default None, False, None.
    others: see ``StepwiseTrainer``.

    Attributes: ``student``, ``optimizer``, ``iteration`` (iterations done).
    """

    kept = {"predictor": "student", "optimizer": "optimizer", "iteration": "iteration"}
    undoes = False  # a copy of a network and its moments in every iteration would be expensive

    def __init__(
        self,
        net,
        config: dict,
        *,
        num_steps: Sequence[int],
        total: float,
        lr: float = 5e-5,
        lr_final: float = 0.1,
        rank: int | None = None,
        dropout: float = 0.0,
        distance: Callable | None = None,
        checkpointing: bool = False,
        error: str | None = None,
        seed: int = 0,
        **others,
    ):
        self.num_steps, self.total, self.lr, self.lr_final = list(num_steps), total, lr, lr_final
        self.dropout = dropout
        self._losses = {
            number: SFDLoss(net, {**config, "num_steps": number}, checkpointing, error, distance)
            for number in self.num_steps
        }
        few = member(net, "few_step")
        tells = len(self.num_steps) > 1 if few is None else few.step_condition
        self.student = make_student(net, tells, rank, dropout, seed)
        largest = self._losses[max(self.num_steps)]
        self.student.few_step = largest.few_step(tells, self.num_steps)
        # The student works at its own noise levels only.
        self.student.sigma_min, self.student.sigma_max = largest.ends
        super().__init__(net, self.student, 1, lr=lr, seed=seed, **others)

    def steps_of(self, iteration: int) -> int:
        """The number of time steps in an iteration. It depends on the seed and the iteration."""
        if len(self.num_steps) == 1:
            return self.num_steps[0]
        generator = torch.Generator().manual_seed(stream_seeds(self.seed, -1 - iteration, 1)[0])
        return self.num_steps[int(torch.randint(len(self.num_steps), (), generator=generator))]

    def rate_of(self, iteration: int) -> float:
        """The learning rate: lowered one iteration after half of the samples were seen."""
        late = iteration > 0 and 2 * (iteration - 1) * self.batch >= self.total
        return self.lr * (self.lr_final if late else 1)

    @property
    def losses(self) -> list[SFDLoss]:
        return [self._losses[self.steps_of(self.iteration)]] * (self.share // self.chunk)

    @property
    def every_loss(self) -> list[SFDLoss]:
        """The losses of all numbers of time steps."""
        return list(self._losses.values())

    @property
    def evaluations(self) -> str:
        """NFE of the student, with the cost of each network call, as text: "2" or "2-5"."""
        calls = list(self.student.few_step.evaluations())
        return "-".join(str(n * member(self.net, "evals_per_call")) for n in dict.fromkeys((calls[0], calls[-1])))

    def step(self, micro_batches, teacher_targets=None) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_of(self.iteration)
        if self.dropout:
            torch.manual_seed(stream_seeds(self.seed + distributed.rank(), -1 - self.iteration, 1)[0])
        return super().step(micro_batches, teacher_targets)

    def iterate(self) -> torch.Tensor:
        """The next iteration. Returns the statistics [1, 2], see ``STATISTICS``."""
        trained = [k for k in range(self.intervals) if self.losses[0].trains(k)]
        losses = super().iterate()[trained, 0]
        return torch.stack([losses.mean(), losses[-1]])[None]

    def result(self) -> EDMDenoiser:
        """The trained network, with merged adapters, frozen and in evaluation mode."""
        return merged(self.student).eval().requires_grad_(False)


class SFDRun(StepwiseRun):
    """The training of a few-step network in a folder."""

    columns = STATISTICS
    result_name = "network"
    options_type = SFDOptions
    recorded = (
        *("objective", "seed", "batch", "num_steps", "sampler_tea", "M", "lr", "lr_final", "rank", "dropout"),
        *("loss", "interval_loss", "amp", "tf32", "teacher_cache", "total_kimg"),
    )

    @staticmethod
    def make_trainer(net, options, **common):
        return SFDTrainer(
            net,
            options.loss_config(),
            num_steps=options.step_numbers(),
            total=options.total_kimg * 1000,
            distance=perceptual_distance(net, options, common["device"]),
            **{name: getattr(options, name) for name in ("lr_final", "rank", "dropout")},
            **common,
        )

    def sample(self, latents, cond):
        net = self.trainer.result()
        return sample(net, latents, num_steps=net.few_step.num_steps[-1], cond=cond)

    def save_result(self, progress: dict) -> None:
        more = {"provenance": {**self.provenance, **progress}}
        on_main(lambda: save_edm_safetensors(self.trainer.result(), self.result_path, more))

    def progress_text(self, latest: torch.Tensor) -> str:
        loss, last = (latest[0] * self.trainer.loss_unit).tolist()
        return f"loss {loss:.4g} last {last:.4g}"

    def describe(self, net) -> list[str]:
        options, trainer, world = self.options, self.trainer, distributed.world_size()
        loss, losses = trainer.losses[0], trainer.every_loss
        parameters = list(trainer.student.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        state = 4 * (sum(p.numel() for p in parameters) + 2 * trained) / 1e6
        teacher = sum(len(one.teacher_sigmas) - 1 - bool(one.teacher_afs) for one in losses) / len(losses)
        student = sum(one.trains(k) for one in losses for k in range(len(one.sigmas) - 1)) / len(losses)
        return [
            f"few-step network, {options.num_steps} time steps, NFE {trainer.evaluations}, taught by "
            f"{options.sampler_tea} (M={options.M}) on {options.dataset_name} ({Path(net.source_path).name})"
            + (", second stage" if options.teacher else ""),
            f"noise levels {numbers(loss.sigmas)}; seed {options.seed}",
            f"batch {options.batch} ({trainer.chunk} per call, {world} processes), {self.total} iterations, "
            f"{trainer.device}; {trained / 1e6:.3g} million trained weights, training states of {state:.3g} MB",
            f"cost of a sample: {teacher:g} evaluations of the teacher, {student:g} of the student with gradients "
            f"(about {teacher + 3 * student:.3g} evaluations), {options.total_kimg:g} thousand samples",
            f"loss: {options.interval_loss or 'absolute'} difference to the teacher per value, mean of the trained steps; "
            f"last: that of the result{'' if loss.distance is None else ' and ' + (options.loss or 'features')}",
        ]


def perceptual_distance(net, options: SFDOptions, device) -> PairLoss | None:
    """What is added to the last step's error: by default, as published, only in a second stage."""
    if options.loss == "none" or (options.loss is None and options.teacher is None):
        return None
    if options.loss is None and not has_features(net, options.feature_sigma, device=device):
        return None
    return PairLoss(options.loss or "features", net, options.feature_sigma)


def train_sfd(options: SFDOptions | dict, device="cpu", run_dir=None, resume=False, schedule=None, net=None) -> Path:
    """Fine-tunes a network for few steps. Returns ``<folder>/network-<kimg>.safetensors``.

    Arguments and errors are those of ``train_stepwise``.
    """
    return train_stepwise(SFDRun, options, device, run_dir, resume, schedule, net)
