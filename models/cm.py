"""EDM networks of the consistency-models code (Song et al. 2023) as denoisers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from models.building import Family, build_empty, check_guidance, load_weights
from models.denoiser import edm_scalings
from models.openai_unet import (
    CONSISTENCY,
    PixelUNetDenoiser,
    UNetModel,
    check_family,
    choose_precision,
    choose_settings,
    unet_arguments,
)
from torch_utils.tensor_file import read_weights

# The settings published with edm_bedroom256_ema.pt and edm_cat256_ema.pt.
_LSUN256 = {
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "dropout": 0.1,
    "resblock_updown": True,
    "use_fp16": True,
}
RELEASED_CONFIGS = {"lsun_bedroom": _LSUN256, "lsun_cat": _LSUN256}


class CMDenoiser(PixelUNetDenoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; 250 ln sigma), with the scalings of EDM.

    config: arguments of ``unet_arguments``.

    ``forward`` takes class_labels, int64 [B]. The published networks use flash attention, which
    orders the channels of ``qkv`` as q, k, v, then heads, whatever ``use_new_attention_order`` is.
    The legacy order loads the same weights without an error and gives wrong images.
    """

    sigma_data = 0.5

    def __init__(self, **config):
        super().__init__(UNetModel(**{**unet_arguments(config), "use_new_attention_order": True, "qkv_dims": 2}))

    def scalings(self, sigma):
        return *edm_scalings(sigma, self.sigma_data), 1000 * 0.25 * sigma.log()

    def predict(self, x, c_noise, sigma, class_labels=None):
        return self.model(x, c_noise, y=class_labels)


def build_cm(config: Mapping, state_dict, guidance_type, guidance_rate, device) -> CMDenoiser:
    """The builder of the family "cm"."""
    net = build_empty(CMDenoiser, config, "a consistency-model U-Net", len(state_dict))
    check_guidance(("none",) if net.label_dim else ("none", "uncond"), guidance_type, guidance_rate, "this network")
    load_weights(net.model, state_dict, device)
    return net


def load_cm(
    path: str | Path,
    dataset_name: str = "lsun_bedroom",
    *,
    config: Mapping | None = None,
    use_fp16: bool | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> CMDenoiser:
    """Load the denoiser of an official ``.pt`` file, frozen and in evaluation mode.

    path: the file.
    dataset_name: chooses the published settings. Default lsun_bedroom.
    config: settings instead of the published ones, see ``build_denoiser``. Default None.
    use_fp16: run the torso in float16. Default: as in the settings on a GPU, else False.
    guidance_type, guidance_rate, device: see ``create_model``.

    Raises UserError if the file is damaged or contains another network.
    """
    arguments = choose_precision(choose_settings(RELEASED_CONFIGS, dataset_name, config), use_fp16, device)
    weights = read_weights(path)
    check_family(path, weights, CONSISTENCY)
    return FAMILY.create(arguments, weights, guidance_type, guidance_rate, device, path)


FAMILY = Family("cm", build_cm, load_cm)
