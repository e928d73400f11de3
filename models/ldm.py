"""Latent diffusion (Rombach et al. 2022) in the CompVis checkpoint layout, as denoisers.

The networks predict the noise eps of a variance-preserving process at discrete times,
x_t = sqrt(a_t) z + sqrt(1 - a_t) eps. With sigma = sqrt((1 - a) / a) and x = x_t / sqrt(a) the
denoiser is D(x; sigma) = x - sigma eps(x / sqrt(1 + sigma^2), t(sigma)).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from models.autoencoder import build_first_stage
from models.building import Family, build_empty, check_guidance, load_weights
from models.noise import DiscreteTime, TimeOfProcess
from models.openai_unet import LATENT_DIFFUSION, UNetDenoiser, UNetModel, check_family, choose_settings
from torch_utils.errors import UserError
from torch_utils.tensor_file import read_weights

_VQ_F4 = {
    "target": "VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}


# The published unconditional models on 64x64x3 latents of VQ-f4: LSUN bedrooms, FFHQ and CelebA-HQ,
# all at 256x256.
VQ_F4_LDM = {
    "linear_start": 0.0015,
    "linear_end": 0.0195,
    "timesteps": 1000,
    "image_size": 64,
    "channels": 3,
    "unet_config": {
        "params": {
            "image_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 224,
            "attention_resolutions": [8, 4, 2],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 3, 4],
            "num_head_channels": 32,
        }
    },
    "first_stage_config": _VQ_F4,
    "cond_stage_config": "__is_unconditional__",
}

RELEASED_CONFIGS = {"lsun_bedroom_ldm": VQ_F4_LDM, "ffhq_ldm": VQ_F4_LDM}


# Arguments of the published configurations that do not change the network or its sampling.
_TRAINING_ONLY = (
    *("base_learning_rate", "ckpt_path", "clip_denoised", "cond_stage_key", "cond_stage_trainable", "first_stage_key"),
    *("ignore_keys", "l_simple_weight", "load_only_unet", "log_every_t", "loss_type", "monitor", "num_timesteps_cond"),
    *("original_elbo_weight", "scheduler_config", "use_positional_encodings", "v_posterior"),
)

DECODE_BATCH = 8  # images decoded at a time, because their feature maps are large


class LatentDenoiser(TimeOfProcess, UNetDenoiser):
    """Base class of latent diffusion: time, U-Net and first stage.

    The arguments are those of the published ``LatentDiffusion`` configurations; ``target`` entries
    only choose among the classes of this code. Parameters are named ``model.diffusion_model.*`` and
    ``first_stage_model.*``, as in the official files. ``forward`` and all noise levels are those of
    latents; ``decode`` and ``encode`` convert to and from images.

    use_ema: whether ``select_weights`` takes the moving averages of a checkpoint. Default True.
    scale_by_std: whether the scale factor of the latents is a tensor of the checkpoint, measured in
        training. Default False.
    """

    latent = True

    def __init__(
        self,
        *,
        unet_config,
        first_stage_config,
        image_size,
        channels=3,
        linear_start=1e-4,
        linear_end=2e-2,
        timesteps=1000,
        beta_schedule="linear",
        parameterization="eps",
        scale_factor=1.0,
        scale_by_std=False,
        use_ema=True,
        conditioning_key=None,
        **others,
    ):
        super().__init__()
        unknown = sorted(others.keys() - set(_TRAINING_ONLY))
        if unknown:
            raise UserError(f"unknown argument '{unknown[0]}' of a latent diffusion model")
        for name, value, known in (
            ("beta_schedule", beta_schedule, "linear"),
            ("parameterization", parameterization, "eps"),
        ):
            if value != known:
                raise UserError(f"{name} '{value}' is not supported; only '{known}' is")
        if conditioning_key not in (None, "crossattn"):
            raise UserError(f"conditioning_key '{conditioning_key}' is not supported; only 'crossattn' is")
        self.img_resolution = int(image_size)
        self.img_channels = int(channels)
        self.scale_factor = float(scale_factor)
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise UserError(f"scale_factor {scale_factor} must be a positive number")
        self.scale_by_std = bool(scale_by_std)
        self.use_ema = bool(use_ema)
        with torch.device("cpu"):  # even if the network is built on the meta device
            self.process = DiscreteTime.of_scaled_linear_betas(linear_start, linear_end, timesteps)
            self.sigma_min, self.sigma_max = self.process.sigma_min, self.process.sigma_max
        self.model = torch.nn.ModuleDict({"diffusion_model": UNetModel(**unet_config["params"])})
        self.first_stage_model = build_first_stage(first_stage_config)
        if self.first_stage_model.latent_channels != self.img_channels:
            raise UserError(
                f"the first stage has {self.first_stage_model.latent_channels} latent channels, the model {channels}"
            )

    @property
    def unet(self) -> UNetModel:
        return self.model["diffusion_model"]

    def predict_noise(self, x: torch.Tensor, timesteps: torch.Tensor, **cond) -> torch.Tensor:
        """The network's output [B,C,H,W] for x [B,C,H,W] of unit variance and timesteps [B]."""
        raise NotImplementedError

    def scalings(self, sigma):
        return 1, -sigma, 1, self.process.timestep(sigma)  # c_in is a division, in ``predict``

    def predict(self, x, c_noise, sigma, **cond):
        return self.predict_noise(x / (1 + sigma**2).sqrt(), c_noise.expand(len(x)), **cond)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Decode latents [B,C,h,w] to images [B,3,H,W], about [-1, 1]."""
        parts = (x.to(torch.float32) / self.scale_factor).split(DECODE_BATCH)
        return torch.cat([self.first_stage_model.decode(part) for part in parts])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [B,3,H,W] in [-1, 1] to latents [B,C,h,w]; KL: the posterior mean."""
        parts = images.to(torch.float32).split(DECODE_BATCH)
        return self.scale_factor * torch.cat([self.first_stage_model.encode(part) for part in parts])

    def select_weights(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint for this network, under the names of this module.

        Tables of the noise process (the only tensors without a dot in their names) and tensors of
        the training are left out. A tensor ``scale_factor`` replaces the configured number. With
        ``use_ema`` the moving averages replace ``model.*``: ``model_ema.*`` has each parameter
        under its name after "model.", without dots. Raises UserError if they are missing.
        """
        measured = state_dict.get("scale_factor")
        if measured is not None:
            if measured.numel() != 1 or not (math.isfinite(measured.item()) and measured.item() > 0):
                raise UserError("the checkpoint's scale_factor is not a positive number")
            self.scale_factor = float(measured)
        elif self.scale_by_std:
            raise UserError("scale_by_std needs a tensor scale_factor in the checkpoint; give scale_factor instead")
        training = ("model_ema.", "first_stage_model.loss.")
        chosen = {name: value for name, value in state_dict.items() if "." in name and not name.startswith(training)}
        if not self.use_ema:
            return chosen
        averages = {name: f"model_ema.{name[6:].replace('.', '')}" for name in chosen if name.startswith("model.")}
        missing = [name for name in averages.values() if name not in state_dict]
        if missing:
            raise UserError(
                f"the checkpoint lacks moving averages of the weights ({len(missing)} of {len(averages)} missing, "
                f"{missing[0]} first); use_ema=False takes the plain weights"
            )
        return chosen | {name: state_dict[average] for name, average in averages.items()}


class LDMDenoiser(LatentDenoiser):
    """Unconditional latent diffusion."""

    def __init__(self, cond_stage_config="__is_unconditional__", **config):
        if cond_stage_config != "__is_unconditional__":
            raise UserError("this family is for unconditional models: cond_stage_config must be __is_unconditional__")
        super().__init__(**config)

    def predict_noise(self, x, timesteps):
        return self.unet(x, timesteps)


def build_ldm(config, state_dict, guidance_type=None, guidance_rate=None, device="cpu") -> LDMDenoiser:
    """The builder of the family "ldm"; guidance_type may be "uncond" or "none", without effect."""
    check_guidance(("none", "uncond"), guidance_type, guidance_rate, "an unconditional latent diffusion model")
    net = build_empty(LDMDenoiser, config, "an unconditional latent diffusion model", len(state_dict))
    load_weights(net, net.select_weights(state_dict), device)
    return net


def load_ldm(
    path: str | Path,
    dataset_name: str = "lsun_bedroom_ldm",
    *,
    config: Mapping | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> LDMDenoiser:
    """Load the denoiser of an official ``model.ckpt``, frozen and in evaluation mode.

    path: the file, or the same in safetensors. If it has no moving averages, as after pruning, its
        weights are taken to be the averages.
    dataset_name: chooses the published settings. Default lsun_bedroom_ldm.
    config: settings instead of the published ones, see ``build_denoiser``. Default None.
    guidance_type, guidance_rate, device: see ``create_model``.

    Raises UserError if the file is damaged or contains another network.
    """
    config = choose_settings(RELEASED_CONFIGS, dataset_name, config)
    return load_latent(FAMILY, LATENT_DIFFUSION, path, config, guidance_type, guidance_rate, device)


def load_latent(family: Family, kind, path, config, guidance_type, guidance_rate, device) -> LatentDenoiser:
    """Load a checkpoint of one of the latent families; kind: its name in ``check_family``."""
    weights = read_weights(path)
    check_family(path, weights, kind)
    averaged = any(name.startswith("model_ema.diffusion_model") for name in weights)
    config = {**config, "use_ema": config.get("use_ema", True) and averaged}
    return family.create(config, weights, guidance_type, guidance_rate, device, path)


FAMILY = Family("ldm", build_ldm, load_ldm)
