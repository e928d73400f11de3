"""The one sampling loop. It owns the schedule, AFS, the NFE count, trajectories and the predictor of learned points.

``Sampler.advance`` does one interval and is what distillation trains through; ``sample`` runs all of them, and
``integrate`` does so with gradients, to the starting noise, the noise levels and whatever the rule or predictor learns.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from models.denoiser import BOTTLENECK_SIZE, call_shifted, read_bottleneck
from solvers.schedules import check_sigmas, get_schedule, levels_tensor
from solvers.solver import Solver, State, make_solver
from torch_utils.errors import UserError

RANGE_SLACK = 1e-3  # schedules in float32 and rounded ends of a range may exceed it by this share
AFS_KINDS = (False, True, "data")


@dataclass
class SampleInfo:
    """What a call of ``sample`` did. The predictor's outputs are lists of [B] tensors, one entry per interval."""

    sigmas: torch.Tensor
    nfe: int = 0
    r: list = field(default_factory=list)
    scale_dir: list = field(default_factory=list)
    scale_time: list = field(default_factory=list)


def afs_direction(net, x: torch.Tensor, sigma, kind) -> torch.Tensor:
    """The analytical first step: the direction at the highest noise, without asking the network.

    True: x / sqrt(1 + sigma^2), the published form for data centred at zero (Dockhorn et al. 2022, Appendix B).
    "data": exact for a Gaussian with the training data's mean image and variance, read from ``net.data_mean`` and
    ``net.data_std``; it matters where the mean is far from zero, as for white strokes on black. A function: of (x, sigma).
    """
    if callable(kind):
        return kind(x, sigma)
    if kind is True:
        return x / (1 + sigma**2).sqrt()
    mean, std = getattr(net, "data_mean", None), getattr(net, "data_std", None)
    if mean is None or std is None:
        raise UserError("afs='data' needs a network that knows the mean and spread of its data; use afs=True")
    mean = mean.to(x.device, x.dtype)
    return (x - mean) * (sigma / (sigma**2 + float(std) ** 2))


class Sampler:
    """A rule on a schedule with a network, and optionally a predictor that inserts one learned point per interval.

    sigmas: [N] descending. afs: False, True, "data" or a function (see ``afs_direction``). ``nfe`` counts the network evaluations really made.
    noise: called without arguments, a standard normal tensor like x; what a stochastic rule draws.
    sigmas_net: [N] what the network is told at the points of the schedule in the place of their noise levels (LD3's
    decoupled times); the arithmetic keeps to sigmas. checkpointing: under gradients, activations of the network are not
    kept but computed again, so that memory does not grow with the number of evaluations. known: {i: (direction [B,C,H,W],
    bottleneck [B,8,8])} of points of the schedule where the network need not be asked, since it was at that very state.
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
        sigmas_net=None,
        checkpointing=False,
        known=None,
    ):
        if not (isinstance(afs, bool) or afs == "data" or callable(afs)):
            raise UserError(f"afs={afs!r}: choose from {', '.join(map(str, AFS_KINDS))}")
        self.net, self.solver, self.sigmas = net, solver.adopt(predictor).bind(net, sigmas), sigmas
        self.sigmas_net = None
        if sigmas_net is not None:
            self.sigmas_net = levels_tensor("sigmas_net", sigmas_net, sigmas.dtype).to(sigmas.device)
            if self.sigmas_net.shape != sigmas.shape or not (self.sigmas_net > 0).all():
                raise UserError(f"sigmas_net must be {len(sigmas)} positive numbers, one per noise level")
        self.afs, self.predictor, self.cond = afs, predictor, dict(cond or {})
        self.observer, self._noise, self.checkpointing = observer, noise, checkpointing
        self.known = dict(known or {})
        self.nfe = 0
        self.predicted: tuple | None = None  # (r, scale_dir, scale_time) of the latest interval
        self._reader = None

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def updates(self) -> int:
        """Updates of the rule over the whole trajectory; one-stage rules make two per interval under a predictor."""
        return self.intervals * (2 if self.predictor is not None and self.solver.stages == 1 else 1)

    def sigma(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The noise level at point i of the schedule, in the dtype of x."""
        return self.sigmas[i].to(x.dtype)

    @contextmanager
    def reading(self):
        """Context in which the network's bottleneck is read; needed around ``advance`` when there is a predictor."""
        if self.predictor is None or self.solver.own_schedule:
            yield
            return
        with read_bottleneck(self.net) as self._reader:
            yield
        self._reader = None

    def advance(self, state: State, i: int) -> State:
        """From point i of the schedule to the next (``rule.stride`` intervals further)."""
        return self.solver.advance(self, state, i)

    # What a rule may ask for.

    def denoise(self, x, sigma, copies=1, shift=None):
        """D(x; sigma); copies: how many states of the batch x holds, one after the other (sigma then [copies B,1,1,1]);
        shift [copies, E]: what is added to the network's embedding of the noise level."""
        self.nfe += copies * getattr(self.net, "evals_per_call", 1)
        cond = self.cond if copies == 1 else {name: _repeat(v, copies, len(x)) for name, v in self.cond.items()}
        net = self.net
        if shift is not None:
            rows = shift if copies == 1 else shift.repeat_interleave(len(x) // copies, 0)
            net = partial(call_shifted, net, rows)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(net, x, sigma, use_reentrant=False, **cond).to(x.dtype)
        return net(x, sigma, **cond).to(x.dtype)

    def sigma_cond(self, i, r=None):
        """What the network is told at point i, or, for a given r, at sigmas[i + 1]^r sigmas[i]^(1 - r); None where that is
        the noise level itself."""
        levels = self.sigmas_net
        if levels is None:
            return None
        return levels[i] if r is None else levels[i + 1] ** r * levels[i] ** (1 - r)

    def direction(self, x, sigma, scale_time=None, sigma_cond=None, shift=None):
        """d = (x - D) / sigma; told (see there) and scale_time change only the noise level that the network is told, shift
        [1, E] its embedding."""
        sigma_cond = sigma if sigma_cond is None else sigma_cond.to(x.dtype)
        return (x - self.denoise(x, sigma_cond if scale_time is None else scale_time * sigma_cond, shift=shift)) / sigma

    def directions(self, points: list, sigmas: list, sigma_cond: list, shift=None) -> list:
        """The directions at several points [B,C,H,W] in one call of the network, which is told the noise levels ``sigma_cond``,
        their embeddings shifted by shift [number of points, E]."""
        if len(points) == 1:
            return [self.direction(points[0], sigmas[0], sigma_cond=sigma_cond[0].to(points[0]), shift=shift)]
        batch = len(points[0])
        levels = (
            torch.stack([level.to(points[0]) for level in sigma_cond]).repeat_interleave(batch).reshape(-1, 1, 1, 1)
        )
        denoised = self.denoise(torch.cat(points), levels, len(points), shift).split(batch)
        return [(x - d) / sigma for x, d, sigma in zip(points, denoised, sigmas, strict=True)]

    def observe(self, i, sigma, x, d):
        """Shows the observer the direction d at point i of the schedule."""
        if self.observer is not None:
            self.observer(i, sigma, x, x - sigma * d)

    def direction_at(self, x, i, shift=None):
        """The direction at point i of the schedule, shown to the observer; at point 0 the analytical one under AFS.

        It is differentiable only if x or the noise level is: nothing learned enters it otherwise.
        """
        if i in self.known:
            return self.known[i][0]
        sigma, sigma_cond = self.sigma(i, x), self.sigma_cond(i)
        learned = any(value is not None and value.requires_grad for value in (x, sigma, sigma_cond, shift))
        with torch.set_grad_enabled(torch.is_grad_enabled() and learned):
            if i == 0 and self.afs:
                d = afs_direction(self.net, x, sigma, self.afs)
            else:
                d = self.direction(x, sigma, sigma_cond=sigma_cond, shift=shift)
        self.observe(i, sigma, x, d)
        return d

    def predict(self, x, i):
        """The predictor's (r, scale_dir, scale_time) for the interval from point i, each [B,1,1,1]."""
        if i == 0 and self.afs:  # the network was not run: the predictor sees zeros, as in the reference implementation
            feature = x.new_zeros(x.shape[0], BOTTLENECK_SIZE, BOTTLENECK_SIZE)
        elif i in self.known:
            feature = self.known[i][1]
        else:
            feature = self._reader.read(x.shape[0]).to(x.dtype)
        outputs = self.predictor(feature, self.sigma(i, x), self.sigma(i + 1, x))
        self.predicted = tuple(value.to(x.dtype) for value in outputs)
        return self.predicted

    def noise(self, x):
        """Standard normal noise like x."""
        return torch.randn_like(x) if self._noise is None else self._noise().to(x)


def _repeat(value, copies, rows):
    """A part of ``cond`` for a batch that holds itself several times; what belongs to no sample as it is."""
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
    """The schedule of a run: ``sigmas`` unchanged if given, else ``get_schedule`` over the network's (or the given) range.

    dtype: precision of the sampling, in which the noise levels must differ.
    """
    if sigmas is not None:
        return _within_range(net, check_sigmas(sigmas, device, dtype))
    lo = net.sigma_min if sigma_min is None else sigma_min
    hi = net.sigma_max if sigma_max is None else sigma_max
    times = get_schedule(num_steps, lo, hi, schedule_type, schedule_rho, net, device, original_code)
    return _within_range(net, check_sigmas(times, device, dtype))


def _within_range(net, sigmas):
    """The schedule if the network supports its noise levels (up to the rounding of a published table)."""
    least, most = getattr(net, "sigma_min", 0.0), getattr(net, "sigma_max", float("inf"))
    low, high = sigmas[-1].item(), sigmas[0].item()
    if low < least * (1 - RANGE_SLACK) or high > most * (1 + RANGE_SLACK):
        wrong = low if high <= most * (1 + RANGE_SLACK) else high
        raise UserError(
            f"sigma={wrong:g} is outside the network's range, {least:g}..{most:g}; choose sigma_min, sigma_max or sigmas within it"
        )
    return sigmas


_SCHEDULE = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")


def check_predictor(predictor, net, solver: Solver, sigmas: torch.Tensor, settings: Mapping) -> None:
    """Raises UserError where a predictor would be used in another way than it was trained for.

    sigmas: [N] noise levels of the run. settings: "afs", and by name what the noise levels were
    computed from. What counts is the effect: an explicit list of the same noise levels is accepted.
    Only settings that the predictor states are compared (``AMEDPredictor.stated``).
    """
    trained = {name: predictor.config[name] for name in getattr(predictor, "stated", ())}
    if "sampler_stu" in trained:
        trained["solver"] = trained["sampler_stu"]
    used = {"solver": solver.name, "afs": settings["afs"]} | {name: getattr(solver, name) for name in solver.options}
    different = [
        name
        for name, value in used.items()
        if trained.get(name) is not None and value != trained[name] and not callable(value)
    ]
    if not different:
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
        different = [name for name, value in used.items() if value not in (None, False, trained.get(name))]
    name = different[0]
    values = [_short(values.get(name)) for values in (used, trained)]
    raise UserError(
        f"{name}={values[0]}: the predictor was trained with {name}={values[1]} and works with that only;"
        " leave it out, or choose another predictor"
    )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def integrate(
    net,
    latents: torch.Tensor,
    *,
    solver: str,
    num_steps: int | None = None,
    schedule_type: str = "polynomial",
    schedule_rho: float = 7,
    afs: bool | str = False,
    predictor=None,
    cond: Mapping | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigmas=None,
    sigmas_net=None,
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
    """Solves the probability-flow ODE from noise to images.

    latents: unit-variance noise [B,C,H,W], scaled here by the first sigma; the dtype of latents is the dtype of all
    arithmetic. num_steps: time stamps (intervals + 1). sigmas: an explicit schedule that replaces num_steps and
    schedule_type; sigmas_net: what the network is told in their place, if not the same. predictor: an AMEDPredictor; it
    inserts one learned evaluation per interval and works only with the settings of its training (UserError for others);
    options of the solver that are not given are then those of the training. For the solver "span" a
    SpanSolver, which brings schedule and first step along. cond: passed on to net.
    denoise_to_zero: one more evaluation at the last sigma. callback(i, sigma, x, denoised): called in every interval with
    the state and the denoised image at its start. noise(): standard normal noise like latents for stochastic solvers
    (default: torch's global generator). original_code: reproduce the published code where it deviates from its
    paper (docs/solvers.md lists the places). checkpointing: see ``Sampler``.

    Gradients flow to whatever requires them: latents, sigmas, sigmas_net, the parameters of a predictor. ``sample`` is the
    same without gradients.

    Returns x [B,C,H,W]; with return_trajectory the states at all sigmas that the solver visits [N,B,C,H,W] (plus the
    denoised one); with return_info the pair (result, SampleInfo). Raises ValueError on unknown solvers and impossible
    settings.
    """
    if not torch.is_tensor(latents) or not latents.is_floating_point():
        found = f"{latents.dtype}" if torch.is_tensor(latents) else type(latents).__name__
        raise UserError(f"sample: latents must be a floating-point tensor [B,C,H,W], got {found}")
    trained = getattr(predictor, "config", {})
    original_code = bool(original_code or trained.get("original_code"))
    common = {"max_order": max_order, "predict_x0": predict_x0, "lower_order_final": lower_order_final}
    common = {**trained, **{name: value for name, value in common.items() if value is not None}}
    common["original_code"] = original_code
    method = make_solver(solver, solver_options, common)
    if method.own_schedule:
        method.adopt(predictor)  # refuses what is no student of it
        predictor.check_network(net)
        own = predictor.brings(num_steps, sigmas, sigmas_net, afs)
        sigmas, sigmas_net, afs = own["sigmas"], own["sigmas_net"], own["afs"]
    if sigmas is None and num_steps is None:
        raise UserError("sample: give num_steps or an explicit list of sigmas")
    schedule = (num_steps, schedule_type, schedule_rho, sigma_min, sigma_max, sigmas)
    times = resolve_sigmas(net, *schedule, latents.device, original_code, latents.dtype)
    if not method.own_schedule:
        names = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max", "sigmas")
        asked = dict(zip(names, schedule, strict=True)) | {"afs": afs, "original_code": original_code}
        check_predictor(predictor, net, method, times, asked)
    run = Sampler(
        net,
        method,
        times,
        afs=afs,
        predictor=predictor,
        cond=cond,
        observer=callback,
        noise=noise,
        sigmas_net=sigmas_net,
        checkpointing=checkpointing,
    )
    info = SampleInfo(sigmas=times.detach())
    state = State(latents * times[0].to(latents.dtype))
    points = [state.x]
    with run.reading():
        i = 0
        while i < run.intervals:
            state = run.advance(state, i)
            i += run.solver.stride(i, run.intervals)
            if return_trajectory:
                points.append(state.x)
            if run.predicted is not None:
                for name, value in zip(("r", "scale_dir", "scale_time"), run.predicted, strict=True):
                    getattr(info, name).append(value.flatten())
    x = state.x
    if denoise_to_zero:
        last = run.sigma_cond(-1)
        x = run.denoise(x, (times[-1] if last is None else last).to(x.dtype))
        points.append(x)
    info.nfe = run.nfe
    result = torch.stack(points) if return_trajectory else x
    return (result, info) if return_info else result


sample = torch.no_grad()(integrate)
