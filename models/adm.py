"""ADM networks (Dhariwal & Nichol 2021) as denoisers, with guidance by a noisy classifier."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.building import Family, build_empty, check_guidance, load_weights
from models.noise import CosineNoise, LinearNoise, TimeOfProcess
from models.openai_unet import (
    ADM,
    ADM_CLASSIFIER,
    EncoderUNetModel,
    PixelUNetDenoiser,
    UNetModel,
    check_family,
    choose_precision,
    choose_settings,
    classifier_arguments,
    unet_arguments,
)
from torch_utils.errors import UserError
from torch_utils.tensor_file import read_weights

# The settings published with <size>x<size>_diffusion.pt and <size>x<size>_classifier.pt (README of
# guided-diffusion).
_COMMON = {
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "use_fp16": True,
}

_CLASSIFIER = {
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_use_fp16": True,
    "classifier_pool": "attention",
}


def _preset(image_size: int, model: Mapping, classifier: Mapping, noise_schedule: str = "linear") -> dict:
    return {
        "model": {**_COMMON, "image_size": image_size, **model},
        "classifier": {**_CLASSIFIER, "image_size": image_size, **classifier},
        "noise_schedule": noise_schedule,
    }


_SMALL = {"num_channels": 192, "num_res_blocks": 3, "dropout": 0.1, "use_new_attention_order": True}

RELEASED_CONFIGS = {
    "imagenet64_adm": _preset(64, _SMALL, {"classifier_depth": 4}, "cosine"),
    "imagenet128": _preset(128, {"num_heads": 4, "num_head_channels": -1}, {}),
    "imagenet256": _preset(256, {}, {}),
    "imagenet512": _preset(512, {"use_fp16": False}, {}),
}

_NOISE = {"linear": LinearNoise, "cosine": CosineNoise}


class ADMDenoiser(TimeOfProcess, PixelUNetDenoiser):
    """D(x; sigma) = x - sigma F(x / sqrt(1 + sigma^2); step), clamped to [-1, 1]; F is the noise.

    model: arguments of ``unet_arguments``. If the network also predicts a variance, that half of
        its output is dropped.
    classifier: arguments of ``classifier_arguments``; needed for guidance only. Default None.
    noise_schedule: "linear" (default) or "cosine".
    guidance_rate: s; F becomes F - s sigma / sqrt(1 + sigma^2) grad ln p(class_labels | x_in;
        step), with the gradient of the classifier with respect to its input x_in (Algorithm 2 of
        the paper). Gradients flow through this term. A call still counts as one evaluation, because
        the classifier costs a tenth of the network. Default: None or 0, no guidance.

    ``forward`` takes class_labels, int64 [B]. Set ``clip_denoised`` to False for no clamp.
    """

    def __init__(
        self,
        model: Mapping,
        classifier: Mapping | None = None,
        noise_schedule: str = "linear",
        guidance_rate: float | None = None,
    ):
        if noise_schedule not in _NOISE:
            raise UserError(f"noise_schedule '{noise_schedule}' is unknown; use {' or '.join(_NOISE)}")
        super().__init__(UNetModel(**unet_arguments(model)))
        if self.model.out_channels not in (self.img_channels, 2 * self.img_channels):
            raise UserError(f"{self.model.out_channels} output channels do not fit {self.img_channels} input channels")
        self.classifier = None
        self.guidance_rate = float(guidance_rate or 0)
        self.guided = self.guidance_rate != 0
        if self.guidance_rate:
            if not classifier:
                raise UserError("classifier guidance needs the arguments and the weights of a classifier")
            self.classifier = EncoderUNetModel(**classifier_arguments(classifier))
            self.label_dim = self.classifier.out_channels
            if self.label_dim != (self.model.num_classes or self.label_dim):
                raise UserError(f"the classifier has {self.label_dim} classes, the network {self.model.num_classes}")
        self.clip_denoised = True
        with torch.device("cpu"):  # even if the network is built on the meta device
            self.process = _NOISE[noise_schedule]()
            self.sigma_min, self.sigma_max = self.process.sigma_min, self.process.sigma_max

    def convert_torso(self, dtype: torch.dtype) -> None:
        super().convert_torso(dtype)
        if self.classifier is not None:
            self.classifier.convert_torso(dtype)

    def classifier_gradient(self, x_in: torch.Tensor, step: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Gradient of the log-probability of the labels with respect to the classifier's input.

        x_in: input of the classifier [B,C,H,W].
        step: timesteps [B] or [1].
        class_labels: int64 [B] or [1].

        Returns [B,C,H,W], with gradients if x_in has them.
        """
        further = torch.is_grad_enabled() and x_in.requires_grad
        # The fused kernels of attention have no second derivative. The hooks hide the tensors that
        # the classifier saves from activation checkpoints around this call, which would otherwise
        # be recomputed by the gradient below.
        attention = sdpa_kernel(SDPBackend.MATH) if further else nullcontext()
        with torch.enable_grad(), attention, saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            if not further:
                x_in, step = x_in.detach().requires_grad_(True), step.detach()
            log_probs = self.classifier(x_in, step).float().log_softmax(dim=1)
            chosen = log_probs.gather(1, class_labels.reshape(-1, 1).expand(len(x_in), 1))
            return torch.autograd.grad(chosen.sum(), x_in, create_graph=further)[0]

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, label_dim] of clean images [B,C,H,W] in [-1, 1], at the lowest noise level."""
        sigma = torch.full([1, 1, 1, 1], self.sigma_min, device=images.device)
        step = self.process.timestep(sigma).flatten().expand(len(images))
        return self.classifier(images / (1 + sigma**2).sqrt(), step).float()

    def scalings(self, sigma):
        return 1, -sigma, 1 / (1 + sigma**2).sqrt(), self.process.timestep(sigma)

    def predict(self, x, c_noise, sigma, class_labels=None):
        if self.classifier is not None and class_labels is None:
            raise UserError("classifier guidance needs class_labels")
        y = class_labels if self.model.num_classes or self.classifier is None else None
        noise = self.model(x, c_noise, y=y)[:, : self.img_channels].to(torch.float32)
        if self.classifier is None:
            return noise
        gradient = self.classifier_gradient(x, c_noise, class_labels)
        return noise - self.guidance_rate * sigma * (1 / (1 + sigma**2).sqrt()) * gradient

    def combine(self, c_skip, x, c_out, output):
        denoised = c_skip * x + c_out * output
        return denoised.clamp(-1, 1) if self.clip_denoised else denoised


def build_adm(config: Mapping, state_dict, guidance_type, guidance_rate, device) -> ADMDenoiser:
    """The builder of the family "adm".

    config: {"model": ..., "classifier": ..., "noise_schedule": ...}; the last two are optional.
    state_dict: weights ``model.*`` and, for guidance, ``classifier.*``.
    guidance_type: "cg" for guidance by the classifier. Without it, the classifier is not built.
    guidance_rate: rate of "cg"; 0 is no guidance. Default 1.
    """
    _check_parts(config)
    rate = (1.0 if guidance_rate is None else float(guidance_rate)) if guidance_type == "cg" else 0.0
    if not (math.isfinite(rate) and rate >= 0):
        raise UserError(f"guidance_rate {rate:g} must be 0 or more")
    net = build_empty(ADMDenoiser, {**config, "guidance_rate": rate}, "an ADM network", len(state_dict))
    allowed = ("none", "cg") if net.model.num_classes else ("none", "uncond", "cg")
    check_guidance(allowed, guidance_type, guidance_rate, "this network")
    if not rate:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("classifier.")}
    load_weights(net, state_dict, device)
    return net


def _check_parts(config: Mapping) -> None:
    if not isinstance(config.get("model"), Mapping) or not isinstance(config.get("classifier") or {}, Mapping):
        raise UserError("the configuration of an ADM network needs the entry 'model' and may have 'classifier'")


def load_adm(
    path_model: str | Path,
    path_classifier: str | Path | None = None,
    dataset_name: str = "imagenet256",
    *,
    config: Mapping | None = None,
    use_fp16: bool | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> ADMDenoiser:
    """Load the denoiser of official ``.pt`` files, frozen and in evaluation mode.

    path_model: file of the network.
    path_classifier: file of the classifier, for guidance_type "cg". Default None.
    dataset_name: chooses the published settings; unconditional variants are recognised by their
        tensors. Default imagenet256.
    config: settings instead of the published ones, see ``build_denoiser``. Default None.
    use_fp16: run the torsos in float16. Default: as in the settings on a GPU, else False.
    guidance_type, guidance_rate, device: see ``create_model``.

    Raises UserError if a file is damaged or contains another network, and for guidance without a
    classifier.
    """
    config = choose_settings(RELEASED_CONFIGS, dataset_name, config)
    _check_parts(config)
    guided = guidance_type == "cg" and guidance_rate != 0
    if guided and path_classifier is None:
        raise UserError("guidance_type 'cg' needs the file of a classifier, such as 256x256_classifier.pt")
    parts = {"model": (path_model, ADM, unet_arguments(config["model"]))}
    if guided:
        parts["classifier"] = (path_classifier, ADM_CLASSIFIER, classifier_arguments(config.get("classifier") or {}))
    weights, arguments = {}, dict(config)
    for part, (path, family, settings) in parts.items():
        tensors = read_weights(path)
        check_family(path, tensors, family)
        arguments[part] = choose_precision(settings, use_fp16, device)
        weights.update({f"{part}.{name}": value for name, value in tensors.items()})
    if "model.label_emb.weight" not in weights:
        arguments["model"]["num_classes"] = None
    files = " and ".join(str(path) for path, _, _ in parts.values())
    return FAMILY.create(arguments, weights, guidance_type, guidance_rate, device, files)


FAMILY = Family("adm", build_adm, load_adm)
