"""EDM networks: the preconditioning of Karras et al. 2022 (Table 1, column "ours") around one of the U-Nets."""

import torch

from models.denoiser import Denoiser
from models.networks import NETWORKS
from torch_utils.errors import UserError


def class_indices(labels, count: int | None, label_dim: int) -> torch.Tensor:
    """Labels, one for all or one per image, as int64 [count]; UserError where they are no classes 0..label_dim - 1."""
    given = torch.as_tensor(labels)
    indices = given.to(torch.int64)
    wrong = indices[(indices < 0) | (indices >= label_dim) | (indices != given)]
    if wrong.numel():
        bad = given[indices == wrong.flatten()[0]].flatten()[0].item()
        raise UserError(f"class {bad} is out of range: this network knows 0..{label_dim - 1}")
    if indices.ndim == 0:
        return indices.expand(count if count is not None else 1)
    if count is not None and indices.shape != (count,):
        raise UserError(f"{indices.numel()} classes for {count} images: give one for all, or one for each")
    return indices


class EDMDenoiser(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4).

    The constructor takes the arguments of the official ``EDMPrecond`` (``init_kwargs`` of a checkpoint): everything after
    ``model_type`` goes to the U-Net. Parameters are named ``model.*`` as in the official files. The sampling range is
    0.002 .. 80, as in the paper's samplers, whatever range the file states.

    ``autocast``: None, torch.bfloat16 or torch.float16; the dtype in which the U-Net's matrix work runs.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs,
    ):
        super().__init__()
        if model_type not in NETWORKS:
            raise UserError(f"unknown EDM network '{model_type}'; known: {', '.join(NETWORKS)}")
        self.img_resolution = int(img_resolution)
        self.img_channels = int(img_channels)
        self.label_dim = int(label_dim)
        self.sigma_min = max(float(sigma_min), 0.002)
        self.sigma_max = min(float(sigma_max), 80.0)
        self.sigma_data = float(sigma_data)
        self.autocast: torch.dtype | None = None
        self.config = {
            "img_resolution": self.img_resolution,
            "img_channels": self.img_channels,
            "label_dim": self.label_dim,
            "sigma_data": self.sigma_data,
            "model_type": model_type,
            **model_kwargs,
        }
        self.model = NETWORKS[model_type](
            img_resolution=self.img_resolution,
            in_channels=self.img_channels,
            out_channels=self.img_channels,
            label_dim=self.label_dim,
            **model_kwargs,
        )

    @property
    def bottleneck(self) -> torch.nn.Module:
        return self.model.bottleneck

    @property
    def noise_embedding(self) -> torch.nn.Module:
        return self.model.map_layer1

    def make_cond(self, generator=None, labels=None) -> dict:
        if not self.label_dim:
            if labels is not None:
                raise UserError("this network is unconditional: it takes no class")
            return {}
        if labels is None:
            if generator is None:
                raise UserError("this network is class-conditional: pass labels, or a generator to draw them")
            indices = generator.randint(self.label_dim)
        else:
            indices = class_indices(labels, len(generator.seeds) if generator is not None else None, self.label_dim)
        device = next(self.parameters()).device
        return {"class_labels": torch.nn.functional.one_hot(indices, self.label_dim).float().to(device)}

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = (sigma.log() / 4).flatten()
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.model(c_in * x, c_noise, class_labels=class_labels, augment_labels=augment_labels)
        return torch.addcmul(c_skip * x, c_out, output.to(torch.float32))


def __getattr__(name):
    # Reading and writing files lives in models/edm_io.py, which imports this module.
    if name in ("load_edm_network", "save_edm_safetensors", "load_edm_safetensors"):
        from models import edm_io

        return getattr(edm_io, name)
    raise AttributeError(f"module 'models.edm' has no attribute '{name}'")
