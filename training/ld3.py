"""LD3: optimises the time schedule by gradient descent through the sampler.

Tong et al. 2024, "Learning to Discretize Denoising Diffusion ODEs". A student (the solver with few
steps) starts from the noise of a teacher with many steps, and should reach the teacher's image. The
noise levels are learned, and separately the noise levels that the network is conditioned on
("decoupled"). The student may start from any noise within a small ball around the teacher's; these
starting points are learned, too ("soft" objective).

Differences from the published code: a decoupled level is bounded by its neighbouring gaps, not by
the smallest gap of all (which the code takes from the logits, where it is zero at first). Steps of
the starting points have a fixed length, not a learning rate in units of the loss. The loss is
divided by its first value, so that learning rates and gradient clipping mean the same for every
loss. Batches are larger. The start is the best of the common schedules or one from a file, since
equal gaps in ln sigma are poor for few steps.
"""

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from models.noise import VPTime
from solvers.sampler import integrate, resolve_sigmas, sample
from solvers.schedule_file import load_schedule
from solvers.schedules import SCHEDULES, check_sigmas
from solvers.solver import Option, check_teacher
from torch_utils import distributed
from torch_utils.errors import UserError
from training.sample_loss import TERM_NAMES, PairLoss, parse_loss
from training.trainer import BaseRun, BaseTrainer, NotFinite, loss_scale_of

INITIAL = {"polynomial": 7, "time_uniform": 1, "logsnr": 1, "discrete": 1}  # schedule_type: usual schedule_rho
SUMMARY = "LD3: gradient descent through the sampler; needs a differentiable solver"
OPTIONS = {
    "solver_tea": Option(str, "unipc", "solver of the teacher"),
    "num_steps_tea": Option(int, 21, "points of the teacher's grid"),
    "schedule_type": Option(tuple(SCHEDULES), "polynomial", "the teacher's grid"),
    "schedule_rho": Option(float, 7.0, "exponent of the teacher's grid"),
    "init": Option(
        str, "auto", f"where to start: {', '.join(INITIAL)}, a schedule file, or auto, the best of the names"
    ),
    "mode": Option(("lambda", "time"), "lambda", "coordinate of the gaps: -ln sigma, or the time of the VP SDE"),
    "loss": Option(str, "features", f"distance to the teacher: weighted sum of {TERM_NAMES}"),
    "feature_sigma": Option(
        float, None, "noise level of the denoiser when features are compared; None: 0.1, or the nearest it supports"
    ),
    "num_train": Option(int, 256, "teacher pairs for training"),
    "num_valid": Option(int, 64, "teacher pairs for validation"),
    "update_batch": Option(int, 32, "pairs per update, over all processes; --batch is per network call"),
    "rounds": Option(int, 15, "passes over the pairs"),
    "rounds_grid": Option(int, 4, "passes before the decoupled noise levels (sigmas_cond) are learned"),
    "valid_every": Option(int, 4, "updates between two validations"),
    "patience": Option(int, 5, "validations without progress until the learning rates fall by a fifth"),
    "lr": Option(float, 5e-3, "learning rate of the gaps (RMSprop)"),
    "lr_net": Option(float, 1.0, "learning rate of the decoupled levels (SGD), divided by the number of intervals"),
    "win_rate": Option(float, 0.5, "bound of the decoupled levels, in units of the next gap; 0: not decoupled"),
    "radius": Option(
        float, 1e-3, "radius of the ball of starting points, times C H W / intervals^2; 0: the noise itself"
    ),
    "checkpointing": Option(bool, True, "compute activations twice instead of storing them"),
}
SMALLEST_GAP = 1e-3  # of the mean gap
MOMENTUM, LARGEST_GRADIENT, DECAY = 0.9, 1.0, 0.8
PROGRESS = 1e-6  # smallest relative decrease of a loss that counts
RELAXATION = 0.5  # length of a step of the starting points, relative to the radius


# --------------------------------------------------------------------------------------------------
# Parameters


class Grid:
    """A schedule with parameters u [N - 1], logits of the gaps, and v [N - 2], decoupled levels.

    initial: initial noise levels [N], float64, N > 2.
    mode: "lambda": gaps in -ln sigma. "time": gaps in the time of the variance-preserving SDE.
    win_rate: bound of the decoupled levels, relative to the smaller neighbouring gap. Default 0.5.
    initial_net: initial noise levels that the network is conditioned on. Default None: as initial.

    v is in -1 .. 1. For any u, the levels descend between the same ends.
    """

    def __init__(self, initial: torch.Tensor, mode: str = "lambda", win_rate: float = 0.5, initial_net=None):
        self.ends, self.mode, self.win_rate = initial[[0, -1]].clone(), mode, win_rate
        self._curve = VPTime(float(initial[-1]), float(initial[0])) if mode == "time" else None
        gaps = self._coordinate(initial).diff()
        self._span, self._start = gaps.sum(), self._coordinate(initial)[0]
        self._least = SMALLEST_GAP / len(gaps)
        free = (gaps / gaps.sum() - self._least).clamp(min=self._least * SMALLEST_GAP)
        self.u = free.log().requires_grad_(True)
        self.v = torch.zeros(len(gaps) - 1, dtype=torch.float64, requires_grad=True)
        if initial_net is not None and win_rate:
            offset = self._coordinate(initial_net[1:-1]) - self._coordinate(initial[1:-1])
            self.v.data = (offset / self._room(gaps)).clamp(-1, 1)

    def levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigmas, sigmas_cond), each float64 [N] on the CPU, with gradients to u and v."""
        shares = self._least + (1 - self._least * len(self.u)) * self.u.softmax(0)
        gaps = self._span * shares
        inner = self._start + gaps.cumsum(0)[:-1]
        return self._pinned(inner), self._pinned(inner + self._room(gaps.detach()) * self.v)

    def project(self) -> None:
        """Clips v to its bounds."""
        self.v.data.clamp_(-1, 1)

    def _room(self, gaps):
        return self.win_rate * torch.minimum(gaps[:-1], gaps[1:])

    def _pinned(self, inner):
        sigmas = (-inner).exp() if self._curve is None else self._curve.sigma(-inner)
        return torch.cat([self.ends[:1], sigmas, self.ends[1:]])

    def _coordinate(self, sigmas):
        """The coordinate of the gaps, which grows from noise to image."""
        return -(sigmas.log() if self._curve is None else self._curve.sigma_inv(sigmas))


@dataclass
class Pairs:
    """Samples of one network call.

    latents: noise [B,C,H,W].
    cond: keyword arguments of the network.
    targets: the teacher's images [B,C,H,W]. Default None.
    relaxed: the student's starting points [B,C,H,W]. Default None.
    """

    latents: torch.Tensor
    cond: Mapping
    targets: torch.Tensor | None = None
    relaxed: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------------
# Check of the gradients


class Probe(torch.nn.Module):
    """The denoiser of Gaussian data with independent pixels, in closed form.

    Samples are well within -1 .. 1, so thresholding has no effect.
    """

    img_channels, img_resolution, label_dim = 1, 4, 0

    def __init__(self, sigma_min, sigma_max):
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.data_mean, self.data_std = torch.linspace(-0.3, 0.2, 16, dtype=torch.float64).reshape(1, 1, 4, 4), 0.2
        self.variance = (0.01 + 0.2 * self.data_mean**2).flip(-1)

    def forward(self, x, sigma, **cond):
        return (self.variance * x + sigma**2 * self.data_mean) / (self.variance + sigma**2)


def check_gradients(problem, sigmas: torch.Tensor) -> None:
    """Raises UserError for a solver without correct gradients to the noise levels.

    They are compared with finite differences on ``Probe``.
    """
    wrong = f"ld3 needs gradients to the noise levels, and the solver '{problem.solver}' "
    solver = problem.make_solver()
    if solver.stochastic:
        raise UserError(wrong + "draws noise: choose a deterministic one")
    if not solver.differentiable:
        raise UserError(wrong + "does not have them: choose another one")
    net = Probe(problem.sigma_min, problem.sigma_max)
    latents = torch.sin(torch.arange(32, dtype=torch.float64) ** 2).reshape(2, 1, 4, 4)

    def output(logs):
        settings = {"solver": problem.solver, "afs": problem.afs, **problem.options}
        x = integrate(net, latents, sigmas=logs[0].exp(), sigmas_cond=logs[1].exp(), **settings)
        return (x * torch.linspace(1, 2, 32, dtype=torch.float64).reshape(x.shape)).sum()

    point = torch.stack([sigmas, sigmas]).cpu().log()
    leaf = point.clone().requires_grad_(True)
    result = output(leaf)
    found = torch.zeros_like(point)
    if result.requires_grad:
        found = torch.autograd.grad(result, leaf, allow_unused=True, materialize_grads=True)[0]
    expected, step = torch.zeros_like(point), 1e-5
    with torch.no_grad():
        for row in range(2):
            for i in range(1, point.shape[1] - 1):
                shift = torch.zeros_like(point)
                shift[row, i] = step
                expected[row, i] = (output(point + shift) - output(point - shift)) / (2 * step)
    error = (found - expected)[:, 1:-1].norm()
    if not error <= 1e-4 * expected.norm():
        raise UserError(wrong + "gives wrong ones: choose another one")


# --------------------------------------------------------------------------------------------------
# Optimisation


class Trainer(BaseTrainer):
    """The trainer of LD3 on a ``Problem``. Processes have different pairs and equal parameters.

    problem: see training/schedule_search.py.
    options: those of ``OPTIONS``.

    One iteration is one update. Attributes: ``grid``; ``best``, the levels with the least
    validation loss, and this loss; ``first``, the validation loss of the start.
    """

    kept = {"updates": "iteration"} | {name: name for name in ("stale", "recomputed", "first", "best")}

    def __init__(self, problem, options: Mapping):
        options = SimpleNamespace(**options)
        self.problem, self.options, self.device = problem, options, torch.device(problem.device)
        self.distance = PairLoss(options.loss, problem.net, options.feature_sigma)
        if options.feature_sigma is not None and "features" not in [name for _, name in parse_loss(options.loss)]:
            raise UserError(f"feature_sigma has no effect with loss={options.loss}; leave it out")
        self.intervals = problem.num_steps - 1
        numbers = problem.net.img_channels * problem.net.img_resolution**2
        self.radius = options.radius * numbers / self.intervals**2
        self.stale = self.recomputed = 0
        self.first = math.inf
        self.best: dict = {}

    # Pairs.

    def deal(self) -> None:
        """Draws the pairs of this process: batches of training pairs, and the validation pairs.

        Both are lists of network calls. The pairs do not depend on the number of processes.
        """
        train, valid, batch = (self.options.num_train, self.options.num_valid, self.options.update_batch)
        seeds = [seed for part in self.problem.batches(train + valid) for seed in part]
        starts = range(0, train, batch)
        self.sizes = [min(batch, train - start) for start in starts]
        self.train = [self._calls(seeds[start : start + size]) for start, size in zip(starts, self.sizes, strict=True)]
        self.valid = self._calls(seeds[train:])

    def _calls(self, seeds: list[int]) -> list[Pairs]:
        mine = seeds[distributed.rank() :: distributed.world_size()]
        parts = [mine[start : start + self.problem.batch] for start in range(0, len(mine), self.problem.batch)]
        return [Pairs(*self.problem.noise(part)) for part in parts]

    @property
    def total(self) -> int:
        """Number of updates of the whole run."""
        return self.options.rounds * len(self.train)

    @property
    def round(self) -> int:
        """Number of finished passes over the training pairs."""
        return self.iteration // len(self.train)

    @property
    def calls(self) -> list[Pairs]:
        return [pairs for batch in (*self.train, self.valid) for pairs in batch]

    def run_teacher(self) -> None:
        """Computes the teacher's images."""
        options, problem = self.options, self.problem
        grid = (options.num_steps_tea, options.schedule_type, options.schedule_rho)
        settings = problem.teacher(options.solver_tea, *grid)
        with problem.progress(sum(len(pairs.latents) for pairs in self.calls), "pair") as bar:
            for pairs in self.calls:
                pairs.targets = sample(problem.net, pairs.latents, cond=pairs.cond, **settings)
                pairs.relaxed = pairs.latents
                bar.update(len(pairs.latents))

    # Losses.

    def losses(self, x, pairs: Pairs, sigmas, sigma_cond) -> torch.Tensor:
        """Distances [B] of the student's samples from noise x."""
        problem = self.problem
        samples, info = integrate(
            problem.net,
            x,
            solver=problem.solver,
            sigmas=sigmas,
            sigmas_cond=sigma_cond,
            afs=problem.afs,
            cond=pairs.cond,
            checkpointing=self.options.checkpointing,
            return_info=True,
            **problem.options,
        )
        if samples.requires_grad and self.options.checkpointing:  # hooks do not count recomputed calls
            self.recomputed += info.nfe * len(x)
            problem.evaluations += info.nfe * len(x)
        return self.distance(samples, pairs.targets, pairs.cond)

    @torch.no_grad()
    def validate(self, sigmas, sigma_cond) -> float:
        """The mean loss of the validation pairs from their current starting points."""
        total = torch.zeros(1, dtype=torch.float64)
        with distributed.together():
            for pairs in self.valid:
                total += self.losses(pairs.relaxed, pairs, sigmas, sigma_cond).cpu().double().sum()
        return float(self._summed(total)) / self.options.num_valid

    def gradients(self, pairs: Pairs, sigmas, sigma_cond) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses [B], gradients [2,N] of their sum to sigmas and sigmas_cond).

        Also moves the starting points of the pairs.
        """
        levels = [sigmas, sigma_cond if sigma_cond is None else sigma_cond.detach().requires_grad_(True)]
        levels[0] = sigmas.detach().requires_grad_(True)
        x = pairs.relaxed.detach().requires_grad_(self.radius > 0)
        losses = self.losses(x, pairs, *levels)
        wanted = [value for value in (*levels, x) if value is not None and value.requires_grad]
        scale = loss_scale_of(self.problem.net)
        found = torch.autograd.grad(losses.sum() * scale, wanted, allow_unused=True, materialize_grads=True)
        found = [value / scale for value in found]
        if self.radius:
            self.relax(
                pairs, found.pop(), losses.detach(), *(value if value is None else value.detach() for value in levels)
            )
        rows = [value.double() for value in found] + [torch.zeros(len(sigmas), dtype=torch.float64)]
        return losses.detach(), torch.stack(rows[:2])

    @torch.no_grad()
    def relax(self, pairs: Pairs, gradient, losses, sigmas, sigma_cond) -> None:
        """One step of projected gradient descent of the starting points, kept if the loss falls."""

        def lengths(value):
            return value.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

        step = RELAXATION * self.radius * gradient / lengths(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
        offset = pairs.relaxed - step - pairs.latents
        candidate = pairs.latents + offset * (self.radius / lengths(offset)).clamp(max=1)
        better = self.losses(candidate, pairs, sigmas, sigma_cond) < losses
        pairs.relaxed = torch.where(better.reshape(-1, 1, 1, 1), candidate, pairs.relaxed)

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes. Raises NotFinite on all if it is not finite."""
        values = distributed.all_reduce_sum(values)
        if not values.isfinite().all():
            raise NotFinite
        return values

    # Steps.

    def start(self) -> None:
        """Chooses the initial grid by the validation pairs."""
        candidates = initial_schedules(self.problem, self.options.init)
        measured = []
        for sigmas, sigma_cond in candidates:
            try:
                measured.append(self.validate(sigmas, sigma_cond))
            except NotFinite:
                measured.append(math.inf)
        self.first = min(measured)
        if not 0 < self.first < math.inf:
            raise UserError(
                f"the loss at the start is {self.first}: check the network, the teacher and the initial schedule"
            )
        sigmas, sigma_cond = candidates[measured.index(self.first)]
        self.best = {"loss": self.first, "sigmas": sigmas, "sigmas_cond": sigma_cond, "updates": 0}
        win_rate = self.options.win_rate
        self.grid = Grid(sigmas, self.options.mode, win_rate, sigma_cond)
        self.optimizers = self._optimizers()

    def _optimizers(self):
        lr, lr_net = self.options.lr, self.options.lr_net / self.intervals
        return [torch.optim.RMSprop([self.grid.u], lr, momentum=MOMENTUM), torch.optim.SGD([self.grid.v], lr_net)]

    def levels(self):
        """The current (sigmas, sigmas_cond); the latter is None if equal."""
        sigmas, sigma_cond = self.grid.levels()
        return sigmas, sigma_cond if self.decoupled or self.grid.v.any() else None

    @property
    def decoupled(self) -> bool:
        """Whether v is learned in this round."""
        return self.options.win_rate > 0 and self.round >= self.options.rounds_grid

    def update(self, index: int) -> None:
        """One step of the parameters on a batch of training pairs."""
        sigmas, sigma_cond = self.levels()
        total = torch.zeros(2 * len(sigmas), dtype=torch.float64)
        with distributed.together():
            for pairs in self.train[index]:
                total += self.gradients(pairs, sigmas, sigma_cond)[1].flatten()
        gradients = self._summed(total).reshape(2, -1) / (self.sizes[index] * self.first)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        outputs = [sigmas] if sigma_cond is None else [sigmas, sigma_cond]
        torch.autograd.backward(outputs, list(gradients[: len(outputs)]))
        learned = [self.grid.u, self.grid.v] if self.decoupled else [self.grid.u]
        torch.nn.utils.clip_grad_norm_(learned, LARGEST_GRADIENT)
        for optimizer in self.optimizers[: len(learned)]:
            optimizer.step()
        self.grid.project()

    @torch.no_grad()
    def validate_grid(self) -> float:
        """Validates the current grid. Keeps it if it is the best, else may lower the rates."""
        sigmas, sigma_cond = self.levels()
        loss = self.validate(sigmas, sigma_cond)
        if loss < self.best["loss"] * (1 - PROGRESS):
            self.best = {"loss": loss, "sigmas": sigmas, "sigmas_cond": sigma_cond, "updates": self.iteration + 1}
            self.stale = 0
        else:
            self.stale += 1
        if self.stale >= self.options.patience:
            self.stale = 0
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] *= DECAY
        return loss

    def relax_validation(self) -> None:
        """Moves the starting points of the validation pairs, once per round."""
        sigmas, sigma_cond = self.levels()
        with distributed.together():
            for pairs in self.valid:
                self.gradients(pairs, sigmas, sigma_cond)
        self.best["loss"] = self.validate(self.best["sigmas"], self.best["sigmas_cond"])

    def iterate(self) -> float | None:
        """One update. Returns the validation loss after it, if due."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.round))
        place = self.iteration % len(self.train)
        if place == 0 and self.radius:
            self.relax_validation()
        self.update(int(order[place]))
        done, loss = self.iteration + 1, None
        if done % self.options.valid_every == 0 or done == self.total:
            loss = self.validate_grid()
        self.iteration = done
        return loss

    def state(self, copied: bool = True) -> dict:
        return super().state(copied) | {
            "grid": [self.grid.u.detach().clone(), self.grid.v.detach().clone()],
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            "relaxed": [pairs.relaxed for pairs in self.calls],
        }

    def load_state(self, state) -> None:
        super().load_state(state)
        self.grid = Grid(self.best["sigmas"], self.options.mode, self.options.win_rate)
        for parameter, value in zip((self.grid.u, self.grid.v), state["grid"], strict=True):
            parameter.data = value.clone()
        self.optimizers = self._optimizers()
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(value))
        for pairs, relaxed in zip(self.calls, state["relaxed"], strict=True):
            pairs.relaxed = relaxed.to(pairs.latents)


class LD3Run(BaseRun):
    """A run of LD3 with the states of its ``Problem``."""

    def __init__(self, trainer: Trainer):
        super().__init__(trainer, trainer.options)
        self.problem = trainer.problem

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best (sigmas, sigmas_cond or None) found."""
        trainer = self.trainer
        trainer.deal()
        with distributed.together():
            state = self.problem.load_state()
        if not self.restore(state):
            with distributed.together():
                trainer.run_teacher()
            trainer.start()
            self.before = trainer.state()
            self.save()
        self.loop()
        best = trainer.best
        distributed.print0(
            f"ld3: validation loss {best['loss']:.4g} after {best['updates']} of {trainer.iteration} updates"
            f" (at the start {trainer.first:.4g}); {trainer.recomputed} evaluations of this process were recomputed for"
            " gradients"
        )
        return best["sigmas"], best["sigmas_cond"]

    def finished(self) -> bool:
        return self.trainer.iteration >= self.trainer.total

    def progress_bar(self):
        return self.problem.progress(self.trainer.total, "update", self.trainer.iteration)

    def show(self, bar, statistics: float | None, seconds: float) -> None:
        if statistics is not None:
            bar.set_postfix(valid=f"{statistics:.4g}", best=f"{self.trainer.best['loss']:.4g}")
        bar.update()

    def after_iteration(self, stopping: bool) -> None:
        if stopping or self.trainer.iteration % len(self.trainer.train) == 0:
            self.save()

    def on_interruption(self) -> str:
        return "; repeat the command to continue"

    def on_failure(self, error: NotFinite) -> None:
        """Raises UserError if nothing beats the start; else the best schedule is the result."""
        updates = self.trainer.iteration
        if not self.trainer.best["updates"]:
            self.problem.drop_state()
            raise UserError(
                f"the loss or its gradient is not finite after {updates} updates, and nothing better than the start was"
                " found: try another solver, loss or a smaller lr"
            ) from None
        distributed.print0(
            f"Warning: stopped after {updates} updates, where the loss or its gradient is not finite; the best schedule"
            " until then is kept",
            file=sys.stderr,
        )

    # Processes save after the same update, but one may be killed before: each keeps two states.

    def save(self) -> None:
        now = self.trainer.state()
        snapshots = [self.before, now] if distributed.world_size() > 1 else [now]
        with distributed.together():
            targets = [pairs.targets for pairs in self.trainer.calls]
            self.problem.save_state({"targets": targets, "snapshots": snapshots})
        self.before = now

    def restore(self, state: dict | None) -> bool:
        """Continues from a state. False if this or another process has none."""
        updates = distributed.gather_objects(None if state is None else state["snapshots"][-1]["updates"])
        if None in updates:
            return False
        common = [one for one in state["snapshots"] if one["updates"] == min(updates)]
        with distributed.together():
            if not common:
                raise UserError("the states of the processes do not belong together: delete them")
        self.before = common[0]
        self.trainer.load_state(self.before)
        for pairs, targets in zip(self.trainer.calls, state["targets"], strict=True):
            pairs.targets = targets.to(pairs.latents)
        return True


def initial_schedules(problem, init: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The candidates (sigmas, sigmas_cond or None) to start from, with the ends of the problem."""

    def pinned(sigmas, sigma_cond=None):
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64).cpu().clone()
        sigmas[0], sigmas[-1] = problem.sigma_max, problem.sigma_min
        return check_sigmas(sigmas), None if sigma_cond is None else torch.as_tensor(sigma_cond, dtype=torch.float64)

    if init != "auto" and init not in INITIAL:
        schedule = load_schedule(init)
        if len(schedule.sigmas) != problem.num_steps:
            raise UserError(f"{init} has {len(schedule.sigmas)} noise levels instead of num_steps={problem.num_steps}")
        return [pinned(schedule.sigmas, schedule.sigmas_cond)]
    found = []
    for name in INITIAL if init == "auto" else [init]:
        if init == "auto" and name == "discrete" and not hasattr(problem.net, "sigma_inv"):
            continue
        try:
            ends = (problem.sigma_min, problem.sigma_max)
            found.append(pinned(resolve_sigmas(problem.net, problem.num_steps, name, INITIAL[name], *ends)))
        except UserError:  # time_uniform does not exist for every range
            if init != "auto":
                raise
    return found


def check_options(problem, options: SimpleNamespace) -> None:
    """Raises UserError for impossible settings, before anything is computed."""
    check_teacher(options.solver_tea)
    if problem.num_steps < 3:
        raise UserError("ld3 needs num_steps of at least 3, to have a noise level between the ends")
    for name in ("num_train", "num_valid", "update_batch", "rounds", "valid_every", "patience"):
        if (value := getattr(options, name)) < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name in ("rounds_grid", "lr", "lr_net", "radius"):
        if not (math.isfinite(value := getattr(options, name)) and value >= 0):
            raise UserError(f"{name}={value} must be a finite number >= 0")
    if not 0 <= options.win_rate <= 0.5:
        raise UserError(f"win_rate={options.win_rate} must be within 0..0.5")
    resolve_sigmas(
        problem.net,
        options.num_steps_tea,
        options.schedule_type,
        options.schedule_rho,
        problem.sigma_min,
        problem.sigma_max,
    )
    check_gradients(problem, initial_schedules(problem, options.init)[0][0])


def ld3_schedule(problem, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sigmas, sigmas_cond or None) for a ``Problem``, float64 [num_steps].

    problem: network, solver and number of steps.
    options: all of ``OPTIONS``.

    The ends are those of the problem. The validation loss is never above that of the start. Raises
    UserError on impossible settings, on solvers without gradients, and if losses are not finite
    before anything better was found.
    """
    check_options(problem, SimpleNamespace(**options))
    return LD3Run(Trainer(problem, options)).run()
