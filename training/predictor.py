"""The AMED predictor: about nine thousand parameters that place and scale one evaluation per interval.

Zhou et al. 2024, "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps" (arXiv 2312.00094), Section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.denoiser import BOTTLENECK_SIZE
from models.edm_unet import Linear, PositionalEmbedding
from torch_utils.errors import UserError
from torch_utils.kinds import check_kinds, check_steps

# Every key of a predictor's configuration with its default: the settings of the run it was trained for (original names),
# then the sizes of its layers.
DEFAULTS = {
    "dataset_name": None,
    "img_resolution": None,
    "num_steps": 4,  # time stamps; the student makes 2 (num_steps - 1) evaluations, one less with AFS
    "sampler_stu": "amed",
    "sampler_tea": "heun",
    "M": 1,  # points the teacher adds to every interval
    "guidance_type": None,
    "guidance_rate": 0.0,
    "schedule_type": "polynomial",
    "schedule_rho": 7,
    "afs": False,  # False, True or "data"
    "scale_dir": 0.0,  # scale_dir lies in [1 - scale_dir, 1 + scale_dir]; 0 switches the head off
    "scale_time": 0.0,
    "max_order": 3,
    "predict_x0": True,
    "lower_order_final": True,
    "thresholding": True,  # dynamic thresholding of dpmpp under predict_x0
    "sigma_min": None,  # None: the network's range
    "sigma_max": None,
    "sigmas": None,  # an explicit schedule that replaces num_steps, schedule_type and schedule_rho
    "hidden_dim": 128,
    "bottleneck_output_dim": 4,
    "noise_channels": 8,
}


# What the values may be: files bring them. (Names that are not here may be of any kind that ``json`` knows.)
KINDS = {
    **dict.fromkeys(("dataset_name", "guidance_type"), str | None),
    **dict.fromkeys(("sampler_stu", "sampler_tea", "schedule_type"), str),
    **dict.fromkeys(("num_steps", "M", "hidden_dim", "bottleneck_output_dim", "noise_channels"), int),
    **dict.fromkeys(("img_resolution", "max_order"), int | None),
    **dict.fromkeys(("guidance_rate", "scale_dir", "scale_time", "sigma_min", "sigma_max"), float | None),
    **dict.fromkeys(("predict_x0", "lower_order_final", "thresholding"), bool | None),
    "schedule_rho": float,
    "afs": bool | str,
    "sigmas": list[float] | None,
}
_WIDEST = 1 << 16  # of any layer


class AMEDPredictor(nn.Module):
    """predictor(bottleneck, t_cur, t_next) -> (r, scale_dir, scale_time), each [B,1,1,1].

    bottleneck: [B,8,8], the channel mean of the U-Net's bottleneck (zeros under AFS); t_cur, t_next: the ends of the
    interval, scalars or [B]. r lies in (0, 1); the scales are ones where their setting is 0. Keyword arguments are the
    keys of ``DEFAULTS``; ``config`` holds all of them, and ``stated`` names those that were given: with other values
    sampling refuses the predictor. ``provenance`` is filled in by whoever trains or loads it.
    """

    def __init__(self, **config):
        super().__init__()
        unknown = sorted(set(config) - set(DEFAULTS))
        if unknown:
            raise UserError(f"unknown predictor setting '{unknown[0]}'; known: {', '.join(DEFAULTS)}")
        self.config, self.stated = {**DEFAULTS, **config}, frozenset(config)
        if torch.is_tensor(self.config["sigmas"]):
            self.config["sigmas"] = self.config["sigmas"].tolist()
        check_kinds(self.config, KINDS)
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

        def plain(cin, cout):  # weights N(0, 1 / fan_in), zero biases
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

    def _embed(self, t, batch, like):
        t = torch.as_tensor(t, dtype=like.dtype, device=like.device).reshape(-1)
        emb = self.map_noise(t)
        emb = emb.reshape(len(t), 2, -1).flip(1).reshape(len(t), -1)  # sines first
        return F.silu(self.map_layer0(emb)).expand(batch, -1)

    def _scale(self, name, z):
        bound = self.config[name]
        if not bound:
            return torch.ones_like(z[:, :1])
        return 1 - bound + 2 * bound * torch.sigmoid(getattr(self, f"fc_{name}")(z))

    def forward(self, bottleneck, t_cur, t_next):
        bottleneck = bottleneck.to(self.fc_r.weight.dtype)
        batch = bottleneck.shape[0]
        code = self.enc_layer1(F.silu(self.enc_layer0(bottleneck.flatten(1))))
        z = torch.cat([code, self._embed(t_cur, batch, bottleneck), self._embed(t_next, batch, bottleneck)], dim=1)
        outputs = torch.sigmoid(self.fc_r(z)), self._scale("scale_dir", z), self._scale("scale_time", z)
        return tuple(value.reshape(-1, 1, 1, 1) for value in outputs)

    def evaluations(self) -> int:
        """Network evaluations of one trajectory with these settings (calls; guidance may double their cost)."""
        stamps = len(self.config["sigmas"]) if self.config["sigmas"] else self.config["num_steps"]
        return 2 * (stamps - 1) - (1 if self.config["afs"] else 0)
