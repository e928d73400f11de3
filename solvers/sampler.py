"""The sampling loop. It owns the schedule, AFS, the NFE count, trajectories and the predictor.

``sample`` runs all steps from noise to images, and ``integrate`` does the same with gradients.
``Sampler.advance`` runs one step of the solver, and ``Sampler.evaluate`` calls the network where
the step needs it. Distillation trains through ``advance``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from models.denoiser import BOTTLENECK_SIZE, beside, call_shifted, member, read_bottleneck
from models.inputs import initial_state
from solvers.recommended import recommend
from solvers.schedules import check_sigmas, get_schedule, levels_tensor
from solvers.solver import Point, Solver, State, make_solver
from torch_utils.errors import UserError
from torch_utils.transfer import to_device

RANGE_SLACK = 1e-3  # schedules in float32 and rounded ends of a range may exceed it by this share
AFS_KINDS = (False, True, "data")


@dataclass
class SampleInfo:
    """What a call of ``sample`` did.

    sigmas: noise levels [N].
    nfe: number of network evaluations.
    r, scale_dir, scale_time: outputs of the predictor, one tensor [B] per interval.
    """

    sigmas: torch.Tensor
    nfe: int = 0
    r: list = field(default_factory=list)
    scale_dir: list = field(default_factory=list)
    scale_time: list = field(default_factory=list)


def afs_direction(net, x: torch.Tensor, sigma, kind, cond: Mapping | None = None) -> torch.Tensor:
    """The analytical first step: the direction [B,C,H,W] at the highest noise, without the network.

    net: the denoiser.
    x: state [B,C,H,W] at the highest noise.
    sigma: noise level of x.
    kind: True, "data" or a function.
        True: x / sqrt(1 + sigma^2), for data with mean zero (Dockhorn et al. 2022, Appendix B).
        "data": exact for a Gaussian with mean image ``net.data_mean`` and standard deviation
        ``net.data_std``. Better if the mean is far from zero, as for white strokes on black.
        A function: called with (x, sigma).
    cond: keyword arguments of net. For restoration networks x is the difference from the degraded
        image. Default: none.

    For PFGM++ "data" replaces the noise variance sigma^2 by that of the kernel at x,
    (D sigma^2 + |x - mean|^2) / (D + N) for N pixels, so it is exact to first order there too.
    """
    prior = member(net, "prior_mean")(**(cond or {}))
    if torch.is_tensor(prior):
        x = x - prior.to(x)
    if callable(kind):
        return kind(x, sigma)
    if kind is True:
        return x / (1 + sigma**2).sqrt()
    mean, std = member(net, "data_mean"), member(net, "data_std")
    if mean is None or std is None:
        raise UserError("afs='data': this network has no mean and standard deviation of its data; use afs=True")
    x = x - mean.to(x.device, x.dtype)
    extra, variance = member(net, "D"), float(std) ** 2
    if extra is None:
        return x * (sigma / (sigma**2 + variance))
    noise = (extra * sigma**2 + x.square().sum((1, 2, 3), keepdim=True)) / (extra + x[0].numel())
    return x * (noise / ((noise + variance) * sigma))


class Sampler:
    """One run of a solver on a network and a schedule, optionally with learned points.

    net: the denoiser.
    solver: the solver; the run uses ``solver.setup(net, sigmas, predictor)``.
    sigmas: noise levels [N], decreasing.
    afs: False, True, "data" or a function, see ``afs_direction``. Default False.
    predictor: inserts one learned point per interval. Default: None, no learned points.
    cond: keyword arguments of net, for example class labels [B,L]. Default: none.
    observer: called with (i, sigma, x, denoised) after the evaluation at schedule point i.
    noise: returns standard normal noise like x, for stochastic solvers. Default: torch's generator.
    sigmas_cond: noise levels [N] to condition the network on at the points of the schedule (the
        decoupled times of LD3); the arithmetic uses sigmas. Default: sigmas.
    checkpointing: recompute the network's activations in the backward pass, so that memory does not
        grow with the number of evaluations. Default False.
    cached_evals: {i: (direction [B,C,H,W], bottleneck [B,8,8])}, evaluations at schedule point i
        that were already made at exactly this state; reused instead of calling the network.
    train_network: gradients flow to the parameters of net. Default False.

    ``nfe`` counts the network evaluations so far.
    """

    def __init__(
        self,
        net,
        solver: Solver,
        sigmas: torch.Tensor,
        *,
        afs=False,
        predictor=None,
        cond=None,
        observer=None,
        noise=None,
        sigmas_cond=None,
        checkpointing=False,
        cached_evals=None,
        train_network=False,
    ):
        if not (isinstance(afs, bool) or afs == "data" or callable(afs)):
            raise UserError(f"afs={afs!r}: choose from {', '.join(map(str, AFS_KINDS))}")
        if sigmas.ndim > 1 and not solver.per_sample:
            raise UserError(f"the solver '{solver.name}' needs one schedule for all samples")
        self.net, self.solver, self.sigmas = net, solver.setup(net, sigmas, predictor), sigmas
        self.sigmas_cond = None
        if sigmas_cond is not None:
            self.sigmas_cond = to_device(levels_tensor("sigmas_cond", sigmas_cond, sigmas.dtype), sigmas.device)
            host = self.sigmas_cond.device.type == "cpu"  # elsewhere they come from a span solver: do not wait for them
            if self.sigmas_cond.shape != sigmas.shape or (host and not (self.sigmas_cond > 0).all()):
                raise UserError(f"sigmas_cond must be {len(sigmas)} positive numbers, one per noise level")
        self.afs, self.predictor, self.cond = afs, predictor, dict(cond or {})
        few = member(net, "few_step")
        if few is not None and few.step_condition:
            self.cond.setdefault("step_condition", len(sigmas))
        self.observer, self._noise, self.checkpointing = observer, noise, checkpointing
        self.cached_evals, self.train_network = dict(cached_evals or {}), train_network
        self.nfe = 0
        self.predicted: tuple | None = None  # (r, scale_dir, scale_time) of the latest interval
        self.reader: Any = None  # of the bottleneck, for the predictor

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def updates(self) -> int:
        """Number of updates of the trajectory; a predictor doubles those of one-stage solvers."""
        return self.intervals * (2 if self.predictor is not None and self.solver.stages == 1 else 1)

    def tail(self, i: int) -> tuple["Sampler", int]:
        """(run, first interval) for a start at schedule point i, without the evaluations before it.

        A predictor's solver runs the rest of the schedule as a schedule of its own. A span solver
        keeps its table, and takes its first direction for those that it does not have.
        """
        if i == 0 or self.solver.own_schedule:
            return self, i
        run = copy.copy(self)
        run.sigmas, run.afs = self.sigmas[i:], False
        run.sigmas_cond = None if self.sigmas_cond is None else self.sigmas_cond[i:]
        run.solver = self.solver.setup(self.net, run.sigmas, self.predictor)
        return run, 0

    def sigma(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The noise level at schedule point i, in the dtype of x."""
        return self.sigmas[i].to(x.dtype)

    @contextmanager
    def reading(self):
        """Context that reads the network's bottleneck, needed for ``advance`` with a predictor."""
        if self.predictor is None or self.solver.own_schedule:
            yield
            return
        with read_bottleneck(self.net) as self.reader:
            yield
        self.reader = None

    def advance(self, state: State, i: int) -> State:
        """One step of the solver: ``solver.stride`` intervals, from schedule point i on."""
        step, answer = self.solver.step(self, state, i), None
        while True:
            try:
                request = step.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = self.evaluate(request)

    def evaluate(self, request: Point | list[Point]):
        """The direction d = (x - D) / sigma [B,C,H,W] at a point, or a list of them at several.

        A list costs one call of the network. The observer is called for points of the schedule.
        sigma is that of ``divisor``.
        """
        points = request if isinstance(request, list) else [request]
        inputs = [v for p in points for v in (p.x, p.sigma, p.sigma_cond, p.shift) if v is not None]
        learned = self.train_network or any(v.requires_grad for v in inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learned):
            known = None if points is request else self.known_direction(points[0])
            directions = self._call_network(points) if known is None else [known]
        for point, d in zip(points, directions, strict=True):
            if self.observer is not None and point.index is not None:
                sigma = self.divisor(point) if known is None else point.sigma
                self.observer(point.index, point.sigma, point.x, point.x - sigma * d)
        return directions if points is request else directions[0]

    def known_direction(self, point: Point):
        """The direction at a point if it is cached or the analytical first step. Else None."""
        if point.index in self.cached_evals:
            return self.cached_evals[point.index][0]
        if point.index == 0 and self.afs:
            return afs_direction(self.net, point.x, point.sigma, self.afs, self.cond)
        return None

    def _call_network(self, points: list[Point]) -> list:
        """The directions at the points from one call of the network."""
        x, sigma, shift = points[0].x, points[0].sigma_cond, points[0].shift
        batch = len(x)
        if len(points) > 1:
            x = torch.cat([point.x for point in points])
            sigma = torch.cat([beside(point.sigma_cond, x).expand(batch, 1, 1, 1) for point in points])
            shifts = [point.shift for point in points if point.shift is not None]
            shift = torch.cat(shifts) if shifts else None
        denoised = self.denoise(x, sigma, len(points), shift).split(batch)
        return [(point.x - d) / self.divisor(point) for point, d in zip(points, denoised, strict=True)]

    def divisor(self, point: Point) -> torch.Tensor:
        """The noise level that x - D is divided by, a scalar or [B,1,1,1]: that of the point.

        For solvers with direction_sigma="network" it is sigma_cond, at points of the schedule.
        """
        conditioned = self.solver.direction_sigma == "network" and point.index is not None
        return point.sigma_cond if conditioned else point.sigma

    def denoise(self, x, sigma, copies=1, shift=None):
        """The denoised images D(x; sigma), in the dtype of x.

        x: states [copies B,C,H,W].
        sigma: noise level to condition the network on, a scalar or [copies B,1,1,1].
        copies: number of points in x, one batch after the other. Default 1.
        shift: [copies,E], added to the network's embedding of the noise level. Default None.
        """
        self.nfe += copies * member(self.net, "evals_per_call")
        cond = self.cond if copies == 1 else {name: _repeat(v, copies, len(x)) for name, v in self.cond.items()}
        net = self.net
        if (compiled := member(net, "compiled")) is not None:
            compiled.copies = copies
        if sigma.ndim == 0 and not hasattr(net, "evals_per_call"):  # not a denoiser, but any function of the user's
            sigma = beside(sigma, x)
        if shift is not None:
            rows = shift if copies == 1 else shift.repeat_interleave(len(x) // copies, 0)
            net = partial(call_shifted, net, rows)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(net, x, sigma, use_reentrant=False, **cond).to(x.dtype)
        return net(x, sigma, **cond).to(x.dtype)

    # What a step uses

    def at(self, x, i, shift=None) -> Point:
        """The ``Point`` at schedule point i with state x [B,C,H,W]; shift as in ``Point``."""
        return Point(x, self.sigma(i, x), self.sigma_cond(i), i, shift)

    def inside(self, x, sigma, i, r, scale_time=None) -> Point:
        """The ``Point`` inside the interval from schedule point i.

        x: state [B,C,H,W].
        sigma: its noise level sigma_{i+1}^r sigma_i^(1-r), a scalar or [B,1,1,1].
        r: place of the point, a number in (0, 1] or [B,1,1,1].
        scale_time: multiplies the noise level that the network is conditioned on, [B,1,1,1].
            Default: 1.
        """
        point = Point(x, sigma, self.sigma_cond(i, r))
        if scale_time is not None:
            point.sigma_cond = scale_time * point.sigma_cond
        return point

    def sigma_cond(self, i, r=None):
        """Noise level to condition the network on. None: the noise level of x itself.

        i: index of the schedule point.
        r: if given, for the intermediate point sigma_{i+1}^r sigma_i^(1-r). Default None.
        """
        levels = self.sigmas_cond
        if levels is None:
            return None
        return levels[i] if r is None else levels[i + 1] ** r * levels[i] ** (1 - r)

    def predict(self, x, i):
        """The predictor's (r, scale_dir, scale_time) for the interval from i, each [B,1,1,1]."""
        if i == 0 and self.afs:  # no call, no bottleneck: zeros, as in the published code
            feature = x.new_zeros(x.shape[0], BOTTLENECK_SIZE, BOTTLENECK_SIZE)
        elif i in self.cached_evals:
            feature = self.cached_evals[i][1]
        else:
            feature = to_device(self.reader.read(x.shape[0]), x.device).to(x.dtype)
        outputs = self.predictor(feature, self.sigma(i, x), self.sigma(i + 1, x))
        # Some diffusers pipelines pack their latents into fewer dimensions than images have.
        self.predicted = tuple(value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for value in outputs)
        return self.predicted

    def noise(self, x):
        """Standard normal noise like x."""
        return torch.randn_like(x) if self._noise is None else to_device(self._noise().to(x.dtype), x.device)


def _repeat(value, copies, rows):
    """Repeat an entry of ``cond`` that has one row per sample; others are returned unchanged."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows // copies:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value


def resolve_sigmas(
    net,
    num_steps,
    schedule_type,
    schedule_rho,
    sigma_min=None,
    sigma_max=None,
    sigmas=None,
    device=None,
    original_code=False,
    dtype=torch.float32,
):
    """The schedule [N] of a run: ``sigmas`` if given, else that of ``get_schedule``.

    num_steps, schedule_type, schedule_rho, net, device, original_code: see ``get_schedule``.
    sigma_min, sigma_max: the range. Default: that of the network.
    sigmas: explicit noise levels [N], decreasing. Default None.
    dtype: precision of the sampling; neighbouring noise levels must differ in it. Default float32.
    """
    if sigmas is not None:
        return _within_range(net, check_sigmas(sigmas, device, dtype))
    lo, hi = (
        _end_of_range(net, name) if given is None else given
        for name, given in (("sigma_min", sigma_min), ("sigma_max", sigma_max))
    )
    times = get_schedule(num_steps, lo, hi, schedule_type, schedule_rho, net, device, original_code)
    return _within_range(net, check_sigmas(times, device, dtype))


def _end_of_range(net, name: str) -> float:
    if not hasattr(net, name):
        raise UserError(
            f"the network has no {name}: wrap it (net = models.wrap(net, sigma_min=0.002, sigma_max=80)),"
            f" or pass {name} or sigmas"
        )
    return getattr(net, name)


def _within_range(net, sigmas):
    """Return sigmas. UserError if they leave the network's range by more than ``RANGE_SLACK``."""
    least, most = getattr(net, "sigma_min", 0.0), getattr(net, "sigma_max", float("inf"))
    low, high = sigmas[-1].min().item(), sigmas[0].max().item()
    if low < least * (1 - RANGE_SLACK) or high > most * (1 + RANGE_SLACK):
        wrong = low if high <= most * (1 + RANGE_SLACK) else high
        raise UserError(
            f"sigma={wrong:g} is outside the network's range, {least:g}..{most:g};"
            " choose sigma_min, sigma_max or sigmas within it"
        )
    return sigmas


_SCHEDULE = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")


def _trained(predictor) -> dict:
    """The settings of the training that are recorded in a predictor's file."""
    trained = {name: predictor.config[name] for name in getattr(predictor, "stated", ())}
    return trained | ({"solver": trained["sampler_stu"]} if "sampler_stu" in trained else {})


def _trained_otherwise(name: str, used: Mapping, trained: Mapping) -> UserError:
    values = [_short(values.get(name)) for values in (used, trained)]
    return UserError(
        f"{name}={values[0]}: the predictor was trained with {name}={values[1]} and works only with that;"
        f" leave {name} out, or choose another predictor"
    )


def check_trained(predictor, used: Mapping) -> None:
    """Raises UserError for a setting that differs from that of the predictor's training."""
    trained = _trained(predictor)
    for name, value in used.items():
        if trained.get(name) is not None and value != trained[name] and not callable(value):
            raise _trained_otherwise(name, used, trained)


def check_predictor(predictor, net, solver: Solver, sigmas: torch.Tensor, settings: Mapping) -> None:
    """Raises UserError if the run differs from the settings that the predictor was trained with.

    sigmas: noise levels [N] of the run. An explicit list of the trained noise levels is accepted.
    settings: "afs" and the schedule's settings, by name.

    Only settings recorded in the predictor's file are compared (``AMEDPredictor.stated``).
    """
    trained = _trained(predictor)
    used = {"solver": solver.name, "afs": settings["afs"]} | {name: getattr(solver, name) for name in solver.options}
    check_trained(predictor, used)
    if trained.keys().isdisjoint((*_SCHEDULE, "sigmas")):
        return
    own = {name: trained.get(name, settings[name]) for name in _SCHEDULE} | {"sigmas": trained.get("sigmas")}
    own["original_code"] = bool(trained.get("original_code"))
    levels = resolve_sigmas(net, **own, device=sigmas.device, dtype=sigmas.dtype)
    if len(levels) == len(sigmas) and torch.allclose(levels, sigmas.detach(), rtol=1e-6, atol=0):
        return
    used, trained = {name: settings[name] for name in (*_SCHEDULE, "original_code")}, predictor.config
    if settings["sigmas"] is not None:
        used, trained = {"sigmas": sigmas.tolist()}, {"sigmas": levels.tolist()}
    name = next(name for name, value in used.items() if value not in (None, False, trained.get(name)))
    raise _trained_otherwise(name, used, trained)


def check_few_step(net, solver: Solver, sigmas: torch.Tensor, afs, predictor=None, denoise_to_zero=False) -> None:
    """Raises UserError if a network that was fine-tuned for few steps is used in another way.

    sigmas: noise levels [N] of the run.
    others: as of ``sample``.
    """
    few = member(net, "few_step")
    if few is None:
        return
    if predictor is not None:
        raise UserError("this network was fine-tuned for few steps: use predictors with the original network")
    fits = solver.name == few.solver and afs == few.afs and not denoise_to_zero and len(sigmas) in few.num_steps
    if fits:
        schedule = {"num_steps": None, "schedule_type": None, "schedule_rho": None, **few.schedule(len(sigmas))}
        levels = resolve_sigmas(net, **schedule, device=sigmas.device, dtype=sigmas.dtype)
        fits = levels.shape == sigmas.shape and torch.allclose(levels, sigmas.detach(), rtol=1e-6, atol=0)
    if not fits:
        raise UserError(
            f"this network was fine-tuned for {few.describe()}: give nfe, the number of evaluations, and leave other"
            " settings of solver and schedule out"
        )


def _with_defaults(asked: dict, predictor, net) -> dict:
    """The settings of a run by name; None is replaced by the predictor's value or the default.

    asked: arguments of ``integrate``: solver, afs, and the settings of the schedule.

    Raises UserError if they differ from those of a predictor with its own schedule.
    """
    config, known = getattr(predictor, "config", {}), {}
    if hasattr(predictor, "brings"):
        known = {"solver": predictor.solver}
        for name in _SCHEDULE:
            if asked[name] not in (None, config.get(name)):
                raise UserError(f"{name}={asked[name]}: the predictor has its own schedule; leave {name} out")
    elif (few := member(net, "few_step")) is not None:
        known = {"solver": few.solver, "afs": few.afs}
        number = asked["num_steps"] or (few.num_steps[0] if len(few.num_steps) == 1 else None)
        if asked["sigmas"] is None and number is not None:
            known |= few.schedule(number)
    elif config:
        known = {name: config.get(name) for name in ("afs", *_SCHEDULE)} | {"solver": config["sampler_stu"]}
        if all(asked[name] is None for name in _SCHEDULE):  # else they define the noise levels
            known["sigmas"] = config.get("sigmas")
    defaults = {"schedule_type": "polynomial", "schedule_rho": 7, "afs": False}
    layers = (asked, known, defaults)
    found = {name: next((a[name] for a in layers if a.get(name) is not None), None) for name in asked}
    if found["solver"] is None:
        raise UserError("sample: give a solver, or nfe (the number of network evaluations), or a predictor")
    return found


def _check_guidance(predictor, net) -> None:
    """Raises UserError if the predictor was trained with another guidance than the network's."""
    config, rate = getattr(predictor, "config", {}), getattr(net, "guidance_rate", None)
    trained = config.get("guidance_rate") if config.get("guidance_type") in ("cfg", "cg") else None
    if None not in (rate, trained) and rate != trained:
        raise UserError(
            f"the predictor was trained with guidance_rate={trained:g}, the network has {rate:g}: load the network with"
            f" guidance_rate={trained:g}, or choose another predictor"
        )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def integrate(
    net,
    latents: torch.Tensor,
    *,
    solver: str | None = None,
    num_steps: int | None = None,
    schedule_type: str | None = None,
    schedule_rho: float | None = None,
    afs: bool | str | None = None,
    nfe: int | None = None,
    predictor=None,
    cond: Mapping | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigmas=None,
    sigmas_cond=None,
    max_order: int | None = None,
    predict_x0: bool | None = None,
    lower_order_final: bool | None = None,
    denoise_to_zero: bool = False,
    return_trajectory: bool = False,
    return_info: bool = False,
    callback: Callable | None = None,
    noise: Callable | None = None,
    original_code: bool = False,
    checkpointing: bool = False,
    **solver_options,
):
    """Solve the probability-flow ODE from noise to images.

    net: the denoiser, called as net(x, sigma, **cond).
    latents: unit-variance noise [B,C,H,W]; multiplied here by the first sigma. Its dtype is that of
        all arithmetic.
    solver: name in ``SOLVERS``. Default: that of the predictor; with nfe the best plain solver for
        this network.
    num_steps: number of time steps, one more than intervals.
    schedule_type, schedule_rho: kind of the schedule, see ``get_schedule``. Default: polynomial, 7;
        with nfe the recommended ones.
    afs: analytical first step, see ``afs_direction``. Default False; with nfe the recommended one.
    nfe: number of network evaluations, instead of num_steps or sigmas; ``recommend`` then chooses
        all settings that are not given (solvers/recommended.py). Default None.
    predictor: an AMEDPredictor, which inserts one learned evaluation per interval, or a SpanSolver.
        It sets solver, schedule, first step and options as in its training; other values are an
        error. Default None.
    cond: keyword arguments of net. Default: none.
    sigma_min, sigma_max: range of the schedule. Default: that of the network.
    sigmas: explicit noise levels [N], decreasing, instead of a schedule; or [N,B,1,1,1], a schedule
        for each sample. Default None.
    sigmas_cond: noise levels [N] to condition the network on. Default: sigmas.
    max_order, predict_x0, lower_order_final: options that several solvers have. Default: those of
        the predictor's training, or of the solver.
    denoise_to_zero: return the denoised image at the last sigma, for one more evaluation. Default
        False.
    return_trajectory, return_info: see below. Default False.
    callback: called with (i, sigma, x, denoised), the state and the denoised image at the start of
        every interval. Default None.
    noise: returns standard normal noise like latents, for stochastic solvers. Default: torch's
        generator.
    original_code: reproduce the published code where it deviates from its paper (listed in
        docs/solvers.md). Default: as in the predictor's training, or False.
    checkpointing: see ``Sampler``. Default False.
    solver_options: other options of the solver. Default: those of the predictor's training, or of
        the solver.

    Gradients flow to latents, sigmas, sigmas_cond and the parameters of a predictor, if these
    require gradients. ``sample`` is the same without gradients.

    Returns x [B,C,H,W]. With return_trajectory: the states at all sigmas that the solver visits
    [N,B,C,H,W], and the denoised image if denoise_to_zero. With return_info: (result, SampleInfo).
    Raises UserError for unknown solvers and impossible settings.
    """
    if not torch.is_tensor(latents) or not latents.is_floating_point():
        found = f"{latents.dtype}" if torch.is_tensor(latents) else type(latents).__name__
        raise UserError(f"sample: latents must be a floating-point tensor [B,C,H,W], got {found}")
    sigmas_cond = solver_options.pop("sigmas_net", sigmas_cond)  # the former name
    common = {"max_order": max_order, "predict_x0": predict_x0, "lower_order_final": lower_order_final}
    common = {name: value for name, value in common.items() if value is not None}
    values = (num_steps, schedule_type, schedule_rho, sigma_min, sigma_max, sigmas)
    asked = dict(zip((*_SCHEDULE, "sigmas"), values, strict=True)) | {"solver": solver, "afs": afs}
    if nfe is not None:
        given = {**common, **solver_options, "denoise_to_zero": denoise_to_zero}
        asked, solver_options = _recommended(net, nfe, asked, given, predictor)
        common = {}
    chosen = _with_defaults(asked, predictor, net)
    _check_guidance(predictor, net)
    trained = getattr(predictor, "config", {})
    chosen["original_code"] = bool(original_code or trained.get("original_code"))
    method = make_solver(
        chosen["solver"], solver_options, {**trained, **common, "original_code": chosen["original_code"]}
    )
    more = {"cond": cond, "observer": callback, "noise": noise, "checkpointing": checkpointing}
    run, times = _make_run(net, method, latents, asked, chosen, sigmas_cond, predictor, more, denoise_to_zero)
    info = SampleInfo(sigmas=times.detach())
    x = initial_state(net, latents, run.sigma(0, latents), cond)
    points = [x]
    for state in _states(run, x, info):
        x = state.x
        if return_trajectory:
            points.append(x)
    if denoise_to_zero:
        last = run.sigma_cond(-1)
        x = run.denoise(x, (times[-1] if last is None else last).to(x.dtype))
        points.append(x)
    info.nfe = run.nfe
    result = torch.stack(points) if return_trajectory else x
    return (result, info) if return_info else result


def _recommended(net, nfe: int, asked: dict, options: dict, predictor) -> tuple[dict, dict]:
    """The settings of ``asked`` and the solver's options that ``recommend`` chooses for nfe.

    options: those that are given, and denoise_to_zero.
    """
    if asked["num_steps"] is not None or asked["sigmas"] is not None or predictor is not None:
        raise UserError("sample: nfe chooses the steps, which num_steps, sigmas or a predictor bring: give one of them")
    given = {name: asked[name] for name in ("schedule_type", "schedule_rho", "afs") if asked[name] is not None}
    found = recommend(net, nfe, asked["solver"], {**given, **options}).settings
    names = ("solver", "num_steps", "schedule_type", "schedule_rho", "afs", "sigmas")
    asked = asked | {name: found.pop(name, None) for name in names}
    found.pop("denoise_to_zero", None)
    return asked, found


def _make_run(
    net, method: Solver, latents, asked: dict, chosen: dict, sigmas_cond, predictor, more: dict, denoise_to_zero: bool
) -> tuple[Sampler, torch.Tensor]:
    """(the run of ``integrate``, its noise levels [N] on the CPU).

    method: the solver with its options.
    asked, chosen: the settings as given, and with defaults.
    more: further arguments of ``Sampler``.
    """
    afs, sigmas = chosen["afs"], chosen["sigmas"]
    if method.own_schedule:
        method.check_predictor(predictor)
        predictor.check_network(net)
        plan = predictor.plan()
        own = predictor.brings(asked["num_steps"], asked["sigmas"], sigmas_cond, asked["afs"], plan)
        sigmas, sigmas_cond, afs = own["sigmas"], own["sigmas_cond"], own["afs"]
    schedule = {name: chosen[name] for name in (*_SCHEDULE, "original_code")}
    if sigmas is None and schedule["num_steps"] is None:
        raise UserError("sample: give num_steps or an explicit list of sigmas")
    times = resolve_sigmas(net, **schedule, sigmas=sigmas, device="cpu", dtype=latents.dtype)
    check_few_step(net, method, times, afs, predictor, denoise_to_zero)
    levels = times
    if method.own_schedule:
        moves = plan.moves().beside(latents)
        method, levels, sigmas_cond = method.with_moves(predictor, moves), moves.sigmas, moves.sigmas_cond
    else:
        check_predictor(predictor, net, method, times, chosen)
        if latents.device.type != "cpu" and any(getattr(v, "requires_grad", False) for v in (times, sigmas_cond)):
            # Their gradients come back in one copy. A gradient of each number would be waited for.
            levels = to_device(times.to(latents.dtype), latents.device)
    return Sampler(net, method, levels, afs=afs, predictor=predictor, sigmas_cond=sigmas_cond, **more), times


def _states(run: Sampler, x: torch.Tensor, info: SampleInfo) -> Iterator[State]:
    """The states after each step from x [B,C,H,W]; what a predictor said is added to ``info``."""
    state, i = State(x), 0
    with run.reading():
        while i < run.intervals:
            state = run.advance(state, i)
            i += run.solver.stride(i, run.intervals)
            if run.predicted is not None:
                for name, value in zip(("r", "scale_dir", "scale_time"), run.predicted, strict=True):
                    getattr(info, name).append(value.flatten())
            yield state


sample = torch.no_grad()(integrate)
