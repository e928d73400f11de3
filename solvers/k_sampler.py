"""A learned solver as a sampling function of k-diffusion and ComfyUI.

    x = sample_learned(model, noise * sigmas[0], sigmas, predictor=predictor)
    sampler = comfy.samplers.KSAMPLER(sample_learned, {"predictor": predictor})

These programs call ``function(model, x, sigmas, extra_args, callback, disable)``; model(x, sigma)
returns the denoised image, with guidance. Nothing of them is imported here.
"""

from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from models.denoiser import BottleneckReader, bottleneck_map, find_block_layers
from models.noise import DiscreteTime, RectifiedFlow
from solvers.learned import NetworkOfProcess, learned_run
from solvers.sampler import Sampler
from solvers.solver import State
from torch_utils.errors import UserError

_TOLERANCE = 1e-3  # relative, between given noise levels and the learned ones
_LAYERS = ("inner_model", "diffusion_model", "model", "unet")  # where the wrapped model is


def learned_sigmas(predictor, model) -> torch.Tensor:
    """The noise levels of a predictor in the terms of the model, float32 [N + 1] on the CPU.

    The last one is 0.

    predictor: an AMEDPredictor or SpanSolver.
    model: as for ``sample_learned``, or ComfyUI's model_sampling. For a flow model the levels are
        the times t = sigma / (1 + sigma).

    Raises UserError if neither the predictor nor the model says the range of noise levels.
    """
    levels = _Levels(model)
    sigmas = levels.outside(_run_of(predictor, levels, None, None).sigmas.double()).cpu()
    return torch.cat([sigmas[:-1], sigmas.new_zeros(1)]).float()


@torch.no_grad()
def sample_learned(model, x, sigmas=None, extra_args=None, callback=None, disable=None, *, predictor):
    """Sample with a learned solver.

    model: denoiser, model(x, sigma, **extra_args) with sigma [B]. If it wraps a flow model of
        ComfyUI, sigma is the time t and x = (1 - t) x0 + t noise; otherwise x = x0 + sigma noise.
    x: noised start [B,...], at the noise level sigmas[0].
    sigmas: the learned noise levels (``learned_sigmas``), or neighbours among them: without the
        first ones for image-to-image. A last 0 stands for the last learned level. Default: all.
    extra_args: keyword arguments of model. Default: none.
    callback: called once per step with a dict of x, i, sigma, sigma_hat and denoised, except after
        an analytical first step, which has no denoised image. Default: none.
    disable: whether to show no progress bar. Default: False.
    predictor: an AMEDPredictor or SpanSolver.

    An AMEDPredictor reads the bottleneck of the U-Net inside ``model``, if there is one. Returns x
    [B,...] at the last noise level. Raises UserError for other noise levels than the learned ones.
    """
    extra_args = dict(extra_args or {})
    levels = _Levels(model)
    if sigmas is not None and len(sigmas) < 2:
        return x
    net = _Network(model, levels, extra_args, len(x))
    run = _run_of(predictor, net, x.device, x.dtype)
    if run.solver.own_schedule:
        predictor.check_network(net)
    known = levels.outside(run.sigmas.double())
    first, last = (0, run.intervals) if sigmas is None else _place(sigmas, known)
    given = known if sigmas is None else sigmas
    start = run.sigmas[first].to(x.dtype)
    if levels.flow:
        x = x / (1 - known[first]).to(x.dtype)
    elif levels.adds_variance(given[0]):
        x = x * (start / (1 + start**2).sqrt())
    with _bottleneck(model, predictor, run):
        x = _loop(run, x, first, last, levels, callback, disable)
    ends = last == run.intervals
    if ends and extra_args.get("denoise_mask") is not None:  # nothing is blended after the last step
        mask = extra_args["denoise_mask"]
        x = x * mask + model.latent_image * (1 - mask)
    # The result of a whole run is the image, whatever the last noise level is called.
    if levels.flow and not (ends and float(given[-1]) == 0):
        x = x * (1 - known[last]).to(x.dtype)
    return x


def _loop(run: Sampler, x, first: int, last: int, levels: "_Levels", callback, disable):
    """The steps from schedule point ``first`` to ``last`` for x = x0 + sigma noise."""
    total = last - first

    def report(i, sigma, x, denoised):
        if callback is None or (i == 0 and walk.afs):
            return
        level = levels.outside(sigma)
        state = {"x": x * (1 - level) if levels.flow else x, "i": offset + i - first}
        callback({**state, "sigma": level, "sigma_hat": level, "denoised": denoised})

    run.observer = report
    walk, i = run.tail(first)
    offset = first - i  # a rest of a schedule counts from 0
    with tqdm(total=total, disable=disable) as bar:
        state = State(x)
        while offset + i < last:
            stride = walk.solver.stride(i, walk.intervals)
            if offset + i + stride > last:
                raise UserError(f"sigmas: the learned solver makes {stride} steps at once and cannot end inside them")
            state = walk.advance(state, i)
            i += stride
            bar.update(stride)
    return state.x


def _place(sigmas, known) -> tuple[int, int]:
    """(first, last) place of the given noise levels among the learned ones, or UserError."""
    given = torch.as_tensor(sigmas, dtype=torch.float64).cpu().flatten()
    known = known.cpu()
    count, ends = len(given) - 1, float(given[-1]) == 0
    for first in range(len(known) - count):
        part = known[first : first + count + 1].clone()
        if ends and first + count == len(known) - 1:
            part[-1] = 0
        if torch.allclose(given, part, rtol=_TOLERANCE, atol=1e-9):
            return first, first + count
    shown = ", ".join(f"{value:.4g}" for value in known)
    raise UserError(
        f"sigmas: {', '.join(f'{value:.4g}' for value in given)} are not the noise levels of this predictor, {shown} "
        "(the last one may be 0), nor a part of them: connect the SIGMAS output of the predictor"
    )


def _run_of(predictor, net, device, dtype) -> Sampler:
    if not hasattr(net, "sigma_min") and predictor.config.get("sigmas") is None:
        missing = [name for name in ("sigma_min", "sigma_max") if predictor.config.get(name) is None]
        if missing:
            raise UserError(
                f"neither the predictor nor the model says {' and '.join(missing)}: no schedule can be made"
            )
    return learned_run(net, predictor, device, dtype or torch.float32)


class _Levels:
    """The noise levels of a model: sigma inside, and what the model calls so.

    flow: whether the model calls t = sigma / (1 + sigma) so.
    sigma_min, sigma_max, sigma, sigma_inv: as those of a denoiser, where the model has a table.
    """

    def __init__(self, model):
        sampling = next((part for part in _chain(model) if hasattr(part, "model_sampling")), None)
        sampling = model if sampling is None else sampling.model_sampling
        self.comfy = sampling is not model
        self.flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)
        self.highest = None
        if self.flow:
            self._of(RectifiedFlow(shift=float(getattr(sampling, "shift", 1.0))))
            return
        table = next(
            (part for part in (sampling, *_chain(model)) if torch.is_tensor(getattr(part, "sigmas", None))), None
        )
        if table is not None and table.sigmas.ndim == 1 and len(table.sigmas) > 2:
            self.highest = float(table.sigmas.max())
            self._of(DiscreteTime(1 / (1 + table.sigmas.double().cpu().sort().values ** 2)))
            return
        range_of = next(
            (part for part in _chain(model) if hasattr(part, "sigma_min") and hasattr(part, "sigma_max")), None
        )
        if range_of is not None:
            self.sigma_min, self.sigma_max = float(range_of.sigma_min), float(range_of.sigma_max)
            for name in ("sigma", "sigma_inv"):
                if callable(getattr(range_of, name, None)):
                    setattr(self, name, getattr(range_of, name))

    def _of(self, process) -> None:
        net = NetworkOfProcess(process)
        for name in ("sigma_min", "sigma_max", "sigma", "sigma_inv"):
            setattr(self, name, getattr(net, name))

    def outside(self, sigma):
        """What the model calls the noise level sigma."""
        return sigma / (1 + sigma) if self.flow else sigma

    def adds_variance(self, level) -> bool:
        """Whether ComfyUI starts at this level from noise sqrt(1 + sigma^2)."""
        return self.comfy and self.highest is not None and float(level) > self.highest * (1 - 1e-5)


class _Network:
    """``model`` as the network of a ``Sampler``: D(x; sigma) for x = x0 + sigma noise.

    Points that the solver wants from one batch are evaluated one after the other, because
    conditions and masks inside the model belong to its own batch.
    """

    def __init__(self, model, levels: _Levels, extra_args: dict, batch: int):
        self.model, self.levels, self.extra_args, self.batch = model, levels, extra_args, batch
        self.reader: _ComfyReader | None = None
        # For the heads "time" and "blocks" of a span solver.
        self.noise_embedding, self.block_layers = _shifted_layers(model)
        for name in ("sigma_min", "sigma_max", "sigma", "sigma_inv"):
            if hasattr(levels, name):
                setattr(self, name, getattr(levels, name))

    def __call__(self, x, sigma):
        if self.reader is not None:
            self.reader.begin()
        level = self.levels.outside(sigma.reshape(-1).expand(len(x)))
        if self.levels.flow:
            x = x * (1 - level.reshape(-1, *[1] * (x.ndim - 1)))
        parts = zip(x.split(self.batch), level.split(self.batch), strict=True)
        return torch.cat([self.model(part, own.contiguous(), **self.extra_args) for part, own in parts])


# The bottleneck


def _chain(model):
    """The model and what it wraps, outermost first."""
    part, seen = model, set()
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = next((inner for name in _LAYERS if (inner := getattr(part, name, None)) is not None), None)


def _shifted_layers(model):
    """The ``noise_embedding`` of the U-Net inside the model, or None, and its ``block_layers``."""
    for part in _chain(model):
        for name in ("noise_embedding", "time_embed", "time_embedding"):
            layer = getattr(part, name, None)
            if isinstance(layer, torch.nn.Module):
                embedding = [inner for inner in layer.modules() if hasattr(inner, "out_features")][-1]
                return embedding, find_block_layers(part)
    return None, []


class _ComfyReader(BottleneckReader):
    """Collects the conditional rows of all calls of the U-Net that one evaluation makes.

    There are several with regional prompts, or with little memory.

    ``begin`` starts an evaluation.
    """

    def __init__(self):
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.which: list[int] | None = None
        self.maps: list[torch.Tensor] = []

    def before(self, module, arguments, named) -> None:
        options = named.get("transformer_options") or {}
        self.which = options.get("cond_or_uncond")

    def collect(self, module, inputs, output) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        if self.which is None:
            self.keep(feature)
            return
        for kind, rows in zip(self.which, feature.chunk(len(self.which)), strict=True):
            if kind == 0:
                self.maps.append(bottleneck_map(rows, len(rows)))

    def read(self, batch: int) -> torch.Tensor:
        if self.maps:
            return torch.stack([m.float().expand(batch, -1, -1) for m in self.maps]).mean(0)
        return super().read(batch)


@contextmanager
def _bottleneck(model, predictor, run: Sampler):
    """Context in which the run reads the bottleneck of the U-Net inside the model, if any."""
    names = ("middle_block", "mid_block", "bottleneck")
    found = [
        (part, block)
        for part in _chain(model)
        for name in names
        if isinstance(block := getattr(part, name, None), torch.nn.Module)
    ]
    if run.solver.own_schedule or not found:
        yield
        return
    network, block = found[0]
    reader = run.net.reader = run.reader = _ComfyReader()
    handles = [
        network.register_forward_pre_hook(reader.before, with_kwargs=True),
        block.register_forward_hook(reader.collect),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
