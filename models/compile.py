"""Speed and precision of a network: autocast, memory format, torch.compile.

The command lines call ``prepare_network``. A compiled denoiser is one graph without breaks. Its
inputs have one noise level per sample, and it returns the bottleneck as a second output.
"""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch._dynamo.exc import TorchDynamoException

from models import edm_unet
from models.denoiser import BottleneckReader, Denoiser, beside, bottleneck_map, member, shift_hooks
from torch_utils.errors import UserError

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Modes of torch.compile. The last two record CUDA graphs. They help small batches, whose kernels
# take less time than their launch.
COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune")
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def prepare_network(
    net: Denoiser, amp: str = "none", channels_last: bool | None = None, compile_mode: str = "none"
) -> Denoiser:
    """Set precision, memory format and compilation of a loaded network in place, and return it.

    net: the denoiser.
    amp: mixed precision of the network, a key of AUTOCAST; solvers keep their own. Default none.
    channels_last: memory format. Default: True on the CPU in float32, which is a fifth faster, and
        False elsewhere. On the CPU in bf16 it is a fifth slower (benchmarks/forward_pass.py), and
        group normalisation on CUDA does not support it.
    compile_mode: one of COMPILE_MODES. Default none.

    Raises UserError for other values, and if the network cannot run in mixed precision.
    """
    if amp not in AUTOCAST:
        raise UserError(f"amp={amp}: choose from {', '.join(AUTOCAST)}")
    if AUTOCAST[amp] is not None and not net.can_autocast:
        raise UserError(f"--amp={amp} is not available for {net.dataset_name or 'this network'}; use --amp=none")
    check_bf16(amp, next(net.parameters(), torch.empty(0)).device)
    net.autocast = AUTOCAST[amp]
    convert_weights(net, net.autocast)
    if channels_last is None:
        channels_last = amp == "none" and next(net.parameters(), torch.empty(0)).device.type == "cpu"
    net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    device = next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0)).device
    check_compile(compile_mode, device, member(net, "choose_level") is not None)
    net.compiled = None if compile_mode == "none" else CompiledForward(net, compile_mode)
    return net


def check_compile(mode: str, device: torch.device, eight_bits: bool = False) -> None:
    """Raises UserError if networks, or 8-bit ones, cannot be compiled so on the device."""
    if mode not in COMPILE_MODES:
        raise UserError(f"compile={mode}: choose from {', '.join(COMPILE_MODES)}")
    if mode == "reduce-overhead" and device.type != "cuda":
        raise UserError(
            f"--compile=reduce-overhead records CUDA graphs, and the device is {device.type}: use --compile=default"
        )
    if mode != "none" and eight_bits and not int8_kernels(device):
        raise UserError("--quantize with --compile needs the int8 kernels of an x86 CPU: leave --compile out")


def int8_kernels(device: torch.device) -> bool:
    """Whether int8 kernels run on this device: x86 CPUs with oneDNN."""
    engines = torch.backends.quantized.supported_engines
    return device.type == "cpu" and "x86" in engines and torch.backends.mkldnn.is_available()


DTYPES = ("fp32", "fp16", "bf16", "auto")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name in ``DTYPES``. auto: bf16 or else fp16 on GPUs, fp32 on the CPU."""
    if name == "auto":
        if device.type == "cpu":
            name = "fp32"
        else:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bf16" if bf16 else "fp16"
    check_bf16(name, device, "dtype")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def choose_backends(tf32: bool, bench: bool) -> None:
    """Sets what NVIDIA GPUs may do to go faster.

    tf32: round the inputs of convolutions and matrix products to 10 bits (TensorFloat-32).
    bench: let cuDNN choose convolution algorithms by timing, which may differ between two runs.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = bench


def check_bf16(name: str, device: torch.device, flag: str = "amp") -> None:
    """Raises UserError if the flag asks for bf16 on a GPU that computes it in software only."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--{flag}=bf16: {torch.cuda.get_device_name(device)} cannot compute in bf16; use fp16")


# Layers whose weights autocast would convert in every call.
_MATRIX_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, edm_unet.Linear, edm_unet.Conv2d)


@torch.no_grad()
def convert_weights(net: Denoiser, dtype: torch.dtype | None) -> None:
    """Gives the layers of ``net.torso`` that autocast runs in ``dtype`` weights of this dtype.

    Autocast converts frozen weights in every call; this does it once, with the same results. Their
    float32 values are kept on the CPU, so that ``dtype`` None restores them.
    """
    kept = net.__dict__.setdefault("_full_precision", {})
    for parameter, value in kept.items():
        parameter.data = value.to(parameter.device)
    kept.clear()
    if dtype is None or net.torso is None:
        return
    for layer in net.torso.modules():
        if isinstance(layer, _MATRIX_LAYERS):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    kept[parameter] = parameter.data.cpu()
                    parameter.data = parameter.data.to(dtype)


def skippable_layers(net: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """(block, part) of every layer that ``skipping`` can leave out, in the order of execution.

    A layer is a residual or an attention block, numbered as in AutoDiffusion (Li et al. 2023).
    """
    return [(block, part) for block in net.modules() for part in getattr(block, "parts", ())]


@contextmanager
def skipping(net: torch.nn.Module, layers: Iterable[int]):
    """Context in which a U-Net leaves out some layers.

    A residual block becomes its shortcut, with resampling and 1x1 convolution where it has them; an
    attention block becomes the identity.

    net: a denoiser or a U-Net, not compiled.
    layers: numbers of layers, from 0; see ``skippable_layers``.

    Raises UserError for numbers that the network does not have.
    """
    known, chosen = skippable_layers(net), set(layers)
    wrong = sorted(number for number in chosen if not 0 <= number < len(known))
    if wrong:
        raise UserError(f"layer {wrong[0]} cannot be left out: this network has layers 0..{len(known) - 1}")
    if chosen and getattr(net, "compiled", None) is not None:
        raise UserError("layers of a compiled network cannot be left out: leave --compile out")
    blocks = {known[number][0] for number in chosen}
    try:
        for block in blocks:
            block.omitted = frozenset(known[number][1] for number in chosen if known[number][0] is block)
        yield
    finally:
        for block in blocks:
            del block.omitted


class CompiledForward:
    """The compiled ``forward`` of a denoiser; called by the denoiser as (x, sigma, cond).

    net: the denoiser.
    mode: one of COMPILE_MODES. Default "default".
    backend: backend of torch.compile. Default inductor.

    A batch smaller than the largest one so far is padded with copies of its last sample. That costs
    less than another graph, and the last batch of a run is usually smaller than the others. Solvers
    that call the network at several points at once have a graph for each number of points.

    CUDA graphs (reduce-overhead, max-autotune) write their results to the same memory in every
    call. Here a call begins a new step of ``torch.compiler.cudagraph_mark_step_begin`` and returns
    copies, so that results may be kept. All inputs are tensors on the device: a number of Python
    would be a constant of the graph.
    """

    def __init__(self, net: Denoiser, mode: str = "default", backend: str = "inductor"):
        self.net, self.mode, self.backend = net, mode, backend
        self.copies = 1  # points of the batch in the next call; ``Sampler`` sets it
        self.batch: dict[int, int] = {}  # the largest number of rows so far, by number of copies
        self._reader: BottleneckReader | None = None
        self._feature = self._shift = None
        # The first call puts tables on the device. Inside the graph this would cost a second graph.
        if hasattr(net, "sigma_inv"):
            net.sigma_inv(torch.ones(1, device=next(net.parameters()).device))
        # Hooks that exist before compilation become part of the graph.
        net.bottleneck.register_forward_hook(self._keep)
        if net.noise_embedding is not None:
            shift_hooks([net.noise_embedding, *net.block_layers], lambda: self._shift)
        self._compile()

    def _compile(self) -> None:
        own_mode = {} if self.mode == "default" else {"mode": self.mode}
        self.graph = torch.compile(self._both, fullgraph=True, dynamic=False, backend=self.backend, **own_mode)

    def forget(self) -> None:
        """Drops the graphs and the sizes so far, after a batch that did not fit into memory."""
        torch.compiler.reset()
        self.batch = {}
        self._compile()

    def _keep(self, module, inputs, output) -> None:
        self._feature = output

    def _both(self, x, sigma, cond, shift) -> tuple[torch.Tensor, torch.Tensor]:
        """(denoised images [B,C,H,W], bottleneck map [B,8,8]); shift as in ``call_shifted``."""
        self._shift = shift
        image = self.net.forward(x, sigma, **cond)
        feature, self._feature = self._feature, None
        self._shift = None
        return image, bottleneck_map(feature, x.shape[0])

    @contextmanager
    def shown_to(self, reader: BottleneckReader):
        """Context in which ``reader`` gets the map of every call."""
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    def arguments(self, x: torch.Tensor, sigma, cond: Mapping, shift: torch.Tensor | None) -> tuple:
        """Inputs of the graph, always of one type and size, to avoid minutes of compilation."""
        count = x.shape[0]
        missing = max(self.batch.get(self.copies, 0) - count, 0)
        self.batch[self.copies] = count + missing
        x = x.to(torch.float32)
        sigma = beside(torch.as_tensor(sigma, dtype=torch.float32), x).reshape(-1).expand(count)

        def fill(value):
            if not isinstance(value, torch.Tensor):
                return value
            if missing and value.ndim and value.shape[0] == count:
                value = torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
            return value.contiguous()

        return fill(x), fill(sigma), {name: fill(value) for name, value in cond.items()}, fill(shift)

    def __call__(self, x: torch.Tensor, sigma, cond: Mapping, shift: torch.Tensor | None = None) -> torch.Tensor:
        choose_level = member(self.net, "choose_level")
        if choose_level is not None:
            choose_level(sigma)
        recorded = x.is_cuda and self.mode in _CUDA_GRAPHS
        if recorded:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            image, feature = self.graph(*self.arguments(x, sigma, cond, shift))
        except TorchDynamoException as exc:
            reason = str(exc).strip().partition("\n")[0][:200]
            raise UserError(f"--compile={self.mode}: torch.compile failed ({reason}); leave --compile out") from exc
        if self._reader is not None:
            self._reader.keep(feature[: len(x)].clone() if recorded else feature[: len(x)])
        # The next run of a CUDA graph overwrites its results, but solvers keep them.
        return image[: len(x)].clone() if recorded else image[: len(x)]
