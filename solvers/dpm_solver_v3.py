"""DPM-Solver-v3: multistep with statistics of the network.

Zheng et al. 2023, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics".

With lambda = -ln sigma and N = x - D(x; sigma) the ODE is dx/dlambda = -N. Three statistics per
noise level and pixel, l, s and b, describe the network. N = l x + f, with the l for which f depends
least on x. df/dlambda = s f + b is the best linear fit. The linear part is solved exactly, the rest
is extrapolated. With L, S and B the integrals of l, s and exp(-S) b from the start of a step,

    x_t = exp(-L_t) (x_s - int exp(L + S) (g + B) dlambda),    g = exp(-S) f - B,

and g is constant if the linear fit is exact (Section 3.2; Appendix C has the formulas in absolute
integrals). ``tools/model_statistics.py`` estimates the statistics. This module reads and writes
their files, and contains the solver.
"""

import copy
import functools
import itertools
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.denoiser import member
from solvers.solver import Option, Solver, State, order_option, register
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.tensor_file import json_entry, read_safetensors, write_safetensors
from torch_utils.transfer import to_device

ENTRY = "dpm_v3"  # key of the settings in the metadata of a statistics file
RANGE_SLACK = 1e-3  # noise levels may exceed those of the statistics by this share
CORRECTORS = ("auto", "same", "pseudo", "off")
CONSTANT = {"data": (1.0, 0.0), "noise": (0.0, -1.0)}  # (l, s) of plain data and noise prediction, b = 0
PIECE = 0.2  # longest piece of the quadrature, in lambda
POINTS = 6  # Gauss-Legendre points per piece
# The value auto of the options, for pixel models without guidance:
CORRECTED_INTERVALS = 6  # up to this number corrector is "same", above it "off"
PSEUDO_INTERVALS = 5  # up to this number pseudo is True
POWERS = 4  # number of moments: three points, and the one of the corrector


@dataclass(frozen=True)
class Statistics:
    """The empirical model statistics.

    sigmas: noise levels [N], decreasing, float64; N >= 2.
    l, s, b: [N,C,H,W], see the module.
    metadata: the network and settings that they were estimated with, JSON values. Default: none.
    """

    sigmas: torch.Tensor
    l: torch.Tensor  # noqa: E741 (the paper's letter)
    s: torch.Tensor
    b: torch.Tensor
    metadata: dict = field(default_factory=dict)


def statistics_path(net) -> Path:
    """The default file of a network's statistics. Raises UserError if the network has no name."""
    name, digest = member(net, "dataset_name"), member(net, "weights_hash")
    if not name or not digest:
        raise UserError("dpm_v3: this network has no name to find its statistics by; give statistics=FILE")
    rate = guidance_rate(net)
    guidance = "" if rate is None else f"-guidance{rate:g}"
    return Path("src") / name / f"dpm_v3-{digest[:12]}{guidance}.safetensors"


def guidance_rate(net) -> float | None:
    """The guidance rate of the denoiser. None without guidance."""
    rate = member(net, "guidance_rate")
    without = rate is None or (rate in (0, 1) and not member(net, "guided"))
    return None if without else float(rate)


def published_variant(net, intervals: int) -> tuple[str, bool]:
    """The authors' (corrector, pseudo) for this kind of network and number of intervals."""
    if member(net, "latent") or member(net, "guided"):
        return "pseudo", False
    return "same" if intervals <= CORRECTED_INTERVALS else "off", intervals <= PSEUDO_INTERVALS


def save_statistics(statistics: Statistics, path) -> None:
    """Write a .safetensors file. An error leaves no partial file."""
    tensors = {name: getattr(statistics, name) for name in ("sigmas", "l", "s", "b")}
    write_safetensors(path, tensors, {ENTRY: json.dumps(statistics.metadata)})


def load_statistics(path) -> Statistics:
    """Read a file of ``save_statistics``. Raises UserError if it is missing or unusable."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"dpm_v3: cannot read the statistics {path}: {error.strerror or error}") from None
    tensors, metadata = read_safetensors(data, str(path))
    entry = json_entry(metadata, ENTRY, str(path))
    missing = [name for name in ("sigmas", "l", "s", "b") if name not in tensors]
    if missing:
        raise UserError(f"{path} is not a statistics file of dpm_v3: '{missing[0]}' is missing")
    sigmas, l, s, b = (tensors[name].double() for name in ("sigmas", "l", "s", "b"))  # noqa: E741
    found = Statistics(sigmas, l, s, b, entry)
    shapes = {found.l.shape, found.s.shape, found.b.shape}
    if len(shapes) > 1 or found.l.ndim != 4 or found.sigmas.shape != found.l.shape[:1] or len(found.sigmas) < 2:
        raise UserError(f"{path}: the shapes of the statistics do not match; make the file again")
    if not all(value.isfinite().all() for value in (found.sigmas, found.l, found.s, found.b)):
        raise UserError(f"{path}: the statistics are not finite; make the file again")
    if (found.sigmas <= 0).any() or (found.sigmas.diff() >= 0).any():
        raise UserError(f"{path}: the noise levels must be positive and decrease; make the file again")
    return found


def node_slopes(lambdas: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """d values / d lambda at the nodes [N,...]: slope of the parabola through three neighbours."""
    edge = 2 if len(lambdas) > 2 else 1
    return torch.gradient(values, spacing=(lambdas,), dim=0, edge_order=edge)[0]


class Curves:
    """The statistics between their nodes.

    l is a cubic Hermite curve with the slopes of ``node_slopes``, which the estimate of df/dlambda
    uses too. s and b are piecewise linear.
    """

    def __init__(self, statistics: Statistics):
        self.nodes = -statistics.sigmas.double().log()
        self.l, self.s, self.b = (value.double() for value in (statistics.l, statistics.s, statistics.b))
        self.slopes = node_slopes(self.nodes, self.l)

    def cell(self, at: float) -> int:
        """Index of the cell that contains ``at``: of the last node before it."""
        return int(torch.searchsorted(self.nodes, at)) - 1 if at > self.nodes[0] else 0

    def values(self, lambdas: torch.Tensor, k: int):
        """(l, s, b), each [Q,C,H,W], at points lambdas [Q] of the cell from node k to k + 1."""
        k = min(k, len(self.nodes) - 2)
        width = self.nodes[k + 1] - self.nodes[k]
        u = ((lambdas - self.nodes[k]) / width).reshape(-1, 1, 1, 1)
        rise = self.l[k + 1] - self.l[k]
        m0, m1 = width * self.slopes[k] - rise, width * self.slopes[k + 1] - rise
        value = self.l[k] + u * rise + u * (1 - u) * ((1 - u) * m0 - u * m1)
        return value, torch.lerp(self.s[k], self.s[k + 1], u), torch.lerp(self.b[k], self.b[k + 1], u)


@dataclass(frozen=True)
class Step:
    """Integrals of the statistics over a step in lambda, each [C,H,W] or broadcastable.

    l_start, l_end   l at both ends
    decay            exp(-L)
    growth           exp(S)
    bias             B = int exp(-S) b
    moments          [POWERS,C,H,W]: exp(-L) int exp(L + S) u^j, u = 0..1 along the step
    drift            exp(-L) int exp(L + S) B
    """

    l_start: torch.Tensor
    l_end: torch.Tensor
    decay: torch.Tensor
    growth: torch.Tensor
    bias: torch.Tensor
    moments: torch.Tensor
    drift: torch.Tensor


class Constants:
    """All numbers of a schedule: its steps, and the weights of their polynomials, made once.

    steps: float64 on the CPU.
    """

    def __init__(self, steps: list[Step]):
        self._steps = steps
        self._moved: dict[tuple, list[Step]] = {}
        self._weights: dict[tuple, list] = {}

    def step(self, i: int, x: torch.Tensor) -> Step:
        """Step i in the dtype and on the device of x; all steps are moved by the first call."""
        key = (x.device, x.dtype)
        if key not in self._moved:
            self._moved = {key: _move(self._steps, x)}
            self._weights = {}
        return self._moved[key][i]

    def weights(self, i: int, x: torch.Tensor, places: list[float], pseudo: bool) -> list[torch.Tensor]:
        """``step_weights`` of step i, like x."""
        moments = self.step(i, x).moments
        key = (i, *places, pseudo)
        if key not in self._weights:
            self._weights[key] = step_weights(moments, places, pseudo)
        return self._weights[key]


def _move(steps: list[Step], x: torch.Tensor) -> list[Step]:
    """The steps in the dtype and on the device of x, in one copy.

    Statistics that are the same for all pixels stay numbers of the CPU.
    """
    names = [entry.name for entry in fields(Step)]
    tensors = [getattr(step, name).to(x.dtype) for step in steps for name in names]
    if x.device.type != "cpu":
        if all(tensor.numel() in (1, POWERS) for tensor in tensors):
            tensors = [tensor.reshape(tensor.shape[:-3]) for tensor in tensors]
        else:
            flat = to_device(torch.cat([tensor.flatten() for tensor in tensors]), x.device)
            parts = flat.split([tensor.numel() for tensor in tensors])
            tensors = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    width = len(names)
    return [Step(*tensors[k : k + width]) for k in range(0, len(tensors), width)]


@functools.cache
def _quadrature():
    """Points and weights [Q] on 0..1, and the matrix [Q,Q] that integrates from 0 to each point."""
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    points, weights = 0.5 * (points + 1), 0.5 * weights
    powers = np.arange(POINTS)
    integrals = points[:, None] ** (powers + 1) / (powers + 1)
    matrix = integrals @ np.linalg.inv(points[:, None] ** powers)
    return tuple(torch.from_numpy(value) for value in (points, weights, matrix))


def make_step(curves: Curves, start: float, end: float) -> Step:
    """The integrals from lambda = start to end > start, by Gauss-Legendre on pieces of cells."""
    points, weights, matrix = _quadrature()
    inside = [node for node in curves.nodes.tolist() if start < node < end]
    edges = [start]
    for a, b in itertools.pairwise([start, *inside, end]):
        count = math.ceil((b - a) / PIECE)
        edges += [a + (b - a) * k / count for k in range(1, count + 1)]
    zero = torch.zeros_like(curves.l[0])
    total_l, total_s, bias, drift = zero, zero, zero, zero
    moments = [zero] * POWERS

    def total(values):
        return torch.einsum("q,q...->...", weights, values)

    def running(values):
        return torch.einsum("qp,p...->q...", matrix, values)

    for a, b in itertools.pairwise(edges):
        width = b - a
        at = a + width * points
        l, s, slope = curves.values(at, curves.cell(0.5 * (a + b)))  # noqa: E741
        sums = total_s + width * running(s)
        source = (-sums).exp() * slope
        weight = width * (total_l + width * running(l) + sums).exp()
        drift = drift + total(weight * (bias + width * running(source)))
        u = ((at - start) / (end - start)).reshape(-1, 1, 1, 1)
        moments = [moment + total(weight * u**j) for j, moment in enumerate(moments)]
        bias = bias + width * total(source)
        total_l, total_s = total_l + width * total(l), total_s + width * total(s)
    first, last = (curves.values(torch.tensor([at], dtype=torch.float64), curves.cell(at))[0][0] for at in (start, end))
    decay = (-total_l).exp()
    return Step(first, last, decay, total_s.exp(), bias, torch.stack(moments) * decay, drift * decay)


def step_weights(moments: torch.Tensor, places: list[float], pseudo: bool = False) -> list[torch.Tensor]:
    """Weights of the values g in the integral of their interpolating polynomial.

    moments: [POWERS,C,H,W], see ``Step``.
    places: u of each g; 0 is the start of the step, 1 its end.
    pseudo: the coefficient of u^j is the divided difference of the first j + 1 places, instead of
        that of the whole polynomial. Default False.
    """
    count = len(places)
    if pseudo:
        matrix = np.zeros((count, count))
        for j in range(count):
            for k in range(j + 1):
                matrix[j, k] = 1 / math.prod(places[k] - places[m] for m in range(j + 1) if m != k)
    else:
        matrix = np.linalg.inv(np.array(places)[:, None] ** np.arange(count))
    weights: list[Any] = [sum(float(matrix[j, k]) * moments[j] for j in range(count)) for k in range(count)]
    return weights


@functools.lru_cache(maxsize=2)
def _read(path: str, stamp: int) -> Statistics:
    return load_statistics(path)


@functools.lru_cache(maxsize=2)
def _digest(path: str, stamp: int) -> str:
    return sha256_of(path)


@functools.lru_cache(maxsize=2)
def _constants_of_file(path: str, stamp: int, sigmas: tuple[float, ...]) -> Constants:
    return _constants(_read(path, stamp), sigmas)


@functools.lru_cache(maxsize=8)
def _plain_constants(kind: str, sigmas: tuple[float, ...]) -> Constants:
    l, s = (torch.full((2, 1, 1, 1), value) for value in CONSTANT[kind])  # noqa: E741
    ends = torch.tensor([sigmas[0], sigmas[-1]], dtype=torch.float64)
    return _constants(Statistics(ends, l, s, torch.zeros_like(l)), sigmas)


def _constants(statistics: Statistics, sigmas: tuple[float, ...]) -> Constants:
    curves = Curves(statistics)
    return Constants([make_step(curves, -math.log(a), -math.log(b)) for a, b in itertools.pairwise(sigmas)])


def _check(statistics: Statistics, net, sigmas: tuple[float, ...], path: str) -> None:
    """Raises UserError unless the statistics are those of the network and cover the schedule."""
    made = statistics.metadata
    known, own = made.get("network_hash"), member(net, "weights_hash")
    if known and own and known != own:
        raise UserError(
            f"{path} has the statistics of another network ({known[:12]}, not {own[:12]}): make them with"
            f"  {_command(net, path)}"
        )
    rate, rated = guidance_rate(net), made.get("guidance_rate")
    if rate != rated:
        raise UserError(f"{path} was made for guidance_rate={rated}, the network has {rate}: make a file for this rate")
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    if tuple(statistics.l.shape[1:]) != shape:
        found = "x".join(map(str, statistics.l.shape[1:]))
        raise UserError(f"{path} is for images of {found}, those of the network have {'x'.join(map(str, shape))}")
    high, low = float(statistics.sigmas[0]), float(statistics.sigmas[-1])
    for sigma in (sigmas[0], sigmas[-1]):
        if not low * (1 - RANGE_SLACK) <= sigma <= high * (1 + RANGE_SLACK):
            raise UserError(f"sigma={sigma:g} is outside the range of the statistics {path}, {low:g}..{high:g}")


def _command(net, path=None) -> str:
    name = member(net, "dataset_name") or "NAME"
    return f"python -m tools.model_statistics --dataset_name={name}" + (f" --dest={path}" if path else "")


@register("dpm_v3")
class DPMSolverV3(Solver):
    """DPM-Solver-v3 multistep (Zheng et al. 2023, Section 3).

    The linear part given by the network's statistics is integrated exactly. The rest is integrated
    as the polynomial in lambda = -ln sigma through the newest max_order points. Follows the
    published code, except that the integrals are exact (docs/solvers.md). Thresholding is not
    supported. The callback gets the predicted points, a trajectory has the corrected ones.

    statistics: a file of tools/model_statistics.py, or one of
        auto: src/<dataset_name>/dpm_v3-<hash of the weights>.safetensors (the default);
        data: (l, s, b) = (1, 0, 0), the exponential integrator in data prediction, without a file;
        noise: (l, s, b) = (0, -1, 0), that in noise prediction, without a file.
    corrector: repeat every step but the last with the evaluation at the predicted point. The next
        interval reuses that evaluation, so it is free. The points of a step of order p are its
        start, its end and older ones, in this order.
        same: use the first p points; no correction if p = 1.
        pseudo: use the first p + 1 points, the first j + 1 for the j-th derivative.
        off: no correction.
        auto: pseudo for latent and guided models; for other pixel models same on up to 6 intervals,
        off on more (the default).
    pseudo: take the j-th derivative of the predictor from the newest j + 1 points, instead of all
        derivatives from all points. Default auto: True for pixel models without guidance on up to
        5 intervals.
    lower_order_final: p is at most the number of intervals left. Default True.
    """

    summary = "DPM-Solver-v3: multistep with statistics of the network, order 1-3"
    options = {
        "max_order": order_option(3),
        "statistics": Option(str, "auto", "file of model statistics, or auto, data, noise"),
        "corrector": Option(CORRECTORS, "auto", "correct each point with the evaluation there"),
        "pseudo": Option(("auto", "True", "False"), "auto", "derivatives from as few points as possible"),
        "lower_order_final": Option(bool, True, "lower order in the last steps"),
    }
    highest_order = 3
    one_step = False
    can_learn = False
    per_sample = False
    can_teach = False
    differentiable = False  # the coefficients of the steps are precomputed numbers

    def setup(self, net, sigmas, predictor=None):
        solver = copy.copy(super().setup(net, sigmas, predictor))
        solver.grid = tuple(sigmas.tolist())
        corrector, pseudo = published_variant(net, len(solver.grid) - 1)
        solver.variant = corrector if self.corrector == "auto" else self.corrector
        solver.pseudo_predictor = pseudo if self.pseudo == "auto" else self.pseudo == "True"
        if self.statistics in CONSTANT:
            solver.constants = _plain_constants(self.statistics, solver.grid)
            return solver
        auto = self.statistics == "auto"
        path = statistics_path(net) if auto else Path(self.statistics)
        if not path.is_file():
            raise UserError(
                f"dpm_v3: there are no statistics {path}: make them with  {_command(net, None if auto else path)}"
            )
        key = (str(path.resolve()), path.stat().st_mtime_ns)
        _check(_read(*key), net, solver.grid, str(path))
        solver.constants = _constants_of_file(*key, solver.grid)
        solver.fingerprint = _digest(*key)
        return solver

    def order(self, i: int, intervals: int) -> int:
        """Order of the step from point i."""
        return min(self.max_order, i + 1, intervals - i if self.lower_order_final else intervals)

    def step(self, run, state, i):
        x, history = state.x, state.history  # history: (g relative to point i, sigma)
        step, corrects = self.constants.step(i, x), self.variant != "off"
        if not history or not corrects:
            sigma = run.sigma(i, x)
            history = (*history, (sigma * (yield run.at(x, i)) - step.l_start * x, sigma))
        order = self.order(i, run.intervals)
        h = math.log(self.grid[i] / self.grid[i + 1])
        places = [math.log(self.grid[i] / self.grid[i - k]) / h for k in range(order)]
        values = [g for g, _ in history[::-1][:order]]
        base = step.decay * x - step.drift

        def extrapolated(places, values, pseudo):
            weights = self.constants.weights(i, x, places, pseudo)
            return base - sum(weight * g for weight, g in zip(weights, values, strict=True))

        following = extrapolated(places, values, self.pseudo_predictor)
        # The same values relative to the next point, where the integrals S and B start again.
        moved = tuple((step.growth * (g + step.bias), sigma) for g, sigma in history)
        if corrects and i + 1 < run.intervals:
            sigma = run.sigma(i + 1, x)
            f = sigma * (yield run.at(following, i + 1)) - step.l_end * following
            moved = (*moved, (f, sigma))
            places.insert(1, 1.0)
            values.insert(1, f / step.growth - step.bias)
            count = order if self.variant == "same" else order + 1
            following = extrapolated(places[:count], values[:count], self.variant == "pseudo")
        return State(following, moved[-self.keep :], state.updates + 1)
