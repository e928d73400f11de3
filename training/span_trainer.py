"""Training of a span solver on its final samples (trajectory objective), against teacher pairs.

The whole trajectory is differentiated. Samples are split by their place in a stream of shuffled
pairs. Gradients are sums over samples, divided by the total batch. So the number of processes and
of micro-batches changes results only by rounding.
"""

import copy
import math
from collections.abc import Callable

import torch

from models.denoiser import member
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.seeds import stream_seeds
from torch_utils.transfer import to_device
from training.options import SpanOptions, learned
from training.sample_loss import DistributionTerm, PairLoss, energy_distance
from training.teacher import TeacherSet
from training.trainer import BaseTrainer, NotFinite, loss_scale_of

STATISTICS = ("loss", "val", "rms", "gradient", "skipped")
PATIENCE = 5  # the run ends after this many consecutive iterations without a finite gradient
QUEUE = 1024  # student samples whose features the energy distance uses


class SpanTrainer(BaseTrainer):
    """A span solver, its optimizer, and one iteration: an Adam step on a batch of final samples.

    net: a Denoiser.
    student: a SpanSolver, trained in place: its table on the CPU, its heads on the device.
    pairs: a TeacherSet.
    options: SpanOptions.
    total: iterations of the whole run, which set the decay of the rates and the phases.
    device: where to train. Default CPU.
    score: function (samples, targets, cond) -> [B] to validate by. Default None: the loss.

    Attributes: ``hold``, number of iterations before the rates decay; ``averaged``, the solver with
    the moving average of the parameters; ``best``, its best state in validation with its value;
    ``validation``, the latest (objective, root mean square distance to the teacher); ``report``,
    function that receives warnings.
    """

    kept = {name: name for name in ("optimizer", "iteration", "averaged", "best", "validation", "first", "failures")}
    kept |= {"predictor": "student", "latest": "_latest", "loss_scale": "loss_scale", "hold": "hold"}
    hold = 0

    def __init__(
        self, net, student: SpanSolver, pairs: TeacherSet, options: SpanOptions, total: int, device="cpu", score=None
    ):
        self.net, self.student, self.pairs, self.options = net, student, pairs, options
        self.prompts = pairs.prompts
        self.total, self.device = total, torch.device(device)
        self.split_batch(options.batch, options.batch_gpu)
        self.pair_loss, self.score = PairLoss(options.loss, net, options.feature_sigma), score
        self.distribution = DistributionTerm(net, options.feature_sigma, QUEUE) if options.w_dist else None
        self.rates, self.phases = options.rates(student), options.phase_list(student)
        student.heads.to(self.device)
        self.groups = learned(student)
        groups = [{"params": parameters, "lr": self.rates[name]} for name, parameters in self.groups.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
        self.averaged = copy.deepcopy(student)
        self.failures = 0  # iterations in a row without a finite gradient
        self.loss_scale = loss_scale_of(net)
        self.validation = (math.nan, math.nan)
        self.best: dict = {"value": math.inf, "iteration": 0, "state": _copy(student.state_dict())}
        self.first: tuple[float, float] | None = None  # validation of the untrained solver
        self.report: Callable[[str], None] = lambda text: None
        self._latest = torch.zeros(1, len(STATISTICS), dtype=torch.float64)
        if self.distribution is not None:
            self.distribution.set_reference(
                (images, cond) for _, cond, images in map(pairs.batch, _chunks(pairs.train, self.chunk))
            )

    @property
    def evaluations(self) -> int:
        """NFE of the solver, with the cost of each network call."""
        return self.student.evaluations() * member(self.net, "evals_per_call")

    # One iteration

    def iterate(self) -> torch.Tensor:
        """One iteration. Returns the statistics [1, 5] (see STATISTICS), the same on all processes.

        A step with a gradient that is not finite is skipped. After ``PATIENCE`` of them in a row,
        NotFinite is raised on every process; the solver is then as after the last good iteration.
        """
        if self.first is None:
            self.first = self.validate()
        trained = self._phase()
        loss, norm = self._accumulate(trained)
        good = math.isfinite(loss) and math.isfinite(norm)
        self._latest[0, -1] = float(not good)
        if good:
            self.failures = 0
            self._update(trained, norm)
            self._latest[0, [0, 3]] = torch.tensor([loss, norm], dtype=torch.float64)
        else:
            self.failures += 1
            self.loss_scale = max(self.loss_scale / 2, 1.0)
            self.report(f"Warning: no finite gradient in iteration {self.iteration + 1}: skipped")
            if self.failures == PATIENCE:
                self.failures = 0  # a resumed run may try again
                raise NotFinite
        self.iteration += 1
        if self.iteration % self.options.val_every == 0 or self.iteration == self.total:
            self.validate()
        self._latest[0, 1:3] = torch.tensor(self.validation)
        return self._latest.clone()

    def _phase(self) -> list[str]:
        """The groups to train in this iteration."""
        end = 0.0
        for groups, share in self.phases:
            end += share * self.total
            if self.iteration < end - 1e-9:
                return [name for name in self.groups if name in groups]
        return [name for name in self.groups if name in self.phases[-1][0]]

    def _rate(self) -> float:
        """Factor of the learning rates: linear warm-up, then a cosine down to lr_final."""
        warm = min(1.0, (self.iteration + 1) / max(self.options.warmup, 1))
        share = max(self.iteration - self.hold, 0) / max(self.total - self.hold, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return warm * (self.options.lr_final + (1 - self.options.lr_final) * cosine)

    def _anchor_weight(self) -> float:
        """Weight of the distance to the teacher's states; falls linearly to 0."""
        end = self.options.anchor * self.total
        return self.options.w_anchor * max(0.0, 1 - self.iteration / end) if end else 0.0

    def _indices(self) -> list[int]:
        """The share of this process in the batch: places in a stream of shuffled epochs."""
        start = self.iteration * self.options.batch + distributed.rank() * self.share
        train, indices, orders = self.pairs.train, [], {}
        for position in range(start, start + self.share):
            epoch, place = divmod(position, len(train))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(stream_seeds(self.options.seed, -1 - epoch, 1)[0])
                orders[epoch] = torch.randperm(len(train), generator=generator).tolist()
            indices.append(train[orders[epoch][place]])
        return indices

    def _accumulate(self, trained: list[str]) -> tuple[float, float]:
        """Puts the gradients of the batch into the parameters of these groups.

        Returns the mean loss of the batch and the norm of the gradient. All that the host needs of
        the device, gradients of heads, losses and features, comes in one copy.
        """
        self.optimizer.zero_grad(set_to_none=True)
        found, vectors = [], []
        for indices in _chunks(self._indices(), self.chunk):
            losses, features = self._losses(indices)
            (losses.sum() * self.loss_scale).backward()
            found.append(losses.detach())
            vectors += [] if features is None else [features]
        parameters = [parameter for name in trained for parameter in self.groups[name]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradients, found, read = _on_host(gradients, found, vectors)
        total = sum(float(losses.double().sum()) for losses in found)
        parts = [g.flatten().double() / self.loss_scale for g in gradients]
        sums = torch.cat([*parts, torch.tensor([total], dtype=torch.float64)])
        sums = distributed.all_reduce_sum(sums) / self.options.batch
        self.optimizer.zero_grad(set_to_none=True)  # Adam skips parameters without gradient
        sizes = [p.numel() for p in parameters]
        gradients = [
            gradient.view_as(parameter).to(parameter.dtype, copy=True)
            for parameter, gradient in zip(parameters, sums[:-1].split(sizes), strict=True)
        ]
        loss = float(sums[-1])
        if self.options.w_delta and "coef_offset" in trained:
            (offsets,) = self.groups["coef_offset"]
            loss += self.options.w_delta * float(offsets.detach().square().sum())
            at = next(k for k, parameter in enumerate(parameters) if parameter is offsets)
            gradients[at] += 2 * self.options.w_delta * offsets.detach()
        norm = float(torch.stack([gradient.norm().double() for gradient in gradients]).norm())
        _put(gradients, parameters)
        if self.distribution is not None:
            everyone = torch.cat(distributed.gather_objects(torch.cat(read)))
            if everyone.isfinite().all():
                own = distributed.world_size() == 1
                self.distribution.push(torch.cat(vectors) if own else to_device(everyone, self.device))
        return loss, norm

    def _losses(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses [B] of these samples with gradients, and detached features of the samples."""
        latents, cond, target = self.pairs.batch(indices)
        anchor = self._anchor_weight()
        found = self.student.run(
            self.net, latents, cond, checkpointing=self.options.checkpointing, return_trajectory=anchor > 0
        )
        x = found[-1] if anchor else found
        losses = self.pair_loss(x, target, cond)
        features = None
        if self.distribution is not None:
            vectors = self.distribution.vectors(x, cond)
            losses = losses + self.options.w_dist * self.distribution(vectors)
            features = vectors.detach()
        if anchor:
            losses = losses + anchor * self._anchor(found, indices)
        return losses, features

    def _anchor(self, states: torch.Tensor, indices: list[int]) -> torch.Tensor:
        """[B]: squared distance of the inner states to the teacher's, divided by sigma^2."""
        sigmas = self.student.sigmas().detach()[1:-1]
        wanted = self.pairs.states_at(indices, sigmas)
        squared = (states[1:-1] - wanted).square().flatten(2).mean(dim=2)
        return (squared / to_device(sigmas.to(squared.dtype), squared.device)[:, None] ** 2).sum(dim=0)

    def _update(self, trained: list[str], norm: float) -> None:
        """An Adam step along the clipped gradients, and the average after it."""
        scale = min(1.0, self.options.clip / max(norm, 1e-30))
        if scale < 1:
            for name in trained:
                for parameter in self.groups[name]:
                    parameter.grad.mul_(scale)
        for group, name in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = self.rates[name] * self._rate()
        self.optimizer.step()
        decay = min(self.options.ema, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():
            for name, averages in learned(self.averaged).items():
                for average, parameter in zip(averages, self.groups[name], strict=True):
                    average.lerp_(parameter, 1 - decay)

    # Validation

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Validates the average, each process a share. Keeps the best. Returns ``validation``."""
        by, at = self.score or self.pair_loss, self.pairs.validation
        loss, rms, vectors = measure(self.net, self.averaged, self.pairs, at, by, self.chunk, self.distribution)
        if self.distribution is not None:
            if self.score is None:
                loss += self.options.w_dist * float(energy_distance(vectors, self.distribution.reference_features))
            if self.distribution.queue is None:
                self.distribution.push(vectors)
        self.validation = (loss, rms)
        if loss < self.best["value"]:
            self.best = {"value": loss, "iteration": self.iteration, "state": _copy(self.averaged.state_dict())}
        return self.validation

    def best_student(self) -> SpanSolver:
        """The solver with the best validation."""
        student = copy.deepcopy(self.averaged)
        student.load_state_dict(self.best["state"])
        return student

    # Resuming

    def state(self, copied: bool = True) -> dict:
        queue = None if self.distribution is None else self.distribution.queue
        more = {
            "student_config": copy.deepcopy(dict(self.student.config)),
            "queue": None if queue is None else queue.cpu(),
        }
        return super().state(copied) | more

    def load_state(self, state: dict) -> None:
        super().load_state({"loss_scale": self.loss_scale, "hold": 0, **state})  # earlier versions have none
        if self.distribution is not None:
            self.distribution.queue = None if state["queue"] is None else state["queue"].to(self.device)


def _on_host(gradients: list, losses: list, features: list) -> tuple[list, list, list]:
    """The tensors on the CPU. Those of another device come in one copy, in float32."""
    tensors = [*gradients, *losses, *features]
    away = [k for k, tensor in enumerate(tensors) if tensor.device.type != "cpu"]
    if away:
        flat = torch.cat([tensors[k].flatten().float() for k in away]).cpu()
        parts = flat.split([tensors[k].numel() for k in away])
        for k, part in zip(away, parts, strict=True):
            tensors[k] = part.view(tensors[k].shape)
    first, second = len(gradients), len(gradients) + len(losses)
    return tensors[:first], tensors[first:second], tensors[second:]


def _put(gradients: list, parameters: list) -> None:
    """Sets gradients from the CPU, with one copy to another device."""
    away = [k for k, parameter in enumerate(parameters) if parameter.device.type != "cpu"]
    if away:
        flat = to_device(torch.cat([gradients[k].flatten() for k in away]), parameters[away[0]].device)
        parts = flat.split([gradients[k].numel() for k in away])
        for k, part in zip(away, parts, strict=True):
            gradients[k] = part.view_as(parameters[k])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _copy(state: dict) -> dict:
    return {name: value.detach().clone() for name, value in state.items()}


def _chunks(indices, size: int):
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


@torch.no_grad()
def measure(net, student, pairs: TeacherSet, indices, pair_loss, chunk: int, distribution=None) -> tuple:
    """(mean loss, mean root mean square distance, features or None) of a solver on these pairs.

    Every process takes a share, and all get the same result, infinite if something is not finite.
    """
    rank, world = distributed.rank(), distributed.world_size()
    mine = list(indices)[len(indices) * rank // world : len(indices) * (rank + 1) // world]
    sums, vectors = torch.zeros(2, dtype=torch.float64), []
    for part in _chunks(mine, chunk):
        latents, cond, target = pairs.batch(part)
        x = student.run(net, latents, cond)
        rms = (x - target).square().flatten(1).mean(dim=1).sqrt()
        values = torch.stack([pair_loss(x, target, cond), rms.float()])
        sums += values.sum(dim=1).cpu().double()
        if distribution is not None:
            vectors.append(distribution.vectors(x, cond).cpu())
    sums = distributed.all_reduce_sum(sums) / len(indices)
    found = None
    if distribution is not None:
        own = torch.cat(vectors) if vectors else torch.zeros(0, distribution.reference_features.shape[1])
        found = torch.cat(distributed.gather_objects(own)).to(pairs.device)
    loss, rms = (value if math.isfinite(value) else math.inf for value in sums.tolist())
    return loss, rms, found
