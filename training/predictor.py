"""The AMED predictor: about nine thousand parameters, which place and scale an evaluation.

Zhou et al. 2024, "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps" (arXiv
2312.00094), Section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.denoiser import BOTTLENECK_SIZE
from models.edm_unet import Linear, PositionalEmbedding
from solvers.sampler import sample
from solvers.solver import SOLVERS, Option, Solver, solver_options
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds, check_steps, defaults_of, kinds_of
from torch_utils.transfer import to_device


@dataclass
class PredictorConfig:
    """The configuration of a predictor: settings of its training (original names), sizes of layers.

    The options of its student and teacher follow under their own names (``solver_settings``).
    """

    dataset_name: str | None = None
    img_resolution: int | None = None
    num_steps: int = 4  # time steps; the student makes 2 (num_steps - 1) evaluations, one less with AFS
    sampler_stu: str = "amed"
    sampler_tea: str = "heun"
    M: int = 1  # points that the teacher adds to every interval
    guidance_type: str | None = None
    guidance_rate: float | None = 0.0
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    afs: bool | str = False  # False, True or "data"
    scale_dir: float | None = 0.0  # the output lies in [1 - scale_dir, 1 + scale_dir]; 0: without this output
    scale_time: float | None = 0.0
    max_order: int | None = 3  # of student and teacher, as in the original code
    sigma_min: float | None = None  # None: the network's range
    sigma_max: float | None = None
    sigmas: list[float] | None = None  # explicit schedule, instead of num_steps, schedule_type and schedule_rho
    hidden_dim: int = 128
    bottleneck_output_dim: int = 4
    noise_channels: int = 8


DEFAULTS = defaults_of(PredictorConfig)
_WIDEST = 1 << 16  # of any layer


def trainable_options() -> dict[str, dict[str, Option]]:
    """The options of all solvers that can be student or teacher: {name: {solver: option}}."""
    found = solver_options(solver for solver in SOLVERS.values() if solver.can_learn or solver.can_teach)
    return {name: users for name, users in found.items() if not any(option.of_schedule for option in users.values())}


def solver_settings(config: Mapping) -> dict:
    """The options of the student and the teacher of a configuration, with their values."""
    student, teacher = (SOLVERS.get(config[role], Solver) for role in ("sampler_stu", "sampler_tea"))
    own = {name: option for name, option in student.options.items() if name not in student.learned_options}
    options = {name: option for name, option in {**teacher.options, **own}.items() if not option.of_schedule}
    return {name: config.get(name, option.default) for name, option in options.items()}


class AMEDPredictor(nn.Module):
    """predictor(bottleneck, t_cur, t_next) -> (r, scale_dir, scale_time), each [B,1,1,1].

    bottleneck: [B,8,8], channel mean of the U-Net's bottleneck (zeros under AFS).
    t_cur, t_next: the ends of the interval, scalars or [B].

    r lies in (0, 1). A scale is 1 if its setting is 0. The constructor takes the fields of
    ``PredictorConfig`` and options of solvers as keyword arguments.

    Attributes: ``config``, all fields and the options of student and teacher; ``stated``, names of
    the fields that were given, and with which sampling must agree; ``provenance``, set by training
    or loading.
    """

    def __init__(self, **config):
        super().__init__()
        options = {name: next(iter(users.values())) for name, users in trainable_options().items()}
        kinds = {name: option.type | None for name, option in options.items()} | kinds_of(PredictorConfig)
        unknown = sorted(set(config) - set(kinds))
        if unknown:
            raise UserError(f"unknown predictor setting '{unknown[0]}'; known: {', '.join(kinds)}")
        self.config, self.stated = {**DEFAULTS, **config}, frozenset(config)
        if torch.is_tensor(self.config["sigmas"]):
            self.config["sigmas"] = self.config["sigmas"].tolist()
        check_kinds(self.config, kinds)
        self.config = {**solver_settings(self.config), **self.config}
        check_steps(self.config, "num_steps", "M", "sigmas")
        for name in ("hidden_dim", "bottleneck_output_dim", "noise_channels"):
            if not 1 <= self.config[name] <= _WIDEST:
                raise UserError(f"{name}={self.config[name]} must be from 1 to {_WIDEST}")
        self.provenance: dict = {}
        for name in ("scale_dir", "scale_time"):
            bound = float(self.config[name] or 0)
            if not 0 <= bound < 1:
                raise UserError(f"{name}={bound} must lie in [0, 1): the scale ranges over 1 +- {name}")
            self.config[name] = bound
        hidden, encoded = self.config["hidden_dim"], self.config["bottleneck_output_dim"]
        channels = self.config["noise_channels"]

        def plain(cin, cout):  # weights from N(0, 1 / fan_in), zero biases
            return Linear(cin, cout, init="kaiming_normal")

        self.map_noise = PositionalEmbedding(channels, endpoint=True)
        self.map_layer0 = Linear(channels, channels, init="xavier_uniform")
        self.enc_layer0 = plain(BOTTLENECK_SIZE**2, hidden)
        self.enc_layer1 = plain(hidden, encoded)
        self.fc_r = plain(encoded + 2 * channels, 1)
        if self.config["scale_dir"]:
            self.fc_scale_dir = plain(encoded + 2 * channels, 1)
        if self.config["scale_time"]:
            self.fc_scale_time = plain(encoded + 2 * channels, 1)

    def _embed(self, times, like):
        """Embeddings of the times, side by side, [1 or B, number of times * noise_channels]."""
        times = [torch.as_tensor(t, dtype=like.dtype).reshape(-1) for t in times]
        t = torch.stack(torch.broadcast_tensors(*times), dim=1)
        emb = self.map_noise(t.flatten())  # where t is: on the CPU for a schedule that needs no gradient
        emb = emb.reshape(t.numel(), 2, -1).flip(1).reshape(*t.shape, -1)  # sines first
        return F.silu(self.map_layer0(to_device(emb, like.device))).flatten(1)

    def forward(self, bottleneck, t_cur, t_next):
        bottleneck = bottleneck.to(self.fc_r.weight.dtype)
        batch = bottleneck.shape[0]
        code = self.enc_layer1(F.silu(self.enc_layer0(bottleneck.flatten(1))))
        z = torch.cat([code, self._embed((t_cur, t_next), bottleneck).expand(batch, -1)], dim=1)
        scales = {name: bound for name in ("scale_dir", "scale_time") if (bound := self.config[name])}
        layers = [getattr(self, f"fc_{name}") for name in ("r", *scales)]
        r, *found = torch.sigmoid(torch.cat([layer(z) for layer in layers], dim=1)).unbind(1)
        outputs = {"r": r}
        for (name, bound), value in zip(scales.items(), found, strict=True):
            outputs[name] = torch.add(torch.tensor(1 - bound, dtype=z.dtype), value, alpha=2 * bound)
        unscaled = None if len(scales) == 2 else torch.ones_like(r)
        return tuple(outputs.get(name, unscaled).reshape(-1, 1, 1, 1) for name in ("r", "scale_dir", "scale_time"))

    def sample(self, net, latents, **options):
        """Images [B,C,H,W] from unit-variance noise; options: of ``solvers.sample``."""
        return sample(net, latents, predictor=self, **options)

    def evaluations(self) -> int:
        """Network calls of one trajectory with these settings (guidance may double their cost)."""
        steps = len(self.config["sigmas"]) if self.config["sigmas"] else self.config["num_steps"]
        return 2 * (steps - 1) - (1 if self.config["afs"] else 0)
