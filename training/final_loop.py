"""Training of a span student on its final samples: the whole trajectory is differentiated, against offline teacher pairs.

Samples are dealt out by their place in a stream of shuffled pairs, and gradients are sums over samples divided by the
total batch, so the number of processes and of micro-batches changes results by rounding only.
"""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.denoiser import embedding_layer
from solvers.pair_loss import PairLoss
from solvers.span import SpanStudent
from torch_utils import distributed
from torch_utils.download import sha256_of
from torch_utils.errors import UserError
from torch_utils.memory import AUTO, explained_oom
from torch_utils.progress import progress_bar
from torch_utils.seeds import stream_seeds
from training.checkpoint import save_predictor
from training.distribution_loss import DistributionTerm, energy_distance
from training.final_config import FinalOptions, grid_sigmas, learned
from training.inputs import draw_condition, draw_inputs
from training.run import Run, check_state, numbers, provenance_of, restore, working_folder
from training.run_folder import newest_state, on_main
from training.teacher_set import TeacherSet, file_of, identity_of, teacher_set
from training.training_loop import fitting_batch_gpu, prepare

STATISTICS = ("loss", "val", "rms", "gradient", "skipped")
PATIENCE = 5  # iterations in a row without a finite gradient, after which the run ends
FINALISTS = 3  # starts that are trained for a moment before one is chosen
QUEUE = 1024  # student samples whose features the energy distance remembers


class NotFinite(Exception):
    """Several iterations in a row had gradients that are not finite."""


class FinalTrainer:
    """A span student, its optimiser, and one iteration: an Adam step for the loss of a batch of final samples.

    net: a Denoiser; student: a SpanStudent, trained in place: its table on the CPU, its heads on the device; pairs: a TeacherSet;
    total: iterations of the whole run, over which rates decay and phases take turns. report(text): told what is unusual.

    ``averaged`` is the student with the moving average of the parameters; ``best`` its best state in validation, with
    its value; ``validation`` the latest (objective, root mean square distance to the teacher).
    """

    def __init__(self, net, student: SpanStudent, pairs: TeacherSet, options: FinalOptions, total: int, device="cpu"):
        self.net, self.student, self.pairs, self.options = net, student, pairs, options
        self.total, self.device = total, torch.device(device)
        self.share = options.batch // distributed.world_size()
        self.chunk = min(options.batch_gpu or self.share, self.share)
        self.pair_loss = PairLoss(options.loss, net, options.feature_sigma)
        self.distribution = DistributionTerm(net, options.feature_sigma, QUEUE) if options.w_dist else None
        self.rates, self.phases = options.rates(student), options.phase_list(student)
        student.heads.to(self.device)
        self.groups = learned(student)
        groups = [{"params": parameters, "lr": self.rates[name]} for name, parameters in self.groups.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
        self.averaged = copy.deepcopy(student)
        self.iteration, self.failures = 0, 0
        self.validation = (math.nan, math.nan)
        self.best: dict = {"value": math.inf, "iteration": 0, "state": _copy(student.state_dict())}
        self.first: tuple[float, float] | None = None  # the validation of the untrained student
        self.report: Callable[[str], None] = lambda text: None
        self._latest = torch.zeros(1, len(STATISTICS), dtype=torch.float64)
        if self.distribution is not None:
            self.distribution.set_bank(
                (images, cond) for _, cond, images in map(pairs.batch, _chunks(pairs.train, self.chunk))
            )

    @property
    def evaluations(self) -> int:
        """NFE of the student, by the cost of the network's calls."""
        return self.student.evaluations() * getattr(self.net, "evals_per_call", 1)

    # One iteration

    def iterate(self) -> torch.Tensor:
        """One iteration; returns the statistics [1, 5] (see STATISTICS), the same on all processes.

        A gradient that is not finite is skipped and counted; ``PATIENCE`` of them in a row raise NotFinite, on every
        process. The student is then as after the last good iteration.
        """
        if self.first is None:
            self.first = self.validate()
        trained = self._phase()
        loss = self._accumulate(trained)
        gradients = [parameter.grad for name in trained for parameter in self.groups[name]]
        norm = torch.stack([gradient.norm().cpu().double() for gradient in gradients]).norm()
        good = math.isfinite(loss) and bool(norm.isfinite())
        self._latest[0, -1] = float(not good)
        if good:
            self.failures = 0
            self._update(gradients, norm)
            self._latest[0, [0, 3]] = torch.tensor([loss, float(norm)], dtype=torch.float64)
        else:
            self.failures += 1
            self.report(f"Warning: no finite gradient in iteration {self.iteration + 1}: skipped")
            if self.failures == PATIENCE:
                self.failures = 0  # a continued run may try again
                raise NotFinite
        self.iteration += 1
        if self.iteration % self.options.val_every == 0 or self.iteration == self.total:
            self.validate()
        self._latest[0, 1:3] = torch.tensor(self.validation)
        return self._latest.clone()

    def _phase(self) -> list[str]:
        """The groups that are trained in this iteration."""
        end = 0.0
        for groups, share in self.phases:
            end += share * self.total
            if self.iteration < end - 1e-9:
                return [name for name in self.groups if name in groups]
        return [name for name in self.groups if name in self.phases[-1][0]]

    def _rate(self) -> float:
        """Share of the learning rates: linear warm-up, then a cosine down to lr_final."""
        warm = min(1.0, (self.iteration + 1) / max(self.options.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.iteration / self.total, 1.0)))
        return warm * (self.options.lr_final + (1 - self.options.lr_final) * cosine)

    def _anchor_weight(self) -> float:
        """Weight of the teacher's states, which falls linearly to 0."""
        end = self.options.anchor * self.total
        return self.options.w_anchor * max(0.0, 1 - self.iteration / end) if end else 0.0

    def _indices(self) -> list[int]:
        """This process's part of the batch: consecutive places in a stream of shuffled epochs."""
        start = self.iteration * self.options.batch + distributed.rank() * self.share
        train, indices, orders = self.pairs.train, [], {}
        for position in range(start, start + self.share):
            epoch, place = divmod(position, len(train))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(stream_seeds(self.options.seed, -1 - epoch, 1)[0])
                orders[epoch] = torch.randperm(len(train), generator=generator).tolist()
            indices.append(train[orders[epoch][place]])
        return indices

    def _accumulate(self, trained: list[str]) -> float:
        """Puts the gradients of the batch into the parameters of these groups; returns the loss, the mean over it."""
        self.optimizer.zero_grad(set_to_none=True)
        total, vectors = 0.0, []
        for indices in _chunks(self._indices(), self.chunk):
            losses, features = self._losses(indices)
            losses.sum().backward()
            total += float(losses.detach().double().sum())
            vectors.append(features)
        parameters = [parameter for name in trained for parameter in self.groups[name]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts = [g.flatten().cpu().double() for g in gradients]
        sums = torch.cat([*parts, torch.tensor([total], dtype=torch.float64)])
        sums = distributed.all_reduce_sum(_for_exchange(sums, self.device)).cpu() / self.options.batch
        self.optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what has no gradient
        sizes = [p.numel() for p in parameters]
        for parameter, gradient in zip(parameters, sums[:-1].split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter, copy=True)
        loss = float(sums[-1])
        if self.options.w_delta and "corrections" in trained:
            (corrections,) = self.groups["corrections"]
            loss += self.options.w_delta * float(corrections.detach().square().sum())
            corrections.grad += 2 * self.options.w_delta * corrections.detach()
        if self.distribution is not None:
            found = torch.cat(distributed.gather_objects(torch.cat(vectors).cpu())).to(self.device)
            if found.isfinite().all():
                self.distribution.push(found)
        return loss

    def _losses(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses [B] of these samples with gradients, and the features of the student's samples, detached."""
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
        """[B]: squared distance of the states between the ends to the teacher's, in units of the noise there."""
        sigmas = self.student.sigmas().detach()[1:-1]
        wanted = self.pairs.states_at(indices, sigmas)
        squared = (states[1:-1] - wanted).square().flatten(2).mean(dim=2)
        return (squared / sigmas.to(squared)[:, None] ** 2).sum(dim=0)

    def _update(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """An Adam step along the clipped gradients, and the average after it."""
        scale = min(1.0, self.options.clip / max(float(norm), 1e-30))
        for gradient in gradients:
            gradient.mul_(scale)
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
        """Judges the average on the pairs of validation, each process its part; keeps the best. Returns ``validation``."""
        loss, rms, vectors = measure(
            self.net, self.averaged, self.pairs, self.pairs.validation, self.pair_loss, self.chunk, self.distribution
        )
        if self.distribution is not None:
            loss += self.options.w_dist * float(energy_distance(vectors, self.distribution.bank))
            if self.distribution.queue is None:
                self.distribution.push(vectors)
        self.validation = (loss, rms)
        if loss < self.best["value"]:
            self.best = {"value": loss, "iteration": self.iteration, "state": _copy(self.averaged.state_dict())}
        return self.validation

    def best_student(self) -> SpanStudent:
        """The student whose validation was best."""
        student = copy.deepcopy(self.averaged)
        student.load_state_dict(self.best["state"])
        return student

    # Continuing

    def state(self) -> dict:
        """A copy of everything that the next iteration depends on."""
        return {
            "predictor": _copy(self.student.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "iteration": self.iteration,
            "student_config": copy.deepcopy(self.student.config),
            "averaged": _copy(self.averaged.state_dict()),
            "best": {**self.best, "state": _copy(self.best["state"])},
            "validation": self.validation,
            "first": self.first,
            "failures": self.failures,
            "latest": self._latest.clone(),
            "queue": None
            if self.distribution is None or self.distribution.queue is None
            else self.distribution.queue.cpu(),
        }

    def load_state(self, state: dict) -> None:
        self.student.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged.load_state_dict(state["averaged"])
        self.iteration, self.failures = state["iteration"], state["failures"]
        self.best, self.validation, self.first = state["best"], state["validation"], state["first"]
        self._latest = state["latest"].clone()
        if self.distribution is not None:
            self.distribution.queue = None if state["queue"] is None else state["queue"].to(self.device)


def _copy(state: dict) -> dict:
    return {name: value.detach().clone() for name, value in state.items()}


def _chunks(indices, size: int):
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def _for_exchange(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device that the processes exchange data with."""
    return tensor.to(device) if device.type == "cuda" else tensor


@torch.no_grad()
def measure(net, student, pairs: TeacherSet, indices, pair_loss, chunk: int, distribution=None) -> tuple:
    """(mean loss, mean of the root mean square distance, features or None) of a student on these pairs.

    Every process takes a part of the pairs, and all get the same result. Infinite where something is not finite.
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
    sums = distributed.all_reduce_sum(_for_exchange(sums, pairs.device)).cpu() / len(indices)
    found = None
    if distribution is not None:
        own = torch.cat(vectors) if vectors else torch.zeros(0, distribution.bank.shape[1])
        found = torch.cat(distributed.gather_objects(own)).to(pairs.device)
    loss, rms = (value if math.isfinite(value) else math.inf for value in sums.tolist())
    return loss, rms, found


# ----------------------------------------------------------------------------------------------------------------------
# The start


def head_sizes(net, options: FinalOptions) -> dict:
    """What the heads of a student have to know of the network."""
    if not options.head_names():
        return {}
    width = embedding_layer(net).out_features if "time" in options.head_names() else None
    return {"img_channels": net.img_channels, "embedding_width": width}


def rehearse(net, options: FinalOptions, ends: tuple, prompts, device, batch_gpu: int) -> None:
    """What needs the memory of an iteration, for one call of the network and without learning."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    student = options.make_student(*ends, **head_sizes(net, options), image_shape=shape)
    student.heads.to(device)
    latents, cond = draw_inputs(net, range(batch_gpu), prompts, device=device)
    x = student.run(net, latents, cond, checkpointing=options.checkpointing)
    PairLoss(options.loss, net, options.feature_sigma)(x, latents, cond).sum().backward()


def choose_start(
    net, options: FinalOptions, pairs: TeacherSet, ends: tuple, chunk: int, total: int, say
) -> SpanStudent:
    """The untrained student: of ``options.starts`` those are picked whose loss on the first init_pairs pairs is least, and
    of these the one that is best after a short training (``try_finalists``). total: iterations of the run; say(text): told
    the scores."""
    pair_loss = PairLoss(options.loss, net, options.feature_sigma)
    starts, indices = options.starts(), pairs.train[: options.init_pairs]
    gaussian = _data_gaussian(net, options, ends, pairs.prompts, chunk)
    results = []
    bar = progress_bar(len(starts), unit="start", disable=len(starts) == 1 or None, leave=False)
    for base, grid in starts:
        bar.update()
        more = {"image_shape": list(gaussian["mean"].shape)} if gaussian else {}
        more |= head_sizes(net, options)
        if base is not None:
            more["base"] = base
        if grid is not None:
            more["sigmas"] = grid_sigmas(grid, options.num_steps, *ends, net)
        try:
            student = options.make_student(*ends, **more)
        except UserError:
            if len(starts) == 1:
                raise
            continue  # two levels of this grid coincide, for example
        student.load_state_dict(gaussian, strict=False)
        student.heads.to(pairs.device)
        loss = measure(net, student, pairs, indices, pair_loss, chunk)[0] if len(starts) > 1 else 0.0
        results.append((loss, len(results), f"{base or 'preset'}@{grid or 'given'}", student))
    bar.close()
    if not results:
        raise UserError(f"--init={options.init}: none of its starts is possible with num_steps={options.num_steps}")
    results.sort(key=lambda result: result[:2])
    if not math.isfinite(results[0][0]):
        raise UserError("no start of the student has a finite loss: check the network, or --amp=none")
    if len(results) > 1:
        say("starts: " + ", ".join(f"{name} {loss:.4g}" for loss, _, name, _ in results))
    finalists = [(name, student) for loss, _, name, student in results[:FINALISTS] if math.isfinite(loss)]
    if len(finalists) == 1 or not options.init_trial:
        return finalists[0][1]
    return try_finalists(net, options, pairs, finalists, math.ceil(options.init_trial * total), say)


def try_finalists(net, options: FinalOptions, pairs: TeacherSet, finalists: list, iterations: int, say) -> SpanStudent:
    """The one of ``finalists``, (name, student) pairs, that is best in validation after so many iterations; untrained.

    Solvers that err alike before training may be far apart after it, and a few iterations show that.
    """
    short = replace(options, warmup=min(options.warmup, iterations // 4))
    results = []
    for name, student in finalists:
        trainer = FinalTrainer(net, copy.deepcopy(student), pairs, short, iterations, pairs.device)
        if trainer.distribution is None:  # which begins with features of the untrained student
            trainer.first = (math.nan, math.nan)  # else its validation is not needed
        try:
            for _ in range(iterations):
                trainer.iterate()
        except NotFinite:
            trainer.best["value"] = math.inf
        results.append((trainer.best["value"], len(results), name, student))
    results.sort(key=lambda result: result[:2])
    say(f"after {iterations} iterations: " + ", ".join(f"{name} {value:.4g}" for value, _, name, _ in results))
    return results[0][-1]


def _data_gaussian(net, options: FinalOptions, ends: tuple, prompts, batch: int) -> dict:
    """Mean and variance of the data for the student's first step, measured on one process; empty where it needs none."""
    student = options.make_student(*ends)
    if student.config["first_step"] != "gaussian":
        return {}

    def measured():
        make_cond = partial(draw_condition, net, prompts=prompts)
        student.measure_gaussian(net, batch=batch, make_cond=make_cond)
        return {name: student.state_dict()[name].cpu() for name in ("mean", "variance")}

    return on_main(measured)


# ----------------------------------------------------------------------------------------------------------------------
# The run


class FinalRun(Run):
    """The training of a span student in a folder."""

    columns = STATISTICS
    failures = (NotFinite,)

    def save_product(self, progress: dict) -> None:
        trainer = self.trainer
        values = {"first": trainer.first[0], "best": trainer.best["value"], "best_iteration": trainer.best["iteration"]}
        provenance = {**self.provenance, **progress, "validation": values}
        on_main(save_predictor, trainer.best_student(), self.product_path, provenance)

    def give_up(self, error: NotFinite) -> None:
        """Saves the last good state and the best student, and says what happened."""
        self.save_state()
        message = (
            f"no finite gradient in {PATIENCE} iterations in a row, up to iteration {self.trainer.iteration + 1} "
            f"({self.nimg / 1000:g} kimg); the last good state is kept in {self.folder}: check the network, or start "
            "again with smaller --lrs or --amp=none"
        )
        self.log.note(f"Error: {message}")
        raise UserError(message) from None

    def shown(self, latest: torch.Tensor) -> str:
        loss, (val, rms) = float(latest[0, 0]), self.trainer.validation  # validation is rare: not smoothed
        return f"loss {loss:.4g} val {val:.4g} (first {self.trainer.first[0]:.4g}) rms {rms:.4g}"

    def announce(self, net, device: torch.device, resume: bool) -> None:
        """Records the options, and says in a few lines what is going to happen."""
        self.record_options(device)
        options, trainer, world = self.options, self.trainer, distributed.world_size()
        config = trainer.student.config
        self.log.say(f"{'Continuing' if resume else 'Training'} in {self.folder}")
        self.log.say(
            f"span student ({options.preset}, base {config['base']}) taught by {options.sampler_tea} on "
            f"{options.dataset_name} ({Path(net.source_path).name}), {config['num_steps']} time stamps, "
            f"NFE {trainer.evaluations}, {_size(trainer.student)}"
        )
        self.log.say(f"noise levels {numbers(trainer.student.sigmas().detach())}; seed {options.seed}")
        self.log.say(
            f"loss {options.loss}, {options.pairs} pairs, batch {options.batch} ({trainer.chunk} per call, {world} "
            f"processes), {self.total} iterations, {device}"
        )
        if resume:
            self.log.say(f"from iteration {trainer.iteration} ({self.nimg / 1000:g} kimg)")


def train_student(options: FinalOptions | dict, device="cpu", run_dir=None, resume: bool = False) -> Path:
    """Trains a span student on final samples and returns its file, ``<folder>/predictor-<kimg>.safetensors``: the state
    that was best in validation.

    Arguments and errors as those of ``train_predictor``.
    """
    with ExitStack() as locks:
        return _train_student(options, device, run_dir, resume, locks)


def _train_student(options: FinalOptions | dict, device, run_dir, resume: bool, locks: ExitStack) -> Path:
    """The same; ``locks`` holds the folder."""
    device = torch.device(device)
    options = FinalOptions.from_dict(options) if isinstance(options, dict) else options
    options, net, prompts = prepare(options, device)
    options = options.resolved(net, prompts, device)
    ends = tuple(
        float(getattr(net, name) if getattr(options, name) is None else getattr(options, name))
        for name in ("sigma_min", "sigma_max")
    )
    if options.sigmas is not None:
        ends = (options.sigmas[-1], options.sigmas[0])
    options.make_student(*ends)  # says what is wrong with the noise levels
    own_place = run_dir is not None or options.nosubdir  # before the work: is it free?
    folder = locks.enter_context(working_folder(options, net, run_dir, resume)) if own_place else None
    state = on_main(newest_state, run_dir) if resume else None  # None: it was killed before the first one
    if state is not None:
        check_state(options, state, net, run_dir)
    if options.batch_gpu == AUTO:
        share = options.batch // distributed.world_size()
        options.batch_gpu = fitting_batch_gpu(partial(rehearse, net, options, ends, prompts, device), share, device)
    pairs = _pairs(net, options, ends, prompts, device, run_dir if resume else None)
    chunk = min(options.batch_gpu or options.batch, options.batch // distributed.world_size())
    total = math.ceil(options.total_kimg * 1000 / options.batch - 1e-9)
    lines: list[str] = []
    if state is None:
        with explained_oom(device, f"lower --batch-gpu (now {chunk})"):
            student = choose_start(net, options, pairs, ends, chunk, max(1, total), lines.append)
    else:
        student = _student_of(state, run_dir)
    trainer = FinalTrainer(net, student, pairs, options, max(1, total), device)
    names = ("seed", "batch", "amp", "objective", "loss", "sampler_tea", "num_steps_tea", "pairs")
    provenance = provenance_of(net, options, names)
    elapsed = 0.0
    if state is not None:
        elapsed = restore(trainer, options, state, net, run_dir)
    if folder is None:
        folder = locks.enter_context(working_folder(options, net, run_dir))
    run = FinalRun(trainer, options, folder, provenance, elapsed)
    trainer.report = run.log.say
    if resume:
        run.tidy()
    run.announce(net, device, resume)
    for line in lines:
        run.log.say(line)
    path = run.carry_out()
    first, best = trainer.first[0], trainer.best
    run.log.say(f"validation {first:.4g} before, {best['value']:.4g} in the best state (iteration {best['iteration']})")
    return path


def _pairs(net, options: FinalOptions, ends, prompts, device, run_dir=None) -> TeacherSet:
    """The teacher pairs. run_dir: folder of a run that is continued; a set that lies beside it is read."""
    settings = options.teacher(*ends)
    more = {name: getattr(options, name) for name in ("guidance_type", "guidance_rate", "amp")}
    if options.prompt_path is not None:
        more["prompts_sha256"] = sha256_of(options.prompt_path)
    path = options.teacher_set
    if path is None:
        places = [options.outdir, *([] if run_dir is None else [Path(run_dir).parent])]
        files = [file_of(Path(place) / "teacher-sets", identity_of(net, settings, more)) for place in places]
        path = next((file for file in files if file.is_file()), files[0])
    batch = options.batch_gpu or max(options.batch // distributed.world_size(), 1)
    return teacher_set(
        net, settings, path, more=more, prompts=prompts, batch=batch, device=device, log=distributed.print0
    )


def _student_of(state: dict, folder) -> SpanStudent:
    """The student of a training state, before its parameters are put back."""
    try:
        student = SpanStudent(**state["student_config"])
        student.load_state_dict(state["predictor"])
    except (TypeError, ValueError, ArithmeticError, KeyError, RuntimeError) as error:
        raise UserError(f"the training state in {folder} is not that of a span student ({str(error)[:120]})") from None
    return student


def _size(student: SpanStudent) -> str:
    heads = sum(parameter.numel() for parameter in student.head_parameters())
    return f"{student.scalars()} scalars" + (f" and {heads} weights of heads" if heads else "")
