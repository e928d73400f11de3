"""The start and the settings of a span solver, chosen by trials.

``choose_start`` chooses among the starts of ``--init``, by the loss. ``Search`` (``--minutes``)
also chooses learning rates, heads, loss and numbers of samples, within a given time and by
``SampleScore``, which does not depend on the loss. Both measure untrained candidates first and
train the best ones for a short time.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from models.denoiser import member, shifted_layers
from models.inputs import draw_condition, draw_inputs
from solvers.solver import make_solver
from solvers.span_heads import SHIFTS
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.progress import progress_bar
from training.options import DEFAULT_LOSS, SpanOptions, Start, grid_sigmas, has_features, parse_start
from training.sample_loss import PairLoss, SampleScore
from training.span_trainer import SpanTrainer, measure
from training.teacher import TeacherSet
from training.trainer import NotFinite

FINALISTS = 3  # starts that are trained briefly before one is chosen

# Candidates


@dataclass(eq=False)
class Candidate:
    """A start with settings.

    options: with this start alone.
    student: the untrained solver.
    value: loss or score of the latest trial; infinite if it failed.
    trainer: of the trials so far. None: not trained yet.
    values: of all trials.
    seconds: spent in trials.
    axis: the key of ``AXES`` in which it differs from the first candidate; "" for the first, None
        for one that differs in several.
    """

    options: SpanOptions
    student: SpanSolver
    value: float = math.inf
    trainer: SpanTrainer | None = None
    values: list[float] = field(default_factory=list)
    seconds: float = 0.0
    axis: str | None = ""

    @property
    def start(self) -> Start:
        return self.options.starts()[0]

    @property
    def name(self) -> str:
        return f"{self.start}{', no analytical step' if self.options.afs is False else ''}"


def head_sizes(net, options: SpanOptions) -> dict:
    """The sizes of the heads that depend on the network."""
    heads, width = options.head_names(), None
    if not heads:
        return {}
    if set(heads) & set(SHIFTS):
        width = sum(layer.out_features for layer in shifted_layers(net, "blocks" in heads))
    return {"img_channels": net.img_channels, "embedding_width": width}


def data_gaussian(net, options: SpanOptions, ends: tuple, prompts, batch: int, calls: int = 256) -> dict:
    """Mean and variance of the data for the first step, measured by one process; {}: not needed."""
    student = options.make_student(*ends)
    if student.config["first_step"] != "gaussian":
        return {}

    def measured():
        make_cond = partial(draw_condition, net, prompts=prompts)
        student.measure_gaussian(net, calls, batch=batch, make_cond=make_cond)
        return {name: student.state_dict()[name].cpu() for name in ("mean", "variance")}

    return on_main(measured)


def untrained(net, options: SpanOptions, ends: tuple, gaussian: dict, device) -> list[Candidate]:
    """A candidate for each of ``options.starts`` that is possible.

    gaussian: see ``data_gaussian``; ignored by students without such a first step.

    Raises UserError if the only one is impossible.
    """
    starts, found = options.starts(), []
    for start in starts:
        more = head_sizes(net, options)
        more |= {"base": start.base} if start.base is not None else {}
        more |= {"max_order": start.order} if start.order is not None else {}
        if start.grid is not None:
            more["sigmas"] = grid_sigmas(start.grid, options.num_steps, *ends, net)
        try:
            student = options.make_student(*ends, **more)
            if student.config["first_step"] == "gaussian":
                student = options.make_student(*ends, **more, image_shape=list(gaussian["mean"].shape))
                student.load_state_dict(gaussian, strict=False)
        except UserError:
            if len(starts) == 1:
                raise
            continue  # for example, two levels of this grid coincide
        student.heads.to(device)
        own = replace(options, init=start.init) if len(starts) > 1 else options
        found.append(Candidate(own, student))
    return found


def choose_start(net, options: SpanOptions, pairs: TeacherSet, ends: tuple, chunk: int, total: int, say) -> SpanSolver:
    """The untrained solver to start from.

    Picks the ``options.starts`` with the least loss on the first init_pairs pairs, and of these the
    one that is best after a short training (``try_finalists``).

    total: iterations of the run.
    say: function that receives the scores as text.
    """
    pair_loss = PairLoss(options.loss, net, options.feature_sigma)
    gaussian = data_gaussian(net, options, ends, pairs.prompts, chunk)
    found = untrained(net, options, ends, gaussian, pairs.device)
    if not found:
        raise UserError(f"--init={options.init}: none of its starts is possible with num_steps={options.num_steps}")
    if len(options.starts()) == 1:
        return found[0].student
    _measure(net, found, pairs, pairs.train[: options.init_pairs], pair_loss, chunk)
    if not math.isfinite(found[0].value):
        raise UserError("no start of the student has a finite loss: check the network, or --amp=none")
    if len(found) > 1:
        say("starts: " + ", ".join(f"{one.name} {one.value:.4g}" for one in found))
    finalists = [one for one in found[:FINALISTS] if math.isfinite(one.value)]
    if len(finalists) == 1 or not options.init_trial:
        return finalists[0].student
    return try_finalists(net, options, pairs, finalists, math.ceil(options.init_trial * total), say)


def _measure(net, candidates: list[Candidate], pairs: TeacherSet, indices, by, chunk: int) -> None:
    """Measures untrained candidates on these pairs, and sorts them, the best first."""
    bar = progress_bar(len(candidates), unit="start", leave=False)
    for one in candidates:
        one.value = measure(net, one.student, pairs, indices, by, chunk)[0]
        bar.update()
    bar.close()
    candidates.sort(key=lambda one: one.value)


def try_finalists(net, options: SpanOptions, pairs: TeacherSet, finalists: list, iterations: int, say) -> SpanSolver:
    """The untrained start that is best in validation after a short training.

    finalists: list of ``Candidate``.
    iterations: length of the training.

    Solvers with equal errors before training may differ much after it, and a few iterations show
    this.
    """
    short = replace(options, warmup=min(options.warmup, iterations // 4))
    for one in finalists:
        trainer = SpanTrainer(net, copy.deepcopy(one.student), pairs, short, iterations, pairs.device)
        if trainer.distribution is None:  # it would need features of the untrained solver
            trainer.first = (math.nan, math.nan)  # skips the first validation
        finished = _train(trainer, lambda trainer=trainer: trainer.iteration == iterations)
        one.value = trainer.best["value"] if finished else math.inf
    finalists = sorted(finalists, key=lambda one: one.value)
    say(f"after {iterations} iterations: " + ", ".join(f"{one.name} {one.value:.4g}" for one in finalists))
    return finalists[0].student


def _train(trainer: SpanTrainer, done: Callable[[], bool]) -> bool:
    """Trains until ``done``. Returns whether the gradients were finite."""
    try:
        while not done():
            trainer.iterate()
    except NotFinite:
        return False
    return True


# Time


class Clock:
    """The time of a run, that of the first process on all.

    minutes: that the run may take.
    spent: seconds of its earlier parts. Default 0.
    """

    def __init__(self, minutes: float, spent: float = 0.0):
        self.limit, self.spent, self.start = 60.0 * minutes, spent, time.monotonic()

    def elapsed(self) -> float:
        """Seconds so far, with the earlier parts."""
        return distributed.broadcast_object(self.spent + time.monotonic() - self.start)

    def left(self) -> float:
        return self.limit - self.elapsed()


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured; of all processes together, which share the work.

    call: of one image through the network, without gradient.
    iteration: of a training iteration, by the number of samples.
    """

    call: float
    iteration: dict[int, float]


BATCHES = (8, 16, 32)
ENOUGH_ITERATIONS = 250  # from here on, larger batches are better than more iterations
LEAST_ITERATIONS = 10
TRIAL_ITERATIONS = 8  # the least in the first round of trials
ROUNDS = 3
SCORE_CALLS = 1  # a score costs as much as this number of network calls, at most
RESERVE = 0.06  # share of the time for what is not planned
SHARES = {"pairs": 0.37, "validation": 0.05, "screening": 0.07, "trials": 0.24}  # the rest is the last training
GAUSSIAN_CALLS = (16, 256)  # network calls for the mean and variance of the first step, least and most
VALIDATION = (8, 128)  # pairs for validation, least and most
MOST_PAIRS, MOST_BYTES = 4096, 1 << 30
SCREENED = (4, 16)  # pairs on which all plain solvers are measured, least and most
LEAST_STARTS = 12  # plain solvers that are measured, at least
BEST_PLAIN = (4, 12)  # plain solvers that are measured on all pairs for validation, least and most
WITHOUT_FIRST = 4  # plain solvers that are also measured without analytical first step
TRIAL_PAIRS = 24  # pairs for the validation in trials, at most
CANDIDATES = (8, 7, 6, 5, 4, 3, 2)


def batches(world: int) -> list[int]:
    """The numbers of samples per iteration to choose from. world: number of processes."""
    return sorted({max(1, round(batch / world)) * world for batch in BATCHES})


@dataclass(frozen=True)
class Plan:
    """What a run does within its time.

    batch, pairs, val_pairs, val_every: options of the run.
    gaussian: network calls for the mean and variance of the first step.
    starts: number of plain solvers to measure.
    screened: number of pairs on which all of them are measured.
    best: number of the best ones, which are measured on all pairs for validation.
    candidates: number of candidates to train in the first round of trials; 1: no trials.
    trial: seconds of training of each candidate in the first round.
    iterations: of the last training, about.
    pace: seconds of an iteration.
    seconds: by part: "teacher pairs", "plain solvers", "trials", "training".
    """

    batch: int
    pairs: int
    val_pairs: int
    val_every: int
    gaussian: int
    starts: int
    screened: int
    best: int
    candidates: int
    trial: float
    iterations: int
    pace: float
    seconds: dict[str, float]


def trial_units(candidates: int) -> tuple[int, int]:
    """(seconds of training, validations) of all trials if each trains one second in round one.

    Every round doubles the time that a candidate has been trained. The better half goes on. In the
    second round there is one more candidate, with the best choices together.
    """
    units, validations, number, together = 0, 0, candidates, 0
    for round in range(ROUNDS):
        length = 2**round
        units += number * (length - length // 2) + together * length
        validations += number + together
        number = math.ceil((number + together) / 2)
        together = int(round == 0 and candidates > 3)
        if number + together < 2:
            break
    return units, validations


def make_plan(
    left: float, costs: Costs, options: SpanOptions, calls: int, teacher_calls: int, starts: int, size: int
) -> Plan:
    """The plan for the time that is left.

    left: seconds.
    costs: as measured, for each batch to choose from.
    options: those not in ``to_choose`` are kept.
    calls, teacher_calls: network calls of the student and of the teacher, for one image.
    starts: number of plain solvers that could be measured.
    size: bytes of one image.

    Raises UserError if the time is too short, which says how long it has to be.
    """
    open, total = options.to_choose(), left * (1 - RESERVE)
    pair, scored = teacher_calls * costs.call, (calls + SCORE_CALLS) * costs.call

    def chosen(name: str, value: float, least: int, most: int) -> int:
        return max(least, min(most, int(value))) if name in open else getattr(options, name)

    batches = [
        b for b in sorted(costs.iteration, reverse=True) if 0.5 * total >= ENOUGH_ITERATIONS * costs.iteration[b]
    ]
    batch = batches[0] if batches else min(costs.iteration)
    iteration = costs.iteration[batch]

    def make(least: bool) -> Plan:
        """The plan with all parts, or with the least of each."""
        time = 0.0 if least else total
        val_pairs = chosen("val_pairs", SHARES["validation"] * time / pair, *VALIDATION)
        rest = SHARES["pairs"] * time - val_pairs * pair
        pairs = chosen("pairs", rest / pair, 2 * batch, max(2 * batch, min(MOST_PAIRS, MOST_BYTES // size)))
        gaussian = max(GAUSSIAN_CALLS[0], min(GAUSSIAN_CALLS[1], int(0.05 * time / costs.call)))
        screening = SHARES["screening"] * time
        screened = min(SCREENED[0], val_pairs)
        number = max(min(LEAST_STARTS, starts), min(starts, int(0.5 * screening / (screened * scored))))
        screened = min(val_pairs, SCREENED[1], max(screened, int(0.5 * screening / (number * scored))))
        best = min(number, BEST_PLAIN[1], max(BEST_PLAIN[0], int(0.5 * screening / (val_pairs * scored))))
        measured = (number + WITHOUT_FIRST * ("afs" in open)) * screened + best * val_pairs
        seconds = {
            "teacher pairs": (pairs + val_pairs) * pair,
            "plain solvers": gaussian * costs.call + measured * scored,
        }
        candidates, trial = 1, 0.0
        for count in () if least else CANDIDATES:
            units, validations = trial_units(count)
            length = (SHARES["trials"] * time - validations * min(val_pairs, TRIAL_PAIRS) * scored) / units
            if length >= TRIAL_ITERATIONS * iteration:
                candidates, trial, seconds["trials"] = count, length, SHARES["trials"] * time
                break
        val_every = max(LEAST_ITERATIONS, math.ceil(10 * val_pairs * scored / iteration))
        val_every = val_every if "val_every" in open else options.val_every
        seconds["training"] = training = max(total - sum(seconds.values()), 0.0)
        each = iteration + val_pairs * scored / val_every
        iterations = int(training / each)
        return Plan(
            **{"batch": batch, "pairs": pairs, "val_pairs": val_pairs, "val_every": min(val_every, max(1, iterations))},
            **{"gaussian": gaussian, "starts": number, "screened": screened, "best": best},
            **{
                "candidates": candidates,
                "trial": trial,
                "iterations": iterations,
                "pace": iteration,
                "seconds": seconds,
            },
        )

    for least in (False, True):
        plan = make(least)
        if plan.iterations >= LEAST_ITERATIONS:
            return plan
    needed = sum(plan.seconds.values()) - plan.seconds["training"]
    needed += LEAST_ITERATIONS * iteration + plan.val_pairs * scored
    needed = (needed / (1 - RESERVE) + 60 * options.minutes - left) / 60
    raise UserError(
        f"minutes={options.minutes:g} is too short: a teacher pair takes {pair:.2g} s here and an iteration of {batch} "
        f"samples {iteration:.2g} s, so that {plan.pairs + plan.val_pairs} pairs and {LEAST_ITERATIONS} iterations need "
        f"{_rounded_up(needed)} minutes in all"
    )


def _rounded_up(value: float) -> str:
    """A number above ``value`` with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(1.1 * value / unit) * unit:.6g}"


def _unmeasured(net, options: SpanOptions, ends: tuple, device) -> SpanSolver:
    """A student for measurements of time and memory, with the mean zero."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    student = options.make_student(*ends, **head_sizes(net, options), image_shape=shape)
    student.heads.to(device)
    return student


def probe(net, options: SpanOptions, ends: tuple, prompts, device, batch_gpu: int) -> float:
    """Makes an iteration for one network call, without learning. Returns once it is finished."""
    student = _unmeasured(net, options, ends, device)
    latents, cond = draw_inputs(net, range(batch_gpu), prompts, device=device)
    x = student.run(net, latents, cond, checkpointing=options.checkpointing)
    PairLoss(options.loss, net, options.feature_sigma)(x, latents, cond).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return sum(float(gradient.sum()) for gradient in gradients)


def measure_costs(
    net, options: SpanOptions, ends: tuple, prompts, device, batches: Iterable[int], clock: Clock
) -> Costs:
    """The costs of this network here. batches: numbers of samples to choose from.

    Raises UserError if this alone takes longer than the time of the run.
    """
    world, iteration, call = distributed.world_size(), {}, 0.0

    def seconds(work) -> float:
        """Mean duration on the slowest process, after a first call."""
        work()
        begin, count = time.monotonic(), 0
        if clock.left() < 0:
            raise UserError(
                f"minutes={options.minutes:g} is too short: the first iteration ends only after {clock.elapsed():.0f} s"
            )
        while count < 3 and (count == 0 or time.monotonic() - begin < 0.005 * clock.limit):
            work()
            count += 1
        return max(distributed.gather_objects((time.monotonic() - begin) / count))

    for batch in sorted(batches):
        if iteration and min(iteration.values()) * ENOUGH_ITERATIONS > 0.5 * clock.limit:
            break  # the smallest will be chosen
        share = batch // world
        chunk = math.gcd(options.batch_gpu or share, share)
        iteration[batch] = seconds(lambda n=chunk: probe(net, options, ends, prompts, device, n)) * share / chunk
        if not call:
            student = _unmeasured(net, options, ends, device)
            inputs = draw_inputs(net, range(chunk), prompts, device=device)
            with torch.no_grad():
                once = seconds(lambda s=student, at=inputs: float(s.run(net, *at).sum()))
            call = once / (chunk * world * max(student.evaluations(), 1))
    return Costs(call, iteration)


# Choices

PLAIN_BASES = ("ipndm:4", "dpmpp:3", "ab:3", "unipc:3", "deis:3", "dpmpp:2", "ipndm:3", "euler")
PLAIN_GRIDS = ("polynomial:7", "polynomial:4", "time_uniform:1", "logsnr", "polynomial:5", "time_uniform:2")
RATE_FACTORS = (2.0, 0.5)
# What candidates differ in, and the options of each choice.
AXES = {"start": ("init", "afs", "num_steps"), "rates": ("lr_factor",), "heads": ("heads",), "loss": ("loss",)}
STATE_FILE = "search-state.pt"


def _best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The first candidate of each base, up to ``FINALISTS``."""
    found: dict[str | None, Candidate] = {}
    for one in candidates:
        found.setdefault(one.start.base, one)
    return list(found.values())[:FINALISTS]


class Search:
    """The settings of a run with ``minutes``: a plan of its time, plain solvers, and trials.

    net, options, ends, prompts, device: of the run; ends is (sigma_min, sigma_max).
    clock: the ``Clock`` of the run.

    Attributes: ``options``, which ``make_plan`` and ``finish`` change; ``plan``; ``plain``, the
    best plain solvers, the best first; ``contenders``, the candidates in the trials, the best
    first; ``finished``, those that left them.
    """

    def __init__(self, net, options: SpanOptions, ends: tuple, prompts, device, clock: Clock):
        self.net, self.ends, self.prompts, self.device, self.clock = net, ends, prompts, device, clock
        self.open, self.calls = options.to_choose(), options.calls
        self.options = replace(options, open=sorted(self.open))
        self.by_features = has_features(net, options.feature_sigma, prompts, device)
        self.score = SampleScore(net, self.by_features)
        self.gaussian: dict = {}
        self.plain: list[Candidate] = []
        self.own: list[Candidate] = []  # untrained starts, if the options name them
        self.contenders: list[Candidate] = []
        self.finished: list[Candidate] = []
        self.round = 0  # rounds of trials that are finished

    # The plan

    def batches(self) -> list[int]:
        """Numbers of samples per iteration to choose from."""
        if "batch" not in self.open:
            return [self.options.batch]
        found, pairs = batches(distributed.world_size()), self.options.pairs
        return [batch for batch in found if "pairs" in self.open or batch <= pairs] or found[:1]

    def make_plan(self) -> None:
        """Measures the costs and plans. UserError if the time is too short."""
        options, net = self.options, self.net
        costs = measure_costs(net, options, self.ends, self.prompts, self.device, self.batches(), self.clock)
        teacher = make_solver(options.sampler_tea, {}).evaluations(options.num_steps_tea - 1)
        size, starts = 4 * net.img_channels * net.img_resolution**2, len(self._plain_starts())
        plan = make_plan(self.clock.left(), costs, options, self.calls, teacher, starts, size)
        self._take(distributed.broadcast_object(plan))

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        names = ("batch", "pairs", "val_pairs", "val_every")
        more = {"total_kimg": max(plan.iterations, 1) * plan.batch / 1000}
        if self.options.batch_gpu is not None:
            more["batch_gpu"] = math.gcd(self.options.batch_gpu, plan.batch // distributed.world_size())
        self.options = replace(self.options, **{name: getattr(plan, name) for name in names}, **more)

    def describe_plan(self) -> str:
        plan = self.plan
        notes = {
            "teacher pairs": f"{plan.pairs} for training, {plan.val_pairs} for validation",
            "plain solvers": f"{plan.starts}",
            "trials": f"{plan.candidates} candidates",
            "training": f"batch {plan.batch}",
        }
        shown = "; ".join(f"{name} {seconds:.0f} s ({notes[name]})" for name, seconds in plan.seconds.items())
        return f"plan for {self.options.minutes:g} minutes: {shown}"

    # Plain solvers

    def _plain_starts(self) -> list[Start]:
        """In an order whose first ones, for a short time, have different solvers and schedules."""
        grids = [*PLAIN_GRIDS, *(["discrete:1"] if hasattr(self.net, "sigma_inv") else [])]
        pairs = [(i + j, j, f"{base}@{grid}") for i, base in enumerate(PLAIN_BASES) for j, grid in enumerate(grids)]
        return [parse_start(text) for _, _, text in sorted(pairs)]

    def _named_starts(self) -> bool:
        """Whether the training starts as the options say, not from the best plain solvers."""
        fixed = self.options.sigmas is not None or self.options.schedule_type is not None
        return (
            "init" not in self.open or fixed or self.options.preset != "full" or self.options.parallel not in (None, 1)
        )

    def _plain_options(self, start: Start, first: bool) -> SpanOptions:
        """The options of a plain solver as a table, with the evaluations of the student.

        first: with analytical first step.
        """
        changes = {"preset": "full", "heads": "none", "lrs": "", "phases": None, "num_steps": self.calls + 1 + first}
        changes |= dict.fromkeys(("parallel", "sigma_scale_bound", "sigmas", "schedule_type", "schedule_rho"))
        afs = (self.options.afs or None) if first else False
        return replace(self.options, **changes, init=start.init, afs=afs)

    def _plain(self, starts: list[Start], first: bool) -> list[Candidate]:
        """The plain solvers that are possible, each table once."""
        found, seen = [], set()
        for start in starts:
            try:
                (one,) = untrained(self.net, self._plain_options(start, first), self.ends, self.gaussian, self.device)
            except UserError:
                continue  # for example, two levels of this grid coincide
            plan = one.student.plan()
            numbers = torch.cat([plan.sigmas, *(c for c, _, _ in plan.steps)]).tolist()
            key = tuple(round(number, 9) for number in numbers)
            if key not in seen:
                seen.add(key)
                found.append(one)
        return found

    def screen(self, pairs: TeacherSet) -> None:
        """Measures plain solvers, and the starts of the options if the training begins there.

        All plain solvers are measured on a few pairs, the best ones on all pairs for validation.
        """
        plan, chunk, first = self.plan, self._chunk(), self.options.afs is not False
        few = pairs.validation[: plan.screened]
        for options in (self._plain_options(parse_start("euler"), first), self.options):
            if not self.gaussian:
                self.gaussian = data_gaussian(self.net, options, self.ends, self.prompts, chunk, plan.gaussian)
        found = self._plain(self._plain_starts()[: plan.starts], first)
        _measure(self.net, found, pairs, few, self.score, chunk)
        if first and "afs" in self.open:
            more = self._plain([one.start for one in found[:WITHOUT_FIRST]], False)
            _measure(self.net, more, pairs, few, self.score, chunk)
            found = sorted([*found, *more], key=lambda one: one.value)
        others = _best_of_each(found)  # starts of the trials
        self.plain = [*found[: plan.best], *(one for one in others if one not in found[: plan.best])]
        if self._named_starts():
            self.own = untrained(self.net, self.options, self.ends, self.gaussian, self.device)
        for some in (self.plain, self.own):
            _measure(self.net, some, pairs, pairs.validation, self.score, chunk)
        if not math.isfinite(min(one.value for one in [*self.plain, *self.own])):
            raise UserError("no solver makes finite images: check the network, or --amp=none")

    def _chunk(self) -> int:
        share = self.options.batch // distributed.world_size()
        return min(self.options.batch_gpu or share, share)

    # Trials

    def settings(self, one: Candidate) -> dict[str, str]:
        """The settings of a candidate as text, by axis."""
        heads = ",".join(one.options.head_names()) or "none"
        return {"start": one.name, "rates": f"x{one.options.lr_factor:g}", "heads": heads, "loss": one.options.loss}

    def _candidates(self) -> list[Candidate]:
        """The candidates of the first round: the best start, other starts, and single changes."""
        starts = self.own[:FINALISTS] if self._named_starts() else _best_of_each(self.plain)
        starts = [one for one in starts if math.isfinite(one.value)]
        changes: dict[str, list[dict]] = dict.fromkeys(AXES, [])
        begun = [{name: getattr(one.options, name) for name in AXES["start"]} for one in starts]
        changes["start"] = begun[1:]
        if {"lrs", "lr_factor"} <= self.open:
            changes["rates"] = [{"lr_factor": factor} for factor in RATE_FACTORS]
        if "heads" in self.open and self.options.head_names():
            changes["heads"] = [{"heads": ",".join(names) or "none"} for names in self._other_heads()]
        if "loss" in self.open and self.by_features:
            changes["loss"] = [{"loss": loss} for loss in (DEFAULT_LOSS, "huber") if loss != self.options.loss]
        found = [self._candidate(begun[0], "")]
        for turn in range(max(map(len, changes.values()))):
            for axis in AXES:
                if turn < len(changes[axis]):
                    found.append(self._candidate(begun[0] | changes[axis][turn], axis))
        return found[: self.plan.candidates]

    def _other_heads(self) -> list[list[str]]:
        """Lists of heads to try instead of the default."""
        usual = self.options.head_names()
        fewer = [[], *([name] for name in usual if len(usual) > 1)]
        if "time" in usual and member(self.net, "block_layers"):
            return [["blocks" if name == "time" else name for name in usual], *fewer]
        return fewer

    def _candidate(self, changes: dict, axis: str | None) -> Candidate:
        options = replace(self.options, **changes)
        (one,) = untrained(self.net, options, self.ends, self.gaussian, self.device)
        one.axis = axis
        return one

    def trials(self, pairs: TeacherSet, save: Callable[[], None]) -> None:
        """Trains candidates for a short time, then the better half of them for longer, and so on.

        save: called after each round.
        """
        if not self.contenders:
            self.contenders = self._candidates()
        while len(self.contenders) > 1 and self.round < ROUNDS:
            with progress_bar(len(self.contenders), unit="candidate", desc="trials", leave=False) as bar:
                for one in self.contenders:
                    self._try(one, pairs, self.plan.trial * 2**self.round)
                    bar.update()
            self.contenders.sort(key=lambda one: one.value)
            self.round += 1
            kept = math.ceil(len(self.contenders) / 2) if self.round < ROUNDS else 1
            together = self._together() if self.round == 1 and len(self.contenders) > 3 else []
            self.finished = [*self.contenders[kept:], *self.finished]
            self.contenders = [*self.contenders[:kept], *together]
            save()

    def _try(self, one: Candidate, pairs: TeacherSet, length: float) -> None:
        """Trains a candidate until it has had ``length`` seconds, and validates it.

        The rates decay within every round, as a longer training would end: without that, large
        rates look worse than they are.
        """
        failed = bool(one.values) and not math.isfinite(one.value)
        one.value = math.inf
        if not failed:
            trainer = self._trainer(one, pairs)
            first, before, begin = trainer.iteration, one.seconds, self.clock.elapsed() - one.seconds
            trainer.hold = first

            def done() -> bool:
                one.seconds, made = self.clock.elapsed() - begin, trainer.iteration - first
                pace = (one.seconds - before) / made if made else self.plan.pace
                left = max(round((length - one.seconds) / pace), 0)
                trainer.total = trainer.iteration + left + 1  # one more, since it validates at the end
                return made > 0 and left == 0

            if _train(trainer, done):
                few = pairs.validation[: min(self.plan.val_pairs, TRIAL_PAIRS)]
                one.value = measure(self.net, trainer.averaged, pairs, few, self.score, trainer.chunk)[0]
        one.values.append(one.value)

    def _trainer(self, one: Candidate, pairs: TeacherSet) -> SpanTrainer:
        """The trainer of a candidate, which goes on from round to round."""
        if one.trainer is None:
            options = replace(one.options, warmup=min(one.options.warmup, TRIAL_ITERATIONS // 2), val_every=1 << 30)
            total = max(self.plan.iterations, 1)
            student = copy.deepcopy(one.student)
            trainer = one.trainer = SpanTrainer(self.net, student, pairs, options, total, self.device, self.score)
            if trainer.distribution is not None:
                trainer.validate()  # its queue needs features
            trainer.first = (math.nan, math.nan)
        return one.trainer

    def _together(self) -> list[Candidate]:
        """The candidate with the best choice of each axis, unless it has been tried."""
        best = {axis: min((o for o in self.contenders if o.axis in ("", axis)), key=lambda o: o.value) for axis in AXES}
        if sum(one.axis == axis for axis, one in best.items()) < 2:
            return []
        changes = {name: getattr(best[axis].options, name) for axis, names in AXES.items() for name in names}
        return [self._candidate(changes, None)]

    def finish(self, pairs: TeacherSet) -> SpanTrainer:
        """The trainer of the best candidate, for the rest of the time. Sets ``options``."""
        (one,) = self.contenders
        trainer = self._trainer(one, pairs)
        trainer.first = measure(self.net, one.student, pairs, pairs.validation, self.score, trainer.chunk)[:2]
        trainer.best = {"value": trainer.first[0], "iteration": 0, "state": copy.deepcopy(one.student.state_dict())}
        begin = self.clock.elapsed()
        trainer.validate()
        validation = self.clock.elapsed() - begin
        pace = (
            one.seconds / trainer.iteration
            if trainer.iteration
            else self.plan.seconds["training"] / self.plan.iterations
        )
        each = pace + validation / self.plan.val_every
        more = max(int((self.clock.left() - RESERVE / 2 * self.clock.limit) / each), 1)
        trainer.hold, trainer.total = trainer.iteration, trainer.iteration + more
        kimg = trainer.total * self.options.batch / 1000
        self.options = replace(one.options, warmup=trainer.options.warmup, total_kimg=kimg)
        trainer.options = self.options
        return trainer

    # Words

    def table(self) -> list[str]:
        """The candidates with their scores, as lines of text."""
        found = [*self.contenders, *self.finished]
        found.sort(key=lambda one: (-len(one.values), one.value))
        rows = [[*self.settings(one).values(), *(f"{value:.4g}" for value in one.values)] for one in found]
        count = max(len(one.values) for one in found)
        head = [*AXES, *(f"{self.plan.trial * 2**k:.3g} s" for k in range(count))]
        rows = [head, *([*row, *[""] * (len(head) - len(row))] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def why(self) -> str:
        """Why the settings were chosen."""
        (one,), chosen = self.contenders, self.settings(self.contenders[0])
        text = ", ".join(f"{axis} {value}" for axis, value in chosen.items())
        if not one.values:
            return f"{text}: the best plain solver as start, with the defaults; there is no time for trials"
        rivals = [other for other in self.finished if len(other.values) == len(one.values)]
        second = f"; the next {min(rivals, key=lambda o: o.value).value:.4g}" if rivals else ""
        return f"{text}: score {one.value:.4g} after {one.seconds:.3g} s of training{second}"

    def record(self) -> dict:
        """The decisions, for the result's file: JSON values."""
        trials = [
            {**self.settings(one), "scores": one.values, "seconds": round(one.seconds, 2)}
            for one in [*self.contenders, *self.finished]
        ]
        score = "geometric mean of root mean square and feature distance" if self.by_features else "root mean square"
        return {
            "minutes": self.options.minutes,
            "chosen_by": f"{score} to the teacher's samples, {self.plan.val_pairs} pairs",
            "left_open": sorted(self.open),
            "plan": asdict(self.plan),
            "plain": {one.name: one.value for one in self.plain},
            "trials": trials,
            "chosen": self.settings(self.contenders[0]),
            "why": self.why(),
        }

    # Resuming

    def state(self) -> dict:
        """Everything that the rest of the search depends on."""
        changed = sorted({name for names in AXES.values() for name in names})

        def pack(one: Candidate) -> dict:
            own = {name: getattr(one.options, name) for name in changed}
            trainer = None if one.trainer is None else one.trainer.state()
            return {"options": own, "trainer": trainer} | {
                n: getattr(one, n) for n in ("axis", "value", "values", "seconds")
            }

        lists = {
            name: [pack(one) for one in getattr(self, name)] for name in ("plain", "own", "contenders", "finished")
        }
        return {
            "plan": asdict(self.plan),
            "gaussian": self.gaussian,
            "round": self.round,
            "elapsed": self.clock.elapsed(),
        } | lists

    def load_plan(self, state: dict) -> None:
        self._take(Plan(**state["plan"]))

    def load_state(self, state: dict, pairs: TeacherSet) -> None:
        """Restores a ``state`` after its plan."""
        self.gaussian, self.round = state["gaussian"], state["round"]

        def unpack(saved: dict, options: SpanOptions) -> Candidate:
            (one,) = untrained(self.net, replace(options, **saved["options"]), self.ends, self.gaussian, self.device)
            one.axis, one.value, one.values, one.seconds = (saved[n] for n in ("axis", "value", "values", "seconds"))
            if saved["trainer"] is not None:
                self._trainer(one, pairs).load_state(saved["trainer"])
            return one

        plain = self._plain_options(parse_start("euler"), True)
        self.plain = [unpack(saved, plain) for saved in state["plain"]]
        for name in ("own", "contenders", "finished"):
            setattr(self, name, [unpack(saved, self.options) for saved in state[name]])
