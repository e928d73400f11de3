"""EDM networks: a U-Net with the preconditioning of Karras et al. 2022 (Table 1, column "Ours")."""

import json

import torch

from models import zoo
from models.building import Family, build_empty, check_guidance, check_weights, load_weights
from models.denoiser import Denoiser, PreconditionedDenoiser, RestorationMixin, edm_scalings
from models.edm_unet import NETWORKS
from models.few_step import FewStep
from models.restoration_unets import pad_to_multiple
from torch_utils.errors import UserError, brief
from torch_utils.safe_pickle import PersistentObject, open_binary, safe_load
from torch_utils.tensor_file import is_safetensors, json_entry, read_safetensors, read_weights, write_safetensors


def class_indices(labels, count: int | None, label_dim: int) -> torch.Tensor:
    """Convert class labels to int64 [count].

    labels: one class for all images, or one per image.
    count: number of images; None: that of the labels.
    label_dim: number of classes.

    Raises UserError if a label is not in 0..label_dim - 1, or their number is wrong.
    """
    given = torch.as_tensor(labels)
    indices = given.to(torch.int64)
    wrong = indices[(indices < 0) | (indices >= label_dim) | (indices != given)]
    if wrong.numel():
        bad = given[indices == wrong.flatten()[0]].flatten()[0].item()
        raise UserError(f"class {bad} is out of range: this network has classes 0..{label_dim - 1}")
    if indices.ndim == 0:
        return indices.expand(count if count is not None else 1)
    if count is not None and indices.shape != (count,):
        raise UserError(f"{indices.numel()} classes for {count} images: give one for all, or one for each")
    return indices


def draw_classes(generator, labels, label_dim: int) -> torch.Tensor:
    """Class labels of a batch, int64 [B].

    generator: ``torch_utils.seeds.SeededGenerators`` that draws them if labels is None.
    labels: one for all images, or one per image; or None.
    label_dim: number of classes.

    Raises UserError where both are None, and for wrong labels.
    """
    if labels is not None:
        return class_indices(labels, None if generator is None else len(generator.seeds), label_dim)
    if generator is None:
        raise UserError("this network is class-conditional: pass labels, or a generator to draw them")
    return generator.randint(label_dim)


class EDMDenoiser(PreconditionedDenoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4).

    The arguments are those of the official ``EDMPrecond`` (``init_kwargs`` of a checkpoint), and
    two of PFGM++: pfgmpp, whether D is used, and D, see ``Denoiser.D``. All others go to the U-Net;
    with step_condition=True it can be conditioned on a number of time steps (``FewStep``).
    Parameters are named ``model.*``, as in the official files. The sampling range is limited to
    0.002 .. 80, as in the paper's samplers, even if the file has a wider one.
    """

    images_at_input = 1  # images side by side at the input of the U-Net

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
        pfgmpp: bool = False,
        D: int = 128,
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
        self.D = int(D) if pfgmpp else None
        if self.D is not None and self.D < 1:
            raise UserError(f"D={self.D}: PFGM++ needs at least one extra dimension")
        self.config = {
            "img_resolution": self.img_resolution,
            "img_channels": self.img_channels,
            "label_dim": self.label_dim,
            "sigma_data": self.sigma_data,
            "model_type": model_type,
            **({"pfgmpp": True, "D": self.D} if pfgmpp else {}),
            **model_kwargs,
        }
        self.model = NETWORKS[model_type](
            img_resolution=self.img_resolution,
            in_channels=self.images_at_input * self.img_channels,
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
        indices = draw_classes(generator, labels, self.label_dim)
        device = next(self.parameters()).device
        return {"class_labels": torch.nn.functional.one_hot(indices, self.label_dim).float().to(device)}

    def scalings(self, sigma):
        return *edm_scalings(sigma, self.sigma_data), sigma.log() / 4

    def predict(self, x, c_noise, sigma, class_labels=None, augment_labels=None, step_condition=None):
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        step = {} if step_condition is None else {"step_condition": step_condition}
        return self.model(x, c_noise, class_labels=class_labels, augment_labels=augment_labels, **step)


def with_step_condition(net: EDMDenoiser, seed: int = 0) -> EDMDenoiser:
    """A copy of a network with layers for the step condition, or the network if it has them.

    seed: of the new layers, which are initialised like the others. Default 0.
    """
    if net.config.get("step_condition"):
        return net
    config = {**net.config, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max, "step_condition": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        larger = EDMDenoiser(**config)
    parameter = next(net.parameters())
    larger = larger.to(parameter.device, parameter.dtype)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    larger.load_state_dict(own, strict=False, assign=True)  # keeps the memory format
    for name in ("data_mean", "data_std", "few_step", "autocast", "dataset_name", "source_path", "weights_hash"):
        setattr(larger, name, getattr(net, name))
    return larger.train(net.training)


class EDMRestorer(RestorationMixin, EDMDenoiser):
    """D(x; sigma | mu) = mu + c_skip (x - mu) + c_out F(c_in (x - mu), mu; ln(sigma) / 4).

    An EDM network of the residual x_0 - mu, which also sees mu, the degraded image. sigma_data,
    data_mean and data_std describe the residual. The other arguments are those of EDMDenoiser.

    ``forward`` takes mu [B,C,H,W] in [-1, 1]. Images may have any size; the U-Net gets them padded
    at the right and bottom to multiples of its factor of downsampling.
    """

    images_at_input = 2

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.label_dim:
            raise UserError("a restoration network takes a degraded image, and no class (label_dim)")
        self.config["restores"] = True
        self._multiple = 1 << len(kwargs.get("channel_mult", (1, 2, 2, 2))) - 1

    def forward(self, x, sigma, mu):
        mu = mu.to(torch.float32)
        return mu + super().forward(x.to(torch.float32) - mu, sigma, mu)

    def predict(self, x, c_noise, sigma, mu):
        height, width = x.shape[-2:]
        both = pad_to_multiple(torch.cat([x, mu.expand_as(x)], 1), self._multiple, "replicate")
        return self.model(both, c_noise, class_labels=None)[..., :height, :width]


def make_edm(restores: bool = False, **config) -> EDMDenoiser:
    """The network with these arguments: EDMRestorer if it restores images, else EDMDenoiser."""
    return (EDMRestorer if restores else EDMDenoiser)(**config)


_LARGEST = 1 << 14  # largest resolution in pixels
_STATISTICS = ("data_mean", "data_std")  # tensors of a file that are not weights


def load_edm_network(path_or_file) -> EDMDenoiser:
    """Load an EDM network, on the CPU, float32, frozen and in evaluation mode.

    path_or_file: path or binary file object of an official ``.pkl``, of a file that ``torch.save``
        made of one, or of a ``.safetensors`` file of this project. No code of the file is run: the
        network is built by this project's code from class name and constructor arguments.

    Raises UnsafePickleError if a pickle contains more than data, and UserError if the file contains
    something else.
    """
    with open_binary(path_or_file) as (file, name):
        start = file.tell()
        head = file.read(9)
        file.seek(start)
        if is_safetensors(head):
            return _from_safetensors(file.read(), name)
        content = safe_load(file)
    stored = content
    if isinstance(content, dict):
        if "ema" not in content:
            entries = list(content.items())[:8]
            found = ", ".join(f"{brief(key)} ({_describe(value)})" for key, value in entries) or "nothing"
            raise UserError(f"{name} is not an EDM network: the entry 'ema' is missing; found {found[:300]}")
        stored = content["ema"]
    if not isinstance(stored, PersistentObject) or stored.class_name != "EDMPrecond":
        raise UserError(f"{name} is not an EDM network (EDMPrecond): found {_describe(stored)}")
    return _build(stored.init_kwargs, stored.state_dict(), name)


def load_edm_safetensors(path) -> EDMDenoiser:
    """Load a file of ``save_edm_safetensors``. Raises UserError for any other file."""
    with open_binary(path) as (file, name):
        return _from_safetensors(file.read(), name)


def save_edm_safetensors(net: EDMDenoiser, path, extra_metadata: dict | None = None) -> None:
    """Write weights (official names), arguments, data statistics and ``few_step``, atomically.

    net: the network.
    path: the ``.safetensors`` file.
    extra_metadata: further entries of the metadata; values that are not strings are stored as JSON.
        Default: none.
    """
    extra = extra_metadata or {}
    extra = {key: value if isinstance(value, str) else json.dumps(value) for key, value in extra.items()}
    if {"config", "family", "few_step"} & extra.keys():
        raise ValueError("'config', 'family' and 'few_step' in the metadata describe the network; leave them out")
    if net.few_step is not None:
        extra["few_step"] = json.dumps(net.few_step.to_dict())
    config = {**net.config, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max}
    tensors = {key: value for key, value in net.state_dict().items() if key.startswith("model.")}
    for key in _STATISTICS:
        if (value := getattr(net, key)) is not None:
            tensors[key] = torch.as_tensor(value, dtype=torch.float32)
    write_safetensors(path, tensors, {"family": "edm", "config": json.dumps(config), **extra})


def _from_safetensors(data: bytes, name: str) -> EDMDenoiser:
    tensors, metadata = read_safetensors(data, name)
    config = json_entry(metadata, "config", name)
    statistics = {key: tensors.pop(key).to(torch.float32) for key in _STATISTICS if key in tensors}
    net = _build(config, tensors, name)
    if "few_step" in metadata:
        try:
            net.few_step = FewStep.from_metadata(json_entry(metadata, "few_step", name))
        except UserError as error:
            raise UserError(f"{name}: its few_step is damaged: {error}") from None
    if "data_mean" in statistics:
        size = 1 if net.takes_images else net.img_resolution  # a restoration network takes any size
        shape = (net.img_channels, size, size)
        if statistics["data_mean"].shape != shape:
            raise UserError(f"{name}: data_mean has shape {list(statistics['data_mean'].shape)}, not {list(shape)}")
        net.data_mean = statistics["data_mean"]
    if "data_std" in statistics:
        if statistics["data_std"].numel() != 1:
            raise UserError(f"{name}: data_std is not a single number")
        net.data_std = float(statistics["data_std"])
    return net


def _build(config: dict, state: dict[str, torch.Tensor], name: str) -> EDMDenoiser:
    """The network with these arguments and weights.

    It is built without memory first, so that wrong arguments cost nothing.
    """
    try:
        net = build_empty(make_edm, config, "an EDM network", len(state))
        if not (0 < net.img_resolution <= _LARGEST and 0 < net.sigma_min < net.sigma_max and 0 < net.sigma_data < 1e6):
            raise UserError("its resolution or noise levels are impossible")
        check_weights(net.state_dict(), state)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    weights = {key: value.to(torch.float32).contiguous() for key, value in state.items()}
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def _describe(value) -> str:
    if isinstance(value, PersistentObject):
        return f"an object of class {value.class_name}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(brief, list(value)[:8])) or 'no entries'}"
    return f"a {type(value).__name__}"


def build_edm(config, state_dict, guidance_type, guidance_rate, device) -> EDMDenoiser:
    """The builder of the family \"edm\"."""
    net = build_empty(make_edm, config, "an EDM network", len(state_dict))
    _check_edm_guidance(net, guidance_type, guidance_rate)
    load_weights(net, state_dict, device)
    return net


def load_edm(path, *, config, dataset_name, guidance_type, guidance_rate, device) -> EDMDenoiser:
    """Load the denoiser of an official pickle, a file of this project, or weights with a config."""
    if config is not None:
        return FAMILY.create(config, read_weights(path), guidance_type, guidance_rate, device, path)
    net = load_edm_network(path)
    if (card := zoo.find_card(dataset_name)) is not None:
        expected = _kind_of_images(card.channels, card.resolution, card.label_dim)
        found = _kind_of_images(net.img_channels, net.img_resolution, net.label_dim)
        if found != expected:
            raise UserError(f"checkpoint {path} is {found}, but dataset_name '{dataset_name}' expects {expected}")
    else:
        _check_edm_guidance(net, guidance_type, guidance_rate)
    return net.to(device)


def _check_edm_guidance(net: Denoiser, guidance_type, guidance_rate) -> None:
    check_guidance(("none",) if net.label_dim else ("none", "uncond"), guidance_type, guidance_rate, "this network")


def _kind_of_images(channels: int, resolution: int, label_dim: int) -> str:
    return f"{channels}x{resolution}x{resolution} {f'with {label_dim} classes' if label_dim else 'unconditional'}"


FAMILY = Family("edm", build_edm, load_edm)
