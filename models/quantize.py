"""8-bit networks: post-training quantisation, calibrated on the states of the sampler itself.

The recipe of PTQ4DM (Shang et al. 2023): weights and activations in 8 bits, ranges that minimise
mean |error|^2.4. On x86 CPUs convolutions run as int8 kernels; elsewhere, and in linear layers, the
same numbers are simulated in floating point. torch.compile fuses the rounding with its neighbours.
"""

import copy
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.compile import int8_kernels
from models.denoiser import Denoiser
from models.edm_unet import Conv2d as EDMConv2d
from models.openai_unet import TimestepEmbedSequential
from torch_utils.errors import UserError

THRESHOLDS = 100  # candidates of the range search
POWER = 2.4  # exponent of the error that the search minimises
SAMPLES = 1 << 11  # activations per layer and evaluation in the search
MOST_LEVELS = 64  # noise levels with their own ranges; others use those of the nearest one


def search_range(x: torch.Tensor, bits: int = 8, channel_wise: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point) of the affine grid with the least mean |error|^2.4.

    The threshold is the best of 1 %, 2 %, ... 100 % of max |x|. The grid is symmetric, or starts at
    zero if no value is negative.

    x: values of any shape.
    bits: the grid has 2^bits levels. Default 8.
    channel_wise: one grid per row of the first dimension. Default: False, one grid.

    Returns two tensors [rows], or [1] unless channel_wise.
    """
    rows = x.flatten(1) if channel_wise else x.reshape(1, -1)
    top, positive, largest = 2**bits - 1, bool(x.min() >= 0), rows.abs().amax(1)
    least = torch.full_like(largest, torch.inf)
    scale, zero = torch.ones_like(largest), torch.zeros_like(largest)
    for k in range(1, THRESHOLDS + 1):
        high = largest * (k / THRESHOLDS)
        low = torch.zeros_like(high) if positive else -high
        step = ((high - low) / top).clamp(min=1e-8)
        shift = (-(low / step).round()).clamp(0, top)
        error = (_round(rows, step[:, None], shift[:, None], top) - rows).abs().pow(POWER).mean(1)
        better = error < least
        least, scale, zero = (
            torch.where(better, new, old) for new, old in ((error, least), (step, scale), (shift, zero))
        )
    return scale, zero


def _round(x, scale, zero, top: int = 255):
    """Round x to the grid, as floating-point numbers."""
    return (((x / scale).round() + zero).clamp(0, top) - zero) * scale


class Levels:
    """The calibrated noise levels, and the index of the current one."""

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = torch.tensor(sorted(sigmas, reverse=True), dtype=torch.float64)
        self.index = 0
        with torch.inference_mode(False):  # it is changed in any mode
            self.input = torch.zeros(1, dtype=torch.long)  # the index as an input of a compiled graph

    def choose(self, sigma) -> None:
        """Set the index to the level nearest to sigma, for a batch to its highest noise level."""
        level = torch.as_tensor(sigma).detach().double().max().cpu()
        self.index = int((self.sigmas.log() - level.log()).abs().argmin())
        self.input.fill_(self.index)

    def before_call(self, module, args, kwargs) -> None:
        self.choose(args[1] if len(args) > 1 else kwargs["sigma"])


_layer_of: "weakref.WeakValueDictionary[int, QuantizedLayer]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("amed::int8_convolution", mutates_args=())
def int8_convolution(x: torch.Tensor, level: torch.Tensor, number: int) -> torch.Tensor:
    """The convolution of rounded values without its scale and bias, as one node of a graph.

    x: rounded values [B,C,H,W], uint8.
    level: index of the noise level [1].
    number: of the layer.
    """
    layer = _layer_of[number]
    return layer.convolve(x, 1.0, layer.zeros[int(level)], None)


@int8_convolution.register_fake
def _(x, level, number):
    layer = _layer_of[number]
    sizes = zip(x.shape[2:], layer.padding, layer.weight.shape[2:], layer.stride, strict=True)
    size = [(pixels + 2 * padding - kernel) // stride + 1 for pixels, padding, kernel, stride in sizes]
    made = x.new_empty(len(x), len(layer.weight), *size, dtype=torch.float32)
    return made.contiguous(memory_format=torch.channels_last)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer in 8 bits.

    weight: [out,in,k,k] or [out,in].
    bias: [out] or None.
    levels: noise levels, shared by all layers of a network.
    scales, zeros: grid of the input at each noise level, one number each.
    stride, padding, groups: settings of the convolution. Default 1, 0, 1.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight, bias, levels: Levels, scales, zeros, stride=1, padding=0, groups=1):
        super().__init__()
        rows = weight.detach().float().flatten(1)
        scale, _ = search_range(torch.cat([rows, -rows], 1), channel_wise=True)
        grid = (rows / scale[:, None]).round().clamp(-128, 127)  # the kernels need zero point 0
        self.register_buffer("weight", grid.to(torch.int8).reshape(weight.shape))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(rows), dtype=torch.int32))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.levels, self.scales, self.zeros = levels, list(map(float, scales)), [int(zero) for zero in zeros]
        grid = torch.tensor([self.scales, self.zeros], dtype=torch.float32)
        self.register_buffer("grid", grid, persistent=False)
        self.stride, self.padding, self.groups = (stride,) * 2, (padding,) * 2, groups
        self._enter()

    def _enter(self) -> None:
        self._packed: dict = {}
        self.number = next(_numbers)
        _layer_of[self.number] = self

    def __getstate__(self):
        return {**self.__dict__, "_packed": {}}  # packed weights cannot be copied

    def __setstate__(self, state):
        super().__setstate__(state)
        self._enter()  # a copy is another layer

    def dequantized_weight(self) -> torch.Tensor:
        return self.weight.float() * self.weight_scale.reshape(-1, *[1] * (self.weight.ndim - 1))

    def forward(self, x):
        if torch.compiler.is_compiling():
            return self._traced(x.float())
        scale, zero = self.scales[self.levels.index], self.zeros[self.levels.index]
        if self.weight.ndim == 4 and int8_kernels(x.device) and not torch.is_grad_enabled():
            return self._kernel(x.float(), scale, zero)
        return self.simulate(x.float(), scale, zero)

    def simulate(self, x, scale, zero):
        """The layer in floating point, with the same rounded numbers.

        Its gradient is that of the layer without rounding (straight-through estimator).
        """
        rounded = _round(x, scale, zero)
        x = x + (rounded - x).detach() if x.requires_grad else rounded
        if self.weight.ndim == 2:
            return F.linear(x, self.dequantized_weight(), self.bias)
        return F.conv2d(x, self.dequantized_weight(), self.bias, self.stride, self.padding, groups=self.groups)

    def _kernel(self, x, scale: float, zero: int):
        x = x.contiguous(memory_format=torch.channels_last)
        # Adding one half rounds to the nearest number, since the conversion to uint8 rounds down.
        x = torch.add(x.new_tensor(zero + 0.5), x, alpha=1 / scale).clamp_(0, 255)
        return self.convolve(x.to(torch.uint8), scale, zero, self.bias)

    def _traced(self, x):
        """``forward`` for torch.compile, on x86 CPUs. One graph serves all noise levels."""
        scale, zero = self.grid.index_select(1, self.levels.input).unbind(0)
        if self.weight.ndim == 2 or torch.is_grad_enabled():
            return self.simulate(x, scale, zero)
        x = (x * (1 / scale) + (zero + 0.5)).clamp(0, 255).to(torch.uint8)
        x = int8_convolution(x.contiguous(memory_format=torch.channels_last), self.levels.input, self.number) * scale
        return x if self.bias is None else x + self.bias[:, None, None]

    def convolve(self, x, scale: float, zero: int, bias: torch.Tensor | None) -> torch.Tensor:
        """The int8 kernel. x: rounded values [B,C,H,W], uint8, channels last. Returns float32."""
        key = (tuple(x.shape), zero)
        settings = (self.stride, self.padding, (1, 1), self.groups)
        if key not in self._packed:
            if len(self._packed) > MOST_LEVELS:
                self._packed.clear()
            shape = list(x.shape)
            self._packed[key] = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, 1.0, zero, *settings, shape
            )
        return torch.ops.onednn.qconv_pointwise(
            x,
            scale,
            zero,
            self._packed[key],
            self.weight_scale,
            self.weight_zero,
            bias,
            *settings,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


def _layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be quantised, by name: 2-D convolutions and linear layers."""
    return {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
        or isinstance(layer, EDMConv2d)
        and layer.weight is not None
        and not (layer.fused_resample and (layer.up or layer.down))
    }


class _Recorder:
    """Records the inputs of each layer by noise level, and the order of the calls."""

    def __init__(self, levels: Levels):
        self.levels, self.order = levels, list[str]()
        self.seen: dict[str, dict[int, list[torch.Tensor]]] = {}

    def hook(self, name: str):
        def record(layer, args):
            x = args[0].detach()
            if isinstance(layer, EDMConv2d) and (layer.up or layer.down):
                x = _resampling(layer)(x)
            if name not in self.order:
                self.order.append(name)
            if isinstance(layer, nn.Linear) and x.ndim < 3:
                return  # embeddings: cheap, and their errors affect every block
            values = x.float().flatten()
            step = max(1, values.numel() // SAMPLES)
            kept = torch.cat([values[::step], values.min()[None], values.max()[None]])
            self.seen.setdefault(name, {}).setdefault(self.levels.index, []).append(kept)

        return record


def _resampling(layer: EDMConv2d) -> EDMConv2d:
    """The part of an EDM convolution before its weights."""
    part = copy.copy(layer)
    part._parameters = {**layer._parameters, "weight": None, "bias": None}
    part._forward_pre_hooks = OrderedDict()  # not the recorder of the whole layer
    return part


def _quantized(layer: nn.Module, levels: Levels, scales, zeros) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return QuantizedLayer(layer.weight, layer.bias, levels, scales, zeros)
    if isinstance(layer, nn.Conv2d):
        stride, padding = layer.stride[0], layer.padding[0]
        return QuantizedLayer(layer.weight, layer.bias, levels, scales, zeros, stride, padding, layer.groups)
    assert isinstance(layer, EDMConv2d)
    quantized = QuantizedLayer(layer.weight, layer.bias, levels, scales, zeros, padding=layer.weight.shape[-1] // 2)
    return nn.Sequential(_resampling(layer), quantized) if layer.up or layer.down else quantized


@torch.no_grad()
def calibrate(net: Denoiser, states: Sequence, per_level: bool = True) -> dict:
    """Ranges of the activations: {"sigmas": [...], "layers": {name: [[scale, zero], ...]}}.

    The last convolution and the layers of embeddings are not included.

    net: the denoiser in floating point.
    states: (x, sigma) or (x, sigma, cond) of evaluations of the sampler.
    per_level: separate ranges for up to ``MOST_LEVELS`` noise levels. Default True.
    """
    if not states:
        raise UserError("quantize: no states to calibrate on")
    sigmas = sorted({float(torch.as_tensor(state[1]).max()) for state in states}, reverse=True)
    if not per_level:
        sigmas = sigmas[:1]
    levels = Levels(sigmas[:: -(-len(sigmas) // MOST_LEVELS)])
    recorder, layers = _Recorder(levels), _layers(net)
    handles = [layer.register_forward_pre_hook(recorder.hook(name)) for name, layer in layers.items()]
    try:
        for x, sigma, *cond in states:
            levels.choose(sigma)
            net(x, sigma, **(cond[0] if cond else {}))
    finally:
        for handle in handles:
            handle.remove()
    ranges = {}
    for name in recorder.order[:-1]:
        found = recorder.seen.get(name)
        if found is None:
            continue
        every = torch.cat([values for part in found.values() for values in part])
        parts = [torch.cat(found[i]) if i in found else every for i in range(len(levels.sigmas))]
        ranges[name] = [[float(value) for value in search_range(part)] for part in parts]
    return {"sigmas": levels.sigmas.tolist(), "layers": ranges}


def apply_ranges(net: Denoiser, calibration: dict) -> Denoiser:
    """A copy of the denoiser with 8-bit layers; calibration: see ``calibrate``."""
    result, levels = copy.deepcopy(net), Levels(calibration["sigmas"])
    layers = _layers(result)
    unknown = sorted(set(calibration["layers"]) - set(layers))
    if unknown:
        raise UserError(f"quantize: the calibration is of another network, which has the layer {unknown[0]}")
    for name, grid in calibration["layers"].items():
        parent, _, child = name.rpartition(".")
        layer = _quantized(layers[name], levels, *zip(*grid, strict=True))
        setattr(result.get_submodule(parent), child, layer)
    result.register_forward_pre_hook(levels.before_call, with_kwargs=True)
    result.choose_level = levels.choose  # a compiled network has no hooks
    for module in result.modules():
        if isinstance(module, TimestepEmbedSequential):
            module.use_checkpoint = False  # its layers would run again at another level
    return result.eval().requires_grad_(False)


def quantize(net: Denoiser, states: Sequence, per_level: bool = True) -> Denoiser:
    """A copy of the denoiser whose convolutions and linear layers compute in 8 bits.

    net: a denoiser in floating point, not compiled.
    states: (x, sigma) or (x, sigma, cond) of evaluations of the sampler that you will use, at all
        of its noise levels. Ranges from other levels lose most of the quality.
    per_level: see ``calibrate``. Default True.

    Compile the result instead of ``net``, on x86 CPUs only (``models.compile.prepare_network``).
    Raises UserError for compiled networks, mixed precision, and no states.
    """
    if net.compiled is not None:
        raise UserError("quantize: compile the 8-bit network, not this one")
    if net.autocast is not None:
        raise UserError("quantize: leave out --amp, 8-bit layers replace it")
    return apply_ranges(net, calibrate(net, states, per_level))
