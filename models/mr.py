"""Image restoration: mean-reverting diffusion (IR-SDE, Refusion) as a denoiser."""

from collections.abc import Mapping
from pathlib import Path

import torch

from models.building import Family, build_empty, check_guidance, load_weights
from models.denoiser import Denoiser, RestorationMixin, standard_inputs
from models.noise import MeanReverting, TimeOfProcess
from models.restoration_unets import NETWORKS
from torch_utils.errors import UserError
from torch_utils.tensor_file import read_weights

# Published settings of the networks without a text encoder (Luo et al. 2023).
_UNET, _DEEP = ({"network": "ConditionalUNet", "nf": nf, "depth": depth} for nf, depth in ((64, 4), (32, 5)))
_NAFNET = {"network": "ConditionalNAFNet", "width": 64, "enc_blk_nums": [1, 1, 1, 28], "dec_blk_nums": [1, 1, 1, 1]}
RELEASED_CONFIGS = {
    "ir_sde_deraining": {**_UNET, "max_sigma": 10},
    "ir_sde_deblurring": {**_UNET, "max_sigma": 10},
    "ir_sde_inpainting": {**_UNET, "max_sigma": 30},
    "ir_sde_sisr": {**_UNET, "max_sigma": 30},
    "ir_sde_deshadow": {**_DEEP, "max_sigma": 30},
    "refusion": {**_NAFNET, "max_sigma": 50},
}


class MRDenoiser(RestorationMixin, TimeOfProcess, Denoiser):
    """D(x; sigma | mu) = x - sigma eps(x_t, mu, t) with x_t = mu + alpha (x - mu).

    network: name in ``NETWORKS``.
    max_sigma, T, schedule, eps, original_code: see ``MeanReverting``.
    img_resolution: size of images if none is given; the network takes any size. Default 256.
    network_kwargs: arguments of the network under their original names.

    ``forward`` takes mu [B,C,H,W], the degraded image, in [-1, 1].
    """

    can_autocast = True

    def __init__(
        self,
        network: str = "ConditionalUNet",
        max_sigma: float = 50,
        T: int = 100,
        schedule: str = "cosine",
        eps: float = 0.005,
        original_code: bool = False,
        img_resolution: int = 256,
        **network_kwargs,
    ):
        super().__init__()
        if network not in NETWORKS:
            raise UserError(f"unknown restoration network '{network}'; known: {', '.join(NETWORKS)}")
        with torch.device("cpu"):
            self.process = MeanReverting(max_sigma, T, schedule, eps, original_code)
        self.sigma_min, self.sigma_max = self.process.sigma_min, self.process.sigma_max
        self.model = NETWORKS[network](**network_kwargs)
        self.img_channels = int(network_kwargs.get("in_nc", network_kwargs.get("img_channel", 3)))
        self.img_resolution = int(img_resolution)

    @property
    def bottleneck(self) -> torch.nn.Module:
        return self.model.bottleneck

    @property
    def noise_embedding(self) -> torch.nn.Module:
        return self.model.time_mlp[3]

    def forward(self, x, sigma, mu):
        x, sigma = standard_inputs(x, sigma)
        mu = mu.to(x.dtype)
        noisy = mu + self.process.alpha(sigma) * (x - mu)
        t = self.process.timestep(sigma).flatten().expand(len(x))
        with self.mixed_precision(x.device):
            noise = self.model((noisy + 1) / 2, (mu + 1) / 2, t)
        return x - sigma * noise.to(torch.float32)


def build_mr(config: Mapping, state_dict, guidance_type, guidance_rate, device) -> MRDenoiser:
    """The builder of the family "mr"; names may have the prefix ``module.``."""
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    net = build_empty(MRDenoiser, config, "a restoration network", len(weights))
    check_guidance(("none", "uncond"), guidance_type, guidance_rate, "this network")
    load_weights(net.model, weights, device)
    return net


def load_mr(
    path: str | Path,
    dataset_name: str = "refusion",
    *,
    config: Mapping | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> MRDenoiser:
    """Load the denoiser of an official ``.pth`` file, a plain state dict.

    path: the file.
    dataset_name: chooses the published settings. Default refusion.
    config: settings instead of the published ones, see ``build_denoiser``. Default None.
    guidance_type, guidance_rate, device: see ``create_model``.

    Raises UserError if the file is damaged or contains another network.
    """
    if config is None and dataset_name not in RELEASED_CONFIGS:
        raise UserError(f"checkpoint {path}: describe the network in {path}.json (family mr), see docs/restoration.md")
    settings = RELEASED_CONFIGS[dataset_name] if config is None else config
    return FAMILY.create(settings, read_weights(path), guidance_type, guidance_rate, device, path)


FAMILY = Family("mr", build_mr, load_mr)
