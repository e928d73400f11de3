"""Stable Diffusion 1.x (Rombach et al. 2022) with classifier-free guidance (Ho & Salimans 2022).

``TextEncoder`` turns prompts into contexts. The denoiser's ``forward`` takes contexts.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from models.building import Family, build_empty, check_guidance, load_weights
from models.ldm import LatentDenoiser, load_latent
from models.openai_unet import STABLE_DIFFUSION
from torch_utils.errors import UserError
from torch_utils.hub import TOKENIZER_FILES, first_line, has_tokenizer, hub_folder, import_transformers
from torch_utils.prompts import batch_of_prompts

GUIDANCE_RATE = 7.5  # that of the published samples

# The text encoder of CLIP ViT-L/14 (Radford et al. 2021).
CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"

STABLE_DIFFUSION_1_5 = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "image_size": 64,
    "channels": 4,
    "conditioning_key": "crossattn",
    "scale_factor": 0.18215,
    "use_ema": False,
    "unet_config": {
        "params": {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "attention_resolutions": [4, 2, 1],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 4, 4],
            "num_heads": 8,
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": 768,
            "use_checkpoint": True,
            "legacy": False,
        }
    },
    "first_stage_config": {
        "target": "AutoencoderKL",
        "params": {
            "embed_dim": 4,
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 256,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 2, 4, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        },
    },
    "cond_stage_config": {"target": "FrozenCLIPEmbedder", "text_config": CLIP_TEXT},
}


class ClipTextWeights(torch.nn.Module):
    """The parameters of CLIP's text transformer under the names of checkpoints; no computation."""

    def __init__(self, config: Mapping):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self._add("embeddings.token_embedding", config["vocab_size"], width, bias=False)
        self._add("embeddings.position_embedding", config["max_position_embeddings"], width, bias=False)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"encoder.layers.{layer}."
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                self._add(f"{prefix}self_attn.{name}", width, width)
            self._add(f"{prefix}layer_norm1", width)
            self._add(f"{prefix}mlp.fc1", inner, width)
            self._add(f"{prefix}mlp.fc2", width, inner)
            self._add(f"{prefix}layer_norm2", width)
        self._add("final_layer_norm", width)

    def _add(self, path: str, *shape: int, bias: bool = True) -> None:
        owner: torch.nn.Module = self
        for part in ("text_model", *path.split(".")):
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.weight = torch.nn.Parameter(torch.zeros(shape))
        if bias:
            owner.bias = torch.nn.Parameter(torch.zeros(shape[:1]))


class TextEncoder(torch.nn.Module):
    """Prompts -> contexts [B, tokens, width], the last hidden states of CLIP's text transformer.

    config: entries that differ from CLIP_TEXT.
    tokenizer: folder or hub id of the CLIPTokenizer; may be set later. Default CLIP_TOKENIZER.

    This module has the weights under their official names. The computation is that of transformers'
    CLIPTextModel, built when first needed.
    """

    def __init__(self, config: Mapping, tokenizer: str = CLIP_TOKENIZER):
        super().__init__()
        self.config = CLIP_TEXT | {key: value for key, value in config.items() if key in CLIP_TEXT}
        self.transformer = ClipTextWeights(self.config)
        self.tokenizer = str(tokenizer)
        self._tokenizer: tuple = (None, None)  # (source, loaded tokenizer)
        self._built: dict[str, torch.nn.Module] = {}  # not a submodule: its parameters are those of ``transformer``

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids, int64 [B, max_position_embeddings], padded or cut.

        Raises UserError if the tokenizer cannot be loaded or is not that of the network.
        """
        if self._tokenizer[0] != self.tokenizer:
            transformers = import_transformers("turning prompts into tokens")
            folder = _tokenizer_folder(self.tokenizer)
            try:
                self._tokenizer = (self.tokenizer, transformers.CLIPTokenizer.from_pretrained(folder))
            except Exception as error:  # the tokenizers library raises plain Exceptions for damaged files
                raise UserError(f"the tokenizer in {folder} cannot be used ({first_line(error)})") from error
        length = self.config["max_position_embeddings"]
        tokens = self._tokenizer[1](
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        if (largest := int(tokens["input_ids"].max())) >= self.config["vocab_size"]:
            raise UserError(f"the tokenizer '{self.tokenizer}' is not this network's: it has a token number {largest}")
        return tokens["input_ids"]

    @torch.no_grad()
    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Contexts of token ids [B,T], float32 [B,T,width] on the device of the weights."""
        if "model" not in self._built:
            self._built["model"] = self._build()
        device = next(self.parameters()).device
        return self._built["model"].to(device)(input_ids=tokens.to(device)).last_hidden_state

    def forward(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.encode(self.tokenize(prompts))

    def _build(self) -> torch.nn.Module:
        transformers = import_transformers("the text encoder")
        with torch.device("meta"):
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**self.config))
        model.eval().requires_grad_(False)
        # Some versions of transformers have the level "text_model", others start below it.
        nested = any(name.startswith("text_model.") for name, _ in model.named_parameters())
        weights = dict(self.transformer.named_parameters())
        model.load_state_dict(
            {name if nested else name.removeprefix("text_model."): value for name, value in weights.items()},
            strict=True,
            assign=True,
        )
        for name, _ in list(model.named_buffers()):  # position_ids, which files need not contain
            owner, _, attribute = name.rpartition(".")
            if attribute != "position_ids":
                raise RuntimeError(f"this version of transformers has an unknown buffer in CLIPTextModel: {name}")
            positions = torch.arange(self.config["max_position_embeddings"]).unsqueeze(0)
            model.get_submodule(owner).register_buffer(attribute, positions, persistent=False)
        return model


def _tokenizer_folder(source: str) -> str:
    """The folder of a tokenizer: ``source``, or the local copy of that hub repository."""
    folder = source
    if not Path(source).is_dir():
        problem = f"no CLIP tokenizer '{source}': it is not a folder, and the hub repository cannot be reached"
        folder = hub_folder(source, TOKENIZER_FILES, problem, "give a folder with vocab.json and merges.txt")
    if not has_tokenizer(folder):
        raise UserError(f"no CLIP tokenizer in {folder}: it has neither tokenizer.json nor vocab.json and merges.txt")
    return folder


class StableDiffusionDenoiser(LatentDenoiser):
    """Text-conditional latent diffusion with classifier-free guidance.

    The noise is u + rate (c - u), with c and u the network's outputs for the two contexts. Both
    come from one call on 2B samples, the unconditional ones first. With rate 1 only c is computed,
    and a call costs one evaluation.

    cond_stage_config: configuration of the text encoder ``cond_stage_model``.
    guidance_rate: rate. Default 7.5.
    config: see ``LatentDenoiser``.

    ``forward`` takes condition and, unless rate is 1, unconditional_condition: contexts [B,T,W], or
    [1,T,W] for the whole batch.
    """

    def __init__(self, *, cond_stage_config, guidance_rate: float = GUIDANCE_RATE, **config):
        super().__init__(**config)
        if not isinstance(cond_stage_config, Mapping):
            raise UserError(f"cond_stage_config={cond_stage_config!r} is not the configuration of a text encoder")
        self.cond_stage_model = TextEncoder(
            cond_stage_config.get("text_config") or cond_stage_config.get("params") or {}
        )
        self.context_dim = config["unet_config"]["params"]["context_dim"]
        self.guidance_rate = float(guidance_rate)
        if not (math.isfinite(self.guidance_rate) and self.guidance_rate >= 0):
            raise UserError(f"guidance_rate {guidance_rate:g} must be 0 or more")

    @property
    def evals_per_call(self) -> int:
        return 2 if self.guided else 1

    @property
    def guided(self) -> bool:
        return self.guidance_rate != 1

    def make_cond(self, generator=None, labels=None, prompts=None, negative_prompt: str = "") -> dict:
        """Contexts of a batch, as keyword arguments of ``forward``.

        generator: gives the number of images. Default None.
        labels: must be None.
        prompts: one string for the whole batch, or a sequence of B strings.
        negative_prompt: prompt of the unconditional side. Default: empty.

        Raises UserError without prompts or for a wrong number of them, and MissingExtra without the
        package transformers.
        """
        prompts = batch_of_prompts(prompts, None if generator is None else len(generator.seeds), labels)
        cond = {"condition": self.cond_stage_model(prompts)}
        if self.guided:
            other = self.cond_stage_model([negative_prompt])
            cond["unconditional_condition"] = other.expand_as(cond["condition"])
        return cond

    def _context(self, name: str, value: torch.Tensor | None, batch: int) -> torch.Tensor:
        if value is None:
            raise UserError(f"Stable Diffusion needs '{name}', a context: make it with make_cond(prompts=...)")
        if value.ndim != 3 or value.shape[0] not in (1, batch) or value.shape[2] != self.context_dim:
            raise UserError(f"'{name}' has shape {list(value.shape)}, not [{batch}, tokens, {self.context_dim}]")
        return value.expand(batch, -1, -1)

    def predict_noise(self, x, timesteps, condition=None, unconditional_condition=None):
        condition = self._context("condition", condition, len(x))
        if not self.guided:
            return self.unet(x, timesteps, context=condition)
        other = self._context("unconditional_condition", unconditional_condition, len(x))
        if other.shape != condition.shape:
            raise UserError(
                f"'condition' has {condition.shape[1]} tokens and 'unconditional_condition' {other.shape[1]}; "
                "the numbers must be equal"
            )
        noise = self.unet(torch.cat([x, x]), torch.cat([timesteps, timesteps]), context=torch.cat([other, condition]))
        unconditional, conditional = noise.to(torch.float32).chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_rate)

    def select_weights(self, state_dict):
        # Versions of transformers before 4.31 stored position_ids 0, 1, 2, ... with the weights.
        chosen = super().select_weights(state_dict)
        return {name: value for name, value in chosen.items() if not name.endswith(".embeddings.position_ids")}


def build_sd(config, state_dict, guidance_type=None, guidance_rate=None, device="cpu") -> StableDiffusionDenoiser:
    """The builder of the family "sd"; guidance_type: "cfg" (default, rate 7.5), "none" (rate 1)."""
    check_guidance(("cfg", "none"), guidance_type or "cfg", guidance_rate, "Stable Diffusion")
    rate = GUIDANCE_RATE if guidance_rate is None else guidance_rate
    rate = 1.0 if guidance_type == "none" else rate
    net = build_empty(
        partial(StableDiffusionDenoiser, guidance_rate=rate), config, "a Stable Diffusion model", len(state_dict)
    )
    load_weights(net, net.select_weights(state_dict), device)
    return net


def load_sd(
    path: str | Path,
    *,
    config: Mapping | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    tokenizer: str | Path = CLIP_TOKENIZER,
    device: str | torch.device = "cpu",
) -> StableDiffusionDenoiser:
    """Load the denoiser of an official checkpoint, frozen and in evaluation mode.

    path: file of Stable Diffusion 1.x.
    config: settings instead of the published ones, see ``build_denoiser``. Default None.
    guidance_type, guidance_rate, device: see ``create_model``.
    tokenizer: folder with vocab.json and merges.txt, or a hub id; read at the first prompt.
        Default CLIP_TOKENIZER.

    Raises UserError if the file is damaged or contains another network.
    """
    config = STABLE_DIFFUSION_1_5 if config is None else config
    net = load_latent(FAMILY, STABLE_DIFFUSION, path, config, guidance_type, guidance_rate, device)
    net.cond_stage_model.tokenizer = str(tokenizer)
    return net


FAMILY = Family("sd", build_sd, load_sd)
