"""Pipelines of the diffusers library as denoisers.

Unconditional U-Nets, Stable Diffusion 1.x, 2.x, XL and 3, and Flux. diffusers and transformers are
optional and imported when a pipeline is loaded. Weights are read from safetensors. No code of a
pipeline's files is run.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from models.building import check_guidance
from models.denoiser import Denoiser, NoFeature, standard_inputs
from models.edm import EDMDenoiser
from models.ldm import DECODE_BATCH
from models.noise import RectifiedFlow, TimeOfProcess, VariancePreserving
from torch_utils import distributed
from torch_utils.download import offline
from torch_utils.errors import MissingExtra, UserError
from torch_utils.files import sha256_of
from torch_utils.hub import import_transformers, read_json, refuse_code_in_configs, refuse_other_files
from torch_utils.prompts import batch_of_prompts
from torch_utils.remote import is_remote

EXTRA = "diffusers"
_FIRST_STAGES = ("vae", "vqvae")
_ZERO_SNR_ALPHA = 2.0**-24  # instead of a = 0 at the last time, where sigma is infinite; as in diffusers


def import_diffusers(purpose: str):
    """The package diffusers. Raises MissingExtra if it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise MissingExtra("diffusers", EXTRA, purpose) from None
    return diffusers


def is_flow(config: Mapping) -> bool:
    """Whether the configuration is that of a flow scheduler."""
    return "base_image_seq_len" in config or config.get("prediction_type") == "flow_prediction"


def noise_process(
    config: Mapping, tokens: int | None = None, mu: float | None = None
) -> VariancePreserving | RectifiedFlow:
    """The noise process of a diffusers scheduler, from its configuration.

    config: configuration of a scheduler of any class.
    tokens: number of tokens of an image, for flow schedulers whose shift depends on it. Default
        None.
    mu: shift parameter that the pipeline computed from the number of tokens. Default: from tokens.

    Raises UserError for unsupported schedulers.
    """
    if is_flow(config):
        if config.get("invert_sigmas"):
            raise UserError("a scheduler with invert_sigmas is not supported")
        return RectifiedFlow(config.get("num_train_timesteps", 1000), _flow_shift(config, tokens, mu))
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        name = config.get("_class_name", "this class")
        raise UserError(
            f"the scheduler's configuration ({name}) has no beta_schedule: such pipelines are not supported"
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    given = {name: config[name] for name in names if config.get(name) is not None}
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    diffusers = import_diffusers("the noise table of a diffusers scheduler")
    try:
        table = diffusers.DDPMScheduler(**given, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"the scheduler's noise table cannot be made: {error}") from None
    return VariancePreserving(
        table.clamp(min=_ZERO_SNR_ALPHA) if zero_snr else table, config.get("prediction_type", "epsilon")
    )


def _flow_shift(config: Mapping, tokens: int | None, mu: float | None) -> float:
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", config.get("flow_shift", 1.0))
    if mu is None:
        if tokens is None:
            raise UserError(
                "the scheduler's shift depends on the size of the image (use_dynamic_shifting), which is unknown"
            )
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        mu = config["base_shift"] + (tokens - low) / (high - low) * (config["max_shift"] - config["base_shift"])
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


class DiffusersDenoiser(TimeOfProcess, Denoiser):
    """D(x; sigma) from the network of a loaded pipeline.

    pipeline: the pipeline; it remains usable and shares its modules.
    guidance_type, guidance_rate: see ``load_diffusers``.

    Subclasses set ``network_name``, the entry of the pipeline with the network, and implement
    ``predict``. ``process`` scales input and output.
    """

    can_autocast = True
    network_name = "unet"

    def __init__(self, pipeline, guidance_type: str | None = None, guidance_rate: float | None = None):
        super().__init__()
        self.pipeline = pipeline
        self.parts = torch.nn.ModuleDict(
            {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        )
        self.first_stage_name = next((name for name in _FIRST_STAGES if name in self.parts), None)
        self.latent = any(name in pipeline.components for name in _FIRST_STAGES)
        self.img_channels, self.img_resolution = self.space()
        self.process = noise_process(pipeline.scheduler.config, self.tokens())
        self.sigma_min, self.sigma_max = self.process.sigma_min, self.process.sigma_max
        self.no_feature = NoFeature()
        self.guidance_rate = self.choose_guidance(guidance_type, guidance_rate)

    @property
    def network(self) -> torch.nn.Module:
        return self.parts[self.network_name]

    @property
    def bottleneck(self) -> torch.nn.Module:
        block = getattr(self.network, "mid_block", None)
        return self.no_feature if block is None else block

    @property
    def noise_embedding(self) -> torch.nn.Module | None:
        return getattr(getattr(self.network, "time_embedding", None), "linear_2", None)

    def space(self) -> tuple[int, int]:
        """(channels, resolution) of the samples. Raises UserError for unsupported networks."""
        config = self.network.config
        channels, size = config.in_channels, config.sample_size
        if isinstance(size, (list, tuple)):
            if len(set(size)) != 1:
                raise UserError(f"the network is for images of {size[0]}x{size[1]}; only square ones are supported")
            size = size[0]
        if size is None:
            raise UserError("the network's configuration has no sample_size")
        if self.first_stage_name is not None:
            latent = self.parts[self.first_stage_name].config.latent_channels
            if latent != channels:
                raise UserError(f"the network takes {channels} channels, its first stage has {latent}: not supported")
        for name in ("time_cond_proj_dim", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise UserError(f"a network with {name} takes an input that is not supported")
        if config.get("time_embedding_type", "positional") != "positional":
            raise UserError(f"a network with time_embedding_type '{config['time_embedding_type']}' is not supported")
        return int(channels), int(size)

    def tokens(self) -> int | None:
        """Number of tokens of an image, for transformers."""
        return None

    def choose_guidance(self, kind: str | None, rate: float | None) -> float:
        """The guidance rate. Raises UserError if the pipeline does not take this guidance type."""
        check_guidance(("none",) if self.label_dim else ("none", "uncond"), kind, rate, "an unconditional pipeline")
        return 1.0

    def predict(self, x: torch.Tensor, times: torch.Tensor, **cond) -> torch.Tensor:
        """The network's output for its input x [B,C,H,W] and times [B]."""
        raise NotImplementedError

    def forward(self, x, sigma, **cond):
        x, sigma = standard_inputs(x, sigma)
        times = self.process.timestep(sigma.flatten()).expand(len(x))
        inputs = (x * self.process.scale(sigma)).to(self.network.dtype)
        with self.mixed_precision(x.device):
            output = self.predict(inputs, times, **cond)
        if self.bottleneck is self.no_feature:
            self.no_feature(x)
        return self.process.denoised(x, sigma, output.to(torch.float32))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Decode latents [B,C,h,w] to images [B,3,H,W], about [-1, 1]; pixel models: identity."""
        if self.first_stage_name is None:
            if missing := [name for name in _FIRST_STAGES if name in self.pipeline.components]:
                raise UserError(f"this pipeline was saved without its {missing[0]}: its latents cannot become images")
            return x
        first_stage = self.parts[self.first_stage_name]
        x = x.to(torch.float32)
        mean, std = (first_stage.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is not None and std is not None:  # some first stages of SDXL
            mean, std = (x.new_tensor(value).reshape(1, -1, 1, 1) for value in (mean, std))
            x = x * std / first_stage.config.scaling_factor + mean
        else:
            x = x / first_stage.config.scaling_factor + (first_stage.config.get("shift_factor") or 0)
        parts = x.to(first_stage.dtype).split(DECODE_BATCH)
        return torch.cat([first_stage.decode(part).sample.to(torch.float32) for part in parts])


class UnconditionalPipeline(DiffusersDenoiser):
    """DDPMPipeline, DDIMPipeline and LDMPipeline: a UNet2DModel, maybe with class_labels [B]."""

    def space(self):
        config = self.network.config
        if config.get("class_embed_type") is not None:
            raise UserError(f"a network with class_embed_type '{config['class_embed_type']}' is not supported")
        self.label_dim = int(config.get("num_class_embeds") or 0)
        return super().space()

    def make_cond(self, generator=None, labels=None) -> dict:
        cond = EDMDenoiser.make_cond(self, generator, labels)
        return {name: value.argmax(dim=1) for name, value in cond.items()}

    def predict(self, x, times, class_labels=None):
        if self.label_dim and class_labels is None:
            raise UserError("this network is class-conditional: pass class_labels, made with make_cond")
        output = self.network(x, times, class_labels=class_labels).sample
        return output[:, : x.shape[1]]  # some networks also predict a variance, which the ODE does not need


class TextPipeline(DiffusersDenoiser):
    """Text-conditional networks with classifier-free guidance: u + rate (c - u).

    ``forward`` takes the tensors of ``names``, [B,...] or [1,...] for the whole batch, and with
    guidance those of the unconditional side as "unconditional_<name>". One call on 2B samples
    computes both sides, the unconditional ones first. With rate 1 only c is computed, and a call
    costs one evaluation.
    """

    names = ("condition",)
    encoders = ("text_encoder",)  # needed for prompts; the third one of SD3 is not
    default_rate = 7.5  # that of the diffusers pipeline

    def choose_guidance(self, kind, rate):
        check_guidance(("cfg", "none"), kind or "cfg", rate, "a text-to-image pipeline")
        rate = 1.0 if kind == "none" else self.default_rate if rate is None else float(rate)
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"guidance_rate {rate:g} must be 0 or more")
        return rate

    @property
    def guided(self) -> bool:
        """Whether both sides are computed."""
        return self.guidance_rate != 1

    @property
    def evals_per_call(self) -> int:
        return 2 if self.guided else 1

    def make_cond(self, generator=None, labels=None, prompts=None, negative_prompt: str | None = None) -> dict:
        """Text conditions of a batch, as keyword arguments of ``forward``.

        generator: gives the number of images. Default None.
        labels: must be None.
        prompts: one string for the whole batch, or a sequence of B strings.
        negative_prompt: prompt of the unconditional side. Default: that of the pipeline.

        Raises UserError without prompts, for a wrong number of them, and for a pipeline without
        text encoders.
        """
        prompts = batch_of_prompts(prompts, None if generator is None else len(generator.seeds), labels)
        missing = [name for name in self.encoders if getattr(self.pipeline, name, None) is None]
        if missing:
            raise UserError(f"this pipeline was saved without its {missing[0]}: it cannot take prompts")
        negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
        with torch.no_grad():
            own, other = self.encode(prompts, negative)
        cond = dict(zip(self.names, own, strict=True))
        if self.guided:
            cond |= {f"unconditional_{name}": value for name, value in zip(self.names, other, strict=True)}
        return cond

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[tuple, tuple]:
        """The tensors of ``names`` for the prompts and, with guidance, the unconditional side."""
        device = next(self.network.parameters()).device
        own, other = self.pipeline.encode_prompt(
            prompts, device, 1, do_classifier_free_guidance=self.guided, negative_prompt=negative
        )
        return (own,), (other,)

    def call(self, x, times, **tensors):
        """The network's output for one side."""
        return self.network(x, times, encoder_hidden_states=tensors["condition"]).sample

    def _side(self, prefix: str, cond: Mapping, x: torch.Tensor) -> dict:
        side = {}
        for name in self.names:
            value = cond.get(prefix + name)
            if value is None:
                raise UserError(f"this network needs '{prefix + name}': make it with make_cond(prompts=...)")
            if value.shape[0] not in (1, len(x)):
                raise UserError(f"'{prefix + name}' has {value.shape[0]} rows for a batch of {len(x)}")
            side[name] = value.to(x.dtype).expand(len(x), *value.shape[1:])
        return side

    def predict(self, x, times, **cond):
        own = self._side("", cond, x)
        if not self.guided:
            return self.call(x, times, **own)
        other = self._side("unconditional_", cond, x)
        both = {name: torch.cat([other[name], own[name]]) for name in self.names}
        output = self.call(torch.cat([x, x]), torch.cat([times, times]), **both)
        unconditional, conditional = output.to(torch.float32).chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_rate)


class StableDiffusionXL(TextPipeline):
    """Stable Diffusion XL: two text encoders, pooled text and sizes.

    Podell et al. 2023, Section 2.2.

    time_ids [B,6]: original size, place of the crop and target size, in pixels.
    """

    names = ("condition", "pooled", "time_ids")
    encoders = ("text_encoder", "text_encoder_2")
    default_rate = 5.0

    def encode(self, prompts, negative):
        device = next(self.network.parameters()).device
        own, other, pooled, other_pooled = self.pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=self.guided, negative_prompt=negative
        )
        pixels = float(self.img_resolution * self.pipeline.vae_scale_factor)
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device).expand(len(prompts), -1)
        return (own, pooled, sizes), (other, other_pooled, sizes)

    def call(self, x, times, **tensors):
        added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
        return self.network(x, times, encoder_hidden_states=tensors["condition"], added_cond_kwargs=added).sample


class StableDiffusion3(TextPipeline):
    """The flow transformer of Esser et al. 2024."""

    network_name = "transformer"
    names = ("condition", "pooled")
    encoders = ("text_encoder", "text_encoder_2")
    default_rate = 7.0

    def tokens(self):
        return (self.img_resolution // self.network.config.patch_size) ** 2

    def encode(self, prompts, negative):
        device = next(self.network.parameters()).device
        own, other, pooled, other_pooled = self.pipeline.encode_prompt(
            prompts, None, None, device, do_classifier_free_guidance=self.guided, negative_prompt=negative
        )
        return (own, pooled), (other, other_pooled)

    def call(self, x, times, **tensors):
        return self.network(
            x, encoder_hidden_states=tensors["condition"], pooled_projections=tensors["pooled"], timestep=times
        ).sample


class Flux(TextPipeline):
    """The flow transformer of Flux.1; its tokens are 2x2 patches of the latents.

    Networks that were distilled with guidance (guidance_embeds, such as "dev") have the rate as an
    input and are called once. The others (such as "schnell") are not guided unless you give a rate.
    """

    network_name = "transformer"
    names = ("condition", "pooled")
    encoders = ("text_encoder", "text_encoder_2")

    def space(self):
        channels = self.network.config.in_channels // 4
        if self.first_stage_name is not None and self.parts[self.first_stage_name].config.latent_channels != channels:
            raise UserError(f"the transformer takes {channels} channels, its first stage has others: not supported")
        return channels, int(self.pipeline.default_sample_size)

    def tokens(self):
        return (self.img_resolution // 2) ** 2

    @property
    def tells_rate(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    @property
    def default_rate(self):
        return 3.5 if self.tells_rate else 1.0

    @property
    def guided(self):
        return not self.tells_rate and self.guidance_rate != 1

    def encode(self, prompts, negative):
        device = next(self.network.parameters()).device
        own = self.pipeline.encode_prompt(prompts, None, device)[:2]
        other = (None, None)
        if self.guided:
            other = self.pipeline.encode_prompt([""] * len(prompts) if negative is None else negative, None, device)[:2]
        return own, other

    def call(self, x, times, **tensors):
        rows, columns = (size // 2 for size in x.shape[-2:])
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        rate = torch.full([len(x)], self.guidance_rate, device=x.device) if self.tells_rate else None
        output = self.network(
            hidden_states=F.pixel_unshuffle(x, 2).flatten(2).mT,
            timestep=times / self.process.steps,
            guidance=rate,
            pooled_projections=tensors["pooled"],
            encoder_hidden_states=tensors["condition"],
            txt_ids=places.new_zeros(tensors["condition"].shape[1], 3),
            img_ids=places.flatten(0, 1),
        ).sample
        return F.pixel_shuffle(output.mT.unflatten(2, (rows, columns)), 2)


# {class of the pipeline: (denoiser, class of its network)}
PIPELINES = {
    "DDPMPipeline": (UnconditionalPipeline, "UNet2DModel"),
    "DDIMPipeline": (UnconditionalPipeline, "UNet2DModel"),
    "LDMPipeline": (UnconditionalPipeline, "UNet2DModel"),
    "StableDiffusionPipeline": (TextPipeline, "UNet2DConditionModel"),
    "StableDiffusionXLPipeline": (StableDiffusionXL, "UNet2DConditionModel"),
    "StableDiffusion3Pipeline": (StableDiffusion3, "SD3Transformer2DModel"),
    "FluxPipeline": (Flux, "FluxTransformer2DModel"),
}

_OWN_SCHEDULER = ["sampling.diffusers_scheduler", "AMEDScheduler"]  # in the index of a pipeline
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # large parts that are not loaded
_INDEX = "model_index.json"


def load_diffusers(
    path_or_hub_id: str | Path,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    allow_pickle: bool = False,
) -> DiffusersDenoiser:
    """Load the denoiser of a diffusers pipeline, frozen and in evaluation mode.

    path_or_hub_id: a folder of ``save_pretrained``, or an id of the Hugging Face hub, which is
        downloaded to the usual cache. All processes of torchrun must call this.
    guidance_type: "cfg" (default) or "none" for text-to-image, "uncond" or "none" otherwise.
    guidance_rate: strength of the guidance, as in diffusers. Default: that of the pipeline.
    device: where the weights are put. Default: the CPU.
    dtype: dtype of the weights; images and noise levels stay in float32,
        and so does a first stage that may overflow. Default float32.
    allow_pickle: also read weights that are not in safetensors, as data only. Default False.

    The result has ``dataset_name``, ``source_path`` and ``weights_hash``: the SHA-256 of the
    weights file, or of the list of hashes if there are several. Raises MissingExtra without the
    packages, and UserError for folders that are not pipelines, unsupported pipelines, and guidance
    that they do not support.
    """
    diffusers = import_diffusers("a diffusers pipeline")
    folder = _local_folder(diffusers, path_or_hub_id, allow_pickle)
    name, index = _read_index(folder, path_or_hub_id)
    denoiser, _ = PIPELINES[name]
    libraries = {"diffusers": diffusers}
    if issubclass(denoiser, TextPipeline):
        libraries["transformers"] = import_transformers("a text-to-image pipeline", EXTRA)
    _refuse_code(folder, index, path_or_hub_id)
    weights = _part_weights(folder, index, allow_pickle)
    refuse_other_files(path for _, paths in weights.values() for path in paths)
    # Parts that were not saved must be given as None.
    given = {part: None for part, entry in index.items() if part in _UNUSED or entry == [None, None]}
    if "safety_checker" in given:
        given["requires_safety_checker"] = False
    dtypes = {"default": dtype}
    dtypes |= {part: _first_stage_dtype(folder / part, dtype) for part in _FIRST_STAGES if part in index}
    options = {
        "use_safetensors": None if allow_pickle else True,
        "trust_remote_code": False,
        "local_files_only": True,
        "low_cpu_mem_usage": diffusers.utils.is_accelerate_available(),
    }
    if index["scheduler"] == _OWN_SCHEDULER:
        given["scheduler"] = _reading(path_or_hub_id, _plain_scheduler, diffusers, folder / "scheduler")
    for part, (variant, _) in weights.items():
        if variant is not None:  # diffusers uses one variant for all parts
            library, kind = index[part]
            load = getattr(libraries[library], kind).from_pretrained
            more = options | {"variant": variant, "dtype": dtypes.get(part, dtype)}
            given[part] = _reading(path_or_hub_id, load, folder / part, **more)
    pipeline = _reading(
        path_or_hub_id, getattr(diffusers, name).from_pretrained, folder, dtype=dtypes, **options, **given
    )
    try:
        net = denoiser(pipeline, guidance_type, guidance_rate)
    except UserError as error:
        raise UserError(f"{path_or_hub_id}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path_or_hub_id}: the configuration of a part is unusable ({error})") from error
    net.dataset_name = "diffusers"
    net.source_path = str(path_or_hub_id)
    part = folder / net.network_name
    net.weights_hash = _hash_weights(part if part.is_dir() else folder)  # old pipelines have no subfolders
    return net.to(device).eval().requires_grad_(False)


def _plain_scheduler(diffusers, folder: Path):
    """A scheduler of diffusers with the settings of the network that an AMEDScheduler has saved."""
    config = read_json(folder / "scheduler_config.json")
    kind = diffusers.FlowMatchEulerDiscreteScheduler if is_flow(config) else diffusers.DDPMScheduler
    return kind.from_config(config)


def _first_stage_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """float32, unless the configuration says that half precision suffices (force_upcast)."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    fits = isinstance(config, dict) and config.get("force_upcast") is False
    return dtype if fits else torch.float32


def _reading(source, function, *arguments, **options):
    """Call a function of diffusers; its errors about files become UserError."""
    try:
        return function(*arguments, **options)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source} cannot be read as a diffusers pipeline: {lines[0][:300]}") from None


def _local_folder(diffusers, source, allow_pickle: bool) -> Path:
    if is_remote(source):
        if re.fullmatch(r"hf:[\w.-]+/[\w.-]+", source) is None:
            raise UserError(f"{source}: a pipeline is a folder, or hf:owner/name")
        source = source.removeprefix("hf:")
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source} is a file; give the folder of a diffusers pipeline (with {_INDEX}), or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{source} is neither an existing folder nor a hub id (owner/name)")
    with distributed.local_main_first():
        offline_only = {"local_files_only": True} if offline() else {}
        config = _reading(source, diffusers.DiffusionPipeline.load_config, str(source), **offline_only)
        _check_index(config, source)  # before the download of gigabytes
        options = {"use_safetensors": None if allow_pickle else True, "trust_remote_code": False, **offline_only}
        return _download(diffusers, str(source), config, allow_pickle, options)


def _download(diffusers, hub_id: str, index: Mapping, allow_pickle: bool, options: dict) -> Path:
    """Download a pipeline of the hub, in half precision if there are no other weights."""
    folder, problem = None, None
    for variant in ({}, {"variant": "fp16"}):
        try:
            folder = Path(_reading(hub_id, diffusers.DiffusionPipeline.download, hub_id, **options, **variant))
        except UserError as error:
            problem = problem or error
            continue
        if all(paths for _, paths in _part_weights(folder, index, allow_pickle).values()):
            return folder
    if folder is None:
        raise problem
    return folder  # incomplete; loading it raises an error that explains it


def _read_index(folder: Path, source) -> tuple[str, dict]:
    path = folder / _INDEX
    if not path.is_file():
        raise UserError(f"{source} is not a diffusers pipeline: it has no {_INDEX}")
    index = read_json(path)
    return _check_index(index, source), index


def takes_prompts(source: str | Path) -> bool | None:
    """Whether the pipeline in a folder is text-to-image; None if there is no such folder."""
    if not (Path(source) / _INDEX).is_file():
        return None
    name, _ = _read_index(Path(source), source)
    return issubclass(PIPELINES[name][0], TextPipeline)


def _check_index(index, source) -> str:
    """The class name of a pipeline. Raises UserError unless all its parts are library classes."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or name not in PIPELINES:
        raise UserError(f"{source} is a {name}, which is not supported; supported: {', '.join(PIPELINES)}")
    denoiser, expected = PIPELINES[name]
    for part, entry in index.items():
        if part.startswith("_") or part in _UNUSED or entry is None or isinstance(entry, (bool, int, float)):
            continue  # notes and settings
        if part == "scheduler" and entry == _OWN_SCHEDULER:
            continue
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (str(entry)[:40], "")
        if library not in (None, "diffusers", "transformers"):
            raise UserError(f"{source}: its '{part}' is code from '{library}', which is not run")
        if re.match("Auto(?!encoder)|Rag|Timm", str(kind)):  # may choose code or weights from elsewhere
            raise UserError(f"{source}: its '{part}' is a {kind}, which may choose any class; it is not supported")
        if str(kind).endswith("Pipeline"):  # it has an index of its own, which was not checked
            raise UserError(f"{source}: its '{part}' is a whole pipeline, which is not supported")
    if index.get("scheduler") in (None, [None, None]):
        raise UserError(f"{source} was saved without its scheduler, which defines the noise of the network")
    found = index.get(denoiser.network_name)
    if not isinstance(found, list) or found[-1] != expected:
        raise UserError(f"{source}: its {denoiser.network_name} is {found}, but must be a {expected}")
    return name


def _refuse_code(folder: Path, index: Mapping, source) -> None:
    """Raises UserError if a part comes with code.

    diffusers would import <part>/<library>.py instead of the library.
    """
    for part in index:
        if code := next((folder / part).rglob("*.py"), None):
            raise UserError(f"{source}: its '{part}' contains code ({code.name}), which is not run; remove the file")
    parts = [part for part, entry in index.items() if part not in _UNUSED and isinstance(entry, list)]
    refuse_code_in_configs([folder, *(folder / part for part in parts)], source)


# diffusion_pytorch_model.safetensors, model.fp16.safetensors,
# model.fp16-00001-of-00002.safetensors, and model-00001-of-00002.fp16.safetensors (until 2024)
_WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<old_variant>\w+))?\.(?P<format>safetensors|bin)"
)

_VARIANTS = (None, "fp32", "ema", "bf16", "fp16")  # the best first; others come after these


def _find_weights(folder: Path, allow_pickle: bool) -> tuple[str | None, list[Path]]:
    """(variant, files) of the weights to load from the folder of a part; (None, []) without any.

    allow_pickle: use files that are not safetensors if there are no others.
    """
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _WEIGHTS_NAME.fullmatch(path.name):
            variant = match["variant"] or match["old_variant"]
            found.setdefault(match["format"], {}).setdefault(variant, []).append(path)
    for kind in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        if variants := found.get(kind):
            known = [variant for variant in _VARIANTS if variant in variants]
            variant = known[0] if known else min(variants)
            return variant, sorted(variants[variant])
    return None, []


def _part_weights(folder: Path, index: Mapping, allow_pickle: bool) -> dict[str, tuple[str | None, list[Path]]]:
    """``_find_weights`` for each part of a pipeline with weights and a subfolder."""
    parts = [
        part
        for part, entry in index.items()
        if re.fullmatch(r"unet|transformer|vae|vqvae|text_encoder(_\d)?", part) and entry not in (None, [None, None])
    ]
    return {part: _find_weights(folder / part, allow_pickle) for part in parts if (folder / part).is_dir()}


def _hash_weights(folder: Path) -> str:
    hashes = [sha256_of(path) for path in _find_weights(folder, allow_pickle=True)[1]]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
