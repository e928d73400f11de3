"""AMEDScheduler: a trained predictor inside a pipeline of the diffusers library.

    from sampling.diffusers_scheduler import AMEDScheduler
    scheduler = AMEDScheduler.from_predictor("exps/00007-...", pipe.scheduler.config, pipe.unet)
    pipe.scheduler = scheduler
    image = pipe(prompt, num_inference_steps=len(scheduler), guidance_scale=7.5).images[0]

The solver is the one that ``sample`` runs. Its step yields the points where it needs the network;
here the pipeline calls the network there, and the step receives the answer. Any solver that can
learn works.

diffusers is optional: it is imported when ``AMEDScheduler`` is first used (``__getattr__`` below).
"""

import copy
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.diffusers import import_diffusers, is_flow, noise_process
from sampling.scheduler_hooks import NetworkHooks
from solvers.learned import NetworkOfProcess, learned_run, solver_of
from solvers.walk import Call, Walk
from torch_utils.errors import UserError
from torch_utils.transfer import to_device
from training.checkpoint import find_predictor, load_predictor, save_predictor

PREDICTOR_FILE = "predictor.safetensors"  # beside scheduler_config.json
# The settings of a variance-preserving process, with the defaults of diffusers.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
# Relative and absolute difference of two equal times: pipelines may round them to bfloat16.
_SAME_TIME = (4e-3, 1e-3)


class _AMEDScheduler(NetworkHooks):
    """Scheduler for diffusers pipelines that samples with a trained AMED predictor or span solver.

    predictor: an AMEDPredictor, whose configuration gives the solver (AMED-Plugin on dpmpp, euler
        or ipndm, or amed), the noise levels and AFS; or a SpanSolver with parallel=1. A path, file
        or experiment number loads one. Default: None; such a scheduler can only be converted.
    config: configuration of the pipeline's own scheduler, which describes the network. Default: the
        settings.
    network: the pipeline's U-Net or transformer, for the per-sample mode (see ``attach``). Default:
        None, the time-only mode, in which the predictor sees zeros instead of the bottleneck.
    settings: entries of the configuration, such as beta_start=0.00085. Default: those of
        diffusers' DDPMScheduler.

    Between the steps the latents are x / sqrt(1 + sigma^2) (variance-preserving process) or x / (1
    + sigma) (flow), at the noise level that the network is conditioned on next. After the last step
    they are x itself. The arithmetic is in float64 (float32 on MPS) for any precision of the
    pipeline. Raises UserError if the arguments do not go together.
    """

    order = 1  # one call of the network per step
    _sigmas: Any
    _timesteps: Any
    _walk: Any
    _start: Any
    _begin_index: Any
    _mu: Any
    _output: Any
    num_inference_steps: Any
    process: Any

    def __init__(
        self, predictor: Any = None, config: Any = None, network: torch.nn.Module | None = None, **settings: Any
    ) -> None:
        super().__init__()
        if predictor is not None and not isinstance(predictor, torch.nn.Module):
            predictor = load_predictor(find_predictor(predictor))
        self.predictor, self.solver = predictor, None if predictor is None else solver_of(predictor)
        if predictor is not None and predictor.config.get("parallel", 1) > 1:
            raise UserError("a pipeline evaluates one point at a time: only span solvers with parallel=1 can be used")
        self.register_to_config(**_complete(config, settings))
        self._network = self._hooks = self._finalizer = self._reader = self._graph = self._start = None
        self._said: set[str] = set()
        self._run = self._sigmas = None
        self._calls: list[Call] = []
        self._timesteps = self.num_inference_steps = self._begin_index = self._returned = None
        self.process = self._walk = self._mu = self._output = None
        self._asked = self._controlnets = False
        self._index = 0
        if predictor is not None and not self.config.get("use_dynamic_shifting"):
            self._plan(None, "cpu")  # else the noise levels depend on the size of the image
        if network is not None:
            self.attach(network)

    @classmethod
    def from_predictor(cls, path, config, network=None):
        """The scheduler of a predictor.

        path: file, folder, experiment number, https address or hf:owner/name.
        config, network: see ``AMEDScheduler``.
        """
        return cls(path, config, network)

    # Saving and loading

    def register_to_config(self, **settings) -> None:
        super().register_to_config(**settings)
        self._internal_dict._predictor = self.predictor  # for ``from_config``; no entry, which is JSON

    @classmethod
    def from_config(cls, config, return_unused_kwargs=False, predictor=None, network=None, **changes):
        """The scheduler of a configuration.

        config: of a scheduler of any class. One of an AMEDScheduler brings its predictor.
        return_unused_kwargs: whether to return the pair (scheduler, {}). Default False.
        predictor, network: see ``AMEDScheduler``.
        changes: entries to change.
        """
        if predictor is None:
            predictor = getattr(config, "_predictor", None)
        scheduler = cls(predictor, {**config, **changes}, network)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def save_config(self, save_directory, push_to_hub=False, **kwargs) -> None:
        """Writes scheduler_config.json and the predictor (predictor.safetensors) into a folder."""
        if self.predictor is not None:
            save_predictor(self.predictor, Path(save_directory) / PREDICTOR_FILE)
        super().save_config(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, predictor=None, **kwargs):
        """The scheduler that ``save_pretrained`` wrote, with its predictor.

        pretrained_model_name_or_path: a folder, or an id of the hub.
        subfolder: of these. Default: None.
        predictor: replaces the one in the folder. Default: None.
        kwargs: of diffusers' method, and ``network``.
        """
        source = pretrained_model_name_or_path
        if predictor is None:
            folder = Path(source, subfolder or "")
            if folder.is_dir():
                predictor = folder / PREDICTOR_FILE if (folder / PREDICTOR_FILE).is_file() else None
            else:
                predictor = _hub_predictor(source, subfolder, kwargs)
        return super().from_pretrained(source, subfolder=subfolder, predictor=predictor, **kwargs)

    def __getstate__(self):
        """A pickled scheduler is without a run and without a network."""
        left_out = ("_network", "_hooks", "_finalizer", "_reader", "_graph", "_run", "_walk", "_output", "process")
        return self.__dict__ | dict.fromkeys(left_out)

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._timesteps is not None:
            self._plan(self._mu, "cpu")

    def __deepcopy__(self, memo):
        """A copy that continues a run in progress on its own. Copies share the network."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {"process": self.process, "_network": memo.get(id(self._network), self._network)}
        shared |= {"_hooks": None, "_finalizer": None, "_graph": None}
        twin.__dict__ |= shared
        twin.__dict__ |= copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in shared}, memo)
        if self._hooks is not None:
            twin._hook()
        return twin

    def __copy__(self):
        return copy.deepcopy(self, {id(self.predictor): self.predictor})

    # The protocol of diffusers

    def __len__(self) -> int:
        """Number of network evaluations, the only possible number of inference steps."""
        self._require_predictor()
        return self.predictor.evaluations()

    def __bool__(self) -> bool:
        return True

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the unit-variance noise that a pipeline starts from."""
        if self._sigmas is None:
            self.set_timesteps()
        return float(self._sigmas[0] * self.process.scale(self._sigmas[0]))

    @property
    def timesteps(self) -> torch.Tensor | None:
        """Times of the network's calls [n]. A pipeline reads them where its run begins."""
        if self._asked and self._run is not None:
            self._hook()
        return self._timesteps

    @timesteps.setter
    def timesteps(self, times: torch.Tensor) -> None:  # some pipelines move them to another device
        self._timesteps = times

    @property
    def sigmas(self) -> torch.Tensor | None:
        """Noise levels [n + 1] of the latents before each call, and 0.

        For flow models they are t = sigma / (1 + sigma), as in diffusers. None before
        set_timesteps, if they depend on the size of the image.
        """
        if not self._calls:
            return None
        levels = torch.stack([self._level(k)[0] for k in range(len(self._calls))])
        if is_flow(self.config):
            levels = levels / (1 + levels)
        return torch.cat([levels, levels.new_zeros(1)]).to(torch.float32)

    @property
    def betas(self) -> torch.Tensor:
        return self._table.betas

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        return self._table.alphas_cumprod

    @property
    def _table(self):
        if is_flow(self.config):
            raise AttributeError("a flow model has no table of betas")
        return import_diffusers("AMEDScheduler").DDPMScheduler.from_config(dict(self.config))

    @property
    def begin_index(self) -> int | None:
        """The step that ``set_begin_index`` chose, or None."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Number of the next step, or None before the first one."""
        return None if self._start is None or self._returned is None else self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the run at this step; ``add_noise`` then gives the latents for it."""
        if not 0 <= begin_index < len(self):
            raise UserError(f"AMEDScheduler cannot begin at step {begin_index}: it has the steps 0..{len(self) - 1}")
        self._begin_index = self._index = int(begin_index)
        self._times = self._timesteps[self._index :][:1]

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """Number of the step with the time nearest to ``timestep``; of several, the second.

        schedule_timesteps: times to search in. Default: ``timesteps``.
        """
        times = self._timesteps if schedule_timesteps is None else schedule_timesteps
        distance = (times.to(torch.float64).cpu() - float(timestep)).abs()
        nearest = (distance == distance.min()).nonzero().flatten()
        return int(nearest[min(1, len(nearest) - 1)])

    @torch.no_grad()
    def _plan(self, mu, device) -> None:
        """Plans the times of the network's calls, with zeros for the bottleneck.

        They are exact in the time-only mode.
        """
        self.process, self._mu = noise_process(self.config, mu=mu), mu
        run, config = learned_run(NetworkOfProcess(self.process), self.predictor), self.predictor.config
        shape = config.get("image_shape") or (config.get("img_channels") or 1, 1, 1)  # of a span solver's images
        self._sigmas, self._calls, walk = run.sigmas, [], Walk(run, run.sigmas.new_ones(1, *shape))
        while walk.point is not None:
            levels = (value.flatten()[0] for value in (walk.point.sigma, walk.point.sigma_cond))
            self._calls.append(Call(walk.interval, walk.inside, *levels))
            walk.answer(torch.zeros_like(walk.point.x))
        times = torch.stack([self.process.timestep(call.sigma_cond.to(torch.float32)) for call in self._calls])
        self.num_inference_steps = len(self._calls)
        self._timesteps, self._planned = to_device(times, device), times.tolist()
        # Whether a step without evaluation, or another scale, comes before the first call.
        self._prepares = not torch.isclose(self._calls[0].sigma_cond, self._sigmas[0], rtol=1e-6)
        self._forget()
        self._run = run

    def _forget(self) -> None:
        """No run is in progress."""
        self._unhook()
        self._run = self._walk = self._start = self._begin_index = self._returned = self._output = None
        self._asked = False  # whether set_timesteps was called
        self._prepared: str | None = None  # who applied the first step of AFS to the network's input
        self._own_call = False  # whether the network's latest call was for this scheduler
        self._told_rate: float | None = None  # guidance rate that the network takes as an input
        self._times = self._timesteps[:1]
        self._index = 0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device=None, sigmas=None, mu=None, timesteps=None
    ) -> None:
        """Starts a new batch.

        num_inference_steps: ``len(scheduler)`` or None; UserError for other numbers. Default None.
        device: where the pipeline samples. Default: the CPU.
        sigmas: many pipelines pass n values from 1 to 1/n, or to 1/1000, without a wish of the
            user, so the schedule remains the learned one. UserError for others. Default None.
        mu: shift of flow models whose pipeline computes one. Default None.
        timesteps: the same as sigmas, times num_train_timesteps. Default None.
        """
        steps = self.config.get("num_train_timesteps", 1000)
        if timesteps is not None and sigmas is None:
            sigmas = np.asarray(timesteps) / steps
        if num_inference_steps is None and sigmas is not None:
            num_inference_steps = len(sigmas)
        if num_inference_steps not in (None, len(self)):
            raise UserError(
                f"the predictor was trained for {len(self)} evaluations: pass num_inference_steps={len(self)}, "
                f"not {num_inference_steps}"
            )
        self._plan(mu, device or "cpu")
        if sigmas is not None:
            given, count = torch.as_tensor(np.asarray(sigmas), dtype=torch.float32), len(self)
            own = self.sigmas
            assert own is not None  # they are planned
            if not any(
                len(given) == count and torch.allclose(given, known, rtol=1e-3, atol=1 / steps)
                for known in (*(torch.linspace(1, 1 / end, count) for end in (count, steps)), own[:-1])
            ):
                self._run = None
                raise UserError("sigmas: the predictor brings its own noise levels; leave the argument out")
        self._asked = True

    def _level(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise level, level for the scale) of the latents before call k."""
        return (self._sigmas[0],) * 2 if k == 0 else (self._calls[k].sigma, self._calls[k].sigma_cond)

    def _place(self, time) -> int | None:
        """The number of the step whose entry of ``timesteps`` this tensor is, without reading it.

        Pipelines pass views of ``timesteps``, often expanded. None for anything else.
        """
        own = self._timesteps
        if not isinstance(time, torch.Tensor) or not time.numel() or time.dtype != own.dtype:
            return None
        several = any(step and size > 1 for size, step in zip(time.shape, time.stride(), strict=True))
        if several or time.untyped_storage()._cdata != own.untyped_storage()._cdata:
            return None
        place = time.storage_offset() - own.storage_offset()
        return place if 0 <= place < len(own) else None

    def _is_now(self, time, number=None) -> tuple[bool, float | None]:
        """Whether a time, in training steps or in [0, 1], is that of the next step.

        number: read it, too; a tensor or None. One wait serves for all that is on the device.

        Returns (answer, the number).
        """
        numbers = [] if number is None else [number]
        if self._place(time) == self._index:
            return True, _read(*numbers)[0] if numbers else None
        shown, planned = self._timesteps[self._index], self._planned[self._index]
        if not isinstance(time, torch.Tensor) and _is_one_of(time, [planned]):
            shown = planned
        time, shown, *numbers = _read(time, shown, *numbers)
        known, steps = (shown, planned), self.config.get("num_train_timesteps", 1000)
        return _is_one_of(time, known) or _is_one_of(time * steps, known), numbers[0] if numbers else None

    def _match(self, time) -> int | None:
        """The number of the step with this time, or None."""
        if (place := self._place(time)) is not None:
            return place
        time, *shown = _read(time, *self._timesteps)
        found = [k for k, known in enumerate(zip(shown, self._planned, strict=True)) if _is_one_of(time, known)]
        return min(found, key=lambda k: abs(self._planned[k] - time)) if found else None

    def _begin(self, sample: torch.Tensor, k: int) -> None:
        """Goes to the point of step k for these latents."""
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64  # MPS has no float64
        # Only here the device is known: some pipelines do not pass theirs to set_timesteps.
        self._run = learned_run(NetworkOfProcess(self.process), self.predictor, sample.device, reader=self._reader)
        self._run.sigmas = self._run.sigmas.to(dtype)
        scale = self.process.scale(self._level(k)[1].to(dtype))
        self._walk = Walk(self._run, sample.to(dtype) / scale, self._calls[k] if k else None)
        self._start = self._index = k
        self._times = self._timesteps[k : k + 1]

    def _first_step(self, timestep) -> int:
        """The step at which a run begins, from ``set_begin_index`` or from its first time."""
        if self._begin_index is not None:
            return self._begin_index
        if timestep is None or (place := self._place(timestep)) == self._index:
            return self._index
        found = self._match(timestep) if place is not None or not self._is_now(timestep)[0] else None
        return self._index if found is None else found

    def _input(self) -> torch.Tensor:
        """The network's input [B,...] at the current point."""
        point = self._walk.point
        return point.x * self.process.scale(point.sigma_cond)

    def _first_input(self, sample: torch.Tensor) -> torch.Tensor:
        self._begin(sample, 0)
        return self._input().to(sample.dtype)

    @torch.no_grad()
    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The network's input [B,...] for the current latents.

        It equals the latents, except in the first call with AFS, which follows the analytical step.
        """
        if self._run is None:
            return sample
        self._hook()
        if self._returned is not None or self._first_step(timestep) > 0:
            return sample
        self._prepared = "by the pipeline"
        return self._first_input(sample)

    @torch.no_grad()
    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ):
        """The latents for the next call of the network.

        model_output: the network's output [B,...] for sample.
        timestep: time of the call, one of ``timesteps``. The first step of a run may be at any of
            them; the others follow in order.
        sample: the latents [B,...] that the network saw. If they were changed since the last step,
            the solver continues from them at the start of an interval; inside one only the
            denoised image is theirs.
        generator: not used, because nothing is random.
        return_dict: return a SchedulerOutput (default: True), else the tuple (prev_sample,).
        eta, use_clipped_model_output: of DDIMScheduler; not used.

        Raises UserError for a time of another step.
        """
        if self._run is None:
            self._require_predictor()
            raise UserError("AMEDScheduler: call set_timesteps before every batch")
        if eta or use_clipped_model_output:
            name = "eta" if eta else "use_clipped_model_output"
            self._say(name, f"AMEDScheduler is deterministic and does not clip: {name} is ignored")
        starts = self._returned is None
        if starts:
            self._start_run(model_output, sample, timestep)
        if not self._is_now(timestep)[0]:
            if not starts and (found := self._match(timestep)) is not None:
                raise UserError(
                    f"AMEDScheduler: step() got the time {float(timestep):g} of step {found}, but step {self._index} is"
                    " next; the steps of a run follow in order, and the first one may be any of them"
                )
            self._say(
                "time",
                f"AMEDScheduler: step() got the time {float(timestep):g}, which is none of its times; "
                f"taken for step {self._index}, time {self._planned[self._index]:g}",
            )
        walk = self._walk
        point = walk.point
        x = point.x
        if not starts and sample is not self._returned:
            # Where the latents are as they were, the state stays unrounded.
            x = torch.where(sample == self._returned, x, sample.to(x.dtype) / self.process.scale(point.sigma_cond))
            if not walk.inside:
                walk.change(x)
        walk.answer(self.process.denoised(x, point.sigma_cond, model_output.to(x.dtype)))
        self._index += 1
        if walk.point is None:
            result = walk.state.x
            self._run = None
            self._unhook()
        else:
            result = self._input()
            self._times = self.process.timestep(walk.point.sigma_cond.to(torch.float32)).flatten()
            if self._reader is not None:
                self._times = to_device(self._times, self._timesteps.device)
                # A pipeline iterates over views of this tensor, so it sees the new value.
                self._timesteps[self._index] = self._times.mean()
        self._returned = result = result.to(sample.dtype)
        if not return_dict:
            return (result,)
        return self.output_class(prev_sample=result)

    def _start_run(self, model_output, sample, timestep) -> None:
        k = self._first_step(timestep)
        if self._shifts and self._network is None:
            raise UserError(
                "a head of this span solver acts inside the network: pass it to the scheduler (network=pipe.unet)"
            )
        if k == 0 and self._prepares and self._prepared is None:
            raise UserError(
                "the predictor was trained with AFS, or with a first time of its own, and this pipeline does not call "
                "scale_model_input: pass the pipeline's network to the scheduler (network=pipe.unet or pipe.transformer)"
            )
        self._begin(sample, k)
        if k:
            level = float(self._level(k)[0])
            self._say("start", f"AMEDScheduler starts at step {k} of {len(self)}, at its noise level {level:.4g}")
        self._check_guidance(model_output)

    def _check_guidance(self, guided) -> None:
        """Points out a guidance rate other than the trained one, if the first call shows it.

        guided: the output [B,...] that the pipeline made of the network's.
        """
        settings, output, rate = self.predictor.config, self._output, self._told_rate
        self._output = None
        trained = {"cfg": settings["guidance_rate"], "none": 1.0}.get(settings["guidance_type"])
        if trained is None or output is None or output.shape[1:] != guided.shape[1:]:
            return
        if rate is None and len(output) == len(guided):
            rate = 1.0
        elif rate is None and len(output) == 2 * len(guided):  # guided = plain + rate (conditional - plain)
            plain, conditional = output.to(self._walk.point.x.dtype).chunk(2)
            difference, change = conditional - plain, guided.to(plain.dtype) - plain
            rate = (difference * change).sum() / difference.square().sum()
            fits = (change - rate * difference).abs() <= 0.02 * ((rate * difference).abs() + change.abs().max())
            rate, fits = _read(rate, fits.all())
            if not fits:
                return  # another kind of guidance
        if rate is not None and abs(rate - trained) > 0.02 * max(abs(trained), 1):
            self._say(
                "guidance",
                f"AMEDScheduler: the guidance rate is {rate:.3g}, but the predictor was trained with {trained:g}: "
                "expect worse images than with the trained rate",
            )

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """Clean latents [B,...] with noise [B,...] at the times timesteps [B].

        After ``set_begin_index`` the latents are those of the next step, whatever the times are.
        """
        x = original_samples
        sigma, sigma_cond = (
            to_device(value.to(torch.float32), x.device).reshape(-1, *[1] * (x.ndim - 1))
            for value in self._levels_at(timesteps)
        )
        return (self.process.scale(sigma_cond) * (x + sigma * noise)).to(x.dtype)

    def scale_noise(self, sample, timestep, noise) -> torch.Tensor:
        """``add_noise`` with the order of arguments that pipelines of flow models use."""
        return self.add_noise(sample, noise, timestep)

    def _levels_at(self, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise levels, levels for the scale), each [B or 1], at times [B]."""
        known = self._run is not None and self._begin_index is not None
        times: Any = [timesteps]
        if not known and self._place(timesteps) is None:
            times = torch.as_tensor(timesteps).flatten().cpu()
        if known or (self._run is not None and all(self._is_now(time)[0] for time in times)):
            point = None if self._returned is None else self._walk.point
            return self._level(self._index) if point is None else (point.sigma, point.sigma_cond)
        found = [self._match(time) for time in times]
        exact = [self.process.sigma_of_timestep(torch.tensor(_read(time))).squeeze() for time in times]
        levels = [(s, s) if k is None else self._level(k) for s, k in zip(exact, found, strict=True)]
        sides = zip(*levels, strict=True)
        first, second = (torch.stack([value.to(torch.float32) for value in side]) for side in sides)
        return first, second

    def _require_predictor(self) -> None:
        if self.predictor is None:
            raise UserError(
                "this AMEDScheduler has no predictor: give one, AMEDScheduler.from_config(config, predictor=...)"
            )

    def _say(self, topic: str, message: str) -> None:
        """A warning, once per topic."""
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(message, stacklevel=3)


def _complete(config, settings: dict) -> dict:
    """The entries to register, with defaults for a variance-preserving process."""
    given = {**(config or {}), **settings}
    unstated = given.pop("_use_default_values", ())
    given = {name: v for name, v in given.items() if not name.startswith("_") or name == "_diffusers_version"}
    if "_diffusers_version" in given:  # from a file
        given["_class_name"] = "AMEDScheduler"
    if given.get("trained_betas") is not None:
        given["trained_betas"] = np.asarray(given["trained_betas"]).tolist()
    # With use_flow_sigmas, a pipeline leaves the noise levels to its scheduler.
    given["use_flow_sigmas"] = is_flow(given) or bool(given.get("use_flow_sigmas"))
    described = config is None or any(given.get(name) is not None for name in ("beta_schedule", "trained_betas"))
    if given["use_flow_sigmas"] or not described:
        return given
    unstated = sorted(
        name for name, value in _DEFAULTS.items() if name not in given or (name in unstated and given[name] == value)
    )
    return {**_DEFAULTS, **given} | ({"_use_default_values": unstated} if unstated else {})


def _hub_predictor(repo_id: str, subfolder, options):
    """The predictor's file of a repository of the hub, or None where it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    try:
        own = {name: options[name] for name in known if name in options}
        return hf_hub_download(str(repo_id), PREDICTOR_FILE, subfolder=subfolder, **own)
    except LocalEntryNotFoundError:
        raise UserError(f"{repo_id} is not in the cache of the hub, and it cannot be downloaded (offline?)") from None
    except EntryNotFoundError:
        return None


def _is_one_of(time: float, known) -> bool:
    relative, absolute = _SAME_TIME
    return any(abs(time - value) <= relative * abs(value) + absolute for value in known)


def _read(*numbers) -> list[float]:
    """The first entries of tensors, or numbers, as floats. Waits for the device once at most."""
    values = [value.flatten()[0] if isinstance(value, torch.Tensor) else value for value in numbers]
    away = [k for k, value in enumerate(values) if isinstance(value, torch.Tensor) and value.device.type != "cpu"]
    if away:
        there = torch.stack([values[k].to(torch.float32) for k in away]).tolist()
        values = [there[away.index(k)] if k in away else value for k, value in enumerate(values)]
    return [float(value) for value in values]


@functools.cache
def _with_diffusers() -> type:
    """The class that pipelines accept: _AMEDScheduler with the base classes of diffusers."""
    diffusers = import_diffusers("AMEDScheduler")
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput

    content = {
        "__module__": __name__,
        "__doc__": _AMEDScheduler.__doc__,
        "_compatibles": [entry.name for entry in KarrasDiffusionSchedulers],
        "output_class": SchedulerOutput,
    }
    return type("AMEDScheduler", (_AMEDScheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin), content)


if TYPE_CHECKING:
    AMEDScheduler = _AMEDScheduler


def __getattr__(name: str):
    if name == "AMEDScheduler":
        return _with_diffusers()
    if name == "SchedulerMixin":  # diffusers looks for it in the module of a pipeline's scheduler
        return import_diffusers("AMEDScheduler").SchedulerMixin
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
