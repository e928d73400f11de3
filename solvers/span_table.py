"""The table of the span solver: an explicit linear sampler as learned numbers.

    span = SpanSolver.preset("full", num_steps=5, sigma_min=0.002, sigma_max=80.0)
    span.measure_gaussian(net)             # only for first_step="gaussian"
    x = span.run(net, latents)             # [B,C,H,W], with gradients; latents: unit-variance noise
    x = sample(net, latents, solver="span", predictor=span)    # the same without gradients
    span.groups()                          # the learned parameters, {group: parameter}
    save_predictor(span, path); load_predictor(path)           # in training/checkpoint.py

Any explicit linear sampler is defined by a small table: its noise levels, the noise level passed to
the network at each, and the coefficients of the directions (``PRESETS`` names some). Between the
noise levels s_0 > ... > s_N (num_steps = N + 1 time steps) a trajectory is

    g_i     = (x_i - D(x_i, a_i s_i)) / s_i       direction; g_0 is analytical with a first step
    x_{i+1} = (1 + delta_i) x_i + gain_i (s_{i+1} - s_i) sum_j c_ij g_j

with a sum over all directions so far and sum_j c_ij = 1. If an interval has more than one call,
there are also directions at the intermediate points m_ik = s_{i+1}^r s_i^(1-r), 0 < r = r_ik < 1:

    e_ik    = x_i + (m_ik - s_i) sum_j c_ikj g_j  g_ik = (e_ik - D(e_ik, a_ik m_ik)) / m_ik

Because each row sums to one, x_i has noise level exactly s_i for any learned coefficients, as long
as delta_i = 0 and gain_i = 1. The learned scalars are offsets: c = c_theory(sigmas) + Delta.
c_theory are the coefficients of a classical solver on the current noise levels, with gradient.

There are two layouts of an interval. "ab" and the other multistep bases call the network at x_i and
the e_ik in one batch; the e_ik depend on the directions of earlier intervals. "midpoint" calls the
network at x_i first, then at the K points e_ik in one batch, and steps along those K directions.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from models.denoiser import member, shifted_layers
from models.inputs import draw_condition, draw_noise, initial_state
from solvers.deis import gauss_legendre, lagrange_basis
from solvers.former_names import FORMER_NAMES, current, with_current_names
from solvers.sampler import integrate, sample
from solvers.schedules import check_sigmas, get_schedule
from solvers.solver import Point, State, make_solver
from solvers.span_heads import HEADS, LIFTED, SHIFTS, SampleHead, SpatialHead, TimeHead
from torch_utils.errors import UserError
from torch_utils.kinds import MOST_STEPS, check_kinds, check_steps, defaults_of, kinds_of
from torch_utils.seeds import SeededGenerators
from torch_utils.transfer import to_device

GROUPS: tuple[str, ...] = (
    "knots",
    "substeps",
    "sigma_scale",
    "substep_sigma_scale",
    "coef_offset",
    "step_gain",
    "state_gain",
)

BASES: tuple[str, ...] = ("ab", "midpoint", "euler", "ipndm", "deis", "dpmpp", "unipc")
FIRST_STEPS: tuple[str, ...] = ("none", "zero", "gaussian")
LEAST_SHARE = 1e-6  # smallest share of an interval in ln(sigma_max / sigma_min): noise levels never coincide


@dataclass
class SpanConfig:
    """The configuration of a span solver."""

    # network and preset
    dataset_name: str | None = None
    img_resolution: int | None = None
    guidance_type: str | None = None
    guidance_rate: float | None = 0.0
    preset: str | None = None  # its name in PRESETS
    # structure
    num_steps: int = 5  # time steps; there are num_steps - 1 intervals
    parallel: int = 1  # K, the number of network calls in one batch
    first_step: str = "zero"  # none; zero: x / sqrt(1 + sigma^2); gaussian: for the data's mean and variance
    image_shape: list[int] | None = None  # [C,H,W] of the mean that measure_gaussian found
    base: str = "ab"  # the classical solver with the coefficients c_theory, one of BASES
    max_order: int = 3  # order of that solver
    lower_order_final: bool = True  # option of that solver, if it is dpmpp
    relative: bool = True  # c_theory on the current noise levels; False: always on the initial ones
    window: int | None = None  # learn the coefficients of this number of newest stages; None: all
    # initial noise levels
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    sigmas: list[float] | None = None  # explicit ones, instead of num_steps, the range and the schedule
    # learned groups, and their bounds
    learn: list[str] = field(default_factory=lambda: ["knots", "sigma_scale", "coef_offset", "state_gain"])
    sigma_scale_bound: float | None = 0.3  # |ln a|; None: unbounded
    step_gain_bound: float = 0.05  # |step_gain - 1|
    last_step_gains: int | None = None  # learn the step gain of this number of last intervals; None: all
    state_gain_bound: float = 0.05  # |delta|
    # optional networks beside the table (solvers/span_heads.py); their outputs are zero at first
    heads: list[str] = field(default_factory=list)  # names in HEADS
    img_channels: int | None = None  # for "spatial"
    embedding_width: int | None = None  # for "time" and "blocks": numbers that they shift in a call


CONFIG_KINDS = kinds_of(SpanConfig)


class _Config(dict):
    """A configuration that can also be read by former names."""

    def __missing__(self, name):
        return self[FORMER_NAMES[name]]


def current_config(config: Mapping) -> dict:
    """The same configuration under current names."""
    config = with_current_names(config)
    if isinstance(config.get("learn"), list):
        config["learn"] = [current(name) for name in config["learn"]]
    return config


PRESETS: dict[str, dict[str, Any]] = {
    # LD3 (Tong et al. 2024, "Learning to Discretize Denoising Diffusion ODEs"): schedule and
    # decoupled times of a fixed solver. Delta = 0; D is conditioned on a_i s_i.
    "ld3": {
        **{"first_step": "none", "base": "dpmpp", "schedule_type": "logsnr", "learn": ["knots", "sigma_scale"]},
        **{"sigma_scale_bound": None},
    },
    # S4S (Frankel et al. 2025): x_{i+1} = (t/s) x_i + (1 - t/s) sum of three b_j D_j. The b are
    # free and start from those of DPM++; the times are those of LD3. The b do not depend on the
    # noise levels, so S4S-Alt trains the two in turn. Here the coefficients of the three newest
    # directions are learned, not those of the three newest images, and rows sum to one.
    "s4s": {
        **{"first_step": "none", "base": "dpmpp", "schedule_type": "logsnr", "relative": False, "window": 3},
        **{"learn": ["knots", "sigma_scale", "coef_offset"], "sigma_scale_bound": None},
    },
    # DyWeight (Zhao et al. 2025): x += (tau_{n+1} - t_n) sum of three W_nj g_j and
    # t_{n+1} = t_n + (sum_j W_nj) (tau_{n+1} - t_n) on a fixed grid tau. With c = W / sum W these
    # are learned noise levels t_n and rows that sum to one. The last noise level is fixed, so the
    # free sum of the last row is the step gain of the last interval.
    "dyweight": {
        **{"first_step": "zero", "base": "ipndm", "relative": False, "window": 3, "sigma_scale_bound": None},
        **{"learn": ["knots", "sigma_scale", "coef_offset", "step_gain"], "last_step_gains": 1, "step_gain_bound": 0.5},
    },
    # Generalized solvers, GS (2025): x_{i+1} = sum_j A_ij x_j + sum_j C_ij D_j, DPM++(3M) on the
    # learned grid plus offsets for all earlier points. The x_j and D_j lie in the span of x_0 and
    # the g_j, up to the gain 1 + delta.
    "gs": {
        **{
            "first_step": "none",
            "base": "dpmpp",
            "schedule_type": "time_uniform",
            "schedule_rho": 1,
            "sigma_scale_bound": None,
        },
        **{"learn": ["knots", "sigma_scale", "coef_offset", "state_gain"]},
    },
    # AMED-Solver (Zhou et al. 2024, eq. 8) without its network: e = x + (m - s) g, x += c (t - s)
    # g_m, m = t^r s^(1-r), with one r, c and a per interval. Also AdaSDE with gamma = 0.
    "amed-table": {
        **{"first_step": "zero", "base": "midpoint", "schedule_type": "time_uniform", "schedule_rho": 1},
        **{"learn": ["substeps", "substep_sigma_scale", "step_gain"], "step_gain_bound": 0.05},
    },
    # EPD-Solver (Zhu et al. 2025): e_k = x + (m_k - s) g, x += (t - s) sum_k w_k c_k g_k, with its
    # K calls in one batch. Here step_gain = sum_k w_k c_k and c = w_k c_k / step_gain, which may be
    # negative.
    "epd": {
        **{"first_step": "zero", "base": "midpoint", "parallel": 2, "schedule_type": "time_uniform", "schedule_rho": 1},
        **{
            "learn": ["substeps", "substep_sigma_scale", "step_gain", "coef_offset"],
            "window": 1,
            "sigma_scale_bound": 0.05,
        },
    },
    # Everything, relative to Adams-Bashforth of order 3 on the current noise levels.
    "full": {
        **{
            "first_step": "gaussian",
            "learn": ["knots", "substeps", "sigma_scale", "substep_sigma_scale", "coef_offset", "state_gain"],
        },
        **{"sigma_scale_bound": 1.0},
    },
}


def _rename_parameters(solver, state: dict, prefix: str, *more) -> None:
    """Rename the parameters of a state dict that has former names, before it is loaded."""
    for name in [name for name in state if name.removeprefix(prefix) in FORMER_NAMES]:
        state[prefix + FORMER_NAMES[name.removeprefix(prefix)]] = state.pop(name)


@dataclass(frozen=True)
class Row:
    """The place of a row of coefficients.

    interval: i.
    substep: k if the row leads to the intermediate point e_ik; None: to x_{i+1}.
    count: number of coefficients, one per direction so far, the oldest first.
    first: index of the first learned coefficient.
    """

    interval: int
    substep: int | None
    count: int
    first: int

    @property
    def free(self) -> int:
        """Number of learned offsets. The newest coefficient follows from the sum of one."""
        return max(self.count - 1 - self.first, 0)


@dataclass(frozen=True)
class Plan:
    """The numbers of one trajectory, float64 on the CPU, with gradients.

    sigmas: noise levels [N + 1].
    sigmas_cond: noise levels [N + 1] to condition the network on.
    steps: per interval (coefficients, step gain, state gain).
    substeps: per interval, one (noise level, sigma_cond, coefficients) per intermediate point.
    """

    sigmas: torch.Tensor
    sigmas_cond: torch.Tensor
    steps: list = field(default_factory=list)
    substeps: list = field(default_factory=list)

    def moves(self) -> "Moves":
        """What the steps multiply with."""
        steps = [
            (c, step_gain * (self.sigmas[i + 1] - self.sigmas[i]), 1 + state_gain)
            for i, (c, step_gain, state_gain) in enumerate(self.steps)
        ]
        return Moves(self.sigmas, self.sigmas_cond, steps, self.substeps)


@dataclass(frozen=True)
class Moves:
    """The factors of one trajectory: float64 on the CPU, or like its states.

    sigmas, sigmas_cond: see ``Plan``.
    steps: per interval (coefficients, length of the step, gain of the state).
    substeps: per interval, one (noise level, sigma_cond, coefficients) per intermediate point.
    """

    sigmas: torch.Tensor
    sigmas_cond: torch.Tensor
    steps: list
    substeps: list

    def beside(self, x: torch.Tensor) -> "Moves":
        """These factors for states like x.

        Without gradients they stay on the CPU, where kernels take them as arguments. With gradients
        one copy takes all of them to the device of x, and their gradients come back in one copy.
        """
        tensors = [self.sigmas, self.sigmas_cond, *(value for step in self.steps for value in step)]
        tensors += [value for points in self.substeps for point in points for value in point]
        if x.device.type == "cpu" or not any(value.requires_grad for value in tensors):
            return self
        flat = to_device(torch.cat([value.reshape(-1) for value in tensors]).to(x.dtype), x.device)
        parts = flat.split([value.numel() for value in tensors])
        moved = iter([part.view(value.shape) for part, value in zip(parts, tensors, strict=True)])
        sigmas, sigmas_cond = next(moved), next(moved)
        steps = [tuple(next(moved) for _ in step) for step in self.steps]
        substeps = [[tuple(next(moved) for _ in point) for point in points] for points in self.substeps]
        return Moves(sigmas, sigmas_cond, steps, substeps)


class _Coordinates:
    """What the step of a linear solver needs of a run. sigmas: noise levels [N + 1]."""

    predictor = None

    def __init__(self, sigmas: torch.Tensor):
        self.sigmas = sigmas
        self.intervals = self.updates = len(sigmas) - 1

    def sigma(self, i: int, x) -> torch.Tensor:
        return self.sigmas[i]

    def sigma_cond(self, i: int) -> None:
        return None

    def at(self, x, i: int) -> Point:
        return Point(x, self.sigmas[i], index=i)


class SpanSolver(nn.Module):
    """The learned table (see the module).

    Keyword arguments are the fields of ``SpanConfig``; ``config`` holds all of them. The parameters
    stay float64 when the module is moved. Those of the groups in ``learn`` require gradients:

        knots [N]      logits of each interval's share of ln(sigma_max / sigma_min)
        substeps [I]   logits of r, of all intermediate points
        sigma_scale    ln a = sigma_scale_bound tanh(sigma_scale), of the calls at schedule points
        substep_sigma_scale [I]   the same for the calls at intermediate points
        coef_offset    Delta of all rows in order, without their newest entry
        step_gain      gain = 1 + step_gain_bound tanh(step_gain), of the last ``last_step_gains``
                       intervals
        state_gain     delta = state_gain_bound tanh(state_gain / state_gain_bound), of the
                       intervals that begin with a call

    Raises UserError for impossible settings.
    """

    kind = "span"  # in the predictor's file
    solver = "span"  # its name in SOLVERS

    def __init__(self, **config):
        super().__init__()
        config = current_config(config)
        unknown = sorted(set(config) - set(CONFIG_KINDS))
        if unknown:
            raise UserError(f"unknown setting '{unknown[0]}' of a span solver; choose from {', '.join(CONFIG_KINDS)}")
        self.config = _Config(copy.deepcopy({**defaults_of(SpanConfig), **config}))
        self.provenance: dict = {}
        initial = self._check()
        self.rows = self._make_rows()
        shares = (initial[:-1] / initial[1:]).log() / math.log(float(initial[0] / initial[-1]))
        if float(shares.min()) <= LEAST_SHARE:
            raise UserError(f"sigmas: two noise levels nearly coincide: {initial.tolist()}; leave one of them out")
        points = sum(self.substep_count(i) for i in range(self.intervals))
        ratios = [
            (k + 1) / (self.substep_count(i) + 1) for i in range(self.intervals) for k in range(self.substep_count(i))
        ]
        calls = self.intervals - self.analytic
        gains = min(self.config["last_step_gains"] or self.intervals, self.intervals)
        start = {
            "knots": ((shares - LEAST_SHARE) / (1 - len(shares) * LEAST_SHARE)).log(),
            "substeps": torch.tensor(ratios, dtype=torch.float64).logit(),
            "sigma_scale": torch.zeros(calls, dtype=torch.float64),
            "substep_sigma_scale": torch.zeros(points, dtype=torch.float64),
            "coef_offset": torch.zeros(sum(row.free for row in self.rows), dtype=torch.float64),
            "step_gain": torch.zeros(gains, dtype=torch.float64),
            "state_gain": torch.zeros(calls, dtype=torch.float64),
        }
        for name in GROUPS:
            setattr(self, name, nn.Parameter(start[name], requires_grad=name in self.config["learn"]))
        self.heads = self._make_heads()
        self.register_buffer("mean", None)
        self.register_buffer("variance", None)
        self._moved_mean: tuple = (None, None)  # see ``_mean_beside``
        if self.config["image_shape"] is not None:
            self._set_gaussian(torch.zeros(self.config["image_shape"]), torch.zeros(()))
        self.register_load_state_dict_pre_hook(_rename_parameters)
        self._theory = None if self.config["relative"] else [row.detach() for row in self._base(*self._levels())]

    def __getattr__(self, name):
        return super().__getattr__(current(name))

    @classmethod
    def preset(cls, name: str, **changes) -> "SpanSolver":
        """The span solver ``name`` of ``PRESETS``, with the given settings changed."""
        if name not in PRESETS:
            raise UserError(f"unknown preset '{name}' of the span solver; choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], "preset": name, **current_config(changes)})

    # Structure

    def _check(self) -> torch.Tensor:
        """The initial noise levels [N + 1]. Raises UserError for impossible settings."""
        c = self.config
        if torch.is_tensor(c["sigmas"]):
            c["sigmas"] = c["sigmas"].tolist()
        check_kinds(c, CONFIG_KINDS)
        check_steps(c, "num_steps", "sigmas", "window")
        calls = (len(c["sigmas"]) if c["sigmas"] else c["num_steps"]) * c["parallel"]
        if calls > MOST_STEPS:
            raise UserError(
                f"num_steps and parallel: {calls} network calls are too many; at most {MOST_STEPS} are allowed"
            )
        for name, known in (("base", BASES), ("first_step", FIRST_STEPS)):
            if c[name] not in known:
                raise UserError(f"{name}={c[name]!r}: choose from {', '.join(known)}")
        for name, known in (("learn", GROUPS), ("heads", HEADS)):
            wrong = [part for part in c[name] if part not in known]
            if wrong:
                raise UserError(f"{name}: unknown '{wrong[0]}'; choose from {', '.join(known)}")
        if "spatial" in c["heads"] and not (isinstance(c["img_channels"], int) and c["img_channels"] > 0):
            raise UserError("the head 'spatial' needs img_channels, the number of channels of the images or latents")
        width = c["embedding_width"]
        shifts = [name for name in SHIFTS if name in c["heads"]]
        if len(shifts) > 1:
            raise UserError("heads: 'blocks' contains 'time'; name one of them")
        if shifts and not (isinstance(width, int) and width > 0):
            raise UserError(f"the head '{shifts[0]}' needs embedding_width, the number of values that it shifts")
        for name, most in (("parallel", 16), ("window", None), ("last_step_gains", None), ("max_order", 4)):
            value = c[name]
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (most or value)
            if not (whole or (name in ("window", "last_step_gains") and value is None)):
                raise UserError(f"{name}={value!r} must be a whole number" + (f" in 1..{most}" if most else " above 0"))
        if c["parallel"] > 1 and c["base"] not in ("ab", "midpoint"):
            raise UserError(f"parallel={c['parallel']} needs base='ab' or 'midpoint', not '{c['base']}'")
        for name, limit in (("sigma_scale_bound", math.inf), ("step_gain_bound", 1), ("state_gain_bound", 1)):
            if c[name] is None and name == "sigma_scale_bound":
                continue
            if not (isinstance(c[name], int | float) and 0 < c[name] < limit):
                raise UserError(f"{name}={c[name]!r} must be a number above 0" + ("" if limit > 1 else " and below 1"))
        if c["sigmas"] is None:
            names = ("num_steps", "sigma_min", "sigma_max", "schedule_type", "schedule_rho")
            return get_schedule(**{name: c[name] for name in names})
        sigmas = check_sigmas(torch.as_tensor(c["sigmas"], dtype=torch.float64).detach())
        c["sigmas"] = sigmas.tolist()
        c["num_steps"], c["sigma_max"], c["sigma_min"] = len(sigmas), c["sigmas"][0], c["sigmas"][-1]
        return sigmas

    @property
    def intervals(self) -> int:
        return self.config["num_steps"] - 1

    @property
    def analytic(self) -> bool:
        """Whether the first direction is analytical."""
        return self.config["first_step"] != "none"

    @property
    def nested(self) -> bool:
        """Whether intermediate points depend on the direction at the start of their interval."""
        return self.config["base"] == "midpoint"

    def substep_count(self, i: int) -> int:
        """Number of intermediate points of interval i."""
        if self.nested:
            return self.config["parallel"]
        return self.config["parallel"] - 1 if i else 0  # there is no earlier direction in interval 0

    def directions_before(self, i: int) -> int:
        """Number of directions of the intervals before interval i."""
        return i + sum(self.substep_count(j) for j in range(i))

    def _make_rows(self) -> list[Row]:
        """All rows in the order of ``coef_offset``: per interval the points e_ik, then x_{i+1}."""
        rows, stages, window = [], list[int](), self.config["window"]

        def add(interval, substep):
            newest = stages[-1] if stages else 0
            first = 0 if window is None else sum(stage <= newest - window for stage in stages)
            rows.append(Row(interval, substep, len(stages), first))

        for i in range(self.intervals):
            points = self.substep_count(i)
            if self.nested:
                stages.append(2 * i)
            for k in range(points):
                add(i, k)
            stages += [2 * i + 1] * points if self.nested else [i] * (points + 1)
            add(i, None)
        return rows

    def _make_heads(self) -> nn.ModuleDict:
        heads, steps = nn.ModuleDict(), [row for row in self.rows if row.substep is None]
        if "sample" in self.config["heads"]:
            heads["sample"] = SampleHead([row.free for row in steps], [row.count - 1 - row.free for row in steps])
        if "spatial" in self.config["heads"]:
            heads["spatial"] = SpatialHead(self.config["img_channels"], {r.interval: r.count for r in steps[-LIFTED:]})
        for name in SHIFTS:
            if name in self.config["heads"]:
                heads[name] = TimeHead(self.evaluations(), self.config["embedding_width"])
        return heads

    @property
    def shift_head(self) -> TimeHead | None:
        """The head "time" or "blocks", if there is one."""
        return next((self.heads[name] for name in SHIFTS if name in self.heads), None)

    def head_parameters(self) -> list[nn.Parameter]:
        """Weights of the heads, float32. ``groups`` does not contain them."""
        return list(self.heads.parameters())

    def groups(self) -> dict[str, nn.Parameter]:
        """The learned parameters by group, without empty groups."""
        learned = {name: getattr(self, name) for name in GROUPS if name in self.config["learn"]}
        return {name: value for name, value in learned.items() if value.numel()}

    def scalars(self) -> int:
        """Number of learned degrees of freedom."""
        groups = self.groups()
        # A constant added to all logits of ``knots`` changes nothing.
        return sum(value.numel() for value in groups.values()) - ("knots" in groups)

    def evaluations(self) -> int:
        """Number of network calls per trajectory (guidance may double their cost)."""
        return self.intervals - self.analytic + sum(self.substep_count(i) for i in range(self.intervals))

    def check_network(self, net) -> None:
        """Raises UserError unless the heads fit the channels and the noise embedding of net."""
        own, channels = self.config["img_channels"], getattr(net, "img_channels", None)
        if "spatial" in self.heads and channels not in (None, own):
            raise UserError(f"the head 'spatial' of the span solver needs {own} channels, this network has {channels}")
        if self.shift_head is not None:
            blocks = "blocks" in self.heads
            own = self.config["embedding_width"]
            width = sum(cast(int, layer.out_features) for layer in shifted_layers(net, blocks))
            if width != own:
                name = "blocks" if blocks else "time"
                raise UserError(
                    f"the head '{name}' needs a noise embedding of {own} numbers, this network's has {width}"
                )

    # Numbers

    def sigmas(self) -> torch.Tensor:
        """The noise levels s_0 > ... > s_N, float64 [N + 1] on the CPU, with gradient."""
        high, low = float(self.config["sigma_max"]), float(self.config["sigma_min"])
        shares = torch.softmax(self.knots, 0) * (1 - self.intervals * LEAST_SHARE) + LEAST_SHARE
        between = high * (-math.log(high / low) * shares.cumsum(0)[:-1]).exp()
        return torch.cat([between.new_tensor([high]), between, between.new_tensor([low])])

    def sigmas_cond(self) -> torch.Tensor:
        """The noise levels a_i s_i to condition the network on, like ``sigmas``."""
        return self._sigmas_cond(self.sigmas())

    def _sigmas_cond(self, sigmas):
        ones = sigmas.new_ones(1)
        return sigmas * torch.cat([*([ones] if self.analytic else []), self._sigma_factor(self.sigma_scale), ones])

    def _sigma_factor(self, raw):
        bound = self.config["sigma_scale_bound"]
        return (raw if bound is None else bound * torch.tanh(raw)).exp()

    def _levels(self):
        """(noise levels [N + 1], list of the intermediate noise levels per interval)."""
        sigmas, r = self.sigmas(), torch.sigmoid(self.substeps)
        substeps, used = [], 0
        for i in range(self.intervals):
            part = r[used : used + self.substep_count(i)]
            substeps.append(sigmas[i + 1] ** part * sigmas[i] ** (1 - part))
            used += len(part)
        return sigmas, substeps

    def _base(self, sigmas, substeps) -> list[torch.Tensor]:
        """The coefficients c_theory on these noise levels, one tensor [count] per row."""
        c = self.config
        if c["base"] == "midpoint":
            parts = (1 if row.substep is not None else c["parallel"] for row in self.rows)
            return [
                sigmas.new_tensor([0.0] * (row.count - n) + [1 / n] * n)
                for row, n in zip(self.rows, parts, strict=True)
            ]
        if c["base"] != "ab":
            return self._symbolic(sigmas)
        nodes = [level for i in range(self.intervals) for level in (sigmas[i], *substeps[i])]
        rows = []
        for row in self.rows:
            start = sigmas[row.interval]
            target = sigmas[row.interval + 1] if row.substep is None else substeps[row.interval][row.substep]
            newest = nodes[max(row.count - c["max_order"], 0) : row.count]
            points, weights = gauss_legendre(start, target, 2)  # exact for cubics
            found = [(weights * basis).sum() / (target - start) for basis in lagrange_basis(points, newest)]
            rows.append(torch.cat([sigmas.new_zeros(row.count - len(newest)), torch.stack(found)]))
        return rows

    def _symbolic(self, sigmas) -> list[torch.Tensor]:
        """The rows of a registered linear solver.

        The solver steps with coordinates in the span of the directions instead of images. This also
        works for solvers that combine denoised images x - sigma g. The rows lead from each point
        where the network is called to the next: for UniPC these are the predicted points, and the
        correction of a point is part of the next row.
        """
        names = ("max_order", "lower_order_final")
        common = {name: self.config[name] for name in names} | {"thresholding": False}
        solver = make_solver(self.config["base"], common=common).setup(None, sigmas)
        directions = torch.eye(self.intervals, dtype=torch.float64)
        run = _Coordinates(sigmas)
        state, points = State(sigmas.new_zeros(self.intervals)), list[torch.Tensor]()
        for i in range(self.intervals):
            step = solver.step(run, state, i)
            answer = None
            try:
                while True:
                    point = step.send(answer)
                    assert isinstance(point, Point)  # these solvers have no calls in one batch
                    answer = directions[len(points)]
                    points.append(point.x)
            except StopIteration as end:
                state = end.value
        points.append(state.x)
        return [
            ((after - before) / (sigmas[i + 1] - sigmas[i]))[: i + 1]
            for i, (before, after) in enumerate(itertools.pairwise(points))
        ]

    def _coefficients(self, sigmas, substeps) -> list[torch.Tensor]:
        """The coefficients c_theory + Delta of all rows."""
        theory = self._base(sigmas, substeps) if self._theory is None else self._theory
        result, used, offsets = [], 0, self.coef_offset
        for row, base in zip(self.rows, theory, strict=True):
            own = offsets[used : used + row.free]
            used += row.free
            if row.free:
                base = base + torch.cat([own.new_zeros(row.first), own, -own.sum().reshape(1)])
            result.append(base)
        return result

    def plan(self) -> Plan:
        """All numbers of a trajectory, with gradient."""
        sigmas, substeps = self._levels()
        plan = Plan(sigmas, self._sigmas_cond(sigmas), substeps=[[] for _ in range(self.intervals)])
        step_gains = 1 + self.config["step_gain_bound"] * torch.tanh(self.step_gain)
        step_gains = torch.cat([step_gains.new_ones(self.intervals - len(step_gains)), step_gains])
        bound, own = self.config["state_gain_bound"], self.state_gain
        state_gains = torch.cat([own.new_zeros(self.intervals - len(own)), bound * torch.tanh(own / bound)])
        factors = self._sigma_factor(self.substep_sigma_scale)
        for row, c in zip(self.rows, self._coefficients(sigmas, substeps), strict=True):
            if row.substep is None:
                plan.steps.append((c, step_gains[row.interval], state_gains[row.interval]))
            else:
                level, used = substeps[row.interval][row.substep], sum(map(len, plan.substeps))
                plan.substeps[row.interval].append((level, factors[used] * level, c))
        return plan

    def coefficients(self, i: int, substep: int | None = None) -> torch.Tensor:
        """The coefficients of the step from s_i, float64 [number of directions], of sum one.

        substep: k, for the coefficients of the intermediate point e_ik instead. Default None.
        """
        plan = self.plan()
        return plan.steps[i][0] if substep is None else plan.substeps[i][substep][2]

    @torch.no_grad()
    def table(self) -> dict:
        """All numbers as a dict for JSON.

        "intervals" has one dict per interval: "sigma", "sigma_cond" (the noise level that the
        network is conditioned on; None if the direction is analytical), "state_gain", "step_gain",
        "coefficients" of the step, and "substeps", a list of dicts with "sigma", "sigma_cond" and
        "coefficients".
        """
        plan = self.plan()
        intervals = []
        for i, (c, step_gain, state_gain) in enumerate(plan.steps):
            points = [
                {"sigma": float(level), "sigma_cond": float(sigma_cond), "coefficients": row.tolist()}
                for level, sigma_cond, row in plan.substeps[i]
            ]
            sigma_cond = None if i == 0 and self.analytic else float(plan.sigmas_cond[i])
            own = {
                "sigma": float(plan.sigmas[i]),
                "sigma_cond": sigma_cond,
                "state_gain": float(state_gain),
                "step_gain": float(step_gain),
            }
            intervals.append({**own, "coefficients": c.tolist(), "substeps": points})
        names = ("preset", "first_step", "base", "parallel")
        result = {name: self.config[name] for name in names}
        result["heads"] = list(self.heads)  # with heads the table is not the whole solver
        result |= {"evaluations": self.evaluations(), "sigmas": plan.sigmas.tolist(), "intervals": intervals}
        return result

    # The first step

    def first_direction(self, x, sigma):
        """The analytical direction [B,C,H,W] at x [B,C,H,W], for ``afs_direction``."""
        if self.config["first_step"] == "zero":
            return x / (1 + sigma**2).sqrt()
        if self.mean is None:
            raise UserError("first_step=gaussian: call measure_gaussian(net) of the span solver before sampling")
        if self.mean.shape != x.shape[1:]:
            raise UserError(f"the span solver is for images of shape {list(self.mean.shape)}, not {list(x.shape[1:])}")
        return (x - self._mean_beside(x)) * (sigma / (self.variance.to(x.dtype) + sigma**2))

    def _mean_beside(self, x) -> torch.Tensor:
        """The mean image in the dtype and on the device of x. A copy on another device is kept."""
        if x.device.type == "cpu":
            return self.mean.to(x.dtype)
        key = (id(self.mean), self.mean._version, x.device, x.dtype)
        if self._moved_mean[0] != key:
            self._moved_mean = (key, to_device(self.mean.to(x.dtype), x.device))
        return self._moved_mean[1]

    def _set_gaussian(self, mean, variance) -> None:
        self.mean, self.variance = mean.to(torch.float64), variance.to(torch.float64)
        self.config["image_shape"] = list(mean.shape)

    @torch.no_grad()
    def measure_gaussian(self, net, calls: int = 256, seed: int = 0, batch: int = 64, make_cond=None) -> None:
        """Estimate the data's mean image mu and variance v with the network, for "gaussian".

        net: the denoiser.
        calls: number of noise images at sigma_max to denoise. Default 256.
        seed: seed of the first image. Default 0.
        batch: images per call of the network. Default 64.
        make_cond: function from the generators of a batch to its cond; text-to-image networks need
            prompts. Default: that of the network.

        For Gaussian data D = mu + v / (v + sigma^2) (x - mu). For restoration networks x and D are
        differences from the degraded image. mu is the mean of D. v follows from
        the slope of D against x, by least squares over all pixels; a negative slope counts as 0. At
        sigma = 80 the slope is below 1e-4, so that v hardly matters.
        """
        sigma = torch.tensor(float(self.config["sigma_max"]), dtype=torch.float64)
        device = next(net.parameters(), torch.empty(0)).device
        make_cond = partial(draw_condition, net) if make_cond is None else make_cond
        total: dict[str, Any] = {"x": 0.0, "d": 0.0, "xd": 0.0, "xx": 0.0}
        images = 0
        for start in range(0, calls, batch):
            generators = SeededGenerators(range(seed + start, seed + min(start + batch, calls)))
            noise = draw_noise(net, generators).to(device)
            cond = make_cond(generators)
            x, prior = initial_state(net, noise, float(sigma), cond), member(net, "prior_mean")(**cond)
            denoised = net(x, sigma.to(x), **cond)
            x, denoised = ((value - prior).to("cpu", torch.float64) for value in (x, denoised))
            for name, value in (("x", x), ("d", denoised), ("xd", x * denoised), ("xx", x * x)):
                total[name] = total[name] + value.sum(0)
            images += len(x)
        mean, noise = total["d"] / images, total["x"] / images
        slope = (total["xd"] / images - mean * noise).sum() / (total["xx"] / images - noise**2).sum()
        slope = slope.clamp(0, 0.5)
        self._set_gaussian(mean, slope / (1 - slope) * sigma**2)

    # Sampling

    def brings(self, num_steps=None, sigmas=None, sigmas_cond=None, afs=None, plan: Plan | None = None) -> dict:
        """Return sigmas, sigmas_cond and afs for the sampler. UserError if others are given.

        plan: that of the current parameters, if known. Default None, it is computed.
        """
        plan = self.plan() if plan is None else plan
        own = {"sigmas": plan.sigmas, "sigmas_cond": plan.sigmas_cond}
        for name, given in (("sigmas", sigmas), ("sigmas_cond", sigmas_cond)):
            if given is None:
                continue
            given = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
            if given.shape != own[name].shape or not torch.allclose(given, own[name].detach(), rtol=1e-6, atol=0):
                raise UserError(f"{name}: the span solver has its own; leave {name} out")
        if num_steps not in (None, self.config["num_steps"]):
            raise UserError(
                f"num_steps={num_steps}: the span solver has {self.config['num_steps']}; leave num_steps out"
            )
        if afs is not None and afs != self.afs:
            raise UserError(f"afs={afs}: the span solver has first_step={self.config['first_step']}; leave afs out")
        return {**own, "afs": self.first_direction if self.analytic else False}

    @property
    def afs(self) -> bool | str:
        """The first step as a value of the option afs: False, True (mean zero) or "gaussian"."""
        values: dict[str, bool | str] = {"none": False, "zero": True, "gaussian": "gaussian"}
        return values[self.config["first_step"]]

    def sample(self, net, latents, **options):
        """Images [B,C,H,W] from unit-variance noise; options: of ``solvers.sample``."""
        return sample(net, latents, predictor=self, **options)

    def run(self, net, latents, cond: Mapping | None = None, checkpointing=False, return_trajectory=False):
        """``solvers.integrate`` with this span solver.

        net, latents, cond, checkpointing: see ``integrate``.
        return_trajectory: return the states at all noise levels [N + 1,B,C,H,W]; default: images
            [B,C,H,W].
        """
        options = {"checkpointing": checkpointing, "return_trajectory": return_trajectory}
        return integrate(net, latents, solver="span", predictor=self, cond=cond, **options)

    def _apply(self, fn, recurse=True):
        """Move the heads. The table stays on the CPU, in float64, for states on any device."""
        for child in self.children():
            child._apply(fn)
        return self
