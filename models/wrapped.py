"""A network of your own as a denoiser: any module or function, with any prediction and time."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from models.denoiser import Denoiser, NoFeature
from models.noise import (
    CosineNoise,
    DiscreteTime,
    LinearNoise,
    NoiseProcess,
    RectifiedFlow,
    vp_denoised,
    vp_scale,
)
from torch_utils.errors import UserError, did_you_mean
from torch_utils.functions import find_function

# Names of predictions, and further words for them.
PREDICTIONS = {
    "denoised": ("denoiser", "D"),
    "epsilon": ("eps", "noise"),
    "v_prediction": ("v",),
    "sample": ("x0", "data"),
    "flow": ("velocity",),
}
_WORDS = {word: name for name, others in PREDICTIONS.items() for word in (name, *others)}
NOISES: dict[str, Callable[[], NoiseProcess]] = {
    "ddpm": lambda: DiscreteTime((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "stable-diffusion": lambda: DiscreteTime.of_scaled_linear_betas(0.00085, 0.012, 1000),
    "vp-sde": LinearNoise,
    "cosine": CosineNoise,
}


class FunctionNoise(NoiseProcess):
    """A noise process given by two functions.

    sigma_of_t, t_of_sigma: the noise level at time t, and its inverse, both elementwise on tensors.
    """

    sigma_min = sigma_max = None

    def __init__(self, sigma_of_t: Callable, t_of_sigma: Callable):
        self._sigma, self._sigma_inv = sigma_of_t, t_of_sigma

    def sigma(self, t):
        return self._sigma(t)

    def sigma_inv(self, sigma):
        return self._sigma_inv(sigma)

    timestep = sigma_inv


def wrap(
    model: Callable,
    prediction: str = "denoised",
    *,
    noise=None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: Sequence[int] | None = None,
    time_scale: float | None = None,
    integer_time: bool = False,
    data_time: int = 0,
    label_dim: int = 0,
    label_name: str = "class_labels",
    one_hot: bool = False,
    make_cond: Callable | None = None,
    decode: Callable | None = None,
    bottleneck: str | torch.nn.Module | None = None,
    noise_embedding: str | torch.nn.Module | None = None,
    data_mean: torch.Tensor | None = None,
    data_std: float | None = None,
    evals_per_call: int = 1,
) -> Denoiser:
    """A ``Denoiser`` around a network of your own.

    model: a module or function, called as model(input [B,C,H,W], time, **cond), which returns
        [B,C,H,W]. A module is put in evaluation mode and its parameters are frozen, in place.
    prediction: kind of its output, input and time:
        "denoised": the clean image D(x; sigma); input x = image + sigma noise, time sigma
            [B,1,1,1], as in EDM. The default.
        "epsilon", "v_prediction", "sample": the noise, v = a noise - b image (Salimans & Ho 2022),
            or the image; input a image + b noise with a^2 + b^2 = 1, time [B] of ``noise``. With
            "epsilon" and no ``noise`` the input is x and the time is sigma [B].
        "flow": noise - image; input (1 - t) image + t noise, time t [B] (Liu et al. 2022).
    noise: the noise process of "epsilon", "v_prediction" and "sample": a table of a^2
        (alphas_cumprod [N] at the times 0 .. N - 1); one of "ddpm", "stable-diffusion", "vp-sde",
        "cosine"; a pair of functions (sigma_of_t, t_of_sigma) with sigma = b / a; or an object
        with the methods of ``NoiseProcess``.
    sigma_min, sigma_max: range of noise levels for sampling. Default: that of the process;
        0.002 and 80 for "denoised".
    shape: (channels, resolution) of a sample. Needed to draw noise.
    time_scale: multiplies the time that the model gets. Default: 1.
    integer_time: round the time to whole numbers (int64), for models that look it up in a table.
        Default: False.
    data_time: 0, or 1 for a flow with t = 0 at the noise and t = 1 at the image, which predicts
        image - noise. Default: 0.
    label_dim: number of classes. Default: 0, no classes.
    label_name: keyword of the model for the classes. Default: class_labels.
    one_hot: classes as float one-hot vectors [B,label_dim] instead of int64 [B]. Default: False.
    make_cond: function (generators, labels) that returns the keyword arguments of the model for one
        batch, instead of classes: see ``Denoiser.make_cond``. Default: None.
    decode: function from samples to images in [-1, 1], for latent models. Default: the identity.
    bottleneck: a submodule, or its name as in ``named_modules``, whose output [B,C',H',W'] an AMED
        predictor reads. Default: None, the predictor uses noise levels only.
    noise_embedding: a linear submodule or its name, whose output [B,E] conditions the network on
        the noise level; the span solver can shift it. Default: None.
    data_mean, data_std: mean image [C,H,W] and standard deviation of the data, for afs="data".
    evals_per_call: network evaluations per call, for example 2 with guidance inside. Default 1.

    Raises UserError for impossible arguments.
    """
    if not callable(model):
        raise UserError(f"wrap: the model must be a module or a function, not {type(model).__name__}")
    if prediction not in _WORDS:
        raise UserError(f"wrap: unknown prediction '{prediction}'{did_you_mean(prediction, _WORDS, PREDICTIONS)}")
    kind = _WORDS[prediction]
    if kind == "denoised" and noise is not None:
        raise UserError(
            "wrap: prediction='denoised' needs no noise process: leave noise out, or give another prediction"
        )
    if kind == "flow" and noise is not None:
        raise UserError("wrap: prediction='flow' has its own noise process; leave noise out")
    if kind in ("v_prediction", "sample") and noise is None:
        raise UserError(f"wrap: prediction='{prediction}' needs noise=, for example noise=alphas_cumprod or 'ddpm'")
    if data_time not in (0, 1) or data_time == 1 and kind != "flow":
        raise UserError(f"wrap: data_time={data_time}: 0, or 1 for prediction='flow'")
    if label_dim and make_cond is not None:
        raise UserError("wrap: label_dim and make_cond are two ways to condition the model; give one of them")
    net = WrappedDenoiser(model, kind, RectifiedFlow() if kind == "flow" else _process_of(noise))
    net.time_scale, net.integer_time, net.data_time = float(time_scale or 1), integer_time, data_time
    net.sigma_min, net.sigma_max = _range_of(net, sigma_min, sigma_max)
    if shape is not None:
        net.img_channels, net.img_resolution = _square(shape)
    net.label_dim, net.label_name, net.one_hot, net.own_cond = int(label_dim), label_name, one_hot, make_cond
    net.own_decode, net.latent = decode, decode is not None
    net.data_mean, net.data_std, net.evals_per_call = data_mean, data_std, int(evals_per_call)
    net.parts = [_part_of(model, "bottleneck", bottleneck), _part_of(model, "noise_embedding", noise_embedding)]
    return net.eval().requires_grad_(False)


def load_own(place: str, device: torch.device | str = "cpu") -> Denoiser:
    """Load the network that the user's function "module:function" returns.

    Raises UserError if it does not return a ``Denoiser``.
    """
    function, _ = find_function(place, "--model_path", "a file, or MODULE:FUNCTION for code of your own")
    net = function()
    if not isinstance(net, Denoiser):
        raise UserError(
            f"--model_path={place}: it returned {type(net).__name__}; return models.wrap(your_network, ...) or a Denoiser"
        )
    net = net.to(device).eval().requires_grad_(False)
    if net.data_mean is not None:  # an attribute, which Module.to does not move
        net.data_mean = net.data_mean.to(device)
    net.source_path, net.weights_hash = place, net.weights_hash or hash_of_weights(net)
    return net


def hash_of_weights(net: torch.nn.Module, settings: str = "") -> str:
    """SHA-256 of the weights of a network, and of a text."""
    digest = hashlib.sha256(settings.encode())
    for name, value in net.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _process_of(noise) -> NoiseProcess | None:
    if noise is None or isinstance(noise, NoiseProcess):
        return noise
    if isinstance(noise, str):
        if noise not in NOISES:
            raise UserError(f"wrap: unknown noise '{noise}'{did_you_mean(noise, NOISES)}")
        return NOISES[noise]()
    if isinstance(noise, tuple) and len(noise) == 2 and all(map(callable, noise)):
        return FunctionNoise(*noise)
    if all(hasattr(noise, name) for name in ("sigma", "sigma_inv", "timestep")):
        return noise
    try:
        table = torch.as_tensor(noise, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"wrap: noise must be a table (alphas_cumprod), one of {', '.join(NOISES)}, or two functions "
            f"(sigma_of_t, t_of_sigma), not {type(noise).__name__}"
        ) from None
    return DiscreteTime(table)


def _range_of(net, sigma_min, sigma_max) -> tuple[float, float]:
    process = Denoiser if net.process is None else net.process
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    found = {name: getattr(process, name, None) if value is None else float(value) for name, value in ends.items()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(f"wrap: a noise process of functions has no range: give {' and '.join(missing)}")
    if not 0 < found["sigma_min"] < found["sigma_max"] < float("inf"):
        raise UserError(f"wrap: sigma_min={sigma_min}, sigma_max={sigma_max}: 0 < sigma_min < sigma_max is needed")
    return found["sigma_min"], found["sigma_max"]


def _square(shape: Sequence[int]) -> tuple[int, int]:
    channels, *sides = (int(side) for side in shape)
    if len(sides) not in (1, 2) or len(set(sides)) != 1:
        raise UserError(f"wrap: shape={tuple(shape)}: write (channels, resolution); only square images are supported")
    return channels, sides[0]


def _part_of(model, what: str, part):
    """Return the submodule ``part``, or the one of this name."""
    if not isinstance(part, str):
        return part
    try:
        return model.get_submodule(part)
    except AttributeError:
        kind = type(model).__name__
        known = [name for name, _ in model.named_modules() if name] if isinstance(model, torch.nn.Module) else []
        raise UserError(f"wrap: {what}='{part}': {kind} has no such module{did_you_mean(part, known, ())}") from None


class WrappedDenoiser(Denoiser):
    """The denoiser that ``wrap`` returns."""

    def __init__(self, model: Callable, prediction: str, process: NoiseProcess | None):
        super().__init__()
        self.model, self.prediction, self.process = model, prediction, process
        self.no_feature = NoFeature()
        self.can_autocast = isinstance(model, torch.nn.Module)
        self.dataset_name, self.source_path = "custom", getattr(model, "__qualname__", type(model).__qualname__)
        if process is not None:  # only networks with a time have these
            self.sigma, self.sigma_inv = process.sigma, process.sigma_inv

    def __getattr__(self, name):
        if name in ("img_channels", "img_resolution"):
            raise UserError("this network has no size of its samples: pass shape=(3, 32) to models.wrap")
        return super().__getattr__(name)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights and the settings."""
        return hash_of_weights(self, f"{self.prediction} {self.sigma_min} {self.sigma_max}")

    @property
    def bottleneck(self) -> torch.nn.Module:
        return self.no_feature if self.parts[0] is None else self.parts[0]

    @property
    def noise_embedding(self) -> torch.nn.Module | None:
        return self.parts[1]

    def make_cond(self, generator=None, labels=None) -> dict:
        if self.own_cond is not None:
            return self.own_cond(generator, labels)
        if not self.label_dim:
            if labels is not None:
                raise UserError("this network takes no class: pass label_dim to models.wrap if it does")
            return {}
        from models.edm import draw_classes

        indices = draw_classes(generator, labels, self.label_dim)
        if self.one_hot:
            indices = torch.nn.functional.one_hot(indices, self.label_dim).float()
        return {self.label_name: indices.to(next(self.parameters(), torch.empty(0)).device)}

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.own_decode is None else self.own_decode(x)

    def forward(self, x, sigma, **cond):
        sigma = torch.as_tensor(sigma, device=x.device).to(x.dtype).reshape(-1, 1, 1, 1)
        scale, time = self._input(sigma)
        weight = next((p for p in self.parameters() if p.is_floating_point()), x)
        if not self.integer_time:  # half precision has too few digits for a time
            time = time.to(torch.promote_types(weight.dtype, torch.float32))
        time = time.expand(len(x), *time.shape[1:])
        with self.mixed_precision(x.device):
            output = self.model((x * scale).to(weight.dtype), time, **cond)
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple | list) else output
        if not torch.is_tensor(output) or output.shape != x.shape:
            found = list(output.shape) if torch.is_tensor(output) else type(output).__name__
            raise UserError(
                f"the wrapped model returned {found} for an input {list(x.shape)}: it must return that shape"
            )
        self.no_feature(x)
        return self._denoised(x, sigma, output.to(x.dtype))

    def _input(self, sigma) -> tuple:
        """(factor of x, time of the model) at noise levels [B or 1,1,1,1]."""
        if self.prediction == "denoised":
            return 1.0, sigma * self.time_scale
        if self.prediction == "flow":
            t = sigma.flatten() / (1 + sigma.flatten())
            time, scale = (1 - t if self.data_time else t), 1 / (1 + sigma)
        elif self.process is None:
            time, scale = sigma.flatten(), 1.0
        else:
            time, scale = self.process.timestep(sigma.flatten()), vp_scale(sigma)
        time = time * self.time_scale
        return scale, time.round().to(torch.int64) if self.integer_time else time

    def _denoised(self, x, sigma, output):
        """D(x; sigma) from the model's output."""
        if self.prediction == "denoised":
            return output
        if self.prediction == "flow":
            return self.process.denoised(x, sigma, -output if self.data_time else output)
        return vp_denoised(self.prediction, x, sigma, output)
